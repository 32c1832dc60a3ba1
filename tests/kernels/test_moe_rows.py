"""Tokens to rows sorted by expert and back, against loops over tokens and slots."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from triptych.kernels import grouped_mlp, moe_combine, moe_gather, moe_plan
from triptych.kernels.moe_rows import plan

EXPERTS = 5
# fp32 sums of K terms, bf16 rounding of the result.
FP32, BF16 = 1e-6, 1e-2


def choices(kind: str, tokens: int = 23, top_k: int = 3) -> Tensor:
    """Experts (N, K), of which no token has one twice."""
    found = torch.rand(tokens, EXPERTS).argsort(-1)[:, :top_k]
    if kind == "dropped":
        found[torch.rand(tokens, top_k) < 0.4] = EXPERTS
    elif kind == "nowhere":
        found[:] = EXPERTS
    elif kind == "one":
        found = torch.full((tokens, 1), 3)
    return found


KINDS = ["all", "dropped", "nowhere", "one"]


@pytest.mark.parametrize("kind", KINDS)
def test_plan_is_a_loop_over_experts_and_tokens(kind: str) -> None:
    experts = choices(kind)
    tokens, slots, counts = moe_plan(experts, EXPERTS)
    expected_tokens, expected_slots = [], torch.full_like(experts, -1)
    for expert in range(EXPERTS):
        for token, k in (experts == expert).nonzero().tolist():
            expected_slots[token, k] = len(expected_tokens)
            expected_tokens.append(token)
    assert tokens.tolist() == expected_tokens
    assert torch.equal(slots, expected_slots)
    assert counts.tolist() == [int((experts == expert).sum()) for expert in range(EXPERTS)]
    assert torch.equal(plan._counts_by_sorting(experts.flatten(), EXPERTS + 1)[:-1], counts), "as on a GPU"
    assert {x.dtype for x in (tokens, slots, counts)} == {torch.int64}


def test_plan_of_many_experts_and_of_no_tokens() -> None:
    experts = torch.randint(0, 40_000, (500, 4))
    tokens, slots, counts = moe_plan(experts, 40_000)
    assert torch.equal(experts.flatten().sort(stable=True).indices // 4, tokens)
    assert torch.equal(tokens[slots], torch.arange(500).unsqueeze(1).expand(500, 4))
    assert torch.equal(counts, experts.flatten().bincount(minlength=40_000))
    tokens, slots, counts = moe_plan(torch.empty(0, 2, dtype=torch.int64), 3)
    assert tokens.shape == (0,) and slots.shape == (0, 2) and counts.tolist() == [0, 0, 0]


@pytest.mark.parametrize("bad", [-1, EXPERTS + 1])
def test_plan_refuses_experts_that_do_not_exist(bad: int) -> None:
    with pytest.raises(ValueError, match=rf"experts must lie in 0 \.\. 5 .*{bad}"):
        moe_plan(torch.tensor([[0, bad]]), EXPERTS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("form", "dtype"), [("torch", torch.float64), ("torch", torch.float32), ("triton", torch.float64)]
)
def test_gather_and_combine_are_indexing(
    agree: Callable[..., None], kind: str, dtype: torch.dtype, form: str
) -> None:
    experts = choices(kind)
    tokens, slots, _ = moe_plan(experts, EXPERTS)
    tolerance = 1e-12 if dtype == torch.float64 else FP32
    if kind != "nowhere":
        x = {"x": torch.randn(experts.shape[0], 7, dtype=dtype), "tokens": tokens, "slots": slots}
        agree(partial(moe_gather, form=form), partial(moe_gather, form="reference"), x, tolerance)
    rows = {
        "rows": torch.randn(tokens.shape[0], 7, dtype=dtype),
        "weights": torch.rand(experts.shape, dtype=dtype),
        "slots": slots,
        "tokens": tokens,
    }
    agree(partial(moe_combine, form=form), partial(moe_combine, form="reference"), rows, tolerance)


def test_rows_longer_than_a_block(agree: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("triptych.kernels.moe_rows.triton")
    monkeypatch.setattr(module, "LARGEST_BLOCK", 16)
    tokens, slots, _ = moe_plan(choices("dropped", tokens=7), EXPERTS)

    def both(x: Tensor, weights: Tensor, form: str) -> Tensor:
        return moe_combine(moe_gather(x, tokens, slots, form=form), weights, slots, tokens, form=form)

    inputs = {"x": torch.randn(7, 37, dtype=torch.float64), "weights": torch.rand(7, 3, dtype=torch.float64)}
    agree(partial(both, form="triton"), partial(both, form="reference"), inputs)


def test_strided_rows(agree: Callable[..., None]) -> None:
    tokens, slots, _ = moe_plan(choices("all", tokens=7), EXPERTS)

    def both(x: Tensor, weights: Tensor) -> Tensor:
        rows = moe_gather(x.mT.contiguous().mT, tokens, slots, form="triton").mT.contiguous().mT
        return moe_combine(rows, weights.mT.contiguous().mT, slots, tokens, form="triton")

    def plain(x: Tensor, weights: Tensor) -> Tensor:
        return x * weights.sum(1, keepdim=True)

    agree(both, plain, {"x": torch.randn(7, 5).double(), "weights": torch.rand(7, 3).double()})


def test_plan_of_all_rows() -> None:
    experts = choices("dropped")
    tokens, slots, counts = moe_plan(experts, EXPERTS, all_rows=True)
    fewer, same_slots, same_counts = moe_plan(experts, EXPERTS)
    assert tokens.shape[0] == experts.numel() > fewer.shape[0] == int(counts.sum())
    assert torch.equal(tokens[: fewer.shape[0]], fewer)
    assert torch.equal(slots, same_slots) and torch.equal(counts, same_counts)


def test_all_rows_give_what_those_of_experts_do(agree: Callable[..., None]) -> None:
    """A layer of experts that never looks at the counts, whatever stands in the rows of no expert."""
    experts = choices("dropped")

    def layer(x: Tensor, weights: Tensor, up: Tensor, down: Tensor, all_rows: bool, form: str) -> Tensor:
        tokens, slots, counts = moe_plan(experts, EXPERTS, all_rows=all_rows)
        rows = moe_gather(x, tokens, slots, form=form)
        rows = grouped_mlp(rows, up, down, counts, activation="gelu", form=form)
        return moe_combine(rows, weights, slots, tokens, form=form)

    inputs = {
        "x": torch.randn(experts.shape[0], 6, dtype=torch.float64),
        "weights": torch.rand(experts.shape, dtype=torch.float64),
        "up": torch.randn(EXPERTS, 9, 6, dtype=torch.float64),
        "down": torch.randn(EXPERTS, 6, 9, dtype=torch.float64),
    }
    ours = partial(layer, all_rows=True, form="triton")
    agree(ours, partial(layer, all_rows=False, form="reference"), inputs)


@pytest.mark.parametrize("form", ["torch", "triton"])
def test_no_rows_at_all_have_gradients_of_zero(form: str) -> None:
    tokens, slots, _ = moe_plan(choices("nowhere"), EXPERTS)
    x, weights = torch.randn(23, 7, requires_grad=True), torch.rand(23, 3, requires_grad=True)
    rows = moe_gather(x, tokens, slots, form=form)
    assert rows.shape == (0, 7)
    y = moe_combine(rows, weights, slots, tokens, form=form)
    assert not y.any()
    y.sum().backward()
    for leaf in (x, weights):
        assert leaf.grad is not None and not leaf.grad.any()


def test_combine_is_a_loop_over_slots() -> None:
    experts = choices("dropped")
    tokens, slots, _ = moe_plan(experts, EXPERTS)
    rows, weights = torch.randn(tokens.shape[0], 7, dtype=torch.float64), torch.rand(experts.shape)
    expected = torch.zeros(experts.shape[0], 7, dtype=torch.float64)
    for n, k in (slots >= 0).nonzero().tolist():
        expected[n] += weights[n, k].double() * rows[slots[n, k]]
    torch.testing.assert_close(moe_combine(rows, weights, slots, tokens), expected)


def test_gradcheck() -> None:
    experts = choices("dropped", tokens=6)
    tokens, slots, _ = moe_plan(experts, EXPERTS)
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(experts.shape, dtype=torch.float64, requires_grad=True)

    def there_and_back(x: Tensor, weights: Tensor) -> Tensor:
        return moe_combine(moe_gather(x, tokens, slots).square(), weights, slots, tokens)

    assert torch.autograd.gradcheck(there_and_back, (x, weights))


@pytest.mark.parametrize("form", ["torch", "triton"])
def test_bf16_rows_with_fp32_weights(accurate: Callable[..., None], form: str) -> None:
    experts = choices("dropped")
    tokens, slots, _ = moe_plan(experts, EXPERTS)
    inputs = {
        "rows": torch.randn(tokens.shape[0], 16).bfloat16(),
        "weights": torch.rand(experts.shape),
        "slots": slots,
        "tokens": tokens,
    }
    ours = partial(moe_combine, form=form)
    assert ours(**inputs).dtype == torch.bfloat16
    accurate(ours, partial(moe_combine, form="reference"), inputs, BF16)


@pytest.mark.parametrize("form", ["torch", "triton"])
def test_a_slot_without_row_reads_nothing(form: str) -> None:
    """Whatever stands in row 0, and whatever the weight of the missing slot."""
    experts = torch.tensor([[0, 1], [EXPERTS, EXPERTS]])
    tokens, slots, _ = moe_plan(experts, EXPERTS)
    rows = torch.full((2, 4), torch.inf, requires_grad=True)
    weights = torch.tensor([[1.0, 1.0], [torch.nan, torch.inf]], requires_grad=True)
    y = moe_combine(rows, weights, slots, tokens, form=form)
    assert y[0].isinf().all() and not y[1].any()
    y.backward(torch.ones_like(y))
    assert weights.grad is not None and not weights.grad[1].any()
    assert rows.grad is not None and torch.equal(rows.grad, torch.ones(2, 4))
    x = torch.randn(2, 4, requires_grad=True)
    moe_gather(x, tokens, slots).backward(torch.full((2, 4), torch.inf))
    assert x.grad is not None and not x.grad[1].any()


def test_tokens_in_chunks_are_tokens(
    monkeypatch: pytest.MonkeyPatch, with_gradients: Callable[..., dict[str, Tensor]]
) -> None:
    from triptych.kernels.moe_rows import torch as fast

    experts = choices("dropped")
    tokens, slots, _ = moe_plan(experts, EXPERTS)
    inputs = {
        "rows": torch.randn(tokens.shape[0], 7),
        "weights": torch.rand(experts.shape),
        "slots": slots,
        "tokens": tokens,
    }
    whole = with_gradients(moe_combine, inputs)
    monkeypatch.setattr(fast, "CHUNK_ELEMENTS", 7 * 4)
    for name, value in with_gradients(moe_combine, inputs).items():
        assert torch.equal(value, whole[name]), name


@pytest.mark.parametrize("mode", ["meta", "fake"])
def test_without_values(mode: str) -> None:
    fake = FakeTensorMode()
    send: Callable[[Tensor], Tensor] = fake.from_tensor if mode == "fake" else (lambda y: y.to("meta"))
    x, weights = (send(y).requires_grad_() for y in (torch.randn(6, 4), torch.rand(6, 2)))
    tokens, slots, counts = moe_plan(send(torch.zeros(6, 2, dtype=torch.int64)), EXPERTS)
    assert tokens.shape == (12,) and slots.shape == (6, 2) and counts.shape == (EXPERTS,)
    y = moe_combine(moe_gather(x, tokens, slots), weights, slots, tokens)
    assert y.shape == (6, 4)
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert weights.grad is not None and weights.grad.shape == weights.shape


@pytest.mark.parametrize("suffix", ["", "_triton"])
def test_registered_operators(suffix: str) -> None:
    if suffix:
        pytest.importorskip("triptych.kernels.moe_rows.triton")
    tokens, slots, _ = moe_plan(choices("dropped"), EXPERTS)
    x, rows = (torch.randn(n, 7, requires_grad=True) for n in (slots.shape[0], tokens.shape[0]))
    weights = torch.rand(slots.shape, requires_grad=True)
    gather, combine = (getattr(torch.ops.triptych, f"moe_{name}{suffix}") for name in ("gather", "combine"))
    torch.library.opcheck(gather.default, (x, tokens, slots))
    torch.library.opcheck(combine.default, (rows, weights, slots, tokens))


def test_shapes_that_do_not_fit() -> None:
    tokens, slots, _ = moe_plan(choices("all"), EXPERTS)
    rows, weights = torch.randn(tokens.shape[0], 7), torch.rand(slots.shape)
    with pytest.raises(ValueError, match=r"slots \(23, 3\) must have a row for each of the 22 tokens"):
        moe_gather(torch.randn(22, 7), tokens, slots)
    with pytest.raises(ValueError, match=r"weights \(23, 2\) must have the shape of slots \(23, 3\)"):
        moe_combine(rows, weights[:, :2], slots, tokens)
    with pytest.raises(ValueError, match=r"tokens must be \(69,\), one per row; they are \(68,\)"):
        moe_combine(rows, weights, slots, tokens[1:])
    with pytest.raises(ValueError, match=r"expected rows \(A, C\)"):
        moe_combine(rows[0], weights, slots, tokens)
