"""Parameters and FLOPs that a configuration means, from the real shapes; no weights are allocated."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from triptych.models.config import ModelConfig
from triptych.models.lm import LanguageModel


@dataclass(frozen=True)
class BlockCount:
    """Parameters of one block. kind: such as "mamba2+swiglu"; active: those that one token meets."""

    layer: int
    kind: str
    mixer: int
    ffn: int
    norms: int
    total: int
    active: int


def parameter_count(config: ModelConfig) -> dict[str, Any]:
    """{"total", "active", "embedding", "head", "norm": int, "per_block": [BlockCount as dict]}.

    active: parameters that one token meets; all of them in a dense model. head is 0 with tied embeddings.
    """
    model = build_on_meta(config)
    blocks = []
    for block in model.blocks.values():
        mixer, ffn, total = _size(block.mixer), _size(block.ffn), _size(block)
        count = BlockCount(block.layer, block.kind, mixer, ffn, total - mixer - ffn, total, active=total)
        blocks.append(asdict(count))
    parts = {"embedding": _size(model.embedding), "head": _size(model.head), "norm": _size(model.norm)}
    total = sum(parts.values()) + sum(block["total"] for block in blocks)
    return {"total": total, "active": total, **parts, "per_block": blocks}


def flops_per_token(config: ModelConfig, seq_len: int) -> dict[str, Any]:
    """Forward FLOPs per token: {"total", "head": float, "per_kind": {kind: of one block}}.

    Two per multiply-add. Attention scores count whole (T x T), causal or not, as in torch.utils.flop_counter;
    norms, activations and the embedding do not count. Forward and backward together are three times as much.
    """
    model = build_on_meta(config)
    per_kind = {block.kind: block.flops(seq_len) / seq_len for block in model.blocks.values()}
    assert model.head is not None, "a whole model has a head"
    head = model.head.flops(seq_len) / seq_len
    total = head + sum(per_kind[block.kind] for block in model.blocks.values())
    return {"total": total, "head": head, "per_kind": per_kind}


def build_on_meta(config: ModelConfig) -> LanguageModel:
    """The whole model without storage."""
    with torch.device("meta"):
        return LanguageModel(config)


def _size(module: nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())
