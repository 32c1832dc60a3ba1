"""A hybrid's blocks under torch.compile(fullgraph=True): one graph each, and the same results."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

from triptych.models import LanguageConfig, LanguageModel, initialize
from triptych.models.context import Context

B, T, C = 2, 48, 32
PATTERN = ["mamba2", "attention", "mamba1", "mlstm"]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    config = LanguageConfig.model_validate({
        "family": "lm",
        "vocab_size": 64,
        "hidden_size": C,
        "num_layers": len(PATTERN),
        "pattern": PATTERN,
        "attention": {"num_heads": 4, "num_kv_heads": 2},
        "mamba2": {"state_size": 16, "head_dim": 16, "num_groups": 2, "chunk_size": 16},
        "mamba1": {"state_size": 8},
        "mlstm": {"num_heads": 2},
        "ffn": {"kind": "swiglu", "intermediate_size": 64},
    })  # fmt: skip
    made = LanguageModel(config)
    initialize(made, seed=0)
    return made


def packed() -> Context:
    bounds = [0, 20, 48, 75, 96]
    lengths = torch.tensor(bounds).diff().tolist()
    positions = torch.cat([torch.arange(length) for length in lengths]).view(B, T)
    return Context(cu_seqlens=torch.tensor(bounds, dtype=torch.int32), positions=positions)


def step(block: torch.nn.Module, context: Context, backend: str | None) -> list[Tensor]:
    """Output, and gradients of input and parameters."""
    torch._dynamo.reset()
    x = torch.randn(B, T, C, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def forward(x: Tensor) -> Tensor:
        return block(x, context)

    run = forward if backend is None else torch.compile(forward, fullgraph=True, backend=backend)
    y = run(x)
    block.zero_grad()
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in block.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize("documents", ["whole", pytest.param("packed", marks=pytest.mark.slow)])
@pytest.mark.parametrize("layer", range(len(PATTERN)), ids=PATTERN)
def test_a_block_is_one_graph(model: LanguageModel, layer: int, documents: str) -> None:
    context = packed() if documents == "packed" else Context()
    block = model.blocks[str(layer)]
    for found, expected in zip(step(block, context, "aot_eager"), step(block, context, None)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles for the CPU with g++")
@pytest.mark.parametrize("layer", [0, 1], ids=PATTERN[:2])
def test_inductor_compiles_it(model: LanguageModel, layer: int) -> None:
    block = model.blocks[str(layer)]
    for found, expected in zip(step(block, Context(), "inductor"), step(block, Context(), None)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
