"""Grouped linear layers and feed-forwards of experts against a loop over experts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from triptych.kernels import grouped_linear, grouped_mlp
from triptych.kernels.grouped_linear import products

# fp32: sums of some tens of terms in another order. bf16: rounding of intermediate results.
FP32, BF16 = 2e-5, 2e-2

# Rows of each expert: uneven, some without at both ends and between; all rows to one; one expert.
COUNTS = ([0, 5, 0, 9, 1, 0], [0, 0, 15, 0], [7])


def linear_inputs(
    counts: list[int], sizes: tuple[int, int], dtype: torch.dtype, bias: bool = True
) -> dict[str, Tensor]:
    num_in, num_out = sizes
    experts = len(counts)
    found = {
        "x": torch.randn(sum(counts), num_in, dtype=dtype),
        "weight": torch.randn(experts, num_out, num_in, dtype=dtype),
        "counts": torch.tensor(counts),
    }
    return found | ({"bias": torch.randn(experts, num_out, dtype=dtype)} if bias else {})


def mlp_inputs(
    counts: list[int], activation: str, dtype: torch.dtype, bias: bool, sizes: tuple[int, int] = (8, 16)
) -> dict[str, Tensor]:
    channels, inner = sizes
    experts = len(counts)
    shapes = {"up": (experts, inner, channels), "down": (experts, channels, inner)}
    if bias:
        shapes |= {"up_bias": (experts, inner), "down_bias": (experts, channels)}
    if activation == "swiglu":
        shapes["gate"] = (experts, inner, channels)
        if bias:
            shapes["gate_bias"] = (experts, inner)
    found = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    return found | {"x": torch.randn(sum(counts), channels, dtype=dtype), "counts": torch.tensor(counts)}


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("sizes", [(8, 16), (5, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_the_loop(
    agree: Callable[..., None], counts: list[int], sizes: tuple[int, int], bias: bool
) -> None:
    plain = partial(grouped_linear, form="reference")
    agree(grouped_linear, plain, linear_inputs(counts, sizes, torch.float64, bias))
    agree(grouped_linear, plain, linear_inputs(counts, sizes, torch.float32, bias), FP32)


@pytest.mark.parametrize("counts", [*COUNTS, [33, 0, 70]])
@pytest.mark.parametrize("bias", [True, False])
def test_triton_linear_is_the_loop(agree: Callable[..., None], counts: list[int], bias: bool) -> None:
    plain, ours = (partial(grouped_linear, form=form) for form in ("reference", "triton"))
    agree(ours, plain, linear_inputs(counts, (37, 19), torch.float64, bias))


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("activation", "bias"), [("swiglu", True), ("swiglu", False), ("gelu", True)])
def test_triton_mlp_is_the_loop(
    agree: Callable[..., None], counts: list[int], activation: str, bias: bool
) -> None:
    plain, ours = (partial(grouped_mlp, activation=activation, form=form) for form in ("reference", "triton"))
    agree(ours, plain, mlp_inputs(counts, activation, torch.float64, bias, (5, 19)))


def test_several_tiles_each_way(agree: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows, outputs and inputs, and more groups of them than one."""
    module = pytest.importorskip("triptych.kernels.grouped_linear.triton")
    monkeypatch.setattr(module, "GROUP", 2)
    monkeypatch.setattr(module, "block_m", lambda rows, experts: 16)
    whole = module.constants

    def small(*sizes: Any) -> dict[str, Any]:
        return whole(*sizes) | {"BLOCK_N": 16, "BLOCK_K": 16}

    monkeypatch.setattr(module, "constants", small)
    plain, ours = (partial(grouped_linear, form=form) for form in ("reference", "triton"))
    agree(ours, plain, linear_inputs([0, 35, 17, 0, 3], (35, 40), torch.float64))


def test_strided_inputs(agree: Callable[..., None]) -> None:
    plain = partial(grouped_linear, form="reference")

    def strided(x: Tensor, weight: Tensor, **rest: Tensor) -> Tensor:
        weight = weight.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        return grouped_linear(x.mT.contiguous().mT, weight, form="triton", **rest)

    agree(strided, plain, linear_inputs([3, 4], (5, 7), torch.float64))

    def strided_mlp(x: Tensor, down: Tensor, **rest: Tensor) -> Tensor:
        return grouped_mlp(x.mT.contiguous().mT, down=down.mT.contiguous().mT, form="triton", **rest)

    inputs = mlp_inputs([3, 4], "swiglu", torch.float64, bias=False)
    agree(strided_mlp, partial(grouped_mlp, form="reference"), inputs)


@pytest.mark.parametrize("function", [grouped_linear, grouped_mlp])
def test_rows_of_no_expert_give_zeros(agree: Callable[..., None], function: Callable[..., Tensor]) -> None:
    """Whatever stands in them."""
    if function is grouped_linear:
        inputs = linear_inputs([3, 0, 5], (8, 6), torch.float64)
    else:
        inputs = mlp_inputs([3, 0, 5], "swiglu", torch.float64, bias=True)

    def longer(x: Tensor, **rest: Tensor) -> Tensor:
        more = torch.full((20, x.shape[1]), torch.inf, dtype=x.dtype, requires_grad=True)
        y = function(torch.cat([x, more]), form="triton", **rest)
        assert not y[8:].any()
        y.sum().backward(retain_graph=True)
        assert more.grad is not None and not more.grad.any()
        for leaf in (x, *rest.values()):
            leaf.grad = None
        return y[:8]

    agree(longer, partial(function, form="reference"), inputs)


def test_who_serves_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(products, "_has_kernel", lambda device: True)
    assert products.no_kernel(gpu, torch.bfloat16, 64, 8) is None
    assert "bf16 alone, not for torch.float16" in str(products.no_kernel(gpu, torch.float16, 64, 8))
    assert "do not fill 16 bytes" in str(products.no_kernel(gpu, torch.bfloat16, 64, 9))
    monkeypatch.setattr(products, "_has_kernel", lambda device: False)
    assert "Hopper and Blackwell" in str(products.no_kernel(gpu, torch.bfloat16, 64, 8))
    with pytest.raises(RuntimeError, match="form='grouped_mm' cannot run on cpu: a GPU's kernel"):
        grouped_linear(**linear_inputs([3], (8, 8), torch.bfloat16), form="grouped_mm")


def test_fp32_of_aligned_sizes_is_one_call_and_others_are_not() -> None:
    aligned = linear_inputs([3, 4], (8, 16), torch.float32)
    assert products.one_call(aligned["x"], aligned["weight"])
    for other in (
        linear_inputs([3, 4], (5, 16), torch.float32),
        linear_inputs([3, 4], (8, 16), torch.float64),
    ):
        assert not products.one_call(other["x"], other["weight"])
    assert not products.one_call(aligned["x"], aligned["weight"].bfloat16())
    assert not products.one_call(aligned["x"].flatten()[1:-7].view(-1, 8), aligned["weight"])


@pytest.mark.parametrize("function", [grouped_linear, grouped_mlp])
def test_bf16(accurate: Callable[..., None], function: Callable[..., Tensor]) -> None:
    if function is grouped_linear:
        inputs = linear_inputs([3, 0, 20], (8, 16), torch.bfloat16)
    else:
        inputs = mlp_inputs([3, 0, 20], "swiglu", torch.bfloat16, bias=True)
    accurate(function, partial(function, form="reference"), inputs, BF16)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("bias", [True, False])
def test_mlp_is_the_loop(agree: Callable[..., None], counts: list[int], activation: str, bias: bool) -> None:
    plain = partial(grouped_mlp, activation=activation, form="reference")
    ours = partial(grouped_mlp, activation=activation)
    agree(ours, plain, mlp_inputs(counts, activation, torch.float64, bias))
    agree(ours, plain, mlp_inputs(counts, activation, torch.float32, bias, (5, 3)), FP32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("form", ["torch", "triton"])
def test_no_rows_at_all(dtype: torch.dtype, form: str) -> None:
    for function, inputs in (
        (grouped_linear, linear_inputs([0, 0], (8, 16), dtype)),
        (grouped_mlp, mlp_inputs([0, 0], "swiglu", dtype, bias=True)),
    ):
        leaves = {k: v.requires_grad_(v.is_floating_point()) for k, v in inputs.items()}
        y = function(**leaves, form=form)
        assert y.shape == (0, 16 if function is grouped_linear else 8)
        y.sum().backward()
        for name, leaf in leaves.items():
            assert not leaf.requires_grad or (leaf.grad is not None and not leaf.grad.any()), name


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_all_experts_at_once_is_the_loop(activation: str) -> None:
    """What runs on a GPU, here on the CPU: the same numbers as expert by expert."""
    from triptych.kernels.grouped_mlp import experts

    one = mlp_inputs([0, 5, 9, 0, 1], activation, torch.float64, bias=True)
    gate, gate_bias = one.get("gate"), one.get("gate_bias")
    forward = (
        one["x"],
        one["up"],
        one["down"],
        one["counts"],
        gate,
        one["up_bias"],
        gate_bias,
        one["down_bias"],
    )
    y, inner = experts.forward(*forward)
    found_y, found_inner = experts._forward_at_once(*forward)
    for found, expected in zip((found_y, *found_inner), (y, *inner), strict=True):
        torch.testing.assert_close(found, expected)
    backward = (torch.randn_like(y), *forward[:5], inner, [True, gate is not None, True])
    for found, expected in zip(experts._backward_at_once(*backward), experts.backward(*backward)):
        if expected is None:
            assert found is None
        else:
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("rows", [1, 2, 5, 15])
def test_pieces_are_the_whole(
    monkeypatch: pytest.MonkeyPatch, agree: Callable[..., None], activation: str, rows: int
) -> None:
    """What is kept for backward, cut anywhere: within experts, between them, not at all."""
    from triptych.kernels.grouped_mlp import experts

    monkeypatch.setattr(experts, "PIECE_BYTES", rows * 16 * 8)
    inputs = mlp_inputs([0, 5, 0, 9, 1, 0], activation, torch.float64, bias=True)
    kept = experts.forward(
        inputs["x"], inputs["up"], inputs["down"], inputs["counts"], None, None, None, None
    )[1]
    assert [piece.shape[0] for piece in kept] == [rows] * (15 // rows) + [15 % rows] * (15 % rows > 0)
    plain = partial(grouped_mlp, activation=activation, form="reference")
    agree(partial(grouped_mlp, activation=activation), plain, inputs)


@pytest.mark.parametrize("counts", [*COUNTS, [0, 0]])
def test_biases_without_reading_the_counts(counts: list[int]) -> None:
    """What runs on a GPU, here on the CPU."""
    one = linear_inputs(counts, (8, 16), torch.float64)
    y = torch.randn(sum(counts), 16, dtype=torch.float64)
    expected = products.bias_gradient(y, one["counts"])
    assert torch.equal(expected, torch.stack([rows.sum(0) for rows in y.split(counts)]))
    torch.testing.assert_close(products.bias_gradient_at_once(y, one["counts"]), expected)
    expected = products.add_bias(y.clone(), one["bias"], one["counts"])
    assert torch.equal(products.add_bias_at_once(y, one["bias"], one["counts"]), expected)


@pytest.mark.parametrize("function", [grouped_linear, grouped_mlp])
def test_gradcheck(function: Callable[..., Tensor]) -> None:
    counts = [2, 0, 3]
    if function is grouped_linear:
        inputs = linear_inputs(counts, (3, 2), torch.float64)
    else:
        inputs = mlp_inputs(counts, "swiglu", torch.float64, bias=True, sizes=(3, 2))
    names = [name for name in inputs if name != "counts"]

    def run(*tensors: Tensor) -> Tensor:
        return function(counts=inputs["counts"], **dict(zip(names, tensors)))

    assert torch.autograd.gradcheck(run, [inputs[name].requires_grad_() for name in names])


def test_expert_without_rows_has_gradients_of_zero() -> None:
    inputs = mlp_inputs([0, 4], "swiglu", torch.float32, bias=True)
    parameters = [v.requires_grad_() for k, v in inputs.items() if k not in ("x", "counts")]
    grouped_mlp(**inputs).sum().backward()
    for parameter in parameters:
        assert parameter.grad is not None
        assert not parameter.grad[0].any() and parameter.grad[1].any()


def test_parts_of_the_inner_channels_add_up() -> None:
    """As tensor parallelism cuts them, 16 inner channels into 5 and 11."""
    one = mlp_inputs([3, 0, 4], "swiglu", torch.float64, bias=False)
    parts = [
        grouped_mlp(one["x"], one["up"][:, s], one["down"][:, :, s], one["counts"], gate=one["gate"][:, s])
        for s in (slice(0, 5), slice(5, 16))
    ]
    torch.testing.assert_close(parts[0] + parts[1], grouped_mlp(**one))


def test_saves_the_inputs_and_the_pre_activations() -> None:
    one = {
        k: v.requires_grad_(v.is_floating_point())
        for k, v in mlp_inputs([9, 7], "swiglu", torch.float32, False).items()
    }
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y) or y, lambda y: y):
        grouped_mlp(**one)
    given = {v.data_ptr() for v in one.values()}
    assert sum(y.numel() for y in kept if y.data_ptr() not in given) == 2 * 16 * 16


def test_autocast_gives_its_dtype_and_gradients_the_parameters() -> None:
    for function, inputs in (
        (grouped_linear, linear_inputs([3, 5], (8, 16), torch.float32)),
        (grouped_mlp, mlp_inputs([3, 5], "swiglu", torch.float32, bias=True)),
    ):
        leaves = {k: v.requires_grad_(v.is_floating_point()) for k, v in inputs.items()}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = function(**leaves)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        assert all(
            v.grad is not None and v.grad.dtype == torch.float32 for v in leaves.values() if v.requires_grad
        )
        expected = function(**inputs)
        assert (y - expected).abs().max() < BF16 * expected.abs().max()


@pytest.mark.parametrize("mode", ["meta", "fake"])
@pytest.mark.parametrize("function", [grouped_linear, grouped_mlp])
def test_without_values(mode: str, function: Callable[..., Tensor]) -> None:
    if function is grouped_linear:
        inputs, width = linear_inputs([3, 5], (8, 16), torch.float32), 16
    else:
        inputs, width = mlp_inputs([3, 5], "swiglu", torch.float32, bias=True), 8
    if mode == "fake":
        fake = FakeTensorMode()
        inputs = {k: fake.from_tensor(v) for k, v in inputs.items()}
    else:
        inputs = {k: v.to("meta") for k, v in inputs.items()}
    leaves = {k: v.requires_grad_(v.is_floating_point()) for k, v in inputs.items()}
    y = function(**leaves)
    assert y.shape == (8, width)
    y.sum().backward()
    assert all(v.grad is not None and v.grad.shape == v.shape for v in leaves.values() if v.requires_grad)


def test_flops_are_counted() -> None:
    inputs = mlp_inputs([3, 5], "swiglu", torch.float32, bias=True)
    leaves = {k: v.requires_grad_(v.is_floating_point()) for k, v in inputs.items()}
    with FlopCounterMode(display=False) as counter:
        grouped_mlp(**leaves).sum().backward()
        y = grouped_linear(leaves["x"], leaves["up"], leaves["counts"])
        y.sum().backward()
    # Three matrices of 8 x 16 and one, per row forward once and backward twice, two per multiply-add.
    assert counter.get_total_flops() == 2 * 3 * (3 + 1) * 8 * (8 * 16)


def test_compiled() -> None:
    inputs = mlp_inputs([3, 0, 5], "swiglu", torch.float32, bias=True)
    expected = grouped_mlp(**inputs)
    torch.use_deterministic_algorithms(False)
    compiled: Any = torch.compile(grouped_mlp, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs), expected)


@pytest.mark.parametrize("suffix", ["", "_triton"])
def test_registered_operators(suffix: str) -> None:
    if suffix:
        pytest.importorskip("triptych.kernels.grouped_mlp.triton")
    one = mlp_inputs([3, 0, 5], "swiglu", torch.float32, bias=True)
    biases = (None, one["gate_bias"], None)
    for name, args in (
        ("grouped_linear", (one["x"], one["up"], one["counts"], one["up_bias"])),
        ("grouped_mlp", (one["x"], one["up"], one["down"], one["counts"], one["gate"], *biases)),
    ):
        leaves = [a.clone().requires_grad_() if a is not None and a.is_floating_point() else a for a in args]
        torch.library.opcheck(getattr(torch.ops.triptych, name + suffix).default, leaves)


def test_what_does_not_fit() -> None:
    linear = linear_inputs([3, 5], (8, 16), torch.float32)
    mlp = mlp_inputs([3, 5], "swiglu", torch.float32, bias=True)
    for function, inputs in ((grouped_linear, linear), (grouped_mlp, mlp)):
        with pytest.raises(ValueError, match=r"counts sum to 7, but there are 8 rows"):
            function(**inputs | {"counts": torch.tensor([3, 4])})
        with pytest.raises(ValueError, match=r"counts must be int64 \(2,\)"):
            function(**inputs | {"counts": torch.tensor([8])})
    with pytest.raises(ValueError, match=r"x must be \(A, I\).*\(8, 7\)"):
        grouped_linear(**linear | {"x": torch.randn(8, 7)})
    with pytest.raises(ValueError, match=r"bias must be \(E, O\) = \(2, 16\)"):
        grouped_linear(**linear | {"bias": torch.randn(2, 8)})
    with pytest.raises(ValueError, match=r"activation='relu' does not exist; use swiglu or gelu"):
        grouped_mlp(**mlp, activation="relu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"swiglu needs a gate.*activation=gelu, one was given"):
        grouped_mlp(**mlp, activation="gelu")
    with pytest.raises(ValueError, match=r"down must be \(E, C, F\) = \(2, 8, 16\)"):
        grouped_mlp(**mlp | {"down": mlp["up"]})
    with pytest.raises(ValueError, match=r"down_bias must be \(2, 8\), it is \(2, 16\)"):
        grouped_mlp(**mlp | {"down_bias": mlp["up_bias"]})
