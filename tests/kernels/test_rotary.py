"""Rotary positions along one axis and several: references, transformers, long positions, layouts, errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from triptych.kernels import axial_rotary, rotary
from triptych.kernels.rotary import torch as torch_ops
from triptych.kernels.rotary import triton as triton_ops

FP32_FLOOR = 1e-5  # angles of a thousand radians, in fp32
BF16_FLOOR = 8e-3  # one rounding to bf16 is 2^-8
FORMS = ["torch", "triton"]


def positions(packed: bool) -> Tensor:
    return torch.tensor([[0, 1, 2, 3, 4], [0, 1, 0, 1, 2]]) if packed else torch.arange(5) + 1000


def grid(packed: bool) -> Tensor:
    rows, columns = positions(packed), positions(packed).flip(-1) + 7
    return torch.stack([rows, columns], dim=-1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("given", [True, False])
def test_agrees_with_the_reference(packed: bool, given: bool, form: str, agree: Callable[..., None]) -> None:
    frequencies = torch.rand(3, dtype=torch.float64) if given else None
    function = partial(rotary, positions=positions(packed), theta=500.0, frequencies=frequencies)
    x = {"x": torch.randn(2, 5, 3, 6).double()}
    agree(partial(function, form=form), partial(function, form="reference"), x)


@pytest.mark.parametrize("form", [*FORMS, "reference"])
@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("given", [True, False])
def test_axes_are_rotations_of_their_own(
    packed: bool, given: bool, axes: int, form: str, agree: Callable[..., None]
) -> None:
    where = torch.cat([grid(packed), positions(packed).unsqueeze(-1) + 2], dim=-1)[..., :axes]
    frequencies = torch.rand(axes, 12 // axes // 2, dtype=torch.float64) if given else None

    def parts(x: Tensor) -> Tensor:
        own = [None] * axes if frequencies is None else frequencies.unbind()
        turned = [
            rotary(part, where[..., axis], 500.0, frequencies=own[axis])
            for axis, part in enumerate(x.chunk(axes, dim=-1))
        ]
        return torch.cat(turned, dim=-1)

    function = partial(axial_rotary, positions=where, theta=500.0, frequencies=frequencies, form=form)
    agree(function, parts, {"x": torch.randn(2, 5, 3, 12).double()})


@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 1, 2), (63, 9, 8), (65, 2, 20), (300, 1, 64)])
def test_triton_at_any_size(tokens: int, heads: int, dim: int, agree: Callable[..., None]) -> None:
    where = torch.randint(0, 100, (2, tokens))
    agree(
        partial(rotary, positions=where, form="triton"),
        partial(rotary, positions=where, form="reference"),
        {"x": torch.randn(2, tokens, heads, dim, dtype=torch.float64)},
    )


@pytest.mark.parametrize("form", FORMS)
def test_agrees_with_transformers(form: str) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 1, 8)
    angles = positions(True).unsqueeze(-1) * 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
    theirs = llama.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    for ours, expected in zip((q, k), theirs):
        found = rotary(ours, positions(True), 10000.0, form=form)
        torch.testing.assert_close(found, expected.transpose(1, 2))


@pytest.mark.parametrize("form", FORMS)
def test_is_relative_and_keeps_lengths(form: str) -> None:
    q, k = torch.randn(2, 1, 5, 1, 8).double().unbind(0)
    turn = partial(rotary, theta=100.0, form=form)
    scores = [(turn(q, p) * turn(k, p + 3)).sum(-1) for p in (torch.arange(5), torch.arange(5) + 77)]
    torch.testing.assert_close(scores[0], scores[1])
    torch.testing.assert_close(turn(q, torch.arange(5)).norm(dim=-1), q.norm(dim=-1))


def test_triton_is_exact_at_far_positions() -> None:
    """In fp32, the angle of position 131,071 has an error of 0.004; the form takes angles in fp64."""
    x, where = torch.randn(1, 3, 2, 64), torch.tensor([131071, 100003, 65537])
    exact = rotary(x.double(), where, form="reference")
    torch.testing.assert_close(rotary(x, where, form="triton").double(), exact, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("turned", [(0, 2, 1, 3), (3, 1, 2, 0)])
def test_strides_do_not_matter(form: str, turned: tuple[int, ...], agree: Callable[..., None]) -> None:
    """Heads before tokens, as attention kernels like it, and channels apart from each other."""
    back = [turned.index(i) for i in range(4)]

    def strided(x: Tensor) -> Tensor:
        moved = x.permute(turned).contiguous().permute(back)
        return rotary(moved, positions(True), form=form).permute(turned)

    agree(
        strided,
        lambda x: rotary(x, positions(True), form="reference").permute(turned),
        {"x": torch.randn(2, 5, 3, 8).double()},
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "floor"), [(torch.float32, FP32_FLOOR), (torch.bfloat16, BF16_FLOOR)])
def test_accuracy(form: str, dtype: torch.dtype, floor: float, accurate: Callable[..., None]) -> None:
    for function in (
        partial(rotary, positions=torch.arange(30)),
        partial(axial_rotary, positions=torch.stack([torch.arange(30)] * 2, dim=-1)),
    ):
        x = {"x": torch.randn(2, 30, 3, 8, dtype=dtype)}
        accurate(partial(function, form=form), partial(function, form="reference"), x, floor)


def test_gradients_by_finite_differences() -> None:
    x = torch.randn(1, 5, 1, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(partial(axial_rotary, positions=grid(False)), (x,))


@pytest.mark.parametrize("form", FORMS)
def test_saves_the_positions_only(form: str) -> None:
    saved: list[Tensor] = []
    x, where = torch.randn(2, 5, 3, 6, requires_grad=True), positions(True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rotary(x, where, form=form)
    assert [t.data_ptr() for t in saved] == [where.data_ptr()]


@pytest.mark.parametrize("ops", [torch_ops, triton_ops])
def test_registration(ops: Any) -> None:
    x = torch.randn(2, 5, 3, 12, requires_grad=True)
    torch.library.opcheck(ops.rotary_op, (x, positions(False).unsqueeze(-1), 100.0, None, False))
    torch.library.opcheck(ops.rotary_op, (x, grid(True), 100.0, torch.rand(2, 3), True))


def test_compiles_as_one_graph() -> None:
    def both(x: Tensor) -> Tensor:
        return axial_rotary(rotary(x, positions(True)), grid(True))

    x = torch.randn(2, 5, 3, 8)
    torch.testing.assert_close(torch.compile(both, fullgraph=True, backend="aot_eager")(x), both(x))


@pytest.mark.parametrize(
    ("function", "x", "where", "frequencies", "message"),
    [
        (rotary, (2, 5, 3, 7), (5,), None, r"rotary: x must be \(B, T, H, D\) with an even D"),
        (rotary, (2, 5, 3, 8), (4,), None, r"positions must be \(T,\) or \(B, T\) = \(2, 5\)"),
        (rotary, (2, 5, 3, 8), (5,), (3,), r"frequencies must be \(4,\) for D=8, not \(3,\)"),
        (axial_rotary, (2, 5, 3, 6), (5, 2), None, "2 axes need a head size that is a multiple of 4"),
        (axial_rotary, (2, 5, 3, 8), (5,), None, r"\(T, A\) or \(B, T, A\); they are .* and \(5,\)"),
        (axial_rotary, (2, 5, 8), (5, 2), None, r"they are \(2, 5, 8\) and \(5, 2\)"),
        (axial_rotary, (2, 5, 3, 8), (2, 5, 2), (4,), r"frequencies must be \(2, 2\) for 2 axes and D=8"),
    ],
)
def test_errors_say_what_to_mend(
    function: Callable[..., Tensor],
    x: tuple[int, ...],
    where: tuple[int, ...],
    frequencies: tuple[int, ...] | None,
    message: str,
) -> None:
    given = None if frequencies is None else torch.ones(frequencies)
    with pytest.raises(ValueError, match=message):
        function(torch.zeros(x), torch.zeros(where, dtype=torch.int64), frequencies=given)


def test_triton_refuses_heads_that_no_program_can_hold() -> None:
    with pytest.raises(ValueError, match="heads of 2048 channels, more than 1024"):
        rotary(torch.zeros(1, 1, 1, 2048), torch.zeros(1, dtype=torch.int64), form="triton")
