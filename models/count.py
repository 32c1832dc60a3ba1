"""Parameters and FLOPs that a configuration means, from the real shapes; no weights are allocated."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from triptych.models.config import ModelConfig
from triptych.models.families import Model, build


@dataclass(frozen=True)
class BlockCount:
    """Parameters of one block. kind: such as "mamba2+swiglu"; active: those that one token meets."""

    layer: int
    kind: str
    mixer: int
    ffn: int
    other: int
    """Norms, modulation, residual scales, long skips."""
    total: int
    active: int


def parameter_count(config: ModelConfig) -> dict[str, Any]:
    """{"total", "active": int, "parts": {part outside the blocks: int}, "per_block": [BlockCount as dict]}.

    active: parameters that one token meets; all of them in a dense model. head is 0 with tied embeddings.
    """
    model = build_on_meta(config)
    blocks = []
    for block in model.blocks.values():
        mixer, ffn, total = _size(block.mixer), _size(block.ffn), _size(block)
        idle = sum(_size(part) - part.active_parameters() for part in _sparse(block))
        other = total - mixer - ffn
        blocks.append(asdict(BlockCount(block.layer, block.kind, mixer, ffn, other, total, total - idle)))
    parts = {name: _size(part) for name, part in _parts(model).items()}
    total = sum(parts.values()) + sum(block["total"] for block in blocks)
    active = total - sum(block["total"] - block["active"] for block in blocks)
    return {"total": total, "active": active, "parts": parts, "per_block": blocks}


def flops_per_token(config: ModelConfig, seq_len: int) -> dict[str, Any]:
    """Forward FLOPs per token: {"total": float, "parts": {part: float}, "per_kind": {kind: of one block},
    "per_block":
    {layer: float}}. Per token of the first stage; per_kind is of the kind's last block.

    Two per multiply-add. Attention scores count whole (T x T), causal or not, as in torch.utils.flop_counter;
    norms, activations and embeddings do not count. Forward and backward together are three times as much.
    """
    model = build_on_meta(config)
    flops = {
        block.layer: block.flops(config.length_at(block.layer, seq_len)) for block in model.blocks.values()
    }
    per_kind = {block.kind: flops[block.layer] / seq_len for block in model.blocks.values()}
    parts = {
        name: model.uses(name) * part.flops(seq_len) / seq_len
        for name, part in _parts(model).items()
        if hasattr(part, "flops")
    }
    steps = getattr(model, "downsamples", {})
    if steps:
        between = [step.flops(config.length_at(int(layer), seq_len)) for layer, step in steps.items()]
        parts["downsamples"] = sum(between) / seq_len
    total = sum(flops.values()) / seq_len + sum(parts.values())
    per_block = {layer: value / seq_len for layer, value in flops.items()}
    return {"total": total, "parts": parts, "per_kind": per_kind, "per_block": per_block}


def build_on_meta(config: ModelConfig) -> Model:
    """The whole model without storage."""
    with torch.device("meta"):
        return build(config)


def _parts(model: Model) -> dict[str, Any]:
    """What stands outside the blocks."""
    return {name: part for name, part in model.named_children() if name != "blocks"}


def _sparse(block: Any) -> list[Any]:
    """The mixer and feed-forward of a block, where they route tokens to experts."""
    return [part for part in (block.mixer, block.ffn) if hasattr(part, "active_parameters")]


def _size(module: nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())
