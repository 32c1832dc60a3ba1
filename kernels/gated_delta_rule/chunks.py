"""How the gated delta rule cuts documents into chunks, and the mathematics of it.

B batch, T length, docs documents (rows of the batch, or packed), L chunk size, K chunks of all documents, H
heads, D channels of queries and keys, E channels of values.

The state takes one write per token, S[t] = exp(g[t]) S[t-1] + k[t] w[t]^T, and what is written corrects what
the state recalls. With b[i] the sum of g up to and with token i of the chunk, S the state before it (a row
each token):
    w[i] = beta[i] (v[i] - exp(b[i]) k[i] S - sum_{j < i} exp(b[i] - b[j]) (k[i].k[j]) w[j]),
    y[i] = scale (exp(b[i]) q[i] S + sum_{j <= i} exp(b[i] - b[j]) (q[i].k[j]) w[j]),
    S'   = exp(b[L-1]) S + sum_j exp(b[L-1] - b[j]) k[j] w[j]^T.
The first is a triangular system, (I + A) w = beta (v - exp(b) k S) with A[i, j] = beta[i] exp(b[i] - b[j])
k[i].k[j] for j < i (the UT transform of arXiv 2406.06484; with decays, arXiv 2412.06464); A does not depend
on the state, so its inverse M is found for all chunks at once, and only w = M beta (v - exp(b) k S) waits for
S.

A chunk never holds tokens of two documents. Behind the end of a document it is padded with zeros, whose beta
of 0 writes nothing and whose g of 0 forgets nothing. Chunks are in the order of the scan: the first of every
document, the second of every document that has one, and so on, the longest documents first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from triptych.kernels.gated_delta_rule.reference import unit
from triptych.kernels.library import statistics_dtype
from triptych.kernels.segments import document_bounds
from triptych.kernels.ssd.chunks import TILE_ELEMENTS, TILE_ELEMENTS_ELSEWHERE, VANISHED, matmul, pad_time


@dataclass
class Layout:
    """Where the tokens of (B, T, ...) are in the chunks (K, H, L, ...)."""

    batch: int
    length: int
    size: int  # L
    counts: list[int]  # documents that have a first, second, ... chunk
    # Of packed documents only:
    order: Tensor | None = None  # (docs,): documents from the longest to the shortest
    source: Tensor | None = None  # (K*L,): the token at each place
    empty: Tensor | None = None  # the places that are padding
    place: Tensor | None = None  # (B*T,): the place of each token

    @property
    def steps(self) -> list[slice]:
        """The chunks of each step of the scan."""
        ends = [sum(self.counts[: c + 1]) for c in range(len(self.counts))]
        return [slice(end - count, end) for end, count in zip(ends, self.counts)]

    def cut(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, T, H, ...) as (K, H, L, ...) in `dtype`, contiguous, zeros in the padding."""
        if self.source is None or self.empty is None:
            x = pad_time(x, len(self.counts) * self.size - self.length)
            x = x.unflatten(1, (-1, self.size)).transpose(0, 1).flatten(0, 1)
        else:
            x = (
                x.flatten(0, 1)
                .index_select(0, self.source)
                .index_fill_(0, self.empty, 0.0)
                .unflatten(0, (-1, self.size))
            )
        return x.transpose(1, 2).to(dtype).contiguous()

    def join(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(K, H, L, ...) as (B, T, H, ...), contiguous, without the padding."""
        x = x.transpose(1, 2)
        if self.place is None:
            x = x.unflatten(0, (-1, self.batch)).transpose(0, 1).flatten(1, 2)[:, : self.length]
        else:
            x = x.flatten(0, 1).index_select(0, self.place).unflatten(0, (self.batch, self.length))
        return x.to(dtype).contiguous()

    def longest_first(self, states: Tensor) -> Tensor:
        """(docs, ...) in the order of the scan."""
        return states if self.order is None else states[self.order]

    def as_given(self, states: Tensor) -> Tensor:
        """The inverse of longest_first."""
        return states if self.order is None else states[self.order.argsort()]


def bound_of_chunks(batch: int, length: int, size: int, cu_seqlens: Tensor | None) -> int:
    """At least K: what is known of it from shapes alone."""
    if cu_seqlens is None:
        return batch * ((length + size - 1) // size)
    return (batch * length + (cu_seqlens.shape[0] - 1) * (size - 1)) // size


def layout(batch: int, length: int, size: int, cu_seqlens: Tensor | None) -> Layout:
    """Reads the values of cu_seqlens, a sync on an accelerator."""
    if cu_seqlens is None:
        return Layout(batch, length, size, [batch] * ((length + size - 1) // size))
    bounds = document_bounds(cu_seqlens)
    chunks = [(end - start + size - 1) // size for start, end in bounds]
    order = sorted(range(len(bounds)), key=lambda i: -chunks[i])
    counts = [sum(n > c for n in chunks) for c in range(max(chunks))]
    starts = torch.tensor([bounds[i][0] + c * size for c, n in enumerate(counts) for i in order[:n]])
    ends = torch.tensor([bounds[i][1] for n in counts for i in order[:n]])
    tokens = starts.unsqueeze(1) + torch.arange(size)
    inside = tokens < ends.unsqueeze(1)
    place = torch.empty(batch * length, dtype=torch.long)
    place[tokens[inside]] = inside.flatten().nonzero().squeeze(1)
    return Layout(
        batch,
        length,
        size,
        counts,
        order=torch.tensor(order).to(cu_seqlens.device),
        source=torch.minimum(tokens, ends.unsqueeze(1) - 1).flatten().to(cu_seqlens.device),
        empty=inside.logical_not().flatten().nonzero().squeeze(1).to(cu_seqlens.device),
        place=place.to(cu_seqlens.device),
    )


@dataclass
class Chunks:
    """The inputs cut into chunks, and their decays, in the dtype of states and sums."""

    layout: Layout
    q: Tensor  # (K, H, L, D), times scale
    k: Tensor  # (K, H, L, D)
    v: Tensor  # (K, H, L, E)
    beta: Tensor  # (K, H, L, 1)
    b: Tensor  # (K, H, L), in fp64
    from_start: Tensor  # exp(b): (K, H, L, 1)
    to_end: Tensor  # exp(b[L-1] - b): (K, H, L, 1)
    through: Tensor  # exp(b[L-1]): (K, H, 1, 1)
    matmul_dtype: torch.dtype

    @property
    def dtype(self) -> torch.dtype:
        """Of states and sums."""
        return self.v.dtype

    def mm(self, x: Tensor, y: Tensor) -> Tensor:
        """(K, H, ., .) products, accumulated and returned in fp32 (fp64)."""
        product = matmul(x.flatten(0, 1), y.flatten(0, 1), self.matmul_dtype, self.dtype)
        return product.view(*x.shape[:2], *product.shape[1:])

    def add_mm(self, total: Tensor, x: Tensor, y: Tensor, alpha: int = 1) -> Tensor:
        """total += alpha x @ y, in place; total contiguous."""
        if self.matmul_dtype != self.dtype:
            return total.add_(self.mm(x, y), alpha=alpha)
        flat = total.view(-1, *total.shape[2:])
        # With out=, not in place: those FLOPs PyTorch counts.
        torch.baddbmm(flat, x.flatten(0, 1), y.flatten(0, 1), alpha=alpha, out=flat)
        return total

    def tiles(self) -> list[slice]:
        """Runs of chunks whose (L, L) matrices fit the bound."""
        chunks, heads, length = self.b.shape
        bound = TILE_ELEMENTS.get(self.b.device.type, TILE_ELEMENTS_ELSEWHERE)
        size = max(1, bound // (heads * length * length))
        return [slice(i, min(i + size, chunks)) for i in range(0, chunks, size)]

    def decays(self, tile: slice) -> Tensor:
        """exp(b[i] - b[j]) for j <= i, else 0: (tile, H, L, L)."""
        b = self.b[tile]
        difference = torch.empty(*b.shape, b.shape[-1], dtype=self.dtype, device=b.device)
        torch.sub(b.unsqueeze(-1), b.unsqueeze(-2), out=difference)
        # Masked before the exponential: above the diagonal it would overflow.
        mask = difference.new_full(difference.shape[-2:], -torch.inf).triu_(1)
        return difference.add_(mask).exp_()

    def similarities(self, tile: slice) -> Tensor:
        """k[i].k[j] for j < i, else 0: (tile, H, L, L)."""
        k = self.k[tile]
        return self.mm(k, k.transpose(2, 3)).tril_(-1)

    def scores(self, tile: slice) -> Tensor:
        """scale q[i].k[j]: (tile, H, L, L)."""
        return self.mm(self.q[tile], self.k[tile].transpose(2, 3))


def cut(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
    normalize: bool,
) -> Chunks:
    """Cut (B, T, ...) inputs into chunks."""
    dtype = statistics_dtype(q, v, g, beta)
    # Half-precision matmuls pay on accelerators; on CPU they are slower than fp32 ones.
    matmul_dtype = q.dtype if q.device.type != "cpu" and q.dtype.itemsize == 2 else dtype
    batch, length = q.shape[:2]
    chunks = layout(batch, length, min(chunk_size, length), cu_seqlens)
    # A step whose decay is 0 in this dtype may as well be the mildest such: the sums' rounding stays bounded.
    log_decay = g.to(dtype).clamp_min(math.log(torch.finfo(dtype).smallest_normal) - VANISHED)
    # Summed in fp64: in fp32 a difference of two sums is off by 1e-7 of the sums, whatever its own size.
    b = chunks.cut(log_decay, torch.float64).cumsum(-1)
    last = b[..., -1:]
    queries, keys = (chunks.cut(x, dtype) for x in (q, k))
    if normalize:
        queries, keys = unit(queries), unit(keys)
    return Chunks(
        layout=chunks,
        q=queries * scale,
        k=keys,
        v=chunks.cut(v, dtype),
        beta=chunks.cut(beta, dtype).unsqueeze(-1),
        b=b,
        from_start=b.exp().to(dtype).unsqueeze(-1),
        to_end=(last - b).exp().to(dtype).unsqueeze(-1),
        through=last.exp().to(dtype).unsqueeze(-1),
        matmul_dtype=matmul_dtype,
    )
