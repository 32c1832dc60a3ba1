"""Product keys against the scores of all experts."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch.utils.checkpoint import checkpoint

from tests.models.common import random_tokens, small_config, small_model, window_of
from tests.models.regions import check_cuts
from tests.models.routing import HIDDEN, randomize, tasks_config, tokens
from triptych import models
from triptych.models.context import Context
from triptych.models.feedforwards.product_keys import ProductKeys

HEADS, KEYS, TOP_K, SIZE = 2, 5, 3, 6


def build(**settings) -> ProductKeys:
    section = {"num_experts": KEYS**2, "num_heads": HEADS, "top_k": TOP_K, "key_size": SIZE} | settings
    layer = ProductKeys(tasks_config(product_keys=section, ffn={"intermediate_size": 16}), 1).double()
    randomize(layer)
    return layer


def dense(layer: ProductKeys, x: torch.Tensor) -> torch.Tensor:
    """Every query's score with every expert, and every expert for every token."""
    x = x.flatten(0, 1)
    out_NEC = F.gelu(x @ layer.down.T, approximate="tanh").unsqueeze(-1) * layer.up
    y = torch.zeros_like(x)
    for h in range(HEADS):
        q = x @ layer.query_proj.weight[h * SIZE : (h + 1) * SIZE].T
        q = F.layer_norm(q, (SIZE,), eps=layer.query_norm.eps)
        first, second = q.chunk(2, dim=-1)
        rows, columns = first @ layer.keys[h, 0].T, second @ layer.keys[h, 1].T
        scores_NE = (rows.unsqueeze(2) + columns.unsqueeze(1)).flatten(1)
        best, experts = scores_NE.sort(dim=1, descending=True)
        gates = torch.zeros_like(scores_NE).scatter(1, experts[:, :TOP_K], best[:, :TOP_K].softmax(-1))
        y = y + torch.einsum("ne,nec->nc", gates, out_NEC)
    return y


@pytest.mark.parametrize("shared", [True, False])
def test_equals_dense_scoring_of_all_experts(shared):
    layer, x = build(shared=shared), tokens().requires_grad_()
    y = layer(x, Context())
    expected = dense(layer, x).view_as(x)
    if layer.shared is not None:
        expected = expected + layer.shared(x, Context())
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-11)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    inputs = (x, *layer.parameters())
    found = torch.autograd.grad((y * weights).sum(), inputs)
    oracle = torch.autograd.grad((expected * weights).sum(), inputs)
    for a, b in zip(found, oracle):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_partial_sums_of_shards_add_up():
    """Heads cut over two ranks; the tables' gradients are partial sums."""
    layer, x = build(), tokens()
    y = layer(x, Context())
    y.square().sum().backward()
    cuts = layer.sharding | {f"shared.{name}": cut for name, cut in layer.shared.sharding.items()}
    total, table = 0, 0
    for rank in range(2):
        local = build()
        for path, part in local.named_modules():
            for name, value in list(part.named_parameters(recurse=False)):
                cut = cuts[f"{path}.{name}" if path else name]
                window = window_of(cut, value.shape, 2, rank)
                setattr(part, name, torch.nn.Parameter(value.detach()[window].clone()))
        part = local(x, Context())
        (part * 2 * y.detach()).sum().backward()
        total, table = total + part.detach(), table + local.down.grad
    torch.testing.assert_close(total, y.detach(), rtol=0, atol=1e-11)
    torch.testing.assert_close(table, layer.down.grad, rtol=1e-10, atol=1e-11)


def test_cut_over_ranks(distributed):
    section = {"num_experts": 25, "num_heads": 2, "top_k": 3, "key_size": 6}
    check_cuts(small_config(pattern=["none+product_keys"], product_keys=section), distributed)


def test_what_no_query_finds_learns_nothing():
    layer, x = build(shared=False), tokens(1, 2)
    layer(x, Context()).sum().backward()
    learned = layer.down.grad.abs().sum(1) > 0
    assert 0 < learned.sum() <= 2 * HEADS * TOP_K < KEYS**2
    assert layer.down.grad.isfinite().all() and layer.keys.grad.isfinite().all()


def test_recomputation_gives_the_same_gradients():
    found = {}
    for again in (False, True):
        layer, x = build(), tokens().requires_grad_()
        y = checkpoint(layer, x, Context(), use_reentrant=False) if again else layer(x, Context())
        y.square().sum().backward()
        found[again] = [x.grad, *(p.grad for p in layer.parameters())]
    for a, b in zip(found[False], found[True]):
        assert torch.equal(a, b)


def test_counts():
    layer = build()
    shared = 3 * HIDDEN * 16
    met = 2 * HEADS * TOP_K * HIDDEN
    queries, keys = HIDDEN * HEADS * SIZE, HEADS * KEYS * SIZE
    assert layer.active_parameters() == shared + met + queries + keys
    assert layer.flops(8) == 2 * 8 * (shared + met + queries + keys)
    total = sum(p.numel() for p in layer.parameters())
    assert total - layer.active_parameters() == 2 * KEYS**2 * HIDDEN - met


def test_in_a_language_model():
    section = {"num_experts": 25, "num_heads": 2, "top_k": 3, "key_size": 6}
    config = small_config(pattern=["attention+product_keys", "mamba2+product_keys"], product_keys=section)
    model = small_model(config)
    x = random_tokens(config, 2, 9)
    model(x, targets=x).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    changed = x.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % config.vocab_size
    assert torch.equal(model(x)[:, :5], model(changed)[:, :5])
    count = models.parameter_count(config)
    assert count["active"] < count["total"]
    with torch.device("meta"):
        shapes = models.build(config)
        x = torch.zeros(2, 9, dtype=torch.int64)
        shapes(x, targets=x).sum().backward()


def test_bf16_autocast():
    layer, x = build().float(), tokens().float()
    expected = layer(x, Context())
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, Context())
    torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.5)
    y.float().sum().backward()
    assert layer.keys.grad.isfinite().all() and layer.keys.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_experts": 1000}, r"num_experts=1000 is not a square.* use 961 or 1024"),
        ({"key_size": 7}, r"key_size=7 is odd.* use 8"),
        ({"num_experts": 4, "top_k": 5}, r"top_k=5 exceeds num_experts=4"),
    ],
)
def test_sizes_that_do_not_go_together(settings, words):
    with pytest.raises(ValidationError, match=words):
        tasks_config(pattern=["attention+product_keys"], product_keys=settings)
