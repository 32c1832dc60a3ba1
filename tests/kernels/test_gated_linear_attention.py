"""Gated linear attention: every form against the recurrence, states, packing, FLOPs, registration, errors."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from triptych.kernels import gated_linear_attention, retention
from triptych.kernels.gated_linear_attention import chunks
from triptych.kernels.gated_linear_attention.torch import (
    gated_linear_attention_backward_op,
    gated_linear_attention_op,
)

FP32_FLOOR = 2e-6  # a sum of some hundred fp32 terms
BF16_FLOOR = 8e-3  # one rounding to bf16 is 2^-8
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
DECAYS = ["per channel", "per head", "constant"]

full = partial(gated_linear_attention, return_final_state=True)
reference = partial(full, form="reference")


def make_inputs(
    length: int,
    decays: str = "per channel",
    *,
    batch: int = 1,
    heads: int = 2,
    dim: int = 3,
    value_dim: int = 5,
    strength: float = 1.0,
    dtype: torch.dtype = torch.float64,
    states: int | None = None,
) -> dict[str, Tensor]:
    """Inputs of the operator, with an initial state for each of `states` documents (default: each row)."""
    wide = torch.promote_types(dtype, torch.float32)
    tokens = (batch, length, heads)
    shape = {"per channel": (*tokens, dim), "per head": tokens, "constant": (heads,)}[decays]
    return {
        "q": torch.randn(*tokens, dim, dtype=dtype),
        "k": torch.randn(*tokens, dim, dtype=dtype),
        "v": torch.randn(*tokens, value_dim, dtype=dtype),
        "g": -strength * torch.rand(shape, dtype=wide),
        "initial_state": torch.randn(states or batch, heads, dim, value_dim, dtype=wide),
    }


def cuts(*bounds: int) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32)


@pytest.mark.parametrize("decays", DECAYS[:2])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 500, 1000])
def test_agrees_with_the_recurrence(length: int, decays: str, agree: Callable[..., None]) -> None:
    agree(full, reference, make_inputs(length, decays, heads=1 if length >= 500 else 2))


@pytest.mark.parametrize("decays", DECAYS[:2])
@pytest.mark.parametrize("length", [1, 63, 65, 150])
def test_triton_agrees_with_the_recurrence(length: int, decays: str, agree: Callable[..., None]) -> None:
    agree(partial(full, form="triton"), reference, make_inputs(length, decays, heads=1))


@pytest.mark.parametrize("form", ["torch", "triton"])
def test_constant_decays(form: str, agree: Callable[..., None]) -> None:
    agree(partial(full, chunk_size=16, form=form), reference, make_inputs(20, "constant", batch=2))


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize("decays", DECAYS[:2])
@pytest.mark.parametrize(("heads", "dim", "value_dim"), [(3, 7, 1), (1, 37, 70)])
def test_odd_sizes(
    heads: int, dim: int, value_dim: int, decays: str, form: str, agree: Callable[..., None]
) -> None:
    inputs = make_inputs(18, decays, heads=heads, dim=dim, value_dim=value_dim)
    agree(partial(full, chunk_size=16, form=form), reference, inputs)


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize("decays", DECAYS[:2])
@pytest.mark.parametrize("strength", [0.0, 20.0, 1000.0])
def test_decays_from_none_to_extreme(
    strength: float, decays: str, form: str, agree: Callable[..., None]
) -> None:
    inputs = make_inputs(70, decays, heads=1)
    inputs["g"] = torch.full_like(inputs["g"], -strength)
    # Every gradient of g is about exp(-strength): relative to that, nothing may be left over.
    agree(partial(full, form=form), reference, inputs, tolerance=1e-12)


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize("decays", DECAYS[:2])
def test_extreme_steps_among_mild_ones_in_fp32(decays: str, form: str, accurate: Callable[..., None]) -> None:
    inputs = make_inputs(70, decays, heads=1, strength=0.1, dtype=torch.float32)
    inputs["g"][:, 20] = -1000.0
    inputs["g"][:, 40:43] = -1e6
    inputs["g"][:, 50:60] = 0.0
    # Differences of cumulative sums would be off by 1e6 * 2^-24.
    accurate(partial(full, form=form), reference, inputs, FP32_FLOOR)


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize("decays", DECAYS[:2])
def test_a_decay_of_zero_forgets_all(decays: str, form: str, with_gradients: Callable[..., Any]) -> None:
    inputs = make_inputs(30, decays, heads=1)
    inputs["g"][:, 25] = -math.inf
    found = with_gradients(partial(full, chunk_size=16, form=form), inputs)
    tail = {k: v[:, 25:] for k, v in inputs.items() if k != "initial_state"}
    expected = with_gradients(partial(full, form="reference"), tail)
    torch.testing.assert_close(found["output 0"][:, 25:], expected["output 0"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found["output 1"], expected["output 1"], rtol=1e-12, atol=1e-12)
    assert all(value.isfinite().all() for value in found.values())
    assert not found["gradient of g"][:, 25].any()


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize("decays", DECAYS[:2])
def test_strided_inputs(decays: str, form: str, agree: Callable[..., None]) -> None:
    def strided(q: Tensor, k: Tensor, v: Tensor, g: Tensor, **rest: Tensor) -> Any:
        k = torch.cat([k, k], -1)[..., : k.shape[-1]]
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
        return full(q=q, k=k, v=v.mT.contiguous().mT, g=g.mT.contiguous().mT, form=form, **rest)

    agree(strided, reference, make_inputs(12, decays))


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize("which", [0, 1])
def test_either_output_alone_has_gradients(which: int, form: str, agree: Callable[..., None]) -> None:
    def only(form: str) -> Callable[..., Tensor]:
        # The final state does not depend on q, which then gets zeros.
        return lambda q, **rest: full(q=q, form=form, **rest)[which] + 0 * q.sum()

    agree(only(form), only("reference"), make_inputs(20, heads=1))


@pytest.mark.parametrize("decays", DECAYS[:2])
@pytest.mark.parametrize(("chunk_size", "form"), [(1, "torch"), (8, "torch"), (256, "torch"), (16, "triton")])
def test_chunk_size_does_not_matter(
    chunk_size: int, form: str, decays: str, agree: Callable[..., None]
) -> None:
    inputs = make_inputs(70 if form == "torch" else 20, decays, heads=1)
    agree(partial(full, chunk_size=chunk_size, form=form), partial(full, form=form), inputs)


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize("decays", DECAYS[:2])
@pytest.mark.parametrize("bounds", [(0, 25, 50), (0, 1, 18, 25, 50)])
def test_packed_documents_are_separate_runs(
    bounds: tuple[int, ...], decays: str, form: str, agree: Callable[..., None]
) -> None:
    inputs = make_inputs(25, decays, batch=2, heads=1, states=len(bounds) - 1)

    def separately(initial_state: Tensor, **tokens: Tensor) -> Any:
        ys, finals = [], []
        for i, (start, end) in enumerate(itertools.pairwise(bounds)):
            document = {k: x.flatten(0, 1)[None, start:end] for k, x in tokens.items()}
            y, final = full(**document, initial_state=initial_state[i : i + 1])
            ys.append(y[0])
            finals.append(final[0])
        return torch.cat(ys).view(tokens["v"].shape), torch.stack(finals)

    agree(partial(full, cu_seqlens=cuts(*bounds), chunk_size=16, form=form), separately, inputs)


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize("decays", DECAYS[:2])
def test_packed_without_states(decays: str, form: str, agree: Callable[..., None]) -> None:
    inputs = make_inputs(35, decays, batch=2, heads=1)
    del inputs["initial_state"]
    packed = partial(gated_linear_attention, cu_seqlens=cuts(0, 3, 32, 35, 70), chunk_size=32)
    agree(partial(packed, form=form), partial(packed, form="reference"), inputs)


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize("decays", DECAYS[:2])
def test_nothing_leaks_into_the_next_document(decays: str, form: str) -> None:
    inputs = make_inputs(60, decays)
    del inputs["initial_state"]
    packed = partial(gated_linear_attention, cu_seqlens=cuts(0, 35, 60), form=form)
    before = packed(**inputs)
    inputs["v"][:, :35] = 1e30
    torch.testing.assert_close(packed(**inputs)[:, 35:], before[:, 35:], rtol=0, atol=0)


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize("decays", DECAYS[:2])
def test_states_hand_over(decays: str, form: str, agree: Callable[..., None]) -> None:
    def in_two(initial_state: Tensor, **tokens: Tensor) -> tuple[Tensor, Tensor]:
        head, tail = ({k: x[:, part] for k, x in tokens.items()} for part in (slice(17), slice(17, None)))
        first, state = full(**head, initial_state=initial_state, form=form)
        second, state = full(**tail, initial_state=state, form=form)
        return torch.cat([first, second], 1), state

    agree(in_two, full, make_inputs(40, decays, heads=1))


@pytest.mark.parametrize("form", ["torch", "triton"])
def test_scale(form: str, agree: Callable[..., None]) -> None:
    def unscaled(q: Tensor, **rest: Tensor) -> Any:
        return full(q=q * 3.0, scale=1.0, form="reference", **rest)

    agree(partial(full, scale=3.0, form=form), unscaled, make_inputs(20))


def test_no_decay_is_causal_linear_attention() -> None:
    inputs = make_inputs(90, strength=0.0)
    del inputs["initial_state"]
    scores = torch.einsum("bihd,bjhd->bhij", inputs["q"], inputs["k"]).tril() * 3**-0.5
    expected = torch.einsum("bhij,bjhe->bihe", scores, inputs["v"])
    torch.testing.assert_close(gated_linear_attention(**inputs), expected, rtol=1e-12, atol=1e-12)


def test_retention_is_its_closed_form(agree: Callable[..., None]) -> None:
    inputs = make_inputs(90, "constant", heads=3)
    inputs = {k: inputs[k] for k in ("q", "k", "v")}

    def closed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # D[i, j] = gamma^(i - j) for j <= i, gamma = 1 - 2^(-5-h) (arXiv 2307.08621, equation 5).
        gamma = 1 - 2.0 ** (-5 - torch.arange(3, dtype=torch.float64))
        distance = torch.arange(90).view(-1, 1) - torch.arange(90)
        decay = (gamma.view(-1, 1, 1) ** distance).tril()
        return torch.einsum("bihd,bjhd,hij,bjhe->bihe", q, k, decay, v) * q.shape[-1] ** -0.5

    agree(retention, closed, inputs)
    state = retention(**inputs, return_final_state=True, form="reference")[1]
    torch.testing.assert_close(retention(**inputs, return_final_state=True)[1], state)


def test_agrees_with_the_naive_form_of_fla() -> None:
    inputs = make_inputs(70, dtype=torch.float32)
    q, k, v, g, state = (inputs[name] for name in ("q", "k", "v", "g", "initial_state"))
    y = []
    for t in range(70):
        state = state * g[:, t].exp()[..., None] + k[:, t, :, :, None] * v[:, t, :, None, :]
        y.append((q[:, t, :, :, None] * 3**-0.5 * state).sum(-2))
    ours, final_state = full(**inputs)
    torch.testing.assert_close(ours, torch.stack(y, 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(final_state, state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize("decays", DECAYS[:2])
@pytest.mark.parametrize("strength", [0.1, 10.0])
def test_fp32_accuracy(strength: float, decays: str, form: str, accurate: Callable[..., None]) -> None:
    inputs = make_inputs(70, decays, heads=1, strength=strength, dtype=torch.float32)
    accurate(partial(full, form=form), reference, inputs, FP32_FLOOR)


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize("decays", DECAYS[:2])
def test_bf16_inputs(decays: str, form: str, accurate: Callable[..., None]) -> None:
    inputs = make_inputs(70, decays, heads=1, dim=16, value_dim=16, dtype=torch.bfloat16)
    y, state = full(**inputs, form=form)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    accurate(partial(full, form=form), reference, inputs, BF16_FLOOR)


@pytest.mark.parametrize("form", ["torch", "triton"])
def test_decays_in_bf16(form: str, accurate: Callable[..., None]) -> None:
    inputs = make_inputs(70, heads=1, dim=16, strength=0.1, dtype=torch.bfloat16)
    inputs["g"] = inputs["g"].bfloat16()
    accurate(partial(full, form=form), reference, inputs, BF16_FLOOR)


def test_autocast_leaves_the_scan_alone() -> None:
    inputs = make_inputs(100, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = full(**inputs)
    assert all(torch.equal(y, z) for y, z in zip(cast, full(**inputs)))


@pytest.mark.parametrize("decays", DECAYS[:2])
def test_numerical_gradients(decays: str) -> None:
    inputs = make_inputs(5, decays, dim=2, value_dim=2, states=2)
    names = list(inputs)

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        return full(**dict(zip(names, values)), cu_seqlens=cuts(0, 2, 5), chunk_size=2)

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in inputs.values()])


def op_arguments(decays: str, packed: bool, exclusive: bool = False) -> tuple[Any, ...]:
    inputs = make_inputs(9, decays, batch=2, states=4 if packed else 2)
    *tokens, state = (x.requires_grad_() for x in inputs.values())
    bonus = torch.randn(2, 3, dtype=torch.float64, requires_grad=True) if exclusive else None
    return (*tokens, bonus, state, cuts(0, 4, 9, 10, 18) if packed else None, 0.5, 4)


@pytest.mark.parametrize(("decays", "packed"), [("per channel", True), ("per head", False)])
def test_registration(decays: str, packed: bool) -> None:
    arguments = op_arguments(decays, packed, exclusive=decays == "per channel")
    torch.library.opcheck(gated_linear_attention_op, arguments, test_utils=CHECKS)
    detached = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    *inputs, _, bounds, scale, size = detached
    y, final_state, states = gated_linear_attention_op(*detached)
    torch.library.opcheck(
        gated_linear_attention_backward_op,
        (y, final_state, *inputs, states, bounds, scale, size),
        test_utils=CHECKS,
    )


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_the_whole_check_of_registration(packed: bool) -> None:
    """With tracing of forward and backward, which takes seconds."""
    torch.library.opcheck(gated_linear_attention_op, op_arguments("per channel", packed, exclusive=True))


def test_registration_of_the_triton_form() -> None:
    from triptych.kernels.gated_linear_attention import triton

    arguments = op_arguments("per head", packed=True)
    arguments = (*arguments[:-1], 16)  # the smallest chunks it takes
    torch.library.opcheck(triton.gated_linear_attention_op, arguments, test_utils=CHECKS)
    detached = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
    outputs = triton.gated_linear_attention_op(*detached)
    torch.library.opcheck(triton.gated_linear_attention_backward_op, (*outputs, *detached), test_utils=CHECKS)


@pytest.mark.parametrize("decays", DECAYS[:2])
@pytest.mark.parametrize("size", [1, 2, 8])
def test_flop_formulas_count_the_matmuls_inside(size: int, decays: str) -> None:
    *arguments, _ = (x.detach() if isinstance(x, Tensor) else x for x in op_arguments(decays, packed=False))
    arguments.append(size)
    *inputs, _, bounds, scale, size = arguments
    y, final_state, states = gated_linear_attention_op(*arguments)
    backward = (y, final_state, *inputs, states, bounds, scale, size)
    pairs = (
        (gated_linear_attention_op, chunks.forward, arguments),
        (gated_linear_attention_backward_op, chunks.backward, backward),
    )
    for op, function, args in pairs:
        with FlopCounterMode(display=False) as registered:
            op(*args)
        with FlopCounterMode(display=False) as plain:
            function(*args)
        assert registered.get_total_flops() == plain.get_total_flops() > 0


@pytest.mark.parametrize("form", ["torch", "triton"])
def test_meta_tensors(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if form == "triton":
        from triptych.kernels.gated_linear_attention.triton import gated_linear_attention as run
    else:
        from triptych.kernels.gated_linear_attention.torch import gated_linear_attention as run
    inputs = {k: x.to("meta").requires_grad_() for k, x in make_inputs(100).items()}
    y, state = run(**inputs, scale=1.0, return_final_state=True, cu_seqlens=None, chunk_size=64)[:2]
    assert y.shape == inputs["v"].shape
    assert state.shape == inputs["initial_state"].shape
    (y.sum() + state.sum()).backward()
    assert all(x.grad.shape == x.shape for x in inputs.values())


@pytest.mark.parametrize(("form", "made"), [("torch", 1), ("triton", 0)])
def test_what_is_saved(form: str, made: int) -> None:
    """The torch form keeps the states before each chunk, the Triton form nothing but the inputs."""
    inputs = {k: x.requires_grad_() for k, x in make_inputs(40).items()}
    saved: list[int] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t)
    with hooks:
        y = gated_linear_attention(**inputs, scale=1.0, chunk_size=16, form=form)
    assert y.data_ptr() not in saved
    assert len(set(saved) - {x.data_ptr() for x in inputs.values()}) == made


def test_places_of_spare_chunks() -> None:
    """The Triton form cannot count its chunks without waiting for the device: spare ones have no tokens."""
    from triptych.kernels.gated_linear_attention.triton import _packed_places

    places = _packed_places(cuts(0, 16, 17, 50), 50, 16)
    assert places.starts[:5].tolist() == [0, 16, 17, 33, 49]
    assert places.counts.tolist() == [16, 1, 16, 16, 1]
    assert places.first_chunks.tolist() == [0, 1, 2]
    places = _packed_places(cuts(0, 16, 32, 48), 48, 16)
    assert places.counts.tolist() == [16, 16, 16, 0, 0], "3 documents could have had 5 chunks"


@pytest.mark.parametrize("decays", DECAYS)
def test_the_adapter_fits_the_signature_of_fla(
    decays: str, peers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, name = ("gla", "chunk_gla") if decays == "per channel" else ("simple_gla", "chunk_simple_gla")
    package = pytest.importorskip(f"fla.ops.{module}", reason="fla is not importable here")
    signature = inspect.signature(getattr(package, name))

    def record(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        bound = signature.bind(*args, **kwargs).arguments
        assert "kwargs" not in bound, "nothing that the package would swallow unread"
        assert bound["q"].shape == (1, 12, 2, 3)
        assert bound["cu_seqlens"].dtype == torch.int64
        return bound["v"], bound["initial_state"]

    monkeypatch.setattr(package, name, record)
    from triptych.kernels.gated_linear_attention.external import gated_linear_attention as adapter

    inputs = make_inputs(6, decays, batch=2, dtype=torch.float32, states=3)
    options = {"scale": 1.0, "return_final_state": True, "chunk_size": 64, "cu_seqlens": cuts(0, 2, 6, 12)}
    y, _ = adapter(**inputs, **options)
    assert y.shape == inputs["v"].shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 6, 3)}, r"q and k must both be \(B, T, H, D\)"),
        ({"k": torch.zeros(1, 6, 2, 4)}, r"they are \(1, 6, 2, 3\) and \(1, 6, 2, 4\)"),
        ({"v": torch.zeros(1, 5, 2, 5)}, r"v must be \(B, T, H, E\) with \(B, T, H\) = \(1, 6, 2\)"),
        ({"g": torch.zeros(1, 6)}, r"g must be .* or \(H,\) = \(2,\), it is \(1, 6\)"),
        ({"initial_state": torch.zeros(2, 2, 3, 5)}, r"initial_state must be \(1, 2, 3, 5\)"),
        ({"chunk_size": 48}, "chunk_size=48 must be a power of two"),
        ({"cu_seqlens": cuts(0, 5)}, r"end at B\*T = 1\*6 = 6"),
        ({"form": "fast"}, r"form='fast' does not exist"),
        ({"form": "triton", "chunk_size": 128}, r"chunk_size=128 is none of \(16, 32, 64\)"),
        ({"form": "triton", "v": torch.zeros(1, 6, 2, 5)}, "needs one dtype of queries, keys and values"),
    ],
)
def test_errors_say_what_to_mend(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gated_linear_attention(**{**make_inputs(6), **change})


def test_no_tokens() -> None:
    with pytest.raises(ValueError, match="has no tokens"):
        gated_linear_attention(**make_inputs(0))


def test_retention_needs_heads() -> None:
    with pytest.raises(ValueError, match=r"retention: q must be \(B, T, H, D\)"):
        retention(*(torch.zeros(1, 6, 2) for _ in range(3)))


@pytest.mark.parametrize(
    ("dtype", "dim", "reason"),
    [
        (torch.float64, 4, "no double precision"),
        (torch.bfloat16, 3, "odd head sizes"),
        (torch.bfloat16, 4, None),
    ],
)
def test_what_fla_cannot_do(dtype: torch.dtype, dim: int, reason: str | None) -> None:
    from triptych.kernels.gated_linear_attention.checks import supported_by_fla

    inputs = make_inputs(6, dim=dim, value_dim=dim, dtype=dtype)
    found = supported_by_fla(*(inputs[k] for k in "qkvg"), cu_seqlens=None)
    assert (found is None) if reason is None else (reason in str(found))
