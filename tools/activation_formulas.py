"""What backward needs of one block in 16-bit precision, term by term, as arithmetic on its sizes.

s tokens of a sequence, b sequences of a micro-batch, h hidden size, a attention heads, i inner channels and H
heads of Mamba-2, G groups, N state, q tokens of a chunk, t tensor-parallel degree; r = t with sequence
parallelism, else 1; g = max(G / t, 1) groups on a rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from triptych.models import LanguageConfig
from triptych.parallel.config import ParallelConfig


@dataclass(frozen=True)
class Term:
    """Something kept, the bytes that the formula gives it, and the formula."""

    name: str
    num_bytes: int
    formula: str = ""


@dataclass(frozen=True)
class Block:
    """A model of one block, and the micro-batch that goes through it."""

    name: str
    model: LanguageConfig
    batch: int
    seq_len: int


def attention_block(*, batch: int, seq_len: int, hidden_size: int, num_heads: int) -> Block:
    """The layer of arXiv 2205.05198: attention and a GELU MLP of 4h, layer norms, three dropouts; scores are
    materialised, and positions are not the block's business."""
    model = LanguageConfig.model_validate({
        "vocab_size": 2,
        "hidden_size": hidden_size,
        "num_layers": 1,
        "pattern": ["attention+gelu"],
        "attention": {
            "num_heads": num_heads, "rope_theta": None, "bias": True, "dropout": 0.1, "form": "reference",
        },
        "ffn": {"kind": "gelu", "bias": True},
        "norm": "layernorm",
        "dropout": 0.1,
    })  # fmt: skip
    return Block("attention+gelu", model, batch, seq_len)


def mamba2_block(
    *,
    batch: int,
    seq_len: int,
    hidden_size: int,
    head_dim: int = 64,
    state_size: int = 128,
    num_groups: int = 8,
    chunk_size: int = 64,
) -> Block:
    """A Mamba-2 block as published: RMS norm and mixer, no feed-forward, no dropout."""
    model = LanguageConfig.model_validate({
        "vocab_size": 2,
        "hidden_size": hidden_size,
        "num_layers": 1,
        "pattern": ["mamba2+none"],
        "mamba2": {
            "head_dim": head_dim, "state_size": state_size,
            "num_groups": num_groups, "chunk_size": chunk_size,
        },
    })  # fmt: skip
    return Block("mamba2", model, batch, seq_len)


def attention_terms(block: Block, parallel: ParallelConfig) -> list[Term]:
    """Table 2 of arXiv 2205.05198, of which the last line is extended to sequence parallelism (2sbh/r)."""
    s, b, h, a = block.seq_len, block.batch, block.model.hidden_size, block.model.attention.num_heads
    t = parallel.tp
    r = t if parallel.sequence_parallel else 1
    if parallel.recompute == "full":
        return [Term("input of the block", 2 * s * b * h // r, "2sbh/r")]
    terms = [
        Term("inputs of the two layer norms", 4 * s * b * h // r, "4sbh/r"),
        Term("inputs of q, k, v and of up projection", 4 * s * b * h // r, "4sbh/r"),
        Term("masks of the two residual dropouts", 2 * s * b * h // r, "2sbh/r"),
        Term("q, k, v", 6 * s * b * h // t, "6sbh/t"),
        Term("input of the output projection", 2 * s * b * h // t, "2sbh/t"),
        Term("inputs of GELU and of down projection", 16 * s * b * h // t, "16sbh/t"),
    ]
    if parallel.recompute == "none":
        terms.append(Term("softmax, its dropout's mask and output", 5 * a * s * s * b // t, "5as²b/t"))
    return terms


def mamba2_terms(block: Block, parallel: ParallelConfig) -> list[Term]:
    """The same for Mamba-2."""
    model = block.model
    s, b, h = block.seq_len, block.batch, model.hidden_size
    i, heads = model.mamba2_inner_size, model.mamba2_num_heads
    n, q = model.mamba2.state_size, min(model.mamba2.chunk_size, block.seq_len)
    t = parallel.tp
    r = t if parallel.sequence_parallel else 1
    g = max(model.mamba2.num_groups // t, 1)
    if parallel.recompute == "full":
        return [Term("input of the block", 2 * s * b * h // r, "2sbh/r")]
    terms = [
        Term("input of the norm", 2 * s * b * h // r, "2sbh/r"),
        Term("1/rms of the norm, fp32", 4 * s * b // r, "4sb/r"),
        Term("input of the projections", 2 * s * b * h // r, "2sbh/r"),
        Term("gate z", 2 * s * b * i // t, "2sbi/t"),
        Term("x before the convolution", 2 * s * b * i // t, "2sbi/t"),
        Term("b and c before the convolution", 4 * s * b * g * n, "4sbgN"),
        Term("input of the output projection", 2 * s * b * i // t, "2sbi/t"),
    ]
    if parallel.recompute == "selective":
        return [*terms, Term("dt as projected", 2 * s * b * heads // t, "2sbH/t")]
    return [
        *terms,
        Term("x after the convolution", 2 * s * b * i // t, "2sbi/t"),
        Term("b and c after the convolution", 4 * s * b * g * n, "4sbgN"),
        *_dt_terms(block, s * b * heads // t),
        Term("states before the chunks, fp32", 4 * b * -(-s // q) * i * n // t, "4b⌈s/q⌉iN/t"),
        Term("y of the scan", 2 * s * b * i // t, "2sbi/t"),
        Term("1/rms of the gated norm, fp32", 4 * s * b * g, "4sbg"),
    ]


def _dt_terms(block: Block, num_dt: int) -> list[Term]:
    """dt of every token and head on a rank, `num_dt` of them; limits that limit nothing are not applied."""
    if block.model.mamba2.dt_limit == (0.0, math.inf):
        return [Term("dt before and after softplus, fp32", 8 * num_dt, "8sbH/t")]
    return [Term("dt before softplus, after it, after the limits, fp32", 12 * num_dt, "12sbH/t")]


FORMULAS: dict[str, Callable[[Block, ParallelConfig], list[Term]]] = {
    "attention+gelu": attention_terms,
    "mamba2": mamba2_terms,
}
