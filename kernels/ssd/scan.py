"""The chunked SSD scan as plain functions on tensors, forward and backward: what the custom ops run.

B batch, T length, L chunk size, C chunks in a row, K = B*C chunks in all, H heads, G groups, R = H/G, P head
dim, N state. The equations are at the head of chunks.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triptych.kernels.segments import segment_ids
from triptych.kernels.ssd.chunks import Chunks, cut, pad_time
from triptych.kernels.ssd.documents import DocumentGradients, Documents


def _unpad(values: Tensor, like: Tensor) -> Tensor:
    """(K, L, ...) as (B, T, ...) contiguous, of the shape and dtype of `like`, without the padding."""
    batch, length = like.shape[:2]
    values = values.reshape(batch, -1, *like.shape[2:])[:, :length]
    return values.to(like.dtype).contiguous()


def _segments(x: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    """The document of each token (B, T)."""
    return None if cu_seqlens is None else segment_ids(cu_seqlens, x.shape[0], x.shape[1])


def forward(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    with_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, H, P), final states (B or docs, H, P, N) and the states before each chunk (B, C, H, P, N).

    with_states: False where documents have neither initial nor final states; of the latter none are returned.
    """
    s = cut(x, dt, a, b, c, _segments(x, cu_seqlens), chunk_size)
    state_shape = (*s.through.shape, x.shape[3], b.shape[3])
    added = s.mm(s.grouped(s.x, s.to_end * s.dt).transpose(1, 2), s.b).view(state_shape)
    states = torch.empty_like(added)
    through = s.through[..., None, None]
    documents = None
    if cu_seqlens is not None and with_states:
        documents = Documents(s, cu_seqlens, x.shape[1], initial_state)
    if s.continues is None:
        states[:, 0] = 0.0 if initial_state is None else initial_state
        for k in range(states.shape[1] - 1):
            torch.addcmul(added[:, k], states[:, k], through[:, k], out=states[:, k + 1])
        final_state = torch.addcmul(added[:, -1], states[:, -1], through[:, -1])
    else:
        states.zero_()
        if documents is not None:
            documents.enter(states.flatten(0, 1))
        for k in range(states.shape[1]):
            added[:, k].addcmul_(states[:, k], through[:, k])
            if k + 1 < states.shape[1]:
                states[:, k + 1].addcmul_(added[:, k], s.continues[:, k + 1])
        final_state = states.new_empty(0, *state_shape[2:])
        if documents is not None:
            final_state = documents.leave(states.flatten(0, 1), added.flatten(0, 1))
    before = states.view(s.b.shape[0], -1, b.shape[3])  # (K*G, R*P, N)
    y = torch.empty(s.x.shape, dtype=s.dtype, device=x.device)
    for tile in s.tiles():
        _outputs(s, tile, before, d, y[tile])
    if documents is not None:
        documents.read(y)
    return _unpad(y, x), final_state, states


def _outputs(s: Chunks, tile: slice, before: Tensor, d: Tensor | None, out: Tensor) -> None:
    """Write y of a run of chunks, (tile, L, G, R, P)."""
    _, length, groups, repeats, dim = out.shape
    rows = slice(tile.start * groups, tile.stop * groups)
    weights = s.decays(tile).mul_(s.scores(tile)).view(-1, length, length)
    inside = s.mm(weights, s.per_head(s.x[tile], s.dt[tile])).view(-1, groups, repeats, length, dim)
    carried = s.mm(s.c[rows], before[rows].transpose(1, 2)).view(-1, groups, length, repeats, dim)
    torch.addcmul(
        inside.permute(0, 3, 1, 2, 4), carried.transpose(1, 2), s.from_start[tile].unsqueeze(-1), out=out
    )
    if d is not None:
        out.addcmul_(s.x[tile], d.to(s.dtype).view(groups, repeats, 1))


def backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    initial_state: Tensor | None,
    states: Tensor,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    with_states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of x, dt, a, b, c, d and the initial state, from those of y and the final state."""
    s = cut(x, dt, a, b, c, _segments(x, cu_seqlens), chunk_size)
    dy_ = pad_time(dy, -x.shape[1] % s.x.shape[1]).reshape(s.x.shape)
    dy_decayed = s.grouped(dy_, s.from_start)  # (K*G, L, R*P)
    from_outputs = s.mm(dy_decayed.transpose(1, 2), s.c).view(states.shape)
    dstates = torch.empty_like(states)  # of the state after each chunk
    through = s.through[..., None, None]
    packed = None
    if cu_seqlens is not None and with_states:
        documents = Documents(s, cu_seqlens, x.shape[1], initial_state)
        packed = DocumentGradients(documents, states.flatten(0, 1), dfinal)
    if s.continues is None:
        dstates[:, -1] = 0.0 if dfinal is None else dfinal
        for k in reversed(range(1, states.shape[1])):
            torch.addcmul(from_outputs[:, k], dstates[:, k], through[:, k], out=dstates[:, k - 1])
        dinitial = torch.addcmul(from_outputs[:, 0], dstates[:, 0], through[:, 0])
    else:
        dstates.zero_()
        if packed is not None:
            packed.leave(from_outputs.flatten(0, 1), dstates.flatten(0, 1))
        for k in reversed(range(states.shape[1])):
            from_outputs[:, k].addcmul_(dstates[:, k], through[:, k])
            if k:
                dstates[:, k - 1].addcmul_(from_outputs[:, k], s.continues[:, k])
        dinitial = states.new_empty(0, *states.shape[2:])
        if packed is not None:
            dinitial = packed.enter(from_outputs.flatten(0, 1))
    flat = (s.b.shape[0], -1, b.shape[3])
    grads = _Gradients(s, b.shape[3])
    # The state that passes a chunk is scaled by 2^q[L-1]; dq is to the natural logarithm.
    grads.dq[..., -1] += ((states * dstates).sum((-1, -2)) * s.through).view(grads.dq.shape[:3])
    for tile in s.tiles():
        grads.carried(tile, dy_decayed, states.view(flat), dstates.view(flat))
        grads.inside(tile, dy_, d)
    if packed is not None:
        packed.heads(dy_, grads.dc)
        packed.tails(grads.dx, grads.ddt, grads.db)
        grads.dq += packed.dq
    # Of the log decay dt * a: it is part of q from its own token on.
    dlog = grads.dq.flip(-1).cumsum(-1).flip(-1).to(s.dtype).permute(0, 3, 1, 2)  # (K, L, G, R)
    ddt = grads.ddt + dlog * a.to(s.dtype).view(dlog.shape[2:])
    da = (dlog * s.dt).sum((0, 1)).flatten().to(a.dtype)
    dd = None if d is None else (dy_ * s.x).sum((0, 1, 4), dtype=s.dtype).flatten().to(d.dtype)
    db, dc = (g.view(-1, b.shape[2], *g.shape[1:]).transpose(1, 2) for g in (grads.db, grads.dc))
    return _unpad(grads.dx, x), _unpad(ddt, dt), da, _unpad(db, b), _unpad(dc, c), dd, dinitial


class _Gradients:
    """Gradients of the chunks' inputs, gathered tile by tile."""

    def __init__(self, s: Chunks, state_size: int) -> None:
        self.s = s
        shape = s.x.shape
        # First of xdt as far as it reaches later chunks, then of x.
        self.dx = s.x.new_empty(shape, dtype=s.dtype)  # (K, L, G, R, P)
        self.ddt = s.x.new_empty(shape[:4], dtype=s.dtype)
        # In fp64: what a token adds here and takes away there must cancel in the sums over tokens.
        self.dq = torch.zeros_like(s.cumulative)  # (K, G, R, L)
        self.db = s.x.new_empty((s.b.shape[0], shape[1], state_size), dtype=s.dtype)  # (K*G, L, N)
        self.dc = torch.empty_like(self.db)

    def carried(self, tile: slice, dy_decayed: Tensor, before: Tensor, dafter: Tensor) -> None:
        """Through the states: y <- state before the chunk, state after the chunk <- x and b."""
        s = self.s
        _, length, groups, repeats, dim = s.x.shape
        rows = slice(tile.start * groups, tile.stop * groups)
        before, dafter, dy_decayed = before[rows], dafter[rows], dy_decayed[rows]
        outputs = s.mm(s.c[rows], before.transpose(1, 2)).mul_(dy_decayed)
        dq = outputs.view(-1, groups, length, repeats, dim).sum(-1).transpose(2, 3)
        self.dc[rows] = s.mm(dy_decayed, before)
        self.db[rows] = s.mm(s.grouped(s.x[tile], s.to_end[tile] * s.dt[tile]), dafter)
        dxdt = s.mm(s.b[rows], dafter.transpose(1, 2)).view(-1, groups, length, repeats, dim).transpose(1, 2)
        torch.mul(dxdt, s.to_end[tile].unsqueeze(-1), out=self.dx[tile])
        self.ddt[tile] = (self.dx[tile] * s.x[tile]).sum(-1)
        to_end = (self.ddt[tile] * s.dt[tile]).permute(0, 2, 3, 1).double()
        self.dq[tile] += dq - to_end
        self.dq[tile][..., -1] += to_end.sum(-1)

    def inside(self, tile: slice, dy: Tensor, d: Tensor | None) -> None:
        """Through the (L, L) weights of each chunk; completes dx and ddt."""
        s = self.s
        _, length, groups, repeats, dim = s.x.shape
        rows = slice(tile.start * groups, tile.stop * groups)
        square = (-1, groups, repeats, length, length)
        decays, scores = s.decays(tile), s.scores(tile)
        dy_heads = s.per_head(dy[tile])
        dweights = s.mm(dy_heads, s.per_head(s.x[tile], s.dt[tile]).transpose(1, 2)).view(square).mul_(decays)
        dscores = dweights.sum(2).view(-1, length, length)
        self.dc[rows] += s.mm(dscores, s.b[rows])
        self.db[rows] += s.mm(dscores.transpose(1, 2), s.c[rows])
        # 2^(q[i] - q[j]) weighs each product: row sums go to q[i], column sums to q[j]. On the diagonal they
        # cancel, exactly only if left out.
        dweights.mul_(scores).diagonal(dim1=-2, dim2=-1).zero_()
        self.dq[tile] += dweights.sum(-1, dtype=torch.float64).sub_(dweights.sum(-2, dtype=torch.float64))
        weights = decays.mul_(scores).view(-1, length, length)
        dxdt = (
            s.mm(weights.transpose(1, 2), dy_heads)
            .view(-1, groups, repeats, length, dim)
            .permute(0, 3, 1, 2, 4)
        )
        self.ddt[tile] += (dxdt * s.x[tile]).sum(-1)
        dx = self.dx[tile].add_(dxdt).mul_(s.dt[tile].unsqueeze(-1))
        if d is not None:
            dx.addcmul_(dy[tile], d.to(s.dtype).view(groups, repeats, 1))
