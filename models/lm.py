"""The language model: embedding, blocks, norm, head; whole, or one pipeline stage of it.

Shape legend: B batch, T length, C hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from triptych.models.block import build_blocks
from triptych.models.cache import Cache
from triptych.models.config import LanguageConfig
from triptych.models.context import build_context
from triptych.models.dropout import salt_dropouts
from triptych.models.norms import build_norm
from triptych.models.vocabulary import Embedding, Head


class LanguageModel(nn.Module):
    """A model or stage of it, built on the default device (torch.device("meta") for sizes alone).

    layers: blocks of this stage, None for all. first: with the embedding. last: with norm and head.
    Names of parameters are those of the whole model in every stage: the blocks keep their numbers.
    Values are unset (NaN) until `models.init.initialize`.
    Raises ValueError for layers outside the model, and for tied embeddings cut between stages.
    """

    main_input: ClassVar[str] = "tokens"
    several_outputs: ClassVar[bool] = False
    targets_inside: ClassVar[bool] = True

    def __init__(
        self, config: LanguageConfig, layers: range | None = None, first: bool = True, last: bool = True
    ) -> None:
        super().__init__()
        if config.tie_embeddings and first != last:
            raise ValueError(
                "model.tie_embeddings=true needs embedding and head in one stage; "
                "use parallel.pp=1, or model.tie_embeddings=false"
            )
        self.config = config
        self.embedding = Embedding(config) if first else None
        self.blocks = build_blocks(config, layers)
        self.norm = build_norm(config) if last else None
        self.head = Head(config) if last else None
        salt_dropouts(self)

    @property
    def exit(self) -> Any:
        """What stands behind the last block, None in other stages."""
        return self.head

    def uses(self, part: str) -> int:
        """How often a forward pass goes through a part outside the blocks."""
        return 1

    @staticmethod
    def keywords(batch: Mapping[str, Any]) -> dict[str, Any]:
        """What every stage is called with besides its main input, of the batch."""
        names = ("document_ids", "sample_keys")
        return {name: batch[name] for name in names if batch.get(name) is not None}

    @staticmethod
    def between(config: LanguageConfig, batch: Mapping[str, Any], layer: int, shards: int) -> list[Any]:
        """Shapes of what enters block `layer` from a stage before; behind the last block, of the output.

        shards: parts in which T is cut.
        """
        rows, length = batch["tokens"].shape
        if layer == config.num_layers:
            return [(rows, length)]
        return [(rows, length // shards, config.hidden_size)]

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
