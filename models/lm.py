"""The language model: embedding, blocks, norm, head; whole, or one pipeline stage of it.

Shape legend: B batch, T length, C hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import ValuesView
from typing import cast

import torch
from torch import nn

from triptych.models.block import Block
from triptych.models.cache import Cache
from triptych.models.config import ModelConfig
from triptych.models.context import build_context
from triptych.models.dropout import salt_dropouts
from triptych.models.norms import build_norm
from triptych.models.vocabulary import Embedding, Head


class Blocks(nn.ModuleDict):
    """Blocks by their number in the whole model, written as a string."""

    def values(self) -> ValuesView[Block]:
        return cast("ValuesView[Block]", super().values())


class LanguageModel(nn.Module):
    """A model or stage of it, built on the default device (torch.device("meta") for sizes alone).

    layers: blocks of this stage, None for all. first: with the embedding. last: with norm and head.
    Names of parameters are those of the whole model in every stage: the blocks keep their numbers.
    Values are unset (NaN) until `models.init.initialize`.
    Raises ValueError for layers outside the model, and for tied embeddings cut between stages.
    """

    def __init__(
        self, config: ModelConfig, layers: range | None = None, first: bool = True, last: bool = True
    ) -> None:
        super().__init__()
        layers = range(config.num_layers) if layers is None else layers
        if len(layers) and not 0 <= min(layers) <= max(layers) < config.num_layers:
            raise ValueError(f"layers={layers} leaves the model; it has model.num_layers={config.num_layers}")
        if config.tie_embeddings and first != last:
            raise ValueError(
                "model.tie_embeddings=true needs embedding and head in one stage; "
                "use parallel.pp=1, or model.tie_embeddings=false"
            )
        self.config = config
        self.embedding = Embedding(config) if first else None
        specs = config.layer_specs()
        self.blocks = Blocks({str(layer): Block(config, specs[layer], layer) for layer in layers})
        self.norm = build_norm(config) if last else None
        self.head = Head(config) if last else None
        salt_dropouts(self)

    def forward(
        self,
        x: torch.Tensor,
        *,
        document_ids: torch.Tensor | None = None,
        sample_keys: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """One forward pass of the stage.

        x: token ids (B, T) in the first stage, else hidden states (B, T, C), T cut under sequence
            parallelism.
        document_ids: int (B, T), the same id for the tokens of one document; attention, convolution, scan and
            positions begin anew at each. None: each row is one document.
        sample_keys: int64 (B,), for dropout. targets: int (B, T), -100 for none. cache: extended in place.
        Returns in the last stage the cross-entropy of each token (B, T) in fp32 (fp64 in fp64), without
        targets logits (B, T, V); in other stages hidden states like x.
        """
        context = build_context(document_ids, sample_keys, cache)
        length = x.shape[1]
        if self.embedding is not None:
            x = self.embedding(x)
        for block in self.blocks.values():
            x = block(x, context)
        if cache is not None:
            cache.length += length
        if self.norm is None or self.head is None:
            return x
        tied = self.embedding.weight if self.config.tie_embeddings and self.embedding is not None else None
        return self.head(self.norm(x), targets, weight=tied)
