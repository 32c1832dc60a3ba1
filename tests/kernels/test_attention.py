"""Attention: its forms against a loop, PyTorch and transformers; packing, masks, sinks, caches, errors."""

from __future__ import annotations

import itertools
import sys
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from triptych.kernels import attention, dispatch, dropout
from triptych.kernels.attention import examples, external, flex, log_sum_exp, reference, sdpa, varlen
from triptych.kernels.attention.masks import all_visible

FP32_FLOOR = 2e-6
BF16_FLOOR = 2e-2  # probabilities and results are rounded to bf16 in either form
EVERY_FORM = ["flash_attn_4", "flash_attn_3", "flash_attn", "varlen", "sdpa", "flex", "reference"]


def make_inputs(
    length: int,
    keys: int | None = None,
    *,
    heads: int = 4,
    groups: int = 2,
    dim: int = 8,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    return {
        "q": torch.randn(2, length, heads, dim, dtype=dtype),
        "k": torch.randn(2, keys or length, groups, dim, dtype=dtype),
        "v": torch.randn(2, keys or length, groups, dim, dtype=dtype),
    }


def cuts(*bounds: int) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32)


def by_query(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    causal: bool = True,
    window: int | tuple[int, int] | None = None,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """A loop over rows, heads and queries; each sums over the keys that it may see, one after the other."""
    (rows, length, heads, dim), keys = q.shape, k.shape[1]
    ends = [] if cu_seqlens is None else cu_seqlens.tolist()

    def document(b: int, t: int) -> int:
        return sum(end <= b * length + t for end in ends)

    def sees(b: int, h: int, t: int, j: int) -> bool:
        at = t + keys - length
        if (causal and j > at) or (ends and document(b, t) != document(b, j)):
            return False
        if window is not None:
            left, right = (window - 1, 0) if isinstance(window, int) else window
            if not at - left <= j <= at + right:
                return False
        return full is None or bool(
            full[b, h, t, j] if full.dtype == torch.bool else full[b, h, t, j] > -1e300
        )

    full = None if mask is None else mask.expand(rows, heads, length, keys)
    out = []
    for b, t, h in itertools.product(range(rows), range(length), range(heads)):
        seen = [j for j in range(keys) if sees(b, h, t, j)]
        g = h // (heads // k.shape[2])
        scores = k[b, seen, g] @ q[b, t, h] * dim**-0.5
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if full is not None and full.dtype != torch.bool:
            scores = scores + full[b, h, t, seen]
        if not seen:
            out.append(0 * (q[b, t, h] + v[b, 0, g]))
            continue
        top = scores.detach().max()
        weights = torch.exp(scores - top)
        total = weights.sum() if sink is None else weights.sum() + torch.exp(sink[h] - top)
        out.append((weights / total) @ v[b, seen, g])
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
    options = {"cu_seqlens": cuts(*bounds), "window": window}
    agree(partial(attention, form=form, **options), partial(by_query, **options), make_inputs(8))


OPTIONS: dict[str, dict[str, Any]] = {
    "window on both sides": {"causal": False, "window": (2, 3)},
    "window on the right": {"causal": False, "window": (0, 4)},
    "causal window in two numbers": {"window": (3, 0)},
    "documents and window": {"causal": False, "window": (2, 1), "cu_seqlens": cuts(0, 2, 9, 14, 18)},
    "documents, both ways": {"causal": False, "cu_seqlens": cuts(0, 2, 9, 14, 18)},
    "softcap": {"softcap": 0.7},
    "sink": {"sink": True},
    "sink and window": {"sink": True, "window": 3},
    "sink and documents": {"sink": True, "cu_seqlens": cuts(0, 2, 9, 14, 18)},
    "mask": {"mask": (2, 4, 9, 9)},
    "mask of keys": {"mask": (2, 1, 1, 9), "causal": False},
    "mask and documents": {"mask": (9, 9), "cu_seqlens": cuts(0, 2, 9, 14, 18)},
    "mask and sink": {"mask": (4, 1, 9), "sink": True},
    "bias": {"bias": (2, 4, 9, 9)},
    "bias by head and window": {"bias": (4, 9, 9), "causal": False, "window": (4, 2)},
    "bias and documents": {"bias": (1, 1, 9, 9), "cu_seqlens": cuts(0, 2, 9, 14, 18)},
    "bias of one number": {"bias": (), "sink": True},
    "all": {
        "causal": False,
        "window": (4, 2),
        "cu_seqlens": cuts(0, 2, 9, 14, 18),
        "softcap": 1.5,
        "sink": True,
        "bias": (2, 4, 9, 9),
    },
}


def with_options(options: dict[str, Any], length: int = 9) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inputs with gradients and the rest; "mask" and "bias" give shapes, and a bias hides some keys."""
    inputs, rest = make_inputs(length), dict(options)
    if rest.pop("sink", False):
        inputs["sink"] = torch.randn(4, dtype=torch.float64)
    if (shape := rest.pop("bias", None)) is not None:
        bias = torch.randn(shape, dtype=torch.float64)
        hidden = torch.rand(shape) < 0.2 if shape else torch.tensor(False)
        inputs["mask"] = bias.masked_fill(hidden, -torch.inf)
    if (shape := rest.pop("mask", None)) is not None:
        rest["mask"] = torch.rand(shape) < 0.6
    return inputs, rest


@pytest.mark.parametrize("form", ["sdpa", "reference"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_agree_with_a_loop(name: str, form: str, agree: Callable[..., None]) -> None:
    inputs, rest = with_options(OPTIONS[name])
    if form == "sdpa" and ("softcap" in rest or {"sink", "mask"} <= inputs.keys()):
        with pytest.raises(ValueError, match=r"no softcap|no gradient of the mask"):
            attention(**{k: v.requires_grad_() for k, v in inputs.items()}, **rest, form=form)
        return
    agree(partial(attention, form=form, **rest), partial(by_query, **rest), inputs)


@pytest.mark.parametrize("name", ["documents and window", "sink and documents", "mask and sink", "all"])
def test_flex_agrees_with_a_loop(name: str) -> None:
    inputs, rest = with_options(OPTIONS[name])
    expected = by_query(**inputs, **rest)
    torch.testing.assert_close(attention(**inputs, **rest, form="flex"), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("length", "keys"), [(1, 9), (4, 9), (9, 4)])
@pytest.mark.parametrize("window", [None, (2, 1), (50, 2), (0, 0)])
def test_queries_beside_a_cache_or_another_sequence(
    length: int, keys: int, window: tuple[int, int] | None, agree: Callable[..., None]
) -> None:
    inputs = make_inputs(length, keys)
    options = {"causal": False, "window": window}
    for form in ("sdpa", "reference"):
        agree(partial(attention, form=form, **options), partial(by_query, **options), inputs)


def test_flex_beside_a_cache() -> None:
    inputs, options = make_inputs(4, 9), {"causal": False, "window": (2, 1)}
    expected = by_query(**inputs, **options)
    torch.testing.assert_close(attention(**inputs, form="flex", **options), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 500, 1000])
@pytest.mark.parametrize("window", [1, 17, (64, 0), (20, 7), (0, 30)])
def test_windows_in_blocks_agree_with_a_mask(
    length: int, window: int | tuple[int, int], agree: Callable[..., None]
) -> None:
    causal = isinstance(window, int) or window[1] == 0
    inputs = {k: v[:1] for k, v in make_inputs(length, heads=2, groups=1, dim=5).items()}
    inputs["sink"] = torch.randn(2, dtype=torch.float64)
    run = partial(attention, causal=causal, window=window)
    agree(run, partial(run, form="reference"), inputs)
    del inputs["sink"]
    agree(run, partial(run, form="reference"), inputs)


def test_packed_windows_are_separate_runs(agree: Callable[..., None]) -> None:
    bounds = (0, 3, 200, 400, 401, 800)
    run = partial(attention, causal=False, window=(15, 8))

    def separately(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
        flat = [x.flatten(0, 1)[None] for x in (q, k, v)]
        parts = [run(*(x[:, s:e] for x in flat), sink=sink) for s, e in itertools.pairwise(bounds)]
        return torch.cat(parts, 1).view(q.shape)

    inputs = make_inputs(400, heads=2, dim=3) | {"sink": torch.randn(2, dtype=torch.float64)}
    agree(partial(run, cu_seqlens=cuts(*bounds)), separately, inputs)


def test_nothing_leaks_into_another_document() -> None:
    inputs = make_inputs(100)
    packed = partial(attention, cu_seqlens=cuts(0, 70, 100, 200), causal=False, window=(9, 9))
    before = packed(**inputs)
    inputs["k"][0, :70] = 1e30
    inputs["v"][0, :70] = torch.nan
    torch.testing.assert_close(packed(**inputs)[0, 70:], before[0, 70:], rtol=0, atol=0)


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("kind", ["mask", "bias", "window"])
@pytest.mark.parametrize("form", ["sdpa", "reference"])
def test_queries_that_see_nothing_give_zeros(form: str, kind: str, sink: bool) -> None:
    length, keys = (9, 4) if kind == "window" else (6, 6)
    inputs: dict[str, Any] = {k: v.requires_grad_() for k, v in make_inputs(length, keys).items()}
    empty = slice(0, 2)
    if sink:
        inputs["sink"] = torch.randn(4, dtype=torch.float64, requires_grad=True)
    if kind == "window":
        inputs |= {"causal": False, "window": (1, 3)}  # query t stands at key t - 5
    else:
        mask = torch.rand(6, 6) < 0.7
        mask[empty], mask[2:, 0] = False, True
        inputs["mask"] = mask
        if kind == "bias":
            inputs["mask"] = torch.zeros(6, 6, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    y = attention(**inputs, form=form)
    assert not y[:, empty].any() and y[:, 2:].abs().sum((-1, -2)).min() > 0
    leaves = [x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad]
    gradients = torch.autograd.grad(y[:, empty].sum(), leaves, retain_graph=True)
    assert not any(g.any() for g in gradients)  # any() of NaN is true
    y.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves)
    assert not inputs["q"].grad[:, empty].any()


def test_agrees_with_pytorch_in_fp64() -> None:
    q, k, v = (x.transpose(1, 2) for x in make_inputs(30, dim=7).values())
    theirs = partial(F.scaled_dot_product_attention, q, k, v, enable_gqa=True)
    ours = partial(attention, *(x.transpose(1, 2) for x in (q, k, v)), form="reference")
    bias, mask = torch.randn(2, 4, 30, 30, dtype=torch.float64), torch.rand(2, 1, 30, 30) < 0.5
    for y, expected in (
        (ours(), theirs(is_causal=True)),
        (ours(causal=False, scale=0.3), theirs(scale=0.3)),
        (ours(causal=False, mask=bias), theirs(attn_mask=bias)),
        (ours(causal=False, mask=mask), theirs(attn_mask=mask)),
        (ours(causal=False, window=(3, 2)), theirs(attn_mask=torch.ones(30, 30).tril(2).triu(-3).bool())),
    ):
        torch.testing.assert_close(y.transpose(1, 2), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["sdpa", "reference"])
def test_sinks_are_those_of_gpt_oss(form: str) -> None:
    module = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    inputs = {k: v.requires_grad_() for k, v in make_inputs(20).items()}
    sink = torch.randn(4, dtype=torch.float64, requires_grad=True)
    layer = types.SimpleNamespace(sinks=sink, num_key_value_groups=2, training=False)
    mask = torch.full((20, 20), -torch.inf).triu(1) + torch.full((20, 20), -torch.inf).tril(-6)
    theirs, _ = module.eager_attention_forward(
        layer, *(x.transpose(1, 2) for x in inputs.values()), mask.nan_to_num(0, 0, -torch.inf).double(), 0.2
    )
    ours = attention(**inputs, sink=sink, window=6, scale=0.2, form=form)
    leaves = [*inputs.values(), sink]
    dy = torch.randn_like(ours)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad(theirs, leaves, dy)
    for found, wanted in zip(torch.autograd.grad(ours, leaves, dy), expected):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_the_softcap_is_that_of_gemma2() -> None:
    module = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")
    inputs = {k: v.requires_grad_() for k, v in make_inputs(20, dtype=torch.float32).items()}
    layer = types.SimpleNamespace(num_key_value_groups=2, training=False)
    mask = torch.full((20, 20), -torch.inf).triu(1)
    theirs, _ = module.eager_attention_forward(
        layer, *(x.transpose(1, 2) for x in inputs.values()), mask, scaling=0.7, softcap=1.3
    )
    ours = attention(**inputs, softcap=1.3, scale=0.7)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    dy = torch.randn_like(ours)
    leaves = list(inputs.values())
    for found, wanted in zip(torch.autograd.grad(ours, leaves, dy), torch.autograd.grad(theirs, leaves, dy)):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["sdpa", "flex", "reference"])
def test_a_sink_of_zero_is_softmax_one(form: str) -> None:
    """One key: y = e^s / (1 + e^s) v; and a sink of -inf is none."""
    inputs = make_inputs(1)
    y = attention(**inputs, sink=torch.zeros(4, dtype=torch.float64), form=form)
    k, v = (inputs[x].repeat_interleave(2, dim=2) for x in ("k", "v"))
    score = (inputs["q"] * k).sum(-1, keepdim=True) * 8**-0.5
    torch.testing.assert_close(y, torch.sigmoid(score) * v, rtol=1e-12, atol=1e-12)
    inputs = make_inputs(9)
    none = attention(**inputs, sink=torch.full((4,), -torch.inf, dtype=torch.float64), form=form)
    torch.testing.assert_close(none, attention(**inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("length", "keys"), [(300, 300), (128, 256), (100, 300), (300, 130)])
@pytest.mark.parametrize("sides", [(None, 0), (None, None), (100, 0), (20, 150), (0, 0)])
@pytest.mark.parametrize("packed", [False, True])
def test_flex_knows_which_blocks_are_seen(
    length: int, keys: int, sides: tuple[int | None, int | None], packed: bool
) -> None:
    if packed and length != keys:
        return
    documents = cuts(0, 5, 130, 256, 300, 428, 600) if packed else None
    ids = flex._documents(documents, torch.empty(2, length, 1, 1))
    some, every = flex.blocks_seen(length, keys, *sides, ids, torch.device("cpu"))
    seen = all_visible(length, keys, *sides, documents, None, 2, torch.device("cpu"))
    seen = torch.ones(length, keys, dtype=torch.bool) if seen is None else seen
    seen = seen.view(-1, 1, length, keys)
    padded = F.pad(seen[:, 0], (0, -keys % 128, 0, -length % 128))
    blocks = padded.unflatten(2, (-1, 128)).unflatten(1, (-1, 128)).transpose(2, 3).flatten(3)
    assert torch.equal(some.expand(blocks.shape[:3]), blocks.any(-1))
    assert torch.equal(every.expand(blocks.shape[:3]), blocks.all(-1))


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
    inputs = {**make_inputs(17, dtype=dtype), "sink": torch.randn(4, dtype=dtype)}
    accurate(partial(attention, form=form, window=5), partial(by_query, window=5), inputs, floor)


def test_strided_inputs(agree: Callable[..., None]) -> None:
    def strided(q: Tensor, k: Tensor, v: Tensor, **rest: Tensor) -> Tensor:
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
        k, v = torch.stack([k, v], -1).unbind(-1)  # neighbours in memory belong to different tensors
        return attention(q, k, v, **rest, window=20)

    for length in (9, 200):
        inputs = {**make_inputs(length), "sink": torch.randn(4, dtype=torch.float64)}
        agree(strided, partial(attention, window=20), inputs)


@pytest.mark.parametrize("form", ["sdpa", "reference"])
def test_numerical_gradients(form: str) -> None:
    q, k, v = (x[:1].requires_grad_() for x in make_inputs(5, heads=2, groups=1, dim=2).values())
    sink = torch.randn(2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 1, 5, dtype=torch.float64, requires_grad=form == "reference")
    cap = 1.5 if form == "reference" else None

    def function(q: Tensor, k: Tensor, v: Tensor, sink: Tensor, bias: Tensor) -> Tensor:
        documents = cuts(0, 2, 5)
        return attention(q, k, v, sink=sink, mask=bias, cu_seqlens=documents, softcap=cap, form=form)

    assert torch.autograd.gradcheck(function, (q, k, v, sink, bias))


def sink_arguments(masked: bool) -> tuple[Any, ...]:
    """Of `attention_sink_op`."""
    tensors = [x.transpose(1, 2).requires_grad_() for x in make_inputs(9).values()]
    mask = torch.rand(2, 1, 9, 9) < 0.6 if masked else None
    return (*tensors, torch.randn(4, dtype=torch.float64, requires_grad=True), mask, not masked, 0.3)


@pytest.mark.parametrize("masked", [False, True])
def test_registration(masked: bool) -> None:
    arguments = sink_arguments(masked)
    torch.library.opcheck(log_sum_exp.attention_sink_op, arguments)
    q, k, v, sink, mask, *rest = (x.detach() if isinstance(x, Tensor) else x for x in arguments)
    out, total = log_sum_exp.attention_sink_op(q, k, v, sink, mask, *rest)
    backward = (torch.randn_like(out), q, k, v, sink, mask, out, total, *rest)
    torch.library.opcheck(log_sum_exp.attention_sink_backward_op, backward)


@pytest.mark.parametrize(
    "name", ["window on both sides", "documents and window", "softcap", "sink", "mask", "bias and documents"]
)
def test_compiles_without_a_break(name: str, agree: Callable[..., None]) -> None:
    torch.compiler.reset()
    inputs, rest = with_options(OPTIONS[name])
    compiled = torch.compile(partial(attention, **rest), fullgraph=True, backend="aot_eager")
    agree(compiled, partial(attention, **rest), inputs)


@pytest.mark.slow
def test_compiles_with_inductor(agree: Callable[..., None]) -> None:
    torch.compiler.reset()
    inputs, rest = with_options(OPTIONS["sink and window"])
    agree(torch.compile(partial(attention, **rest), fullgraph=True), partial(attention, **rest), inputs)


@pytest.mark.parametrize("form", ["sdpa", "flex"])
def test_examples_serve_the_self_check(form: str) -> None:
    device, dtype = torch.device("cpu"), torch.float64
    if form == "flex":  # without gradients, which it has on GPUs only
        inputs = examples.MAKERS["everything"](device, dtype)
        torch.testing.assert_close(attention(**inputs, form="flex"), attention(**inputs, form="reference"))
        return
    found = dispatch.check("attention", form, device, dtype)
    assert found == dict.fromkeys(["plain", "packed", "windowed", "cached", "with_sink", "masked"])


def by_document(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, left: int, right: int
) -> Callable[..., Any]:
    """Calls fn(a document's q, k, v as (1, tokens, heads, D), left, right) for each; -1 is no limit."""

    def call(fn: Callable[..., Any]) -> list[Any]:
        bounds = zip(*(itertools.pairwise(x.tolist()) for x in (q_starts, k_starts)))
        sides = (None if x < 0 else x for x in (left, right))
        left_, right_ = sides
        return [fn(q[None, a:b], k[None, c:d], v[None, c:d], left_, right_) for (a, b), (c, d) in bounds]

    return call


def plainly(q: Tensor, k: Tensor, v: Tensor, left: int | None, right: int | None, **rest: Any) -> Tensor:
    """The form "reference" of (B, T, H, D) without anything else."""
    given = {"cu_seqlens": None, "softcap": None, "sink": None, "mask": None, "dropout": None, **rest}
    return reference.attention(q, k, v, left=left, right=right, **given)


@pytest.fixture
def flash_on_cpu() -> Any:
    """PyTorch's two flash-attention operators for packed documents, on the CPU, from their definition: the
    backward works from the result and the log-sum-exp that it is given."""

    def scores(q: Tensor, k: Tensor, v: Tensor, left: int | None, right: int | None, scale: float) -> Tensor:
        k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        s = scale * torch.einsum("btha,bsha->hts", q, k)
        seen = all_visible(q.shape[1], k.shape[1], left, right, None, None, 1, q.device)
        return s if seen is None else s.masked_fill(~seen, -torch.inf)

    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_starts: Tensor,
        k_starts: Tensor,
        q_length: int,
        k_length: int,
        dropout: float,
        causal: bool,
        debug: bool,
        *,
        scale: float,
        window_size_left: int,
        window_size_right: int,
    ) -> tuple[Tensor, ...]:
        assert q_length >= q_starts.diff().max() and k_length >= k_starts.diff().max() and dropout == 0
        assert q_starts.dtype == k_starts.dtype == torch.int32 and q.stride(-1) == 1
        assert causal == ((window_size_left, window_size_right) == (-1, 0))
        call = by_document(q, k, v, q_starts, k_starts, window_size_left, window_size_right)
        out = torch.cat([y[0] for y in call(partial(plainly, scale=scale))])
        lse = torch.cat([s.logsumexp(-1) for s in call(partial(scores, scale=scale))], 1)
        return out, lse, q.new_zeros(2), q.new_zeros(0), q.new_zeros(0)

    def backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        q_starts: Tensor,
        k_starts: Tensor,
        q_length: int,
        k_length: int,
        dropout: float,
        causal: bool,
        rng: Tensor,
        unused: Tensor,
        *,
        scale: float,
        window_size_left: int,
        window_size_right: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        groups, repeats = k.shape[1], q.shape[1] // k.shape[1]
        call = by_document(q, k, v, q_starts, k_starts, window_size_left, window_size_right)
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        spans = zip(*(itertools.pairwise(x.tolist()) for x in (q_starts, k_starts)))
        for s, ((a, b), (c, d)) in zip(call(partial(scores, scale=scale)), spans):
            p = torch.exp(s - lse[:, a:b, None])
            dy, wide_v = dout[a:b], v[c:d].repeat_interleave(repeats, 1)
            dp = torch.einsum("tha,sha->hts", dy, wide_v)
            ds = scale * p * (dp - (dy * out[a:b]).sum(-1).T.unsqueeze(-1))
            dq[a:b] = torch.einsum("hts,sha->tha", ds, k[c:d].repeat_interleave(repeats, 1))
            dk[c:d] = torch.einsum("hts,tha->sha", ds, q[a:b]).unflatten(1, (groups, repeats)).sum(2)
            dv[c:d] = torch.einsum("hts,tha->sha", p, dy).unflatten(1, (groups, repeats)).sum(2)
        return dq, dk, dv

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
        yield


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize(
    ("keys", "options"),
    [
        (None, {"cu_seqlens": cuts(0, 5, 20, 21, 40)}),
        (None, {"cu_seqlens": cuts(0, 5, 20, 21, 40), "causal": False, "window": (4, 2)}),
        (None, {"window": 7}),
        (None, {"causal": False, "window": (0, 6)}),
        (33, {}),
        (33, {"causal": False}),
    ],
)
def test_varlen_lays_out_what_the_kernels_take(
    keys: int | None, options: dict[str, Any], sink: bool, flash_on_cpu: None, agree: Callable[..., None]
) -> None:
    def through_varlen(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None = None) -> Tensor:
        given = captured(q, k, v, sink)
        return varlen.attention(q, k, v, **given)

    def captured(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None) -> dict[str, Any]:
        left, right = options.get("window"), None
        if isinstance(left, tuple):
            left, right = left
        elif left is not None:
            left -= 1
        right = 0 if options.get("causal", True) else right
        given = {"softcap": None, "sink": sink, "mask": None, "dropout": None, "scale": 8**-0.5}
        return {**given, "left": left, "right": right, "cu_seqlens": options.get("cu_seqlens")}

    inputs = make_inputs(20, keys)
    if sink:
        inputs["sink"] = torch.randn(4, dtype=torch.float64)
    agree(through_varlen, partial(attention, form="reference", **options), inputs)


@pytest.mark.parametrize("sink", [False, True])
def test_varlen_registration(sink: bool, flash_on_cpu: None) -> None:
    q, k, v = (x.flatten(0, 1).float().requires_grad_() for x in make_inputs(10).values())
    logit = torch.randn(4, requires_grad=True) if sink else None
    starts = cuts(0, 5, 12, 20)
    rest = (8, 8, 3, 0, 0.3)
    torch.library.opcheck(varlen.attention_varlen_op, (q, k, v, starts, starts, logit, *rest))
    q, k, v, logit = (None if x is None else x.detach() for x in (q, k, v, logit))
    with FlopCounterMode(display=False) as counter:
        out, total = varlen.attention_varlen_op(q, k, v, starts, starts, logit, *rest)
        assert counter.get_total_flops() == 2 * 20 * 4 * 4 * (8 + 8)  # four keys in the window
        backward = (torch.randn_like(out), q, k, v, starts, starts, logit, out, total, *rest)
        varlen.attention_varlen_backward_op(*backward)
        assert counter.get_total_flops() == 2 * 20 * 4 * 4 * 7 * 8
    torch.library.opcheck(varlen.attention_varlen_backward_op, backward)


def fake_package(version: int) -> types.ModuleType:
    """A module with the functions of flash-attn 2, 3 or 4 by their documentation, and no other arguments."""
    module = types.ModuleType("flash")

    def run(
        q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, window: Any, **rest: Any
    ) -> Tensor:
        left, right = (None if x in (None, -1) else x for x in window)
        right = 0 if causal else right
        return plainly(q, k, v, left, right, scale=softmax_scale, **rest)

    none = (None, None) if version == 4 else (-1, -1)

    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: Any = none,
        softcap: float = 0.0,
        deterministic: bool = False,
        **sink: Any,
    ) -> Any:
        assert set(sink) <= ({"learnable_sink"} if version == 4 else set()) and deterministic
        rest = {"softcap": softcap or None, "sink": sink.get("learnable_sink")}
        out = run(q, k, v, softmax_scale, causal, window_size, **rest)
        return (out, None) if version == 4 else out

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        **rest: Any,
    ) -> Any:
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
        bounds = list(itertools.pairwise(cu_seqlens_q.tolist()))
        parts = [flash_attn_func(q[None, a:b], k[None, a:b], v[None, a:b], **rest) for a, b in bounds]
        if version == 4:
            return torch.cat([out[0] for out, _ in parts]), None
        return torch.cat([out[0] for out in parts])

    def _flash_attn_bwd(learnable_sink: Any = None) -> None: ...

    module.flash_attn_func, module.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    module.interface = types.SimpleNamespace(_flash_attn_bwd=_flash_attn_bwd)
    return module


PACKAGES = {2: "flash_attn", 3: "flash_attn_interface", 4: "flash_attn.cute"}


@pytest.mark.parametrize("version", PACKAGES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False},
        {"window": 5},
        {"causal": False, "window": (3, 100), "softcap": 2.0},
        {"cu_seqlens": cuts(0, 5, 20, 21, 40), "window": 5, "scale": 0.3},
        {"sink": torch.tensor([0.0, 1.0, -1.0, 2.0])},
    ],
)
def test_adapters_pass_what_packages_document(
    version: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, PACKAGES[version], fake_package(version))
    name = {2: "flash_attn", 3: "flash_attn_3", 4: "flash_attn_4"}[version]
    form = dispatch._FORMS["attention"][name]
    monkeypatch.setitem(
        dispatch._FORMS["attention"], name, dispatch.Form(name, form.run, supports=form.supports)
    )
    inputs: dict[str, Any] = make_inputs(20, dtype=torch.bfloat16)
    run = partial(attention, **inputs, **options)
    if "sink" in options and version < 4:
        with pytest.raises(ValueError, match="it has no sink"):
            run(form=name)
        return
    torch.testing.assert_close(run(form=name), run(form="reference"), rtol=1e-2, atol=1e-2)


def call_of(**changes: Any) -> dict[str, Any]:
    """The arguments of a form's call, half precision, with changes."""
    shape = changes.pop("shape", (1, 16, 2, 64))
    q = torch.zeros(shape, dtype=changes.pop("dtype", torch.bfloat16))
    names = ("left", "right", "cu_seqlens", "softcap", "sink", "mask", "dropout")
    return {"q": q, "k": q, "v": q, "scale": 1.0, **dict.fromkeys(names), **changes}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"dtype": torch.float32}, "float16 and bfloat16, not float32"),
        ({"shape": (1, 16, 2, 20)}, "multiples of 8 up to 256, not 20"),
        ({"shape": (1, 16, 2, 264)}, "multiples of 8 up to 256, not 264"),
        ({"mask": torch.ones(1, 1, 16, 16)}, "no mask"),
        ({"dropout": lambda p: p}, "generator"),
        ({"v": torch.zeros(1, 16, 2, 32)}, "need one head dim"),
        ({"sink": torch.zeros(2)}, "no sink"),
    ],
)
def test_flash_attention_says_what_it_cannot(changes: dict[str, Any], reason: str | None) -> None:
    found = {2: external.supports_2, 3: external.supports_3, 4: external.supports_4}
    for version, supports in found.items():
        why = supports(**call_of(**changes))
        if version == 4 and "sink" in changes:
            reason = None
        assert (why is None) if reason is None else (why is not None and reason in why)


def test_forms_say_what_they_cannot() -> None:
    window, sink = {"left": 3, "right": 0}, torch.zeros(2)
    varlen_cannot = {
        "plain batch": {"right": 0},
        "no softcap": {"softcap": 1.0, **window},
        "take no mask": {"mask": torch.ones(1, 1, 16, 16), **window},
        "not float32": {"dtype": torch.float32, **window},
    }
    for reason, changes in varlen_cannot.items():
        assert reason in str(varlen.supports(**call_of(**changes)))
    for changes in (window, {"sink": sink}, {"cu_seqlens": cuts(0, 3, 16)}, {"left": None, "right": 3}):
        assert varlen.supports(**call_of(**changes)) is None
    leaf = torch.zeros(1, 16, 2, 64, requires_grad=True)
    assert "no backward on the CPU" in str(flex.supports(**call_of(q=leaf)))
    assert "no deterministic gradient" in str(flex.supports(**call_of(mask=leaf)))
    assert "no dropout" in str(flex.supports(**call_of(dropout=lambda p: p)))
    meta = call_of(sink=sink, mask=leaf)
    assert "no gradient of the mask" in str(sdpa.supports(**meta))
    assert "one head dim" in str(sdpa.supports(**call_of(sink=sink, v=leaf[..., :8])))
    rows = [row for row in dispatch.table("cpu") if row.op == "attention"]
    assert [row.form for row in rows] == EVERY_FORM
    assert [row.form for row in rows if row.default] == ["sdpa"]
    with pytest.raises(RuntimeError, match="form='varlen' cannot run on cpu: PyTorch has"):
        attention(**make_inputs(4), form="varlen")


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
    rest = {"sink": torch.zeros(4), "window": 2}
    torch.testing.assert_close(
        attention(**inputs, **rest, dropout=lambda p: 2 * p), 2 * attention(**inputs, **rest)
    )
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


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops_with_a_sink(device: str) -> None:
    inputs = make_inputs(16, dtype=torch.float32) | {"sink": torch.zeros(4)}
    leaves = {k: v.to(device).requires_grad_() for k, v in inputs.items()}
    with FlopCounterMode(display=False) as counter:
        y = attention(**leaves)
        assert counter.get_total_flops() == 4 * 2 * 4 * 16 * 16 * 8
        y.sum().backward()
    assert counter.get_total_flops() == (4 + 10) * 2 * 4 * 16 * 16 * 8
    assert all(x.grad.shape == x.shape for x in leaves.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 6, 4)}, r"q must be \(B, T, H, D\)"),
        ({"q": torch.zeros(2, 6, 4, 7)}, "must have one head dim"),
        ({"q": torch.zeros(2, 6, 3, 8)}, "2 key/value heads do not divide 3 heads"),
        ({"q": torch.zeros(2, 7, 4, 8)}, "causal needs S >= T"),
        ({"window": 0}, "window=0 must be at least 1"),
        ({"window": (2, 3)}, r"window=\(2, 3\) sees to the right; it needs causal=False"),
        ({"window": (2, -1), "causal": False}, r"must be \(left, right\), two ints of at least 0"),
        ({"window": (2, 3, 4), "causal": False}, r"must be \(left, right\)"),
        ({"softcap": 0.0}, r"softcap=0\.0 must be above 0"),
        ({"sink": torch.zeros(2)}, r"sink must be \(H,\) = \(4,\), it is \(2,\)"),
        ({"sink": torch.zeros(4, dtype=torch.int32)}, "sink must be floating"),
        ({"sink": torch.zeros(4, device="meta")}, "sink is on meta and q on cpu; move it"),
        (
            {"mask": torch.zeros(2, 3, 6, 6)},
            r"broadcast to \(B, H, T, S\) = \(2, 4, 6, 6\); it is .*2, 3, 6, 6",
        ),
        ({"mask": torch.zeros(6, 6, dtype=torch.int64)}, "mask must be bool or floating"),
        ({"mask": torch.zeros(1, 1, 1, 6, 6)}, "mask must be"),
        ({"k": torch.zeros(2, 6, 2, 8, device="meta")}, "k is on meta"),
        ({"q": torch.zeros(2, 6, 4, 8, dtype=torch.int64)}, "q must be floating"),
        ({"q": torch.zeros(2, 0, 4, 8)}, "every size must be at least 1"),
        ({"form": "flash"}, "form='flash' does not exist; use one of"),
        ({"window": 3, "causal": False}, "needs causal=True"),
        ({"q": torch.zeros(2, 5, 4, 8), "cu_seqlens": torch.tensor([0, 5, 10])}, "cu_seqlens needs S = T"),
        ({"cu_seqlens": torch.tensor([0, 6, 13])}, "end at"),
    ],
)
def test_errors_say_what_to_mend(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(**{**make_inputs(6, dtype=torch.float32), **change})
