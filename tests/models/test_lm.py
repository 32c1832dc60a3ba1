import itertools

import pytest
import torch
import torch.nn.functional as F

from tests.models.common import (
    ThreadShards,
    on_ranks,
    random_tokens,
    set_parameter,
    small_config,
    small_model,
    window_of,
)
from triptych import models

PATTERNS = ["M*", "M-*-", ["mamba2+gelu", "attention+none", "none+swiglu"]]


@pytest.mark.parametrize("residual_scale", ["one", "depth", "learned"])
def test_blocks_add_scaled_branches_of_the_normed_stream(residual_scale):
    config = small_config(num_layers=3, residual_scale=residual_scale)
    model = small_model(config)
    tokens = random_tokens(config, 2, 11)
    x = model.embedding.weight[tokens]
    context = models.Context()
    for block in model.blocks.values():
        for branch, norm, f in [
            (block.mixer_branch, block.mixer_norm, block.mixer),
            (block.ffn_branch, block.ffn_norm, block.ffn),
        ]:
            s = {"one": 1, "depth": 6**-0.5, "learned": branch.scale}[residual_scale]
            x = x + s * f(norm(x), context)
    logits = model.norm(x) @ model.head.weight.T
    torch.testing.assert_close(model(tokens), logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_is_the_cross_entropy_of_the_logits(tie, dtype):
    config = small_config(tie_embeddings=tie)
    model = small_model(config, dtype=dtype)
    assert ("head.weight" in dict(model.named_parameters())) is not tie
    tokens = random_tokens(config, 2, 11)
    targets = random_tokens(config, 2, 11, seed=2)
    targets[0, 3] = -100
    nll = model(tokens, targets=targets)
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="none").view(2, 11)
    assert nll.dtype == dtype and nll[0, 3] == 0
    torch.testing.assert_close(nll, expected)
    nll.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_stages_compose_to_the_whole(pattern):
    config = small_config(num_layers=5, pattern=pattern)
    model = small_model(config)
    whole = dict(model.named_parameters())
    tokens, targets = random_tokens(config, 2, 12), random_tokens(config, 2, 12, seed=2)
    document_ids = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
    x, names = tokens, []
    cuts = [0, 2, 3, 5]
    for stage, (low, high) in enumerate(itertools.pairwise(cuts)):
        part = models.build(config, layers=range(low, high), first=stage == 0, last=stage == 2).double()
        part.load_state_dict({name: whole[name] for name, _ in part.named_parameters()})
        names += [name for name, _ in part.named_parameters()]
        x = part(x, document_ids=document_ids, targets=targets if stage == 2 else None)
    assert sorted(names) == sorted(whole)
    torch.testing.assert_close(x, model(tokens, document_ids=document_ids, targets=targets), rtol=0, atol=0)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("pattern", ["M*", "*"])
def test_packed_documents_equal_separate_ones(pattern, window):
    config = small_config(pattern=pattern, attention={"num_heads": 4, "head_dim": 8, "window": window})
    model = small_model(config)
    tokens = random_tokens(config, 2, 20)
    ids = torch.tensor([[0] * 7 + [1] * 13, [4] * 1 + [5] * 9 + [4] * 10])
    packed = model(tokens, document_ids=ids)
    for row, first, last in [(0, 0, 7), (0, 7, 20), (1, 0, 1), (1, 1, 10), (1, 10, 20)]:
        alone = model(tokens[row : row + 1, first:last])
        torch.testing.assert_close(packed[row : row + 1, first:last], alone, rtol=0, atol=1e-11)


def test_nothing_looks_ahead():
    config = small_config(num_layers=4)
    model = small_model(config)
    tokens = random_tokens(config, 1, 20)
    other = tokens.clone()
    other[:, 13:] = (other[:, 13:] + 1) % config.vocab_size
    a, b = model(tokens), model(other)
    torch.testing.assert_close(a[:, :13], b[:, :13], rtol=0, atol=1e-12)
    assert not torch.allclose(a[:, 13:], b[:, 13:])


@pytest.mark.parametrize("tie", [False, True])
def test_vocabulary_cut_over_shards(tie):
    config = small_config(tie_embeddings=tie)
    model = small_model(config)
    tokens, targets = random_tokens(config, 2, 6), random_tokens(config, 2, 6, seed=2)
    x = torch.randn(2, 6, 24, dtype=torch.float64, requires_grad=True)

    def ends(embedding, head):
        weight = embedding.weight if tie else None
        nll = head(x, targets, weight=weight)
        wrt = [x, embedding.weight if tie else head.weight]
        return [embedding(tokens).detach(), nll.detach(), *torch.autograd.grad(nll.sum(), wrt)]

    def shard(rank, group):
        local = models.build(config).double()
        rows = 40 // 4
        for module, name in [(model.embedding, "embedding"), (model.head, "head")]:
            local.get_submodule(name).shards = ThreadShards(group, rank, start=rank * rows)
            if module.weight is not None:
                value = module.weight[window_of(module.sharding["weight"], module.weight.shape, 4, rank)]
                set_parameter(local, f"{name}.weight", value)
        return ends(local.embedding, local.head)

    vectors, nlls, dxs, dweights = zip(*on_ranks(4, shard))
    expected = ends(model.embedding, model.head)
    torch.testing.assert_close(sum(vectors), expected[0])
    for nll in nlls:
        torch.testing.assert_close(nll, expected[1])
    torch.testing.assert_close(sum(dxs), expected[2])
    torch.testing.assert_close(torch.cat(dweights), expected[3])


def test_every_parameter_of_the_table_exists_and_regions_are_marked():
    config = small_config(pattern=["mamba2", "attention+gelu"], ffn={"intermediate_size": 40, "bias": True})
    model = models.build(config)
    regions = [name for name, module in model.named_modules() if getattr(module, "tp_region", False)]
    expected = [f"blocks.{i}.{part}" for i in range(2) for part in ("mixer", "ffn")]
    assert regions == ["embedding", *expected, "head"]
    for module in model.modules():
        for name in getattr(module, "sharding", {}):
            module.get_parameter(name)
        for name in getattr(module, "selective", ()):
            assert callable(getattr(module, name))


def test_the_model_runs_on_meta_and_in_bfloat16_autocast():
    config = small_config(dropout=0.1)
    with torch.device("meta"):
        model = models.build(config)
        tokens = torch.zeros(2, 16, dtype=torch.int64)
        nll = model(
            tokens, targets=tokens, document_ids=tokens, sample_keys=torch.zeros(2, dtype=torch.int64)
        )
        nll.sum().backward()
    assert nll.shape == (2, 16) and nll.dtype == torch.float32
    model = small_model(config, dtype=torch.float32).eval()
    tokens = random_tokens(config, 2, 16)
    exact = model(tokens, targets=tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(tokens, targets=tokens)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.2)
    rounded.sum().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_illegal_stages_are_refused():
    with pytest.raises(ValueError, match=r"layers=range\(1, 3\) leaves the model; it has model.num_layers=2"):
        models.build(small_config(), layers=range(1, 3))
    with pytest.raises(
        ValueError, match=r"tie_embeddings=true needs embedding and head in one stage; use parallel.pp=1"
    ):
        models.build(small_config(tie_embeddings=True), last=False)


def test_a_model_that_nobody_initialised_gives_nan():
    config = small_config()
    assert models.build(config)(random_tokens(config, 1, 4)).isnan().all()
