"""Our language model's weights in the names and fused shapes of transformers' Bamba, and back.

V vocabulary, D hidden size, C channels, K convolution width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

_NORMS_AND_FFN = {
    "input_layernorm.weight": ["mixer_norm.weight"],
    "pre_ff_layernorm.weight": ["ffn_norm.weight"],
    "feed_forward.gate_proj.weight": ["ffn.gate_proj.weight"],
    "feed_forward.up_proj.weight": ["ffn.up_proj.weight"],
    "feed_forward.down_proj.weight": ["ffn.down_proj.weight"],
}
_MIXERS = {
    "mamba": {
        "in_proj.weight": [f"{part}_proj.weight" for part in ("z", "x", "b", "c", "dt")],
        "conv1d.weight": [f"conv_{part}.weight" for part in ("x", "b", "c")],
        "conv1d.bias": [f"conv_{part}.bias" for part in ("x", "b", "c")],
        "dt_bias": ["dt_bias"],
        "A_log": ["a_log"],
        "D": ["d"],
        "norm.weight": ["norm.weight"],
        "out_proj.weight": ["out_proj.weight"],
    },
    "self_attn": {f"{part}_proj.weight": [f"{part}_proj.weight"] for part in ("q", "k", "v", "o")},
}


def names(ours: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Bamba's parameter name -> our names, whose tensors stand one after the other along dim 0 of Bamba's."""
    table = {
        "model.embed_tokens.weight": ["embedding.weight"],
        "model.final_layernorm.weight": ["norm.weight"],
        "lm_head.weight": ["head.weight"],
    }
    layers = {int(name.split(".")[1]) for name in ours if name.startswith("blocks.")}
    for layer in sorted(layers):
        here, there = f"blocks.{layer}.", f"model.layers.{layer}."
        for name, parts in _NORMS_AND_FFN.items():
            table[there + name] = [here + part for part in parts]
        kind = "mamba" if here + "mixer.a_log" in ours else "self_attn"
        for name, parts in _MIXERS[kind].items():
            table[f"{there}{kind}.{name}"] = [f"{here}mixer.{part}" for part in parts]
    return table


@torch.no_grad()
def load_into_transformers(ours: nn.Module, theirs: nn.Module) -> None:
    """Copy our weights into a Bamba of the same shape.

    Raises RuntimeError when either side has a parameter that the other has not.
    """
    mine = dict(ours.named_parameters())
    table = names(mine)
    other = dict(theirs.named_parameters())
    used = {part for parts in table.values() for part in parts}
    if other.keys() != table.keys() or used != mine.keys():
        unknown = sorted(other.keys() ^ table.keys()) + sorted(used ^ mine.keys())
        raise RuntimeError(f"our model and transformers' Bamba have different parameters: {unknown}")
    for name, parts in table.items():
        # Bamba's convolution is (C, 1, K), ours (C, K).
        other[name].copy_(torch.cat([mine[part] for part in parts]).reshape(other[name].shape))


def unfuse(ours: nn.Module, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under Bamba's names (weights or gradients) as tensors under our names, in our shapes."""
    mine = dict(ours.named_parameters())
    found: dict[str, Tensor] = {}
    for name, parts in names(mine).items():
        pieces = theirs[name].split([mine[part].shape[0] for part in parts])
        found |= {part: piece.reshape(mine[part].shape) for part, piece in zip(parts, pieces)}
    return found
