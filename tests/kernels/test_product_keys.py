"""Product keys against the scores of all experts, and rank-one experts against fetched vectors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from triptych.kernels import product_key_topk, rank_one_experts
from triptych.kernels.product_keys.retrieval import pairs, scatter_add_in_turn

# fp32 sums of some tens of terms in another order; bf16: rounding of intermediate results.
FP32, BF16 = 1e-5, 2e-2
ACTIVATIONS = ["gelu", "silu", "relu"]


def retrieval_inputs(n: int, dtype: torch.dtype = torch.float64, tokens: int = 9) -> dict[str, Tensor]:
    return {"queries": torch.randn(tokens, 3, 6, dtype=dtype), "keys": torch.randn(3, 2, n, 3, dtype=dtype)}


def expert_inputs(
    dtype: torch.dtype = torch.float64, tokens: int = 11, experts: int = 10
) -> dict[str, Tensor]:
    """Of the experts, the last has no token, and tokens have experts twice."""
    return {
        "x": torch.randn(tokens, 6, dtype=dtype),
        "down": torch.randn(experts, 6, dtype=dtype),
        "up": torch.randn(experts, 6, dtype=dtype),
        "experts": torch.randint(experts - 1, (tokens, 2, 3)),
        "weights": torch.rand(tokens, 2, 3, dtype=dtype),
    }


@pytest.mark.parametrize(("n", "top_k"), [(5, 1), (5, 3), (5, 5), (5, 25), (4, 7), (1, 1), (30, 8)])
def test_topk_is_the_topk_of_all_scores(agree: Callable[..., None], n: int, top_k: int) -> None:
    inputs = retrieval_inputs(n)
    scores, experts = product_key_topk(**inputs, top_k=top_k)
    first, second = inputs["queries"].chunk(2, -1)
    keys = inputs["keys"]
    every = torch.stack(
        [(first * keys[:, 0, e // n] + second * keys[:, 1, e % n]).sum(-1) for e in range(n * n)], -1
    )
    expected, places = every.topk(top_k, -1)
    torch.testing.assert_close(scores, expected)
    assert torch.equal(experts, places)
    plain = partial(product_key_topk, top_k=top_k, form="reference")
    agree(lambda **x: product_key_topk(**x, top_k=top_k)[0], lambda **x: plain(**x)[0], inputs)


def test_topk_in_fp32_and_of_bf16_queries(agree: Callable[..., None]) -> None:
    inputs = retrieval_inputs(5, torch.float32)
    plain = partial(product_key_topk, top_k=4, form="reference")
    agree(lambda **x: product_key_topk(**x, top_k=4)[0], lambda **x: plain(**x)[0], inputs, FP32)
    queries = inputs["queries"].bfloat16()
    scores, experts = product_key_topk(queries, inputs["keys"], 4)
    expected = product_key_topk(queries.float(), inputs["keys"], 4)
    assert scores.dtype == torch.float32 and torch.equal(scores, expected[0])
    assert torch.equal(experts, expected[1])


def test_equal_scores_give_different_experts() -> None:
    scores, experts = product_key_topk(torch.zeros(2, 1, 4), torch.zeros(1, 2, 4, 2), 8)
    assert not scores.any()
    assert all(len(set(one)) == 8 for one in experts.squeeze(1).tolist())


def test_adding_in_turn_is_adding() -> None:
    x, values, places = torch.zeros(4, 3, 5), torch.randn(4, 3, 7), torch.randint(5, (4, 3, 7))
    expected = torch.zeros_like(x).scatter_add_(-1, places, values)
    assert torch.equal(scatter_add_in_turn(x, places, values), expected)


def test_pairs_hold_whatever_can_be_among_the_best() -> None:
    for top_k, keys in ((8, 64), (3, 5), (20, 6)):
        kept = set(zip(*pairs(top_k, keys), strict=True))
        assert len(kept) >= top_k
        # A pair is left out only if k others, which cannot be smaller, come before it.
        for i in range(keys):
            for j in range(keys):
                assert ((i, j) in kept) or (i + 1) * (j + 1) - 1 >= top_k
    assert len(pairs(8, 64)[0]) == 20


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_experts_are_the_formula(agree: Callable[..., None], activation: str) -> None:
    ours = partial(rank_one_experts, activation=activation)
    agree(ours, partial(ours, form="reference"), expert_inputs())
    agree(ours, partial(ours, form="reference"), expert_inputs(torch.float32), FP32)


def test_experts_are_a_loop() -> None:
    one = expert_inputs()
    expected = torch.zeros_like(one["x"])
    for n in range(11):
        for e, w in zip(one["experts"][n].flatten().tolist(), one["weights"][n].flatten()):
            inner = torch.nn.functional.gelu(one["x"][n] @ one["down"][e], approximate="tanh")
            expected[n] += w * inner * one["up"][e]
    torch.testing.assert_close(rank_one_experts(**one), expected)


def test_experts_of_more_than_16_bits() -> None:
    one = expert_inputs(experts=40_000)
    torch.testing.assert_close(rank_one_experts(**one), rank_one_experts(**one, form="reference"))
    for name in ("down", "up"):
        gradients = []
        for form in (None, "reference"):
            leaf = one[name].clone().requires_grad_()
            rank_one_experts(**one | {name: leaf}, form=form).square().sum().backward()
            gradients.append(leaf.grad)
        torch.testing.assert_close(*gradients)


def test_one_expert_for_all(agree: Callable[..., None]) -> None:
    plain = partial(rank_one_experts, form="reference")
    agree(rank_one_experts, plain, expert_inputs() | {"experts": torch.full((11, 2, 3), 4)})


def test_no_tokens() -> None:
    one = {k: v.requires_grad_(v.is_floating_point()) for k, v in expert_inputs(tokens=0).items()}
    found = {k: v.requires_grad_() for k, v in retrieval_inputs(5, tokens=0).items()}
    y = rank_one_experts(**one)
    scores, experts = product_key_topk(**found, top_k=4)
    assert y.shape == (0, 6) and scores.shape == experts.shape == (0, 3, 4)
    (y.sum() + scores.sum()).backward()
    for leaf in (*one.values(), *found.values()):
        assert not leaf.requires_grad or (leaf.grad is not None and not leaf.grad.any())


def test_bf16(accurate: Callable[..., None]) -> None:
    inputs = expert_inputs(torch.bfloat16)
    accurate(rank_one_experts, partial(rank_one_experts, form="reference"), inputs, BF16)
    mixed = inputs | {
        "weights": inputs["weights"].float(),
        "down": inputs["down"].float(),
        "up": inputs["up"].float(),
    }
    assert rank_one_experts(**mixed).dtype == torch.bfloat16
    accurate(rank_one_experts, partial(rank_one_experts, form="reference"), mixed, BF16)


def test_gradcheck() -> None:
    one = expert_inputs(tokens=4)
    names = ("x", "down", "up", "weights")

    def run(*tensors: Tensor) -> Tensor:
        return rank_one_experts(experts=one["experts"], **dict(zip(names, tensors)))

    assert torch.autograd.gradcheck(run, [one[name].requires_grad_() for name in names])
    queries = {k: v.requires_grad_() for k, v in retrieval_inputs(4, tokens=3).items()}
    assert torch.autograd.gradcheck(lambda q, k: product_key_topk(q, k, 3)[0], tuple(queries.values()))


def test_no_tensor_of_tokens_times_experts_times_channels() -> None:
    """The largest tensor that an operator makes, forward or backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            for y in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(y, Tensor):
                    self.size = max(self.size, y.numel())
            return result

    tokens, channels, chosen = 64, 48, 20
    x, table = (
        torch.randn(tokens, channels, requires_grad=True),
        torch.randn(30, channels, requires_grad=True),
    )
    experts = torch.randint(30, (tokens, chosen))
    from triptych.kernels.product_keys import rank_one

    with Largest() as largest, torch.no_grad():
        y, inner = rank_one.forward(x, table, table, experts, torch.rand(tokens, chosen), "gelu")
        rank_one.backward(y, inner, x, table, table, experts, torch.rand(tokens, chosen), "gelu")
    assert largest.size == tokens * channels


@pytest.mark.parametrize("mode", ["meta", "fake"])
def test_without_values(mode: str) -> None:
    fake = FakeTensorMode()
    send: Callable[[Tensor], Tensor] = fake.from_tensor if mode == "fake" else (lambda y: y.to("meta"))
    one = {k: send(v).requires_grad_(v.is_floating_point()) for k, v in expert_inputs().items()}
    y = rank_one_experts(**one)
    assert y.shape == (11, 6)
    found = {k: send(v).requires_grad_() for k, v in retrieval_inputs(5).items()}
    scores, experts = product_key_topk(**found, top_k=4)
    assert scores.shape == experts.shape == (9, 3, 4) and experts.dtype == torch.int64
    (y.sum() + scores.sum()).backward()
    for leaf in (*one.values(), *found.values()):
        assert not leaf.is_floating_point() or (leaf.grad is not None and leaf.grad.shape == leaf.shape)


def test_registered_operators() -> None:
    one = {k: v.requires_grad_(v.is_floating_point()) for k, v in expert_inputs(torch.float32).items()}
    flat = (one["x"], one["down"], one["up"], one["experts"].flatten(1), one["weights"].detach().flatten(1))
    torch.library.opcheck(torch.ops.triptych.rank_one_experts.default, (*flat, "gelu"))
    found = [v.requires_grad_() for v in retrieval_inputs(5, torch.float32).values()]
    torch.library.opcheck(torch.ops.triptych.product_key_topk.default, (*found, 4))


def test_flops_are_counted() -> None:
    one = {k: v.requires_grad_(v.is_floating_point()) for k, v in expert_inputs(torch.float32).items()}
    with FlopCounterMode(display=False) as counter:
        rank_one_experts(**one).sum().backward()
    # 11 tokens of 6 experts of 2 x 6 numbers: once forward, twice backward, two per multiply-add.
    assert counter.get_total_flops() == 2 * 3 * 11 * 6 * 12


def test_what_does_not_fit() -> None:
    queries, keys = retrieval_inputs(5).values()
    with pytest.raises(ValueError, match=r"top_k=26 must lie in 1 \.\. 25"):
        product_key_topk(queries, keys, 26)
    with pytest.raises(ValueError, match=r"keys have 2 channels, which must be half of the queries' 6"):
        product_key_topk(queries, keys[..., :2], 2)
    with pytest.raises(ValueError, match=r"keys \(H, 2, n, D/2\)"):
        product_key_topk(queries, keys[:2], 2)
    one = expert_inputs()
    with pytest.raises(ValueError, match=r"activation='tanh' does not exist"):
        rank_one_experts(**one, activation="tanh")
    with pytest.raises(ValueError, match=r"must have one shape, \(11, \.\.\.\)"):
        rank_one_experts(**one | {"weights": one["weights"][:, :1]})
    with pytest.raises(ValueError, match=r"down \(E, C\)"):
        rank_one_experts(**one | {"down": one["down"][:, :5]})
