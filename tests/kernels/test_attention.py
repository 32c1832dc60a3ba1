"""Attention: the two forms against a loop, packing, windows, caches, what is saved, FLOPs, errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from triptych.kernels import attention, dropout

FP32_FLOOR = 2e-6
BF16_FLOOR = 2e-2  # probabilities and results are rounded to bf16 in either form


def make_inputs(
    length: int,
    keys: int | None = None,
    *,
    heads: int = 4,
    groups: int = 2,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    return {
        "q": torch.randn(2, length, heads, 8, dtype=dtype),
        "k": torch.randn(2, keys or length, groups, 8, dtype=dtype),
        "v": torch.randn(2, keys or length, groups, 8, dtype=dtype),
    }


def by_query(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, window: int | None = None, starts: Any = None
) -> Tensor:
    """A loop over rows, heads and queries; starts[b][t] is the first token of the document of token t."""
    offset = k.shape[1] - q.shape[1]
    out = []
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            first = 0 if starts is None else starts[b][t]
            if window is not None:
                first = max(first, t + offset - window + 1)
            seen = slice(first, t + offset + 1 if causal else None)
            for h in range(q.shape[2]):
                g = h // (q.shape[2] // k.shape[2])
                weights = torch.softmax(k[b, seen, g] @ q[b, t, h] * q.shape[3] ** -0.5, 0)
                out.append(weights @ v[b, seen, g])
    return torch.stack(out).view(*q.shape[:3], -1)


@pytest.mark.parametrize("form", ["sdpa", "reference"])
@pytest.mark.parametrize(
    ("length", "keys", "options"),
    [
        (1, 1, {}),
        (9, 9, {}),
        (9, 9, {"window": 3}),
        (9, 9, {"window": 1}),
        (9, 9, {"window": 50}),
        (5, 9, {}),
        (1, 9, {}),
        (1, 9, {"window": 4}),
        (4, 9, {"window": 3}),
        (9, 5, {"causal": False}),
    ],
)
def test_agrees_with_a_loop(
    form: str, length: int, keys: int, options: dict[str, Any], agree: Callable[..., None]
) -> None:
    agree(partial(attention, form=form, **options), partial(by_query, **options), make_inputs(length, keys))


@pytest.mark.parametrize("form", ["sdpa", "reference"])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("bounds", [(0, 8, 16), (0, 4, 8, 12, 16), (0, 1, 6, 8, 13, 14, 15, 16)])
def test_packed_documents(
    bounds: tuple[int, ...], window: int | None, form: str, agree: Callable[..., None]
) -> None:
    starts = [[max(s for s in bounds if s <= 8 * b + t) - 8 * b for t in range(8)] for b in range(2)]
    packed = partial(attention, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), form=form, window=window)
    agree(packed, partial(by_query, starts=starts, window=window), make_inputs(8))


@pytest.mark.parametrize(("heads", "groups"), [(3, 3), (3, 1), (6, 2)])
def test_forms_agree_at_length(heads: int, groups: int, agree: Callable[..., None]) -> None:
    inputs = make_inputs(129, heads=heads, groups=groups)
    agree(attention, partial(attention, form="reference"), inputs)
    packed = partial(
        attention, cu_seqlens=torch.tensor([0, 100, 129, 200, 258], dtype=torch.int32), window=40
    )
    agree(packed, partial(packed, form="reference"), inputs)


@pytest.mark.parametrize(("dtype", "floor"), [(torch.float32, FP32_FLOOR), (torch.bfloat16, BF16_FLOOR)])
@pytest.mark.parametrize("form", ["sdpa", "reference"])
def test_accuracy(form: str, dtype: torch.dtype, floor: float, accurate: Callable[..., None]) -> None:
    accurate(partial(attention, form=form), by_query, make_inputs(17, dtype=dtype), floor)


def test_reference_saves_what_the_table_counts() -> None:
    """Korthikanti et al. (arXiv 2205.05198) count q, k, v, probabilities, 1-byte mask, dropout's output."""
    q, k, v = (x.requires_grad_() for x in make_inputs(16, groups=4, dtype=torch.bfloat16).values())
    saved: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        drop = partial(dropout, p=0.1, keys=torch.arange(2), start=(0, 0, 0), shape=(4, 16, 16))
        attention(q, k, v, form="reference", dropout=drop)
    scores = 2 * 4 * 16 * 16
    bytes_saved = sum(t.untyped_storage().nbytes() for t in saved.values())
    assert bytes_saved == 3 * 2 * q.numel() + (2 + 1 + 2) * scores


def test_dropout_falls_back_to_the_reference_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    inputs = make_inputs(4)
    with caplog.at_level("WARNING"):
        y = attention(**inputs, dropout=lambda p: 2 * p)
    torch.testing.assert_close(y, 2 * attention(**inputs))
    with pytest.raises(ValueError, match="form='sdpa' cannot serve this call: its dropout"):
        attention(**inputs, dropout=lambda p: p, form="sdpa")


@pytest.mark.parametrize("form", ["sdpa", "reference"])
def test_autocast_decides_the_dtype(form: str) -> None:
    inputs = make_inputs(8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = attention(**inputs, form=form)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), attention(**inputs), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops_are_those_of_the_materialised_form(device: str) -> None:
    counts = {}
    for form in ("sdpa", "reference"):
        q, k, v = (x.to(device).requires_grad_() for x in make_inputs(16, dtype=torch.float32).values())
        with FlopCounterMode(display=False) as counter:
            y = attention(q, k, v, form=form)
        counts[form] = counter.get_total_flops()
        y.sum().backward()
        assert q.grad is not None and q.grad.shape == q.shape
    assert counts["sdpa"] == counts["reference"] == 4 * 2 * 4 * 16 * 16 * 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 6, 4)}, r"q must be \(B, T, H, D\)"),
        ({"q": torch.zeros(2, 6, 4, 7)}, "must have one head dim"),
        ({"q": torch.zeros(2, 6, 3, 8)}, "2 key/value heads do not divide 3 heads"),
        ({"q": torch.zeros(2, 7, 4, 8)}, "causal needs S >= T"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"window": 3, "causal": False}, "needs causal=True"),
        ({"q": torch.zeros(2, 5, 4, 8), "cu_seqlens": torch.tensor([0, 5, 10])}, "cu_seqlens needs S = T"),
        ({"cu_seqlens": torch.tensor([0, 6, 13])}, "end at"),
    ],
)
def test_errors_say_what_to_mend(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(**{**make_inputs(6, dtype=torch.float32), **change})
