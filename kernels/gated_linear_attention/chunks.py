"""Gated linear attention in chunks as plain functions on tensors: what the custom ops run.

B batch, T length, L tokens of a chunk (a power of two), K chunks in all, H heads, N = K*H, D key dim,
E value dim, S state (D, E), a = exp(g) decays.

With a(j, i] the product of the decays of the tokens behind j up to and with i, a chunk that begins with S
gives
    y[i] = sum_{j <= i} A[i, j] v[j] + (q[i] a(-1, i])^T S,    A[i, j] = sum_d q[i, d] k[j, d] a_d(j, i],
    S'   = a(-1, L-1] S + sum_j (k[j] a(j, L-1]) v[j]^T.
RWKV-6 reads before it forgets and adds: a(j, i) takes the place of a(j, i], and A[i, i] = sum_d q u k. This
is the *exclusive* form, chosen by giving the bonus u.

Decays per channel: no product over d can be split into one factor of i and one of j, unless the factors
begin at a token between them, else one overflows. So pairs are taken in levels. At level s = 1, 2, 4, ...
L/2, the chunk is cut into windows of s tokens, and the tokens i of each odd window meet the tokens j of the
even one before it: a(j, i] = r[j] p[i], with r from j to the border of the two windows and p from there to i.
Every pair meets at exactly one level, in a matmul. p and r are products of decays and nothing else: from one
level to the next they are multiplied by the whole product of the window that joins. So nothing overflows or
is divided, a decay of 0 is as good as any, and the gradient of g is a sum of the pairs that it is part of,
with none that have to cancel.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.kernels.library import statistics_dtype
from triptych.kernels.segments import document_bounds

# Elements of the (L, L) scores that exist at a time: bounds memory, and keeps a tile in a CPU's cache.
TILE_ELEMENTS = {"cpu": 1 << 16}
TILE_ELEMENTS_ELSEWHERE = 1 << 26


def chunk_length(chunk_size: int, length: int) -> int:
    """L: chunk_size, or the power of two that holds a shorter row."""
    return min(chunk_size, 1 << (length - 1).bit_length())


def chunk_bound(batch: int, length: int, documents: int | None, chunk_size: int) -> tuple[int, int]:
    """Rows and chunks per row of the states that are kept; for packed documents the most there can be."""
    size = chunk_length(chunk_size, length)
    if documents is None:
        return batch, -(-length // size)
    return 1, (batch * length + documents * (size - 1)) // size


class Layout:
    """Where the tokens of (B, T, ...) lie in chunks. Packed documents begin a chunk each."""

    def __init__(self, batch: int, length: int, cu_seqlens: Tensor | None, chunk_size: int) -> None:
        self.batch, self.length, self.size = batch, length, chunk_length(chunk_size, length)
        self.place: Tensor | None = None
        if cu_seqlens is None:
            self.rows, self.chunks = batch, -(-length // self.size)
            everything = slice(0, batch)
            self.first, self.last = {0: everything}, {self.chunks - 1: everything}
            return
        self.rows, self.chunks, self.first, self.last = 1, 0, {}, {}
        shifts = []
        bounds = document_bounds(cu_seqlens)
        for i, (start, end) in enumerate(bounds):
            self.first[self.chunks] = slice(i, i + 1)
            shifts.append(self.chunks * self.size - start)
            self.chunks += -(-(end - start) // self.size)
            self.last[self.chunks - 1] = slice(i, i + 1)
        lengths = torch.tensor([end - start for start, end in bounds])
        shift = torch.tensor(shifts).repeat_interleave(lengths)
        self.place = (torch.arange(batch * length) + shift).to(cu_seqlens.device)

    def cut(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, T, H, X) -> (N, L, X), zeros where there is no token."""
        heads, dim = x.shape[2:]
        if self.place is None:
            padding = self.chunks * self.size - self.length
            x = F.pad(x, (0, 0, 0, 0, 0, padding)) if padding else x
        else:
            empty = x.new_zeros(self.chunks * self.size, heads, dim)
            x = empty.index_copy_(0, self.place, x.reshape(-1, heads, dim))
        x = x.reshape(-1, self.size, heads, dim).transpose(1, 2)
        return x.to(dtype).reshape(-1, self.size, dim)

    def join(self, x: Tensor, like: Tensor) -> Tensor:
        """(N, L, X) -> the shape and dtype of `like`, (B, T, H, X) or (B, T, H)."""
        heads = like.shape[2]
        x = x.view(-1, heads, self.size, x.shape[2]).transpose(1, 2).to(like.dtype)
        if self.place is None:
            return x.reshape(self.batch, -1, *x.shape[2:])[:, : self.length].reshape(like.shape).contiguous()
        return x.reshape(-1, *x.shape[2:])[self.place].view(like.shape)


def tiles(count: int, size: int, device: torch.device) -> list[slice]:
    """Runs of the N chunks and heads whose scores fit the bound."""
    step = max(1, TILE_ELEMENTS.get(device.type, TILE_ELEMENTS_ELSEWHERE) // (size * size))
    return [slice(i, min(i + step, count)) for i in range(0, count, step)]


def _suffix_sums(x: Tensor, exclusive: bool = False) -> Tensor:
    """Sums over the tokens from each on (behind each) of (N, L, X); a matmul, as cumsum is slow on a CPU."""
    ones = torch.ones(x.shape[1], x.shape[1], dtype=x.dtype, device=x.device)
    return torch.matmul(ones.triu(1 if exclusive else 0), x)


def _prefix_sums(x: Tensor) -> Tensor:
    """Sums over the tokens before each of (N, L, X)."""
    ones = torch.ones(x.shape[1], x.shape[1], dtype=x.dtype, device=x.device)
    return torch.matmul(ones.tril(-1), x)


class HeadDecays:
    """One decay per token and head: A = (q k^T) exp(sum of g over (j, i]), elementwise.

    from_start (N, L, 1): a(-1, i]. to_end (N, L, 1): a(j, L-1]. through (N, 1): a(-1, L-1].
    """

    def __init__(self, g: Tensor, bonus: Tensor | None) -> None:
        assert bonus is None, "the exclusive form has decays per channel"
        length = g.shape[1]
        # Of each pair its own sum: a difference of two sums would lose what is small beside them.
        logs = g.expand(-1, -1, length).tril(-1).cumsum(1)
        hidden = torch.ones(length, length, dtype=torch.bool, device=g.device).triu(1)
        self.decays = logs.masked_fill_(hidden, float("-inf")).exp_()  # (N, L, L)
        self.from_start = self.decays[:, :, :1] * g[:, :1].exp()
        self.to_end = self.decays[:, -1].unsqueeze(-1)
        self.through = self.from_start[:, -1]

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """A (N, L, L)."""
        return torch.bmm(q, k.mT).mul_(self.decays)

    def gradients(
        self, q: Tensor, k: Tensor, da: Tensor, dstart: Tensor, dend: Tensor, dthrough: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        """dq, dk and dg from the gradients of A, of q a(-1, i], of k a(j, L-1], and of S' by way of
        a(-1, L-1], times that factor and summed over E (N, D)."""
        scores = torch.bmm(q, k.mT)
        da = da * self.decays
        dq = torch.bmm(da, k).addcmul_(dstart, self.from_start)
        dk = torch.bmm(da.mT, q).addcmul_(dend, self.to_end)
        # g[t] is part of the pairs j < t <= i.
        pairs = da.mul_(scores).tril_(-1)
        dg = _suffix_sums(pairs).tril_(-1).sum(-1, keepdim=True)
        dg += _suffix_sums((q * dstart).sum(-1, keepdim=True) * self.from_start)
        dg += _prefix_sums((k * dend).sum(-1, keepdim=True) * self.to_end)
        return dq, dk, dg + dthrough.sum(-1).view(-1, 1, 1), None


class ChannelDecays:
    """One decay per token and channel: A level by level. Attributes as of HeadDecays, with D for 1; they hold
    once `levels` has been run through, as `scores` and `gradients` do."""

    def __init__(self, g: Tensor, bonus: Tensor | None) -> None:
        self.bonus = None if bonus is None else bonus.unsqueeze(1)
        self.decay = g.exp()

    @property
    def exclusive(self) -> bool:
        return self.bonus is not None

    def levels(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """s, p of the odd windows, r of the even ones: (N, L/2s, s, D)."""
        decay = self.decay
        count, length, dim = decay.shape
        self.from_start = torch.ones_like(decay) if self.exclusive else decay.clone()
        self.to_end = torch.ones_like(decay)
        whole = decay  # of each window, (N, L/s, D)
        size = 1
        while size < length:
            p, r = (self._windows(x, size) for x in (self.from_start, self.to_end))
            yield size, p[:, :, 1], r[:, :, 0]
            whole = whole.view(count, -1, 2, dim)
            p[:, :, 1] *= whole[:, :, 0].unsqueeze(2)
            r[:, :, 0] *= whole[:, :, 1].unsqueeze(2)
            whole = whole[:, :, 0] * whole[:, :, 1]
            size *= 2
        self.through = whole.view(count, dim)

    def run(self) -> ChannelDecays:
        for _ in self.levels():
            pass
        return self

    @staticmethod
    def _windows(x: Tensor, size: int) -> Tensor:
        """(N, L, D) -> (N, L/2s, 2, s, D): even and odd windows."""
        return x.view(x.shape[0], -1, 2, size, x.shape[2])

    @staticmethod
    def _pairs(a: Tensor, size: int) -> Tensor:
        """The (s, s) blocks of (N, L, L) in which odd windows meet even ones: a view (N, L/2s, s, s)."""
        count, length, _ = a.shape
        blocks = length // (2 * size)
        a = a.view(count, blocks, 2, size, blocks, 2, size)[:, :, 1, :, :, 0]
        return a.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """A (N, L, L)."""
        length = q.shape[1]
        a = q.new_zeros(q.shape[0], length, length)
        torch.sum((q if self.bonus is None else q * self.bonus) * k, -1, out=a.diagonal(dim1=1, dim2=2))
        for size, p, r in self.levels():
            far = (self._windows(q, size)[:, :, 1] * p).flatten(0, 1)
            near = (self._windows(k, size)[:, :, 0] * r).flatten(0, 1)
            blocks = self._pairs(a, size)
            blocks.copy_(torch.bmm(far, near.mT).view(blocks.shape))
        return a

    def gradients(
        self, q: Tensor, k: Tensor, da: Tensor, dstart: Tensor, dend: Tensor, dthrough: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """dq, dk, dg and dbonus (N, D); the arguments are those of HeadDecays."""
        diagonal = da.diagonal(dim1=1, dim2=2).unsqueeze(-1)
        dq, dk, dbonus = diagonal * k, diagonal * q, None
        if self.bonus is not None:
            dbonus = (dq * q).sum(1)
            dq, dk = dq * self.bonus, dk * self.bonus
        dg = torch.zeros_like(q)
        for size, p, r in self.levels():
            far = (self._windows(q, size)[:, :, 1] * p).flatten(0, 1)
            near = (self._windows(k, size)[:, :, 0] * r).flatten(0, 1)
            block = self._pairs(da, size).reshape(-1, size, size)
            dfar, dnear = torch.bmm(block, near), torch.bmm(block.mT, far)
            self._windows(dq, size)[:, :, 1].addcmul_(dfar.view(p.shape), p)
            self._windows(dk, size)[:, :, 0].addcmul_(dnear.view(r.shape), r)
            # g[t] is part of p[i] for i >= t, of r[j] for j < t.
            dg_ = self._windows(dg, size)
            dg_[:, :, 1] += _suffix_sums(dfar.mul_(far), self.exclusive).view(p.shape)
            if size > 1:
                dg_[:, :, 0] += _prefix_sums(dnear.mul_(near)).view(r.shape)
        start, end = dstart * self.from_start, dend * self.to_end
        dg += _suffix_sums(q * start, self.exclusive)
        dg += _prefix_sums(k * end)
        return dq.add_(start), dk.add_(end), dg.add_(dthrough.unsqueeze(1)), dbonus


class _Inputs:
    """The inputs cut into chunks."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        bonus: Tensor | None,
        cu_seqlens: Tensor | None,
        chunk_size: int,
    ) -> None:
        self.dtype = statistics_dtype(q, k, v, g)
        self.layout = Layout(q.shape[0], q.shape[1], cu_seqlens, chunk_size)
        self.q, self.k, self.v = (self.layout.cut(x, self.dtype) for x in (q, k, v))
        self.per_channel = g.dim() == 4
        self.g = self.layout.cut(g if self.per_channel else g.unsqueeze(-1), self.dtype)
        self.bonus = None
        if bonus is not None:
            chunks = self.layout.rows * self.layout.chunks
            self.bonus = bonus.to(self.dtype).expand(chunks, -1, -1).reshape(-1, bonus.shape[1])
        self.tiles = tiles(self.q.shape[0], self.layout.size, q.device)
        self.state_shape = (self.layout.rows, self.layout.chunks, q.shape[2], q.shape[3], v.shape[3])

    def decays(self, tile: slice) -> HeadDecays | ChannelDecays:
        bonus = None if self.bonus is None else self.bonus[tile]
        return (ChannelDecays if self.per_channel else HeadDecays)(self.g[tile], bonus)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, H, E), final states (B | docs, H, D, E), states before each chunk (`chunk_bound`, H, D, E)."""
    inputs = _Inputs(q, k, v, g, bonus, cu_seqlens, chunk_size)
    layout, dtype = inputs.layout, inputs.dtype
    documents = None if cu_seqlens is None else cu_seqlens.numel() - 1
    y = torch.empty_like(inputs.v)
    readers = torch.empty_like(inputs.q)
    added = q.new_empty(inputs.state_shape, dtype=dtype)
    through = q.new_empty(*inputs.state_shape[:3], inputs.g.shape[2], 1, dtype=dtype)
    for tile in inputs.tiles:
        decays = inputs.decays(tile)
        scaled = inputs.q[tile] * scale
        torch.bmm(decays.scores(scaled, inputs.k[tile]), inputs.v[tile], out=y[tile])
        torch.mul(scaled, decays.from_start, out=readers[tile])
        torch.bmm((inputs.k[tile] * decays.to_end).mT, inputs.v[tile], out=added.flatten(0, 2)[tile])
        through.flatten(0, 2)[tile] = decays.through.unsqueeze(-1)
    rows, bound = chunk_bound(q.shape[0], q.shape[1], documents, chunk_size)
    states = q.new_zeros(rows, bound, *inputs.state_shape[2:], dtype=dtype)
    final = q.new_empty(documents or q.shape[0], *inputs.state_shape[2:], dtype=dtype)
    after = added[:, 0]
    for c in range(layout.chunks):
        if c in layout.first:
            if initial_state is not None:
                states[:, c] = initial_state[layout.first[c]]
        else:
            states[:, c] = after
        after = torch.addcmul(added[:, c], states[:, c], through[:, c])
        if c in layout.last:
            final[layout.last[c]] = after
    torch.baddbmm(y, readers, states[:, : layout.chunks].flatten(0, 2), out=y)
    return layout.join(y, v), final, states


def backward(
    dy: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    bonus: Tensor | None,
    states: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of q, k, v, g, bonus and the initial state, from those of y and the final state."""
    inputs = _Inputs(q, k, v, g, bonus, cu_seqlens, chunk_size)
    layout, dtype = inputs.layout, inputs.dtype
    dy_ = layout.cut(dy, dtype)
    read = q.new_empty(inputs.state_shape, dtype=dtype)
    through = q.new_empty(*inputs.state_shape[:3], inputs.g.shape[2], 1, dtype=dtype)
    for tile in inputs.tiles:
        decays = inputs.decays(tile)
        if isinstance(decays, ChannelDecays):
            decays.run()
        readers = inputs.q[tile] * scale * decays.from_start
        torch.bmm(readers.mT, dy_[tile], out=read.flatten(0, 2)[tile])
        through.flatten(0, 2)[tile] = decays.through.unsqueeze(-1)
    states = states[:, : layout.chunks]
    dafter = torch.empty_like(read)  # of the state after each chunk
    documents = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    dinitial = q.new_empty(documents, *inputs.state_shape[2:], dtype=dtype)
    dbefore = read[:, 0]
    for c in reversed(range(layout.chunks)):
        if c in layout.last:
            dafter[:, c] = 0.0 if dfinal is None else dfinal[layout.last[c]]
        else:
            dafter[:, c] = dbefore
        dbefore = torch.addcmul(read[:, c], dafter[:, c], through[:, c])
        if c in layout.first:
            dinitial[layout.first[c]] = dbefore
    before, dafter, passed = (x.flatten(0, 2) for x in (states, dafter, through))
    dq, dk, dv, dg = (torch.empty_like(x) for x in (inputs.q, inputs.k, inputs.v, inputs.g))
    dbonus = None if inputs.bonus is None else torch.empty_like(inputs.bonus)
    for tile in inputs.tiles:
        decays = inputs.decays(tile)
        q_, k_, v_, dy_tile = inputs.q[tile] * scale, inputs.k[tile], inputs.v[tile], dy_[tile]
        scores = decays.scores(q_, k_)
        inside = torch.bmm(scores.mT, dy_tile)
        torch.baddbmm(inside, k_ * decays.to_end, dafter[tile], out=dv[tile])
        dstart = torch.bmm(dy_tile, before[tile].mT)
        dend = torch.bmm(v_, dafter[tile].mT)
        dthrough = (before[tile] * dafter[tile]).sum(-1) * passed[tile].squeeze(-1)
        found = decays.gradients(q_, k_, torch.bmm(dy_tile, v_.mT), dstart, dend, dthrough)
        torch.mul(found[0], scale, out=dq[tile])
        dk[tile], dg[tile] = found[1], found[2]
        if dbonus is not None and found[3] is not None:
            dbonus[tile] = found[3]
    if bonus is not None and dbonus is not None:
        dbonus = dbonus.view(-1, *bonus.shape).sum(0).to(bonus.dtype)
    grads = (layout.join(x, like) for x, like in ((dq, q), (dk, k), (dv, v), (dg, g)))
    return *grads, dbonus, dinitial  # type: ignore[return-value]
