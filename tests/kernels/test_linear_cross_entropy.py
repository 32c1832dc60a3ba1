"""Fused linear cross-entropy: against full logits, in chunks, cut over the vocabulary, in low precision."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from triptych.kernels import linear_cross_entropy
from triptych.kernels.linear_cross_entropy.torch import linear_logsumexp_backward_op, linear_logsumexp_op

FP32_FLOOR = 2e-6


def make_inputs(tokens: int = 13, vocab: int = 11, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    targets = torch.randint(0, vocab, (tokens,))
    targets[2] = targets[5] = -100
    return {
        "hidden": torch.randn(tokens, 6, dtype=dtype),
        "weight": torch.randn(vocab, 6, dtype=dtype),
        "targets": targets,
    }


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    logits = hidden @ weight.T
    penalty = z_loss * logits.logsumexp(-1).square() * (targets != -100)
    return F.cross_entropy(logits, targets, reduction="none") + penalty


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("chunk_size", [None, 1, 4, 13, 100])
@pytest.mark.parametrize("form", ["torch", "reference"])
def test_agrees_with_full_logits(
    form: str, chunk_size: int | None, z_loss: float, agree: Callable[..., None]
) -> None:
    function = partial(linear_cross_entropy, chunk_size=chunk_size, z_loss=z_loss, form=form)
    agree(function, partial(plain, z_loss=z_loss), make_inputs())


def test_ignored_tokens_have_neither_loss_nor_gradient() -> None:
    inputs = make_inputs()
    hidden = inputs["hidden"].requires_grad_()
    nll = linear_cross_entropy(hidden, inputs["weight"], inputs["targets"], z_loss=0.1)
    nll.sum().backward()
    assert hidden.grad is not None
    assert nll[2] == nll[5] == 0 and not hidden.grad[[2, 5]].any() and hidden.grad[[0, 1]].any()
    everywhere = torch.full_like(inputs["targets"], 3)
    assert not linear_cross_entropy(hidden, inputs["weight"], everywhere, ignore_index=3).any()


def test_large_logits_stay_finite() -> None:
    inputs = make_inputs(dtype=torch.float32)
    inputs["hidden"] = (1e4 * inputs["hidden"]).requires_grad_()
    nll = linear_cross_entropy(**inputs)
    nll.sum().backward()
    torch.testing.assert_close(nll, plain(**inputs))
    assert inputs["hidden"].grad is not None and inputs["hidden"].grad.isfinite().all()


class ThreadShards:
    """All-reduces between threads, each of which holds a part of the vocabulary."""

    def __init__(
        self, rank: int, start: int, parties: int, board: dict[int, Tensor], gate: threading.Barrier
    ):
        self.rank, self.start, self.parties, self.board, self.gate = rank, start, parties, board, gate

    def _gathered(self, x: Tensor) -> Tensor:
        assert not x.requires_grad, "the verbs carry no gradient"
        self.board[self.rank] = x.clone()
        self.gate.wait()
        everything = torch.stack([self.board[i] for i in range(self.parties)])
        self.gate.wait()
        return everything

    def max(self, x: Tensor) -> Tensor:
        return self._gathered(x).amax(0)

    def sum(self, x: Tensor) -> Tensor:
        return self._gathered(x).sum(0)


@pytest.mark.parametrize("form", ["torch", "reference"])
def test_cut_over_the_vocabulary(
    form: str, with_gradients: Callable[..., dict[str, Tensor]], errors: Callable[..., dict[str, float]]
) -> None:
    inputs = make_inputs()
    inputs["hidden"][3] *= 1e3  # one shard then has probability 0
    bounds = [0, 4, 5, 11]
    board: dict[int, Tensor] = {}
    gate = threading.Barrier(3)
    results: list[dict[str, Tensor]] = [{}, {}, {}]

    def work(rank: int) -> None:
        shards = ThreadShards(rank, bounds[rank], 3, board, gate)
        weight = inputs["weight"][bounds[rank] : bounds[rank + 1]]
        function = partial(linear_cross_entropy, shards=shards, z_loss=1e-2, chunk_size=5, form=form)
        results[rank] = with_gradients(function, inputs | {"weight": weight})

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = with_gradients(partial(linear_cross_entropy, z_loss=1e-2), inputs)
    found = {
        "output 0": results[1]["output 0"],
        "gradient of hidden": torch.stack([r["gradient of hidden"] for r in results]).sum(0),
        "gradient of weight": torch.cat([r["gradient of weight"] for r in results]),
    }
    assert max(errors(found, whole).values()) < 1e-12
    assert all(torch.equal(r["output 0"], found["output 0"]) for r in results)


def test_fp32_accuracy(accurate: Callable[..., None]) -> None:
    inputs = make_inputs(200, 300, torch.float32)
    accurate(linear_cross_entropy, partial(linear_cross_entropy, form="reference"), inputs, FP32_FLOOR)


def test_weight_gradients_accumulate_in_fp32_under_autocast() -> None:
    inputs = make_inputs(4096, 7, torch.float32)
    weight = inputs["weight"].requires_grad_()
    exact = torch.autograd.grad(linear_cross_entropy(**inputs).sum(), weight)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nll = linear_cross_entropy(**inputs, chunk_size=4)
    assert nll.dtype == torch.float32
    found = torch.autograd.grad(nll.sum(), weight)[0]
    assert found.dtype == torch.float32
    # A thousand additions in bf16 would stop at some 2^-8 of the sum and lose several percent.
    assert (found - exact).abs().max() / exact.abs().max() < 5e-3


def test_bf16_inputs_give_fp32_losses() -> None:
    inputs = make_inputs(dtype=torch.bfloat16)
    nll = linear_cross_entropy(**inputs)
    assert nll.dtype == torch.float32
    wide = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    torch.testing.assert_close(nll, plain(**wide), rtol=3e-2, atol=3e-2)


def test_registration_and_flops() -> None:
    inputs = make_inputs()
    targets = inputs["targets"].clamp_min(0)
    options = (targets, 0, 4, torch.float64)
    hidden, weight = inputs["hidden"].requires_grad_(), inputs["weight"].requires_grad_()
    torch.library.opcheck(linear_logsumexp_op, (hidden, weight, *options))
    lse, picked = (v.detach() for v in linear_logsumexp_op(hidden, weight, *options))
    backward = (lse, picked, lse, hidden.detach(), weight.detach(), *options)
    torch.library.opcheck(linear_logsumexp_backward_op, backward)
    with FlopCounterMode(display=False) as fused:
        linear_cross_entropy(hidden, weight, targets).sum().backward()
    with FlopCounterMode(display=False) as full:
        plain(hidden, weight, targets).sum().backward()
    assert 3 * fused.get_total_flops() == 4 * full.get_total_flops(), "the logits are computed twice"


def test_saves_no_logits() -> None:
    inputs = make_inputs(tokens=64, vocab=512)
    leaves = [inputs["hidden"].requires_grad_(), inputs["weight"].requires_grad_()]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear_cross_entropy(**inputs)
    given = {leaf.data_ptr() for leaf in leaves}
    assert max(t.numel() for t in saved if t.data_ptr() not in given) <= 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(11, 5)}, r"hidden must be \(N, D\) and weight \(V, D\)"),
        ({"targets": torch.zeros(4, dtype=torch.long)}, r"targets must be \(13,\)"),
        ({"targets": torch.full((13,), 11)}, "but the vocabulary has 11 rows"),
    ],
)
def test_errors_say_what_to_mend(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**make_inputs(), **change})
