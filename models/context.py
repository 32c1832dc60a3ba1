"""What every block of one forward pass shares.

Shape legend: B batch, T length of the whole sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

if TYPE_CHECKING:
    from triptych.models.cache import Cache
    from triptych.models.positions import Rope
    from triptych.models.scan import Scan


@dataclass(frozen=True)
class Context:
    """Made once per forward pass, passed as `block(x, context)`.

    cu_seqlens: int32 (documents + 1,), where documents begin in the flattened batch; None: each row is one.
    positions: int64 (B, T), each token's place in its document; None: T counted from start.
    start: tokens that the cache holds already.
    sample_keys: int64 (B,), one key per sample for its dropout masks.
    cache: state of a generation, read and extended by the mixers.

    Of denoisers alone, where positions may also be (1 | B, T, A), coordinates on a grid of A axes:
    scan: where the tokens stand, for mixers that scan or shift. rope: rotary frequencies per axis.
    memory: (B, L, C), the embedded text. conditioning: (B, G, C), what modulates the blocks: one vector per
    image, of which a row holds G. images: int64 (B, T), which of the G a token belongs to; None: G is 1.
    shared_modulation: (B, G, 6 C), what low-rank modulations have in common.

    Of routers alone: tasks: int64 (B,), the task of each row; None: there is one. padding: bool (B, T),
    tokens that stand for nothing and go to no expert; None: none do. routing: what routers decided in this
    pass, by their names, so that recomputation repeats it.
    """

    cu_seqlens: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    start: int = 0
    sample_keys: torch.Tensor | None = None
    cache: Cache | None = None
    scan: Scan | None = None
    rope: Rope | None = None
    memory: torch.Tensor | None = None
    conditioning: torch.Tensor | None = None
    images: torch.Tensor | None = None
    shared_modulation: torch.Tensor | None = None
    tasks: torch.Tensor | None = None
    padding: torch.Tensor | None = None
    routing: dict[str, Any] = field(default_factory=dict)

    def positions_of(self, length: int, device: torch.device) -> torch.Tensor:
        """Positions (B, T), or (T,) where all rows have the same ones."""
        if self.positions is not None:
            return self.positions
        return torch.arange(self.start, self.start + length, device=device)


def has_values(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds numbers; on the meta device, and with fake tensors, there are shapes alone."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def build_context(
    document_ids: torch.Tensor | None = None,
    sample_keys: torch.Tensor | None = None,
    cache: Cache | None = None,
) -> Context:
    """The context of a batch.

    document_ids: int (B, T); neighbours with the same id belong to one document, and a document ends with
    its row. None: each row is one document. Ids without values (`has_values`), likewise.
    Raises ValueError for document_ids together with a cache.
    """
    if cache is not None and document_ids is not None:
        raise ValueError(
            "document_ids with a cache: generation goes on with one document per row; leave them out"
        )
    start = cache.length if cache is not None else 0
    if document_ids is None or not has_values(document_ids):
        return Context(start=start, sample_keys=sample_keys, cache=cache)
    cu_seqlens, positions = document_bounds(document_ids)
    return Context(cu_seqlens=cu_seqlens, positions=positions, sample_keys=sample_keys)


def document_bounds(document_ids: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """document_ids (B, T) -> cu_seqlens and positions as in Context; both None if each row is one."""
    B, T = document_ids.shape
    first = torch.ones_like(document_ids, dtype=torch.bool)
    first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = first.flatten().nonzero().flatten()
    if starts.numel() == B:
        return None, None
    cu_seqlens = torch.cat([starts, starts.new_tensor([B * T])]).to(torch.int32)
    place = torch.arange(T, device=document_ids.device).expand(B, T)
    positions = place - torch.where(first, place, 0).cummax(dim=1).values
    return cu_seqlens, positions
