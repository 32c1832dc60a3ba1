"""What operators keep for backward: bytes by formula, and what autograd's hooks see."""

from __future__ import annotations

import torch
from torch import Tensor

from triptych.kernels import attention, saved_for_backward, ssd, swiglu


def test_ssd_keeps_a_state_per_chunk() -> None:
    B, T, H, P, N, chunk = 2, 130, 4, 8, 16, 64
    x, dt, a = torch.randn(B, T, H, P), torch.rand(B, T, H), -torch.rand(H)
    b, c = torch.randn(2, B, T, 1, N).unbind(0)
    kept = saved_for_backward(ssd, x=x, dt=dt, a=a, b=b, c=c, chunk_size=chunk)
    assert {one.argument for one in kept} == {"x", "dt", "a", "b", "c", None}
    own = [one for one in kept if one.argument is None]
    assert sum(one.num_bytes for one in own) == B * -(-T // chunk) * H * P * N * 4


def test_arguments_are_named_and_counted_once() -> None:
    gate = torch.randn(3, 5)
    kept = saved_for_backward(swiglu, gate=gate, up=gate.clone())
    assert sorted((one.argument, one.num_bytes, one.shape) for one in kept) == [
        ("gate", 60, (3, 5)),
        ("up", 60, (3, 5)),
    ]
    own_product = saved_for_backward(lambda x: x * x, x=gate)
    assert [one.argument for one in own_product] == ["x"]


def test_attention_keeps_no_scores() -> None:
    q, k, v = (torch.randn(1, 256, heads, 16) for heads in (4, 2, 2))
    fused = saved_for_backward(attention, q=q, k=k, v=v)
    own = {one.shape for one in fused if one.argument is None}
    assert sum(one.num_bytes for one in fused if one.argument is None) == 4 * (q.numel() + 4 * 256), own
    # The reference keeps (T, T) probabilities of each head.
    plain = saved_for_backward(lambda **x: attention(**x, form="reference"), q=q, k=k, v=v)
    assert sum(one.num_bytes for one in plain) > 4 * 4 * 256 * 256


def test_the_same_as_on_real_tensors() -> None:
    def real(x: Tensor) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = swiglu(x, torch.sigmoid(x))
        assert y.requires_grad
        return sum(sizes.values())

    x = torch.randn(64, 3, requires_grad=True)
    kept = saved_for_backward(lambda x: swiglu(x, torch.sigmoid(x)), x=x)
    assert sum(one.num_bytes for one in kept) == real(x) == 2 * x.numel() * 4
