"""Fused linear cross-entropy: against full logits, in chunks, cut over the vocabulary, in low precision."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from triptych.kernels import linear_cross_entropy
from triptych.kernels.linear_cross_entropy import operators

FP32_FLOOR = 2e-6
BF16_FLOOR = 8e-3  # one rounding to bf16 is 2^-8


def make_inputs(tokens: int = 13, vocab: int = 11, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    targets = torch.randint(0, vocab, (tokens,))
    targets[2] = targets[5] = -100
    return {
        "hidden": torch.randn(tokens, 6, dtype=dtype),
        "weight": torch.randn(vocab, 6, dtype=dtype),
        "targets": targets,
    }


def plain(
    hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0, softcap: float | None = None
) -> Tensor:
    logits = hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    penalty = z_loss * logits.logsumexp(-1).square() * (targets != -100)
    return F.cross_entropy(logits, targets, reduction="none") + penalty


FORMS = ["torch", "triton", "reference"]


@pytest.mark.parametrize(("z_loss", "softcap"), [(0.0, None), (1e-2, None), (1e-2, 3.0)])
@pytest.mark.parametrize(
    ("form", "chunk_size"),
    [*((form, size) for form in ("torch", "reference") for size in (None, 1, 4, 13, 100)), ("triton", 4)],
)
def test_agrees_with_full_logits(
    form: str, chunk_size: int | None, z_loss: float, softcap: float | None, agree: Callable[..., None]
) -> None:
    """Under a cotangent for each token, from gradients made in forward or in backward."""
    for recompute in (False, True):
        function = partial(
            linear_cross_entropy, chunk_size=chunk_size, z_loss=z_loss, softcap=softcap, form=form,
            recompute=recompute,
        )  # fmt: skip
        agree(function, partial(plain, z_loss=z_loss, softcap=softcap), make_inputs())


@pytest.mark.parametrize(
    ("form", "tokens"), [*(("torch", tokens) for tokens in (1, 63, 64, 65)), ("triton", 1), ("triton", 65)]
)
def test_numbers_of_tokens(form: str, tokens: int, agree: Callable[..., None]) -> None:
    inputs = make_inputs(max(tokens, 6), 37)
    inputs = {k: v if k == "weight" else v[-tokens:] for k, v in inputs.items()}
    agree(partial(linear_cross_entropy, form=form, chunk_size=32), plain, inputs)


@pytest.mark.parametrize("tokens", [500, 1000])
def test_many_tokens(tokens: int, agree: Callable[..., None]) -> None:
    agree(partial(linear_cross_entropy, chunk_size=96), plain, make_inputs(tokens, 50))


def test_rows_longer_than_a_block(agree: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("triptych.kernels.linear_cross_entropy.triton")
    monkeypatch.setattr(module, "BLOCK", 16)
    function = partial(linear_cross_entropy, z_loss=1e-2, form="triton")
    agree(function, partial(plain, z_loss=1e-2), make_inputs(7, 75))


@pytest.mark.parametrize("form", ["torch", "triton"])
def test_one_cotangent_for_all_tokens(
    form: str, agree: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then nothing is computed again, whatever the cotangents of ignored tokens are."""
    options = {"z_loss": 1e-2, "softcap": 3.0}
    inputs = make_inputs()
    factors = torch.full((13,), -0.7, dtype=torch.float64)
    factors[2] = 5.0
    found: list[bool] = []
    looked = operators.uniform

    def look(cotangent: Tensor, counted: Tensor) -> Tensor | None:
        factor = looked(cotangent, counted)
        found.append(factor is not None)
        return factor

    monkeypatch.setattr(operators, "uniform", look)

    def weighted(function: Callable[..., Tensor], weights: Tensor, **one: Tensor) -> Tensor:
        return (function(**one, **options) * weights).sum()

    ours = partial(linear_cross_entropy, form=form)
    for weights in (factors, factors * torch.arange(13)):
        agree(partial(weighted, ours, weights), partial(weighted, plain, weights), inputs)
    assert found == [True, False]


@pytest.mark.parametrize("weighted", [False, True])
def test_backward_twice_and_use_twice(weighted: bool) -> None:
    inputs = make_inputs()
    leaves = [inputs["hidden"].requires_grad_(), inputs["weight"].requires_grad_()]
    factors = torch.rand(13, dtype=torch.float64) if weighted else torch.tensor(2.0, dtype=torch.float64)
    nll, expected = linear_cross_entropy(**inputs), plain(**inputs)
    for loss, truth in (
        (nll * factors, expected * factors),
        (nll * nll + nll, expected * expected + expected),
    ):
        ours = torch.autograd.grad(loss.sum(), leaves, retain_graph=True)
        theirs = torch.autograd.grad(truth.sum(), leaves, retain_graph=True)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_either_input_alone_has_gradients(frozen: str) -> None:
    inputs = make_inputs()
    leaf = inputs["weight" if frozen == "hidden" else "hidden"].requires_grad_()
    found = torch.autograd.grad(linear_cross_entropy(**inputs).sum(), leaf)[0]
    torch.testing.assert_close(found, torch.autograd.grad(plain(**inputs).sum(), leaf)[0])


def test_strided_inputs(agree: Callable[..., None]) -> None:
    def strided(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        every_other = torch.stack([targets, targets], 1).flatten()[::2]
        return linear_cross_entropy(
            hidden.mT.contiguous().mT, weight.mT.contiguous().mT, every_other, form="triton"
        )

    agree(strided, plain, make_inputs())


def test_numerical_gradients() -> None:
    inputs = {k: v[:4] for k, v in make_inputs(6, 5).items()}
    targets = torch.tensor([1, -100, 3, 0])

    def function(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, z_loss=1e-2, softcap=2.0)

    assert torch.autograd.gradcheck(function, [inputs[k].requires_grad_() for k in ("hidden", "weight")])


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


def one_kernel_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter serves one thread."""
    from triptych.kernels.linear_cross_entropy import triton

    lock, launch = threading.Lock(), triton.launch

    def alone(*args: Any, **kwargs: Any) -> None:
        with lock:
            launch(*args, **kwargs)

    monkeypatch.setattr(triton, "launch", alone)


@pytest.mark.parametrize("form", FORMS)
def test_cut_over_the_vocabulary(
    form: str,
    with_gradients: Callable[..., dict[str, Tensor]],
    errors: Callable[..., dict[str, float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if form == "triton":
        one_kernel_at_a_time(monkeypatch)
    inputs = make_inputs()
    inputs["hidden"][3] *= 1e3  # one shard then has probability 0
    bounds = [0, 4, 5, 11]
    board: dict[int, Tensor] = {}
    gate = threading.Barrier(3, timeout=30)
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


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_fp32_accuracy(form: str, softcap: float | None, accurate: Callable[..., None]) -> None:
    inputs = make_inputs(200 if form == "torch" else 40, 300, torch.float32)
    function = partial(linear_cross_entropy, softcap=softcap)
    accurate(partial(function, form=form), partial(function, form="reference"), inputs, FP32_FLOOR)


@pytest.mark.parametrize("form", ["torch", "triton"])
def test_bf16_accuracy(form: str, accurate: Callable[..., None]) -> None:
    inputs = make_inputs(60, 75, torch.bfloat16)
    inputs["hidden"] *= 0.3
    function = partial(linear_cross_entropy, softcap=5.0, z_loss=1e-3, chunk_size=48)
    accurate(partial(function, form=form), partial(function, form="reference"), inputs, BF16_FLOOR)


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


def test_sums_that_fp16_cannot_hold() -> None:
    """The gradient of a mean can be, though that of the sum is beyond 65504."""
    hidden, targets = torch.full((4000, 2), 40.0), torch.zeros(4000, dtype=torch.int64)
    weight = torch.zeros(3, 2).half().requires_grad_()
    # On the CPU the products of a chunk are rounded to fp16 before they are added up.
    linear_cross_entropy(hidden.half(), weight, targets, chunk_size=500).mean().backward()
    expected = 40.0 * torch.tensor([-2 / 3, 1 / 3, 1 / 3]).unsqueeze(1).expand(3, 2)
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad.float(), expected, rtol=2e-3, atol=0)


def test_bf16_inputs_give_fp32_losses() -> None:
    inputs = make_inputs(dtype=torch.bfloat16)
    nll = linear_cross_entropy(**inputs)
    assert nll.dtype == torch.float32
    wide = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    torch.testing.assert_close(nll, plain(**wide), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("suffix", ["", "_triton"])
def test_registration(suffix: str) -> None:
    if suffix:
        pytest.importorskip("triptych.kernels.linear_cross_entropy.triton")
    inputs = make_inputs()
    targets = inputs["targets"].clamp_min(-1)
    hidden, weight = inputs["hidden"].requires_grad_(), inputs["weight"].requires_grad_()
    ops = torch.ops.triptych
    options = (targets, 0, 4, torch.float64, 3.0)
    torch.library.opcheck(getattr(ops, f"linear_logsumexp{suffix}").default, (hidden, weight, *options))
    lse, picked = torch.randn(2, 13, dtype=torch.float64)
    one = (lse, picked, lse, hidden.detach(), weight.detach(), *options, True, True)
    torch.library.opcheck(getattr(ops, f"linear_logsumexp{suffix}_backward").default, one)
    options = (targets, 4, torch.float64, 3.0, 1e-2, True)
    loss_op = getattr(ops, f"linear_cross_entropy{suffix}").default
    # All outputs but the first have no gradient, which the check of autograd does not know.
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(loss_op, (hidden, weight, *options), test_utils=checks[:2])
    kept = loss_op(hidden.detach(), weight.detach(), *options)[1:]
    one = (picked, *kept, hidden.detach(), weight.detach(), *options)
    torch.library.opcheck(getattr(ops, f"linear_cross_entropy{suffix}_backward").default, one)


def flops(recompute: bool) -> int:
    inputs = make_inputs()
    hidden, weight = inputs["hidden"].requires_grad_(), inputs["weight"].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(hidden, weight, inputs["targets"], recompute=recompute).sum().backward()
    return counter.get_total_flops()


def test_flops() -> None:
    inputs = make_inputs()
    hidden, weight = inputs["hidden"].requires_grad_(), inputs["weight"].requires_grad_()
    with FlopCounterMode(display=False) as full:
        plain(hidden, weight, inputs["targets"]).sum().backward()
    assert flops(recompute=False) == full.get_total_flops() > 0
    assert 3 * flops(recompute=True) == 4 * full.get_total_flops(), "the logits are computed twice"


@pytest.mark.parametrize("recompute", [False, True])
def test_saves_no_logits(recompute: bool) -> None:
    inputs = make_inputs(tokens=64, vocab=512)
    leaves = [inputs["hidden"].requires_grad_(), inputs["weight"].requires_grad_()]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear_cross_entropy(**inputs, recompute=recompute)
    given = {leaf.data_ptr() for leaf in leaves}
    kept = sum(t.numel() for t in saved if t.data_ptr() not in given)
    gradients = 0 if recompute else sum(leaf.numel() for leaf in leaves)
    assert kept <= gradients + 3 * 64, "at most the gradients and numbers per token"


def test_compiles_and_runs_without_values() -> None:
    inputs = make_inputs()
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(compiled(**inputs), linear_cross_entropy(**inputs))
    leaves = {k: v.to("meta").requires_grad_(v.is_floating_point()) for k, v in inputs.items()}
    linear_cross_entropy(**leaves).sum().backward()
    assert all(v.grad is not None and v.grad.shape == v.shape for k, v in leaves.items() if k != "targets")


def liger_refuses(**change: object) -> str | None:
    from triptych.kernels.linear_cross_entropy.external import supports_liger

    one = make_inputs(dtype=torch.bfloat16) | change
    options = {"shards": None, "chunk_size": None, "matmul_dtype": torch.bfloat16} | change
    tensors = {k: one[k] for k in ("hidden", "weight", "targets")}
    return supports_liger(**tensors, **{k: v for k, v in options.items() if k not in tensors})


def test_liger_is_called_as_it_is_written(peers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    path = "liger_kernel.transformers.functional"
    liger = pytest.importorskip(path, exc_type=ImportError)
    from triptych.kernels.linear_cross_entropy import external

    signature = inspect.signature(liger.liger_fused_linear_cross_entropy)
    calls: list[inspect.BoundArguments] = []
    monkeypatch.setattr(
        liger, "liger_fused_linear_cross_entropy", lambda *a, **k: calls.append(signature.bind(*a, **k))
    )
    inputs = make_inputs(dtype=torch.bfloat16)
    external.liger(**inputs, softcap=30.0, z_loss=1e-4, shards=None)
    given = calls[0].arguments
    assert given["target"] is inputs["targets"] and given["input"] is inputs["hidden"]
    assert (given["softcap"], given["lse_square_scale"], given["reduction"]) == (30.0, 1e-4, "none")
    assert given["accum_dtype"] == torch.float32


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"shards": object()}, "no shards"),
        ({"chunk_size": 8}, "leave chunk_size out"),
        ({"matmul_dtype": torch.float64}, "not torch.float64"),
        ({"weight": torch.zeros(11, 6), "matmul_dtype": torch.float32}, "multiplies what has one dtype"),
    ],
)
def test_what_liger_cannot_do(change: dict[str, object], reason: str | None, peers: None) -> None:
    found = liger_refuses(**change)
    assert found is None if reason is None else reason in str(found)


def test_older_ligers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from triptych.kernels.linear_cross_entropy import external

    monkeypatch.setattr(external, "_version", lambda: "0.6.2")
    assert "0.6.2 gives all tokens one cotangent" in str(liger_refuses())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(11, 5)}, r"hidden must be \(N, D\) and weight \(V, D\)"),
        ({"targets": torch.zeros(4, dtype=torch.long)}, r"targets must be \(13,\)"),
        ({"targets": torch.full((13,), 11)}, "but the vocabulary has 11 rows"),
        ({"chunk_size": 0}, "chunk_size=0 must be at least 1"),
        ({"softcap": 0.0}, "softcap=0.0 must be above 0"),
        ({"form": "fast"}, "form='fast' does not exist"),
    ],
)
def test_errors_say_what_to_mend(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**make_inputs(), **change})
