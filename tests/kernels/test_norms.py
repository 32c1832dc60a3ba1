"""RMS norm, plain and gated, and layer norm: references, groups, dtypes, registration, other packages."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.kernels import dispatch, gated_rms_norm, layer_norm, rms_norm
from triptych.kernels.layer_norm import torch as torch_layer_norm
from triptych.kernels.layer_norm import triton as triton_layer_norm
from triptych.kernels.layer_norm.lines import MAX_CHANNELS, Lines, splits, tile
from triptych.kernels.rms_norm import external, reference
from triptych.kernels.rms_norm import torch as torch_rms_norm
from triptych.kernels.rms_norm import triton as triton_rms_norm

FP32_FLOOR = 1e-6
BF16_FLOOR = 8e-3  # one rounding to bf16 is 2^-8
FORMS = ["torch", "triton"]


def make_inputs(
    *, channels: int = 12, tokens: int = 7, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Inputs of `rms_norm`."""
    shape = (3, tokens, channels)
    return {"x": torch.randn(shape, dtype=dtype), "weight": torch.randn(channels, dtype=dtype)}


def gated_inputs(**options: Any) -> dict[str, Tensor]:
    """Inputs of `gated_rms_norm`."""
    inputs = make_inputs(**options)
    return {"x": inputs["x"], "z": torch.randn_like(inputs["x"]), "weight": inputs["weight"]}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("group_size", [1, 4, 12])
def test_agrees_with_the_reference(form: str, group_size: int, agree: Callable[..., None]) -> None:
    function = partial(gated_rms_norm, group_size=group_size, eps=1e-3)
    agree(partial(function, form=form), partial(function, form="reference"), gated_inputs())
    function = partial(rms_norm, eps=1e-3)
    agree(partial(function, form=form), partial(function, form="reference"), make_inputs())


def test_agrees_with_pytorch(agree: Callable[..., None]) -> None:
    agree(
        partial(rms_norm, eps=1e-6),
        lambda x, weight: F.rms_norm(x, (12,), weight, 1e-6),
        make_inputs(),
    )


@pytest.mark.parametrize("form", [*FORMS, "reference"])
@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("norm_before_gate", [True, False])
def test_gated_norm_is_what_mamba_2_has(
    form: str, group_size: int | None, norm_before_gate: bool, agree: Callable[..., None]
) -> None:
    def published(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        size = group_size or x.shape[-1]
        if not norm_before_gate:
            x = x * F.silu(z)
        y = F.rms_norm(x.unflatten(-1, (-1, size)), (size,), eps=1e-5).flatten(-2) * weight
        return y * F.silu(z) if norm_before_gate else y

    function = partial(gated_rms_norm, group_size=group_size, norm_before_gate=norm_before_gate, form=form)
    agree(function, published, gated_inputs())


@pytest.mark.parametrize("tokens", [1, 63, 65, 500])
def test_triton_at_any_number_of_tokens(tokens: int, agree: Callable[..., None]) -> None:
    """With 500 tokens the gradients of weights are added up by several programs, each of several tiles."""
    lines = Lines(3, 3 * tokens, 5, interleaved=True)
    assert tokens < 500 or 1 < splits(lines) < lines.lines / tile(lines).rows
    function = partial(gated_rms_norm, group_size=5)
    inputs = gated_inputs(channels=15, tokens=tokens)
    agree(partial(function, form="triton"), partial(function, form="reference"), inputs, 1e-11)


@pytest.mark.parametrize("channels", [1, 127, 2049, 5000])
def test_triton_at_any_row_length(channels: int, agree: Callable[..., None]) -> None:
    inputs = make_inputs(channels=channels, tokens=2)
    agree(partial(rms_norm, form="triton"), partial(rms_norm, form="reference"), inputs, 1e-11)
    inputs["bias"] = torch.randn(channels, dtype=torch.float64)
    eps = {"eps": 1e-3}  # of one channel, the variance is 0
    agree(
        partial(layer_norm, form="triton", **eps),
        partial(layer_norm, form="reference", **eps),
        inputs,
        1e-11,
    )


@pytest.mark.parametrize("form", FORMS)
def test_strides_do_not_matter(form: str, agree: Callable[..., None]) -> None:
    def strided(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        both = torch.stack([x, z], dim=-1)
        return gated_rms_norm(both[..., 0], both[..., 1], weight.repeat_interleave(2)[::2], form=form).mT

    agree(strided, lambda **inputs: gated_rms_norm(**inputs, form="reference").mT, gated_inputs())


@pytest.mark.parametrize(
    ("dtype", "floor"),
    [(torch.float32, FP32_FLOOR), (torch.bfloat16, BF16_FLOOR), (torch.float16, 1e-3)],
)
@pytest.mark.parametrize("form", FORMS)
def test_accuracy(form: str, dtype: torch.dtype, floor: float, accurate: Callable[..., None]) -> None:
    function = partial(gated_rms_norm, group_size=6)
    accurate(
        partial(function, form=form), partial(function, form="reference"), gated_inputs(dtype=dtype), floor
    )
    plain = partial(rms_norm, form="reference")
    accurate(partial(rms_norm, form=form), plain, make_inputs(dtype=dtype), floor)


@pytest.mark.parametrize("form", FORMS)
def test_accuracy_of_the_other_order_and_of_layer_norm(form: str, accurate: Callable[..., None]) -> None:
    function = partial(gated_rms_norm, norm_before_gate=True)
    inputs = gated_inputs(dtype=torch.bfloat16)
    accurate(partial(function, form=form), partial(function, form="reference"), inputs, BF16_FLOOR)
    inputs = make_inputs(dtype=torch.bfloat16) | {"bias": torch.randn(12).bfloat16()}
    accurate(partial(layer_norm, form=form), partial(layer_norm, form="reference"), inputs, BF16_FLOOR)


@pytest.mark.parametrize("form", FORMS)
def test_huge_and_zero_rows_stay_finite(form: str) -> None:
    x = torch.stack([torch.zeros(8), torch.full((8,), 1e18)]).requires_grad_()
    y = rms_norm(x, torch.ones(8), form=form)
    y.sum().backward()
    assert y.isfinite().all() and x.grad is not None and x.grad.isfinite().all()
    torch.testing.assert_close(y[1], torch.ones(8))


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm_before_gate", [True, False])
def test_closed_gates_stay_finite(form: str, norm_before_gate: bool) -> None:
    z = torch.tensor([-1000.0, -100.0, 0.0, 100.0, 1000.0]).repeat(2, 1).requires_grad_()
    x = torch.randn(2, 5, requires_grad=True)
    y = gated_rms_norm(x, z, torch.ones(5), norm_before_gate=norm_before_gate, form=form)
    y.sum().backward()
    for value in (y, x.grad, z.grad):
        assert value is not None and value.isfinite().all()


def test_gradients_by_finite_differences() -> None:
    leaves = tuple(value.requires_grad_() for value in gated_inputs(channels=4, tokens=2).values())
    for norm_before_gate in (True, False):
        function = partial(gated_rms_norm, group_size=2, eps=1e-2, norm_before_gate=norm_before_gate)
        assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("ops", [torch_rms_norm, triton_rms_norm])
@pytest.mark.parametrize("gated", [True, False])
def test_registration(ops: Any, gated: bool) -> None:
    inputs = {k: v.requires_grad_() for k, v in (gated_inputs() if gated else make_inputs()).items()}
    arguments = (inputs["x"], inputs["weight"], inputs.get("z"), 1e-5, 2, gated)
    torch.library.opcheck(ops.rms_norm_op, arguments)
    x, weight, gate = (v if v is None else v.detach() for v in arguments[:3])
    y, rstd = ops.rms_norm_op(x, weight, gate, 1e-5, 2, gated)
    torch.library.opcheck(ops.rms_norm_backward_op, (y, x, weight, gate, rstd, 2, gated))


@pytest.mark.parametrize("ops", [torch_layer_norm, triton_layer_norm])
@pytest.mark.parametrize("affine", [True, False])
def test_registration_of_layer_norm(ops: Any, affine: bool) -> None:
    x, weight, bias = torch.randn(3, 2, 6), torch.randn(6), torch.randn(6)
    arguments = (
        [v.requires_grad_() for v in (x, weight, bias)] if affine else [x.requires_grad_(), None, None]
    )
    torch.library.opcheck(ops.layer_norm_op, (*arguments, 1e-5))
    x, weight, _ = (v if v is None else v.detach() for v in arguments)
    y, mean, rstd = ops.layer_norm_op(x, weight, None, 1e-5)
    torch.library.opcheck(ops.layer_norm_backward_op, (y, x, weight, mean, rstd, affine))


@pytest.mark.parametrize("form", FORMS)
def test_saves_inputs_and_one_number_per_group(form: str) -> None:
    inputs = {k: v.requires_grad_() for k, v in gated_inputs().items()}
    saved: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.setdefault(t.data_ptr(), t.numel()) and t, lambda t: t
    ):
        gated_rms_norm(**inputs, group_size=4, form=form)
    assert sorted(saved.values()) == sorted([*(v.numel() for v in inputs.values()), 3 * 7 * 3])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("function", [rms_norm, layer_norm])
def test_autocast_keeps_the_dtype_of_x(function: Callable[..., Tensor], form: str) -> None:
    x, weight = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True), torch.ones(8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = function(x, weight, form=form)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    assert weight.grad is not None and weight.grad.dtype == torch.float32


@pytest.mark.parametrize("form", [*FORMS, "reference"])
def test_layer_norm(form: str, agree: Callable[..., None]) -> None:
    def plain(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        y = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        y = y if weight is None else y * weight
        return y if bias is None else y + bias

    inputs = make_inputs() | {"bias": torch.randn(12, dtype=torch.float64)}
    inputs["x"] += 5  # what cancels in x - mean would show
    for names in (("x", "weight", "bias"), ("x", "weight"), ("x", "bias"), ("x",)):
        agree(partial(layer_norm, form=form), plain, {name: inputs[name] for name in names})


def test_errors_say_what_to_mend() -> None:
    with pytest.raises(ValueError, match=r"rms_norm: weight must be \(12,\)"):
        rms_norm(torch.ones(2, 12), torch.ones(5))
    with pytest.raises(ValueError, match=r"layer_norm: bias must be \(4,\)"):
        layer_norm(torch.ones(2, 4), None, torch.ones(3))


def test_errors_of_the_gated_norm() -> None:
    x, weight = torch.ones(2, 12), torch.ones(12)
    with pytest.raises(ValueError, match=r"gated_rms_norm: z \(2, 6\) must have the shape of x \(2, 12\)"):
        gated_rms_norm(x, torch.ones(2, 6), weight)
    with pytest.raises(ValueError, match=r"gated_rms_norm: weight must be \(12,\)"):
        gated_rms_norm(x, x, torch.ones(3))
    with pytest.raises(ValueError, match="group_size=5 does not divide the 12 channels"):
        gated_rms_norm(x, x, weight, group_size=5)


def test_triton_refuses_rows_that_no_program_can_hold() -> None:
    x = torch.ones(1, MAX_CHANNELS + 1)
    for function, rest in ((rms_norm, (x[0],)), (gated_rms_norm, (x, x[0])), (layer_norm, ())):
        with pytest.raises(ValueError, match="lines of 65537 channels, more than 65536"):
            function(x, *rest, form="triton")


def test_liger_gets_arguments_that_it_has(peers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from liger_kernel.ops import layer_norm as liger_layer_norm
    from liger_kernel.ops import rms_norm as liger_rms_norm

    from triptych.kernels.layer_norm import external as external_layer_norm

    calls = []
    for function in (liger_rms_norm.LigerRMSNormFunction, liger_layer_norm.LigerLayerNormFunction):
        signature = inspect.signature(function.forward)
        monkeypatch.setattr(
            function, "apply", lambda *args, s=signature: calls.append(s.bind(None, *args).arguments)
        )
    x, weight, bias = torch.ones(2, 4), torch.ones(4), torch.zeros(4)
    external.liger_rms_norm(x, weight, eps=1e-3, gate=None, num_groups=1, norm_before_gate=False)
    external_layer_norm.layer_norm(x, weight, bias, 1e-3)
    rms, layer = calls
    assert (rms["X"] is x, rms["W"] is weight, rms["eps"], rms["offset"]) == (True, True, 1e-3, 0.0)
    # In place it would overwrite the dy of others; the mode "llama" rounds before the weight comes in.
    assert rms["in_place"] is False and rms["casting_mode"] == "gemma"
    assert (layer["X"] is x, layer["W"] is weight, layer["B"] is bias, layer["eps"]) == (
        True,
        True,
        True,
        1e-3,
    )


@pytest.mark.parametrize("norm_before_gate", [True, False])
def test_mamba_ssm_gets_arguments_that_it_has(
    norm_before_gate: bool, monkeypatch: pytest.MonkeyPatch, agree: Callable[..., None]
) -> None:
    """A stand-in with the signature and meaning of mamba-ssm 2.3.2's function."""

    def rmsnorm_fn(x, weight, bias, z=None, eps=1e-6, group_size=None, norm_before_gate=True):  # type: ignore[no-untyped-def]
        assert bias is None
        groups = x.shape[-1] // group_size
        return reference.rms_norm(
            x, weight, eps=eps, gate=z, num_groups=groups, norm_before_gate=norm_before_gate
        )

    module = ModuleType("mamba_ssm.ops.triton.layernorm_gated")
    module.rmsnorm_fn = rmsnorm_fn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.triton.layernorm_gated", module)
    for parent in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))

    def ours(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        return external.mamba_ssm_gated_rms_norm(
            x, weight, eps=1e-3, gate=z, num_groups=3, norm_before_gate=norm_before_gate
        )

    expected = partial(gated_rms_norm, eps=1e-3, group_size=4, norm_before_gate=norm_before_gate)
    agree(ours, expected, gated_inputs())


@pytest.mark.slow  # imports all of flash-linear-attention
def test_fla_gets_arguments_that_it_has(peers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("fla.modules.norm.fused_norm_gate")
    calls = []
    signature = inspect.signature(module.rms_norm_gated)
    monkeypatch.setattr(
        module, "rms_norm_gated", lambda *a, **k: calls.append(signature.bind(*a, **k).arguments)
    )
    x, z, weight = gated_inputs().values()
    external.fla_gated_rms_norm(x, weight, eps=1e-3, gate=z, num_groups=1, norm_before_gate=True)
    (found,) = calls
    assert (found["x"] is x, found["g"] is z, found["weight"] is weight, found["bias"]) == (*[True] * 3, None)
    assert (found["activation"], found["eps"]) == ("swish", 1e-3)


def test_packages_are_refused_what_they_cannot_do() -> None:
    def why(form: str, x: Tensor, **options: Any) -> str:
        arguments: dict[str, Any] = {"gate": x, "num_groups": 1, "norm_before_gate": True, "eps": 1e-5}
        op = "rms_norm" if form == "liger" else "gated_rms_norm"
        supports = dispatch._FORMS[op][form].supports
        return str(supports(x, x[0], **{**arguments, **options}))

    x, long = torch.zeros(2, 12), torch.zeros(1, 16385, device="meta")
    huge = torch.empty(1 << 20, 1 << 11, device="meta")
    assert why("mamba_ssm", x, num_groups=3) == why("fla", x) == why("liger", x, gate=None) == "None"
    assert "one group, and norms before it gates" in why("fla", x, norm_before_gate=False)
    for form in ("mamba_ssm", "fla"):
        assert "16385 channels, more than the 16384" in why(form, long)
        assert "counts elements in 32 bits" in why(form, huge)
    for form, gate in (("mamba_ssm", x), ("fla", x), ("liger", None)):
        assert "fp32, fp16 and bf16, not torch.float64" in why(form, x.double(), gate=gate)


@pytest.mark.parametrize("form", FORMS)
def test_no_tokens(form: str) -> None:
    x, weight = torch.zeros(0, 12, requires_grad=True), torch.ones(12, requires_grad=True)
    (rms_norm(x, weight, form=form) + layer_norm(x, weight, form=form)).sum().backward()
    assert x.grad is not None and x.grad.shape == (0, 12)
    assert weight.grad is not None and not weight.grad.any()


def test_compiles_as_one_graph() -> None:
    def both(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        return layer_norm(gated_rms_norm(x, z, weight, group_size=4), weight)

    inputs = gated_inputs()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs), both(**inputs))
