"""Gated delta rule: every form against the recurrence, states, packing, FLOPs, registration, errors."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from triptych.kernels import gated_delta_rule
from triptych.kernels.gated_delta_rule import limits, scan
from triptych.kernels.gated_delta_rule.torch import gated_delta_rule_backward_op, gated_delta_rule_op

FP32_FLOOR = 4e-6  # a sum of some hundred fp32 terms, solved for
BF16_FLOOR = 8e-3  # one rounding to bf16 is 2^-8
BOUNDS = [(0, 100, 200), (0, 1, 2, 64, 100, 131, 200), (0, 63, 100, 164, 165, 200)]


def make_inputs(
    length: int,
    *,
    batch: int = 1,
    heads: int = 3,
    channels: int = 5,
    values: int = 4,
    decay: float = 1.0,
    dtype: torch.dtype = torch.float64,
    states: int | None = None,
) -> dict[str, Tensor]:
    """Inputs of `full`, beta up to 2, with an initial state for each of `states` documents (default: each
    row)."""
    wide = torch.promote_types(dtype, torch.float32)
    return {
        "q": torch.randn(batch, length, heads, channels, dtype=dtype),
        "k": F.normalize(torch.randn(batch, length, heads, channels, dtype=dtype), dim=-1),
        "v": torch.randn(batch, length, heads, values, dtype=dtype),
        "g": -decay * torch.rand(batch, length, heads, dtype=wide),
        "beta": 2 * torch.rand(batch, length, heads, dtype=wide),
        "initial_state": torch.randn(states or batch, heads, channels, values, dtype=wide),
    }


def cuts(*bounds: int) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32)


full = partial(gated_delta_rule, return_final_state=True)
reference = partial(full, form="reference")


def plain(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor) -> Any:
    """The recurrence as it stands in the paper, with the matrix I - beta k k^T."""
    state, ys = initial_state, []
    eye = torch.eye(q.shape[-1], dtype=q.dtype)
    for t in range(q.shape[1]):
        k_t, beta_t = k[:, t].unsqueeze(-1), beta[:, t, :, None, None]
        state = g[:, t, :, None, None].exp() * (eye - beta_t * k_t @ k_t.mT) @ state
        state = state + beta_t * k_t @ v[:, t].unsqueeze(-2)
        ys.append((state.mT @ q[:, t].unsqueeze(-1)).squeeze(-1) / q.shape[-1] ** 0.5)
    return torch.stack(ys, 1), state


@pytest.mark.parametrize("form", ["torch", "triton", "reference"])
def test_agrees_with_the_equations(form: str, agree: Callable[..., None]) -> None:
    agree(partial(full, form=form, chunk_size=16), plain, make_inputs(21, heads=2))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 500, 1000])
def test_agrees_with_the_recurrence(length: int, agree: Callable[..., None]) -> None:
    agree(full, reference, make_inputs(length, heads=2))


@pytest.mark.parametrize("length", [1, 63, 65])
def test_triton_agrees_with_the_recurrence(length: int, agree: Callable[..., None]) -> None:
    agree(partial(full, form="triton"), reference, make_inputs(length, heads=1))


@pytest.mark.parametrize(("heads", "channels", "values"), [(1, 7, 1), (3, 1, 9), (2, 6, 6)])
def test_odd_sizes(heads: int, channels: int, values: int, agree: Callable[..., None]) -> None:
    inputs = make_inputs(77, batch=3, heads=heads, channels=channels, values=values)
    agree(partial(full, chunk_size=16), reference, inputs)


def test_triton_takes_odd_heads_by_blocks(agree: Callable[..., None]) -> None:
    """33 value channels are two blocks of a state, the second one with a single column."""
    inputs = make_inputs(40, heads=1, channels=19, values=33)
    agree(partial(full, form="triton", chunk_size=32), reference, inputs)


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize("decay", [0.0, 20.0, 1e3])
def test_decays_from_none_to_extreme(form: str, decay: float, agree: Callable[..., None]) -> None:
    inputs = make_inputs(70, heads=1, decay=decay)
    agree(partial(full, form=form), reference, inputs, tolerance=1e-11)


@pytest.mark.parametrize("form", ["torch", "triton"])
def test_a_decay_of_nothing_starts_anew(form: str) -> None:
    inputs = make_inputs(30, heads=1)
    inputs["g"][:, 9] = -torch.inf
    late = {name: x[:, 9:] for name, x in inputs.items() if name != "initial_state"}
    y, state = full(**inputs, form=form, chunk_size=16)
    expected, last = full(**late)
    torch.testing.assert_close(y[:, 9:], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["torch", "triton"])
def test_keys_that_repeat(form: str, agree: Callable[..., None]) -> None:
    """Equal keys, beta 2 and no decay: the hardest systems, whose inverses have entries of 2 throughout."""
    inputs = make_inputs(64, heads=1, decay=0.0)
    inputs["k"] = inputs["k"][:, :1].expand_as(inputs["k"]).contiguous()
    inputs["beta"].fill_(2.0)
    agree(partial(full, form=form), reference, inputs, tolerance=1e-11)
    narrow = {name: x.float() for name, x in inputs.items()}
    y, expected = full(**narrow, form=form)[0], full(**inputs)[0]
    assert (y - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("form", ["torch", "triton", "reference"])
def test_without_decay(form: str, agree: Callable[..., None]) -> None:
    inputs = make_inputs(40, heads=2, decay=0.0)
    zeros = inputs.pop("g")
    agree(partial(full, g=None, form=form), partial(reference, g=zeros), inputs)


@pytest.mark.parametrize("form", ["torch", "triton"])
def test_normalizes_queries_and_keys(form: str, agree: Callable[..., None]) -> None:
    def by_hand(q: Tensor, k: Tensor, **rest: Tensor) -> Any:
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
        return reference(q=q, k=k, **rest)

    inputs = make_inputs(40, heads=2)
    inputs["k"] = 3 * torch.randn_like(inputs["k"])
    agree(partial(full, normalize=True, form=form), by_hand, inputs)


@pytest.mark.parametrize("form", ["torch", "triton"])
def test_strided_inputs(form: str, agree: Callable[..., None]) -> None:
    def strided(q: Tensor, g: Tensor, **rest: Tensor) -> Any:
        q, g = q.transpose(1, 2).contiguous().transpose(1, 2), g.mT.contiguous().mT
        return full(q=q, g=g, form=form, **rest)

    agree(strided, full, make_inputs(20, batch=2, heads=2))


def test_without_an_initial_state(agree: Callable[..., None]) -> None:
    inputs = make_inputs(20, heads=1)
    zeros = torch.zeros_like(inputs.pop("initial_state"))
    for form in ("torch", "triton"):
        agree(partial(full, form=form), partial(reference, initial_state=zeros), inputs)


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize("which", [0, 1])
def test_either_output_alone_has_gradients(which: int, form: str, agree: Callable[..., None]) -> None:
    def only(form: str) -> Callable[..., Tensor]:
        # The final state does not depend on q, which then gets zeros.
        return lambda q, **rest: full(q=q, form=form, **rest)[which] + 0 * q.sum()

    agree(only(form), only("reference"), make_inputs(20))


@pytest.mark.parametrize("chunk_size", [1, 7, 32, 256])
def test_chunk_size_does_not_matter(chunk_size: int, agree: Callable[..., None]) -> None:
    agree(partial(full, chunk_size=chunk_size), full, make_inputs(150, batch=2))


@pytest.mark.parametrize("chunk_size", [5, 32])
def test_chunk_size_does_not_matter_to_triton(chunk_size: int, agree: Callable[..., None]) -> None:
    agree(partial(full, chunk_size=chunk_size, form="triton"), full, make_inputs(70, heads=1))


def separately(bounds: tuple[int, ...]) -> Callable[..., Any]:
    """Every document in a call of its own."""

    def run(initial_state: Tensor, **by_token: Tensor) -> Any:
        ys, finals = [], []
        for i, (start, end) in enumerate(itertools.pairwise(bounds)):
            part = {name: x.flatten(0, 1)[None, start:end] for name, x in by_token.items()}
            y, final = full(**part, initial_state=initial_state[i : i + 1])
            ys.append(y[0])
            finals.append(final[0])
        return torch.cat(ys).view(by_token["v"].shape), torch.stack(finals)

    return run


@pytest.mark.parametrize("bounds", BOUNDS)
def test_packed_documents_are_separate_runs(bounds: tuple[int, ...], agree: Callable[..., None]) -> None:
    inputs = make_inputs(100, batch=2, states=len(bounds) - 1)
    agree(partial(full, cu_seqlens=cuts(*bounds)), separately(bounds), inputs)


def test_packed_documents_are_separate_runs_in_triton(agree: Callable[..., None]) -> None:
    inputs = make_inputs(35, batch=2, heads=1, states=4)
    bounds = (0, 1, 18, 35, 70)
    packed = partial(full, cu_seqlens=cuts(*bounds).long(), form="triton", chunk_size=16)
    agree(packed, separately(bounds), inputs)


@pytest.mark.parametrize("form", ["torch", "triton"])
def test_nothing_leaks_into_the_next_document(form: str) -> None:
    inputs = make_inputs(60, heads=1)
    del inputs["initial_state"]
    packed = partial(gated_delta_rule, cu_seqlens=cuts(0, 40, 60), form=form)
    before = packed(**inputs)
    inputs["v"][:, :40] = 1e30
    torch.testing.assert_close(packed(**inputs)[:, 40:], before[:, 40:], rtol=0, atol=0)


@pytest.mark.parametrize("form", ["torch", "triton"])
def test_states_hand_over(form: str, agree: Callable[..., None]) -> None:
    def in_two(initial_state: Tensor, **by_token: Tensor) -> tuple[Tensor, Tensor]:
        head, tail = ({k: x[:, part] for k, x in by_token.items()} for part in (slice(40), slice(40, None)))
        first, state = full(**head, initial_state=initial_state, form=form)
        second, state = full(**tail, initial_state=state, form=form)
        return torch.cat([first, second], 1), state

    agree(in_two, full, make_inputs(71, heads=1))


@pytest.mark.parametrize("decay", [0.1, 10.0])
def test_fp32_accuracy(decay: float, accurate: Callable[..., None]) -> None:
    accurate(full, reference, make_inputs(300, decay=decay, dtype=torch.float32), FP32_FLOOR)


def test_fp32_accuracy_of_triton(accurate: Callable[..., None]) -> None:
    inputs = make_inputs(70, heads=1, channels=16, dtype=torch.float32)
    accurate(partial(full, form="triton"), reference, inputs, FP32_FLOOR)


def test_bf16_inputs(accurate: Callable[..., None]) -> None:
    inputs = make_inputs(200, dtype=torch.bfloat16)
    y, state = full(**inputs)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    accurate(full, reference, inputs, BF16_FLOOR)


def test_fp16_inputs_of_triton(errors: Callable[..., Any], with_gradients: Callable[..., Any]) -> None:
    """Its products run in fp16, with one rounding of 2^-11 each, some in a row. (Triton's interpreter cuts
    bf16 off instead of rounding it.)"""
    inputs = make_inputs(70, heads=1, channels=16, values=16, dtype=torch.float16)
    found = with_gradients(partial(full, form="triton"), inputs)
    exact = with_gradients(reference, {name: x.double() for name, x in inputs.items()})
    assert max(errors(found, exact).values()) < 8 * 2**-11


@pytest.mark.parametrize("theirs", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
@pytest.mark.parametrize("normalize", [False, True])
def test_agrees_with_transformers(theirs: str, normalize: bool) -> None:
    module = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    function = getattr(module, theirs, None)
    if function is None:
        pytest.skip(f"this transformers has no {theirs}")
    inputs = make_inputs(100, batch=2, dtype=torch.float32)
    # The name dispatches to a kernel of the hub; what it wraps is the plain PyTorch form.
    y, state = getattr(function, "__wrapped__", function)(
        *(inputs[name] for name in ("q", "k", "v")),
        g=inputs["g"],
        beta=inputs["beta"],
        initial_state=inputs["initial_state"],
        output_final_state=True,
        use_qk_l2norm_in_kernel=normalize,
    )
    ours, final = full(**inputs, normalize=normalize)
    torch.testing.assert_close(ours, y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(final, state, rtol=1e-4, atol=1e-4)


def test_autocast_leaves_the_scan_alone() -> None:
    inputs = make_inputs(100, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = full(**inputs)
    assert all(torch.equal(y, z) for y, z in zip(cast, full(**inputs)))


def test_numerical_gradients() -> None:
    inputs = make_inputs(5, heads=2, channels=2, values=2)
    names = list(inputs)

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        return full(**dict(zip(names, values)), chunk_size=2, normalize=True)

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in inputs.values()])


def op_arguments(packed: bool) -> tuple[Any, ...]:
    inputs = make_inputs(9, batch=2, states=4 if packed else 2)
    return (
        *(x.requires_grad_() for x in inputs.values()),
        cuts(0, 4, 9, 15, 18) if packed else None,
        0.5,
        4,
        True,
    )


def backward_arguments(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    *inputs, _, cu_seqlens, scale, size, normalize = arguments
    y, final, states, inverses = gated_delta_rule_op(*arguments)
    return y, final, *inputs, states, inverses, cu_seqlens, scale, size, normalize


@pytest.mark.parametrize("packed", [False, True])
def test_registration(packed: bool) -> None:
    arguments = op_arguments(packed)
    torch.library.opcheck(gated_delta_rule_op, arguments)
    detached = tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)
    torch.library.opcheck(gated_delta_rule_backward_op, backward_arguments(detached))


def test_registration_of_triton() -> None:
    from triptych.kernels.gated_delta_rule import triton

    counted = {str(name).removeprefix("triptych.") for name in flop_registry}
    assert {"gated_delta_rule_triton", "gated_delta_rule_triton_backward"} <= counted
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    inputs = make_inputs(6, heads=1, states=2)
    arguments = (*(x.requires_grad_() for x in inputs.values()), cuts(0, 4, 6), 0.5, 16, True)
    torch.library.opcheck(triton.gated_delta_rule_op, arguments, test_utils=utilities)
    *inputs, initial, cu_seqlens, scale, size, normalize = (
        x.detach() if isinstance(x, Tensor) else x for x in arguments
    )
    y, final, inverses = triton.gated_delta_rule_op(*inputs, initial, cu_seqlens, scale, size, normalize)
    backward = (y, final, *inputs, initial, inverses, cu_seqlens, scale, size, normalize)
    torch.library.opcheck(triton.gated_delta_rule_backward_op, backward, test_utils=utilities)


def test_flop_formulas_count_the_matmuls_inside() -> None:
    arguments = tuple(x.detach() if isinstance(x, Tensor) else x for x in op_arguments(packed=False))
    for op, function, args in (
        (gated_delta_rule_op, scan.forward, arguments),
        (gated_delta_rule_backward_op, scan.backward, backward_arguments(arguments)),
    ):
        with FlopCounterMode(display=False) as registered:
            op(*args)
        with FlopCounterMode(display=False) as inside:
            function(*args)
        assert registered.get_total_flops() == inside.get_total_flops() > 0


def test_meta_tensors() -> None:
    inputs = {name: x.to("meta").requires_grad_() for name, x in make_inputs(100).items()}
    y, state = full(**inputs)
    assert y.shape == inputs["v"].shape
    assert state.shape == inputs["initial_state"].shape
    (y.sum() + state.sum()).backward()
    assert all(x.grad.shape == x.shape for x in inputs.values())


def test_compiles_whole() -> None:
    inputs = make_inputs(20)
    compiled = torch.compile(partial(full, cu_seqlens=cuts(0, 7, 20)), fullgraph=True, backend="aot_eager")
    del inputs["initial_state"]
    found, expected = compiled(**inputs), full(**inputs, cu_seqlens=cuts(0, 7, 20))
    assert all(torch.equal(x, y) for x, y in zip(found, expected))


def test_calls_fla_with_arguments_that_it_takes(peers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    gated = pytest.importorskip("fla.ops.gated_delta_rule")
    delta = pytest.importorskip("fla.ops.delta_rule")
    from triptych.kernels.gated_delta_rule import external

    calls: list[dict[str, Any]] = []

    def stub(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)

        def call(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
            calls.append(signature.bind(*args, **kwargs).arguments)
            return torch.zeros_like(args[2]), None

        return call

    for module, name in ((gated, "chunk_gated_delta_rule"), (delta, "chunk_delta_rule")):
        monkeypatch.setattr(module, name, stub(getattr(module, name)))
    inputs = make_inputs(9, batch=2, dtype=torch.bfloat16, states=3)
    options = {"scale": 0.5, "chunk_size": 64, "normalize": True, "with_final_state": False}
    y, _ = external.fla(**inputs, **options, cu_seqlens=cuts(0, 3, 9, 18))
    assert y.shape == inputs["v"].shape
    external.fla(**{**inputs, "g": None, "initial_state": None}, **options, cu_seqlens=None)
    packed, ungated = calls
    assert packed["k"].shape == (1, 18, 3, 5) and packed["g"].shape == (1, 18, 3)
    assert torch.equal(packed["v"][0], inputs["v"].flatten(0, 1)) and "kwargs" not in packed
    assert packed["scale"] == ungated["scale"] == 0.5 and packed["use_qk_l2norm_in_kernel"] is True
    assert "g" not in ungated and "kwargs" not in ungated


@pytest.mark.parametrize(
    ("dtype", "head", "reason"),
    [
        (torch.bfloat16, 64, None),
        (torch.float32, 64, "made for half precision"),
        (torch.bfloat16, 257, "more than 256 channels"),
    ],
)
def test_says_what_fla_cannot_do(dtype: torch.dtype, head: int, reason: str | None) -> None:
    q = torch.zeros(1, 4, 2, head, dtype=dtype)
    found = limits.fla(q, q, q, None, q[..., 0])
    assert found is None if reason is None else reason in str(found)


def test_triton_refuses_mixed_dtypes() -> None:
    inputs = make_inputs(6)
    with pytest.raises(ValueError, match="q, k and v must be of one dtype"):
        full(**{**inputs, "v": inputs["v"].float()}, form="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 6, 3)}, r"q and k must be \(B, T, H, D\)"),
        ({"k": torch.zeros(1, 6, 3, 4)}, r"they are \(1, 6, 3, 5\) and \(1, 6, 3, 4\)"),
        ({"v": torch.zeros(1, 5, 3, 4)}, r"v must be \(B, T, H, E\) with \(B, T, H\) = \(1, 6, 3\)"),
        ({"g": torch.zeros(1, 6)}, r"g must be \(B, T, H\) = \(1, 6, 3\), it is \(1, 6\)"),
        ({"beta": torch.zeros(1, 6, 2)}, r"beta must be \(B, T, H\)"),
        ({"initial_state": torch.zeros(2, 3, 5, 4)}, r"initial_state must be \(1, 3, 5, 4\)"),
        ({"chunk_size": 0}, "chunk_size=0 must be at least 1"),
        ({"cu_seqlens": cuts(0, 5)}, r"end at B\*T = 1\*6 = 6"),
        (
            {"form": "fast"},
            r"form='fast' does not exist; use one of \['fla', 'triton', 'torch', 'reference'\]",
        ),
    ],
)
def test_errors_say_what_to_mend(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gated_delta_rule(**{**make_inputs(6), **change})
