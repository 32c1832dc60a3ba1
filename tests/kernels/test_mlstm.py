"""mLSTM: the chunked form against the recurrence, states, packing, FLOPs, registration, errors."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from triptych.kernels import mlstm, mlstm_step
from triptych.kernels.mlstm import scan
from triptych.kernels.mlstm.torch import mlstm_backward_op, mlstm_op

FP32_FLOOR = 4e-6  # a sum of some hundred fp32 terms, divided by one
BF16_FLOOR = 8e-3  # one rounding to bf16 is 2^-8


def make_inputs(
    length: int,
    *,
    batch: int = 1,
    heads: int = 3,
    channels: int = 5,
    values: int = 4,
    dtype: torch.dtype = torch.float64,
    states: int | None = None,
) -> dict[str, Tensor]:
    """Inputs of `full`, with an initial state for each of `states` documents (default: each row)."""
    wide = torch.promote_types(dtype, torch.float32)
    count = states or batch
    return {
        "q": torch.randn(batch, length, heads, channels, dtype=dtype),
        "k": torch.randn(batch, length, heads, channels, dtype=dtype),
        "v": torch.randn(batch, length, heads, values, dtype=dtype),
        "igate": 2 * torch.randn(batch, length, heads, dtype=wide),
        "fgate": torch.randn(batch, length, heads, dtype=wide) + 1,
        "memory": torch.randn(count, heads, channels, values + 1, dtype=wide),
        "m": torch.randn(count, heads, dtype=wide),
    }


def cuts(*bounds: int) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32)


def full(memory: Tensor | None = None, m: Tensor | None = None, **rest: Any) -> tuple[Tensor, Tensor]:
    """y, and what the final state stands for, which does not depend on how it is divided."""
    state = None if memory is None or m is None else (memory, m)
    y, (final, top) = mlstm(**rest, initial_state=state, return_final_state=True)
    return y, final * top.exp()[..., None, None]


reference = partial(full, form="reference")


def plain(memory: Tensor, m: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's equations 19 to 27 as they stand, nothing stabilised."""
    q, k, v, igate, fgate = inputs.values()
    state = memory * m.exp()[..., None, None]
    c, n = state[..., :-1], state[..., -1]
    q = q / q.shape[-1] ** 0.5
    ys = []
    for t in range(q.shape[1]):
        i, f = igate[:, t].exp(), fgate[:, t].sigmoid()
        c = f[..., None, None] * c + i[..., None, None] * k[:, t, :, :, None] * v[:, t, :, None]
        n = f[..., None] * n + i[..., None] * k[:, t]
        top = torch.einsum("bhd,bhde->bhe", q[:, t], c)
        ys.append(top / (n * q[:, t]).sum(-1, keepdim=True).abs().clamp(min=1))
    return torch.stack(ys, 1), torch.cat([c, n.unsqueeze(-1)], -1)


@pytest.mark.parametrize("form", ["torch", "triton", "reference"])
def test_agrees_with_the_equations(form: str, agree: Callable[..., None]) -> None:
    agree(partial(full, form=form, chunk_size=8), plain, make_inputs(21, heads=2), tolerance=1e-10)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 500, 1000])
def test_agrees_with_the_recurrence(length: int, agree: Callable[..., None]) -> None:
    agree(full, reference, make_inputs(length), tolerance=1e-10)


@pytest.mark.parametrize("length", [1, 63, 65])
def test_triton_agrees_with_the_recurrence(length: int, agree: Callable[..., None]) -> None:
    agree(partial(full, form="triton"), reference, make_inputs(length, heads=1), tolerance=1e-10)


def test_triton_takes_odd_heads_by_blocks(agree: Callable[..., None]) -> None:
    """33 value channels are two blocks of a memory, the second one with a single column."""
    inputs = make_inputs(40, heads=2, channels=19, values=33)
    agree(partial(full, form="triton", chunk_size=32), reference, inputs, tolerance=1e-10)


@pytest.mark.parametrize(("heads", "channels", "values"), [(1, 7, 1), (3, 1, 9), (2, 6, 6)])
def test_odd_sizes(heads: int, channels: int, values: int, agree: Callable[..., None]) -> None:
    inputs = make_inputs(77, batch=3, heads=heads, channels=channels, values=values)
    agree(partial(full, chunk_size=16), reference, inputs, tolerance=1e-10)


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize("shift", [-60.0, -10.0, 10.0, 300.0])
def test_gates_from_closed_to_wide_open(form: str, shift: float, agree: Callable[..., None]) -> None:
    """Input gates of exp(300) overflow in fp32, were nothing stabilised; what remains is y."""

    def only_y(**inputs: Any) -> Tensor:
        return mlstm(**inputs)

    inputs = make_inputs(130 if form == "torch" else 70, heads=1)
    del inputs["memory"], inputs["m"]
    inputs["igate"] += shift
    agree(partial(only_y, form=form), partial(only_y, form="reference"), inputs, tolerance=1e-10)
    narrow = {name: value.float() for name, value in inputs.items()}
    assert mlstm(**narrow, form=form).isfinite().all()


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize("value", [-1e4, -20.0, 1e4])
def test_forget_gates_that_drop_or_keep_all(form: str, value: float, agree: Callable[..., None]) -> None:
    inputs = make_inputs(70, heads=1)
    inputs["fgate"][:, 30:50] = value
    agree(partial(full, form=form), reference, inputs, tolerance=1e-9)


@pytest.mark.parametrize("form", ["torch", "triton"])
def test_decays_of_e_to_the_minus_20_and_1000(form: str, agree: Callable[..., None]) -> None:
    for value in (-20.0, -1000.0):
        inputs = make_inputs(40, heads=1)
        inputs["fgate"][:] = value
        agree(partial(full, form=form), reference, inputs, tolerance=1e-9)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("form", ["torch", "triton"])
def test_tokens_that_are_never_let_in(form: str) -> None:
    inputs = make_inputs(20, heads=1)
    inputs["igate"][:] = -torch.inf
    del inputs["memory"], inputs["m"]
    y, state = full(**inputs, chunk_size=8, form=form)
    assert torch.equal(y, torch.zeros_like(y)) and torch.equal(state, torch.zeros_like(state))
    inputs["igate"][:, 9:] = 0.5
    late = {name: value[:, 9:] for name, value in inputs.items()}
    found = full(**inputs, form=form)[0][:, 9:]
    torch.testing.assert_close(found, full(**late)[0], rtol=1e-12, atol=1e-12)


def test_strided_inputs(agree: Callable[..., None]) -> None:
    def strided(q: Tensor, fgate: Tensor, **rest: Tensor) -> Any:
        return full(q=q.transpose(1, 2).contiguous().transpose(1, 2), fgate=fgate.mT.contiguous().mT, **rest)

    agree(strided, full, make_inputs(70, batch=2))
    agree(partial(strided, form="triton"), full, make_inputs(20, batch=2, heads=1), tolerance=1e-10)


def test_without_an_initial_state(agree: Callable[..., None]) -> None:
    inputs = make_inputs(30, heads=1)
    zeros = {"memory": torch.zeros_like(inputs.pop("memory")), "m": torch.zeros_like(inputs.pop("m"))}
    agree(full, partial(reference, **zeros), inputs, tolerance=1e-10)
    agree(partial(full, form="triton"), partial(reference, **zeros), inputs, tolerance=1e-10)


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize("which", [0, 1])
def test_either_output_alone_has_gradients(which: int, form: str, agree: Callable[..., None]) -> None:
    def only(form: str) -> Callable[..., Tensor]:
        # The final state does not depend on q, which then gets zeros.
        return lambda q, **rest: full(q=q, form=form, **rest)[which] + 0 * q.sum()

    agree(only(form), only("reference"), make_inputs(30, heads=1), tolerance=1e-10)


@pytest.mark.parametrize("chunk_size", [1, 7, 32, 256])
def test_chunk_size_does_not_matter(chunk_size: int, agree: Callable[..., None]) -> None:
    agree(partial(full, chunk_size=chunk_size), full, make_inputs(150, batch=2), tolerance=1e-10)


@pytest.mark.parametrize("chunk_size", [5, 32])
def test_chunk_size_does_not_matter_to_triton(chunk_size: int, agree: Callable[..., None]) -> None:
    triton = partial(full, chunk_size=chunk_size, form="triton")
    agree(triton, full, make_inputs(70, heads=1), tolerance=1e-10)


def separately(bounds: tuple[int, ...]) -> Callable[..., Any]:
    """Every document in a call of its own."""

    def run(memory: Tensor, m: Tensor, **rest: Any) -> Any:
        ys, finals = [], []
        for i, (start, end) in enumerate(itertools.pairwise(bounds)):
            part = {name: value.flatten(0, 1)[None, start:end] for name, value in rest.items()}
            y, final = full(memory[i : i + 1], m[i : i + 1], **part)
            ys.append(y[0])
            finals.append(final[0])
        return torch.cat(ys).view(rest["v"].shape), torch.stack(finals)

    return run


@pytest.mark.parametrize("bounds", [(0, 100, 200), (0, 1, 2, 64, 100, 131, 200), (0, 63, 100, 164, 165, 200)])
def test_packed_documents_are_separate_runs(bounds: tuple[int, ...], agree: Callable[..., None]) -> None:
    inputs = make_inputs(100, batch=2, states=len(bounds) - 1)
    agree(partial(full, cu_seqlens=cuts(*bounds)), separately(bounds), inputs)


def test_packed_documents_are_separate_runs_in_triton(agree: Callable[..., None]) -> None:
    bounds = (0, 1, 18, 35, 70)
    packed = partial(full, cu_seqlens=cuts(*bounds).long(), form="triton", chunk_size=16)
    agree(packed, separately(bounds), make_inputs(35, batch=2, heads=1, states=4), tolerance=1e-10)


@pytest.mark.parametrize("chunk_size", [16, 64])
def test_packed_without_states(chunk_size: int, agree: Callable[..., None]) -> None:
    inputs = make_inputs(150, batch=2)
    del inputs["memory"], inputs["m"]
    packed = partial(mlstm, cu_seqlens=cuts(0, 3, 64, 128, 129, 150, 222, 300))
    agree(partial(packed, chunk_size=chunk_size), partial(packed, form="reference"), inputs, tolerance=1e-10)


def test_nothing_leaks_into_the_next_document() -> None:
    inputs = make_inputs(100)
    del inputs["memory"], inputs["m"]
    packed = partial(mlstm, cu_seqlens=cuts(0, 70, 100))
    before = packed(**inputs)
    inputs["v"][:, :70] = 1e30
    inputs["igate"][:, :70] += 200
    torch.testing.assert_close(packed(**inputs)[:, 70:], before[:, 70:], rtol=1e-12, atol=1e-12)


def test_states_hand_over(agree: Callable[..., None]) -> None:
    def in_two(memory: Tensor, m: Tensor, **by_token: Tensor) -> tuple[Tensor, Tensor]:
        head, tail = ({k: v[:, part] for k, v in by_token.items()} for part in (slice(70), slice(70, None)))
        first, state = mlstm(**head, initial_state=(memory, m), return_final_state=True)
        second, final = full(*state, **tail)
        return torch.cat([first, second], 1), final

    agree(in_two, full, make_inputs(111, batch=2), tolerance=1e-10)


def test_steps_give_the_same() -> None:
    inputs = make_inputs(20, batch=2)
    y, final = full(**inputs)
    state = inputs.pop("memory"), inputs.pop("m")
    for t in range(20):
        y_t, state = mlstm_step(state, *(value[:, t] for value in inputs.values()))
        torch.testing.assert_close(y_t, y[:, t], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state[0] * state[1].exp()[..., None, None], final, rtol=1e-11, atol=1e-11)


def test_agrees_with_transformers() -> None:
    module = pytest.importorskip("transformers.models.xlstm.modeling_xlstm")
    theirs = getattr(module, "mlstm_recurrent_sequence_native", None)
    if theirs is None:
        pytest.skip("this transformers takes its mLSTM from another package")
    inputs = make_inputs(40, batch=2)
    del inputs["memory"], inputs["m"]
    y = theirs(*(value.transpose(1, 2) for value in inputs.values()), dtype_state=torch.float64, eps=0.0)
    y = y[0] if isinstance(y, tuple) else y
    torch.testing.assert_close(mlstm(**inputs), y.transpose(1, 2), rtol=1e-10, atol=1e-10)


def test_fp32_accuracy(accurate: Callable[..., None]) -> None:
    accurate(full, reference, make_inputs(300, dtype=torch.float32), FP32_FLOOR)


def test_bf16_inputs(accurate: Callable[..., None]) -> None:
    inputs = make_inputs(200, dtype=torch.bfloat16)
    y, state = full(**inputs)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    accurate(full, reference, inputs, BF16_FLOOR)


def test_fp32_accuracy_of_triton(accurate: Callable[..., None]) -> None:
    inputs = make_inputs(70, heads=1, channels=16, dtype=torch.float32)
    accurate(partial(full, form="triton"), reference, inputs, FP32_FLOOR)


def test_fp16_inputs_of_triton(errors: Callable[..., Any], with_gradients: Callable[..., Any]) -> None:
    """Its products run in fp16, with one rounding of 2^-11 each, some in a row; where a normaliser is near 0,
    the gradient by it is large. (Triton's interpreter cuts bf16 off instead of rounding it.)"""
    inputs = make_inputs(70, heads=1, channels=16, values=16, dtype=torch.float16)
    found = with_gradients(partial(full, form="triton"), inputs)
    exact = with_gradients(reference, {name: x.double() for name, x in inputs.items()})
    assert max(errors(found, exact).values()) < 16 * 2**-11


def test_triton_refuses_mixed_dtypes() -> None:
    inputs = make_inputs(6)
    with pytest.raises(ValueError, match="q, k and v must be of one dtype"):
        full(**{**inputs, "v": inputs["v"].float()}, form="triton")


def test_autocast_leaves_the_scan_alone() -> None:
    inputs = make_inputs(100, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = full(**inputs)
    assert all(torch.equal(y, z) for y, z in zip(cast, full(**inputs)))


def test_numerical_gradients() -> None:
    inputs = make_inputs(5, heads=2, channels=2, values=2)
    names = list(inputs)

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        return full(**dict(zip(names, values)), chunk_size=2)

    assert torch.autograd.gradcheck(function, [v.requires_grad_() for v in inputs.values()])


def op_arguments(packed: bool) -> tuple[Any, ...]:
    inputs = make_inputs(9, batch=2)
    segments = torch.arange(9, dtype=torch.int32).expand(2, 9) // 4 if packed else None
    return (*(v.requires_grad_() for v in inputs.values()), segments, 0.5, 4)


def backward_arguments(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    *inputs, _, m, segments, scale, size = arguments
    y, final, _, normaliser, memories = mlstm_op(*arguments)
    return y, final, *inputs, m, segments, y, normaliser, memories, scale, size


@pytest.mark.parametrize("packed", [False, True])
def test_registration(packed: bool) -> None:
    arguments = op_arguments(packed)
    torch.library.opcheck(mlstm_op, arguments)
    detached = tuple(v.detach() if isinstance(v, Tensor) else v for v in arguments)
    torch.library.opcheck(mlstm_backward_op, backward_arguments(detached))


def test_registration_of_triton() -> None:
    from triptych.kernels.mlstm import triton

    counted = {str(name).removeprefix("triptych.") for name in flop_registry}
    assert {"mlstm_triton", "mlstm_triton_backward"} <= counted
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    inputs = make_inputs(6, heads=1, states=2)
    arguments = (*(v.requires_grad_() for v in inputs.values()), cuts(0, 4, 6), 0.5, 16)
    torch.library.opcheck(triton.mlstm_op, arguments, test_utils=utilities)
    detached = [v.detach() if isinstance(v, Tensor) else v for v in arguments]
    y, final, _, denominators, signs = triton.mlstm_op(*detached)
    backward = (y, final, *detached[:8], y, denominators, signs, *detached[8:])
    torch.library.opcheck(triton.mlstm_backward_op, backward, test_utils=utilities)


def test_flop_formulas_count_the_matmuls_inside() -> None:
    arguments = tuple(v.detach() if isinstance(v, Tensor) else v for v in op_arguments(packed=False))
    backward = backward_arguments(arguments)
    for op, function, args in (
        (mlstm_op, scan.forward, arguments),
        (mlstm_backward_op, scan.backward, backward),
    ):
        with FlopCounterMode(display=False) as registered:
            op(*args)
        with FlopCounterMode(display=False) as inside:
            function(*args)
        assert registered.get_total_flops() == inside.get_total_flops() > 0


def test_meta_tensors() -> None:
    inputs = {k: v.to("meta").requires_grad_() for k, v in make_inputs(100).items()}
    y, state = full(**inputs)
    assert y.shape == inputs["v"].shape
    assert state.shape == inputs["memory"].shape
    (y.sum() + state.sum()).backward()
    assert all(v.grad.shape == v.shape for v in inputs.values())


def test_keeps_nothing_of_two_lengths() -> None:
    """What backward needs grows with T, not with its square."""
    sizes = {}
    for length in (128, 256):
        inputs = {k: v.requires_grad_() for k, v in make_inputs(length).items()}
        kept: dict[int, int] = {}
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.update({t.data_ptr(): t.numel()}) or t, lambda t: t
        )
        with hooks:
            mlstm(**{k: v for k, v in inputs.items() if k not in ("memory", "m")}, chunk_size=64)
        sizes[length] = sum(kept.values())
    assert sizes[256] == 2 * sizes[128]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 6, 3)}, r"q and k must be \(B, T, H, D\)"),
        ({"k": torch.zeros(1, 6, 3, 4)}, r"they are \(1, 6, 3, 5\) and \(1, 6, 3, 4\)"),
        ({"v": torch.zeros(1, 5, 3, 4)}, r"v must be \(B, T, H, E\) with \(B, T, H\) = \(1, 6, 3\)"),
        ({"igate": torch.zeros(1, 6)}, r"igate must be \(B, T, H\) = \(1, 6, 3\), it is \(1, 6\)"),
        ({"fgate": torch.zeros(1, 6, 2)}, r"fgate must be \(B, T, H\)"),
        ({"initial_state": (torch.zeros(1, 3, 5, 4), torch.zeros(1, 3))}, r"a memory \(1, 3, 5, 5\) and m"),
        ({"chunk_size": 0}, "chunk_size=0 must be at least 1"),
        ({"cu_seqlens": cuts(0, 5)}, r"end at B\*T = 1\*6 = 6"),
        ({"form": "fast"}, r"form='fast' does not exist; use one of \['triton', 'torch', 'reference'\]"),
    ],
)
def test_errors_say_what_to_mend(change: dict[str, Any], message: str) -> None:
    inputs = make_inputs(6)
    del inputs["memory"], inputs["m"]
    with pytest.raises(ValueError, match=message):
        mlstm(**{**inputs, **change})
