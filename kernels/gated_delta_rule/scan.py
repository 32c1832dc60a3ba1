"""The chunked gated delta rule as plain functions on tensors, forward and backward: what the custom ops run.

B batch, T length, L chunk size, K chunks of all documents, docs documents, H heads, D channels of queries and
keys, E channels of values. The equations are at the head of chunks.py; below, X = v - exp(b) k S is what
tokens would write on their own, so that w = M beta X, and z = M^T dw is the gradient of beta X.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from triptych.kernels.gated_delta_rule.chunks import Chunks, bound_of_chunks, cut
from triptych.kernels.gated_delta_rule.reference import EPS


class Outputs(NamedTuple):
    """y (B, T, H, E) and the final state (docs, H, D, E); for backward the state before each chunk
    (K, H, D, E) and the inverse M of each chunk (K, H, L, L), both with room for as many as there can be."""

    y: Tensor
    final_state: Tensor
    states: Tensor
    inverses: Tensor


class Gradients(NamedTuple):
    """Of q, k, v, g, beta (B, T, H, ...) and the initial state (docs, H, D, E)."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    initial: Tensor


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
    normalize: bool,
) -> Outputs:
    """Shapes as in the public function."""
    s = cut(q, k, v, g, beta, cu_seqlens, scale, chunk_size, normalize)
    chunks, heads, size, channels = s.k.shape
    room = bound_of_chunks(q.shape[0], q.shape[1], size, cu_seqlens)
    inverses = s.k.new_empty(room, heads, size, size)
    eye = torch.eye(size, dtype=s.dtype, device=q.device)
    weights = torch.empty_like(inverses[:chunks])
    for tile in s.tiles():
        decays = s.decays(tile)
        torch.mul(s.scores(tile), decays, out=weights[tile])
        system = s.similarities(tile).mul_(decays).mul_(s.beta[tile])
        inverses[tile] = torch.linalg.solve_triangular(
            system, eye.expand_as(system), upper=False, unitriangular=True
        )
    states = s.k.new_empty(room, heads, channels, v.shape[3])
    final_state = s.k.new_empty(s.layout.counts[0], heads, channels, v.shape[3])
    recalling, writing = s.k * s.from_start, (s.k * s.to_end).transpose(2, 3)
    w = torch.empty_like(s.v)
    steps = s.layout.steps
    states[steps[0]] = 0.0 if initial_state is None else s.layout.longest_first(initial_state)
    for c, step in enumerate(steps):
        before = states[step]
        w[step] = _written(s, step, recalling, before, inverses)
        after = s.add_mm(before * s.through[step], writing[step], w[step])
        remaining = s.layout.counts[c + 1] if c + 1 < len(steps) else 0
        if remaining:
            states[steps[c + 1]] = after[:remaining]
        final_state[remaining : len(after)] = after[remaining:]
    y = s.add_mm(s.mm(weights, w), s.q * s.from_start, states[:chunks])
    # What is to spare, so that equal calls have equal outputs.
    states[chunks:], inverses[chunks:] = 0.0, 0.0
    return Outputs(s.layout.join(y, v.dtype), s.layout.as_given(final_state), states, inverses)


def _written(s: Chunks, chunks: slice, recalling: Tensor, states: Tensor, inverses: Tensor) -> Tensor:
    """w = M beta (v - exp(b) k S) of some chunks."""
    own = s.add_mm(s.v[chunks].clone(), recalling[chunks], states, alpha=-1).mul_(s.beta[chunks])
    return s.mm(inverses[chunks], own)


def backward(
    dy: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    states: Tensor,
    inverses: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
    normalize: bool,
) -> Gradients:
    """From the gradients of y and of the final state, with what forward gave."""
    s = cut(q, k, v, g, beta, cu_seqlens, scale, chunk_size, normalize)
    dy = s.layout.cut(dy, s.dtype)
    count = dy.shape[0]
    recalling, writing = s.k * s.from_start, s.k * s.to_end
    w = _written(s, slice(count), recalling, states[:count], inverses)
    z = torch.empty_like(w)  # first the gradient of w from outputs of its own chunk
    for tile in s.tiles():
        z[tile] = s.mm(s.scores(tile).mul_(s.decays(tile)).transpose(2, 3), dy[tile])
    from_outputs = s.mm((s.q * s.from_start).transpose(2, 3), dy)
    recalling = recalling.mul_(s.beta).transpose(2, 3)
    dstates = torch.empty_like(from_outputs)  # of the state after each chunk
    steps = s.layout.steps
    dlast = None if dfinal is None else s.layout.longest_first(dfinal)
    dbefore = dstates.new_empty(0, *dstates.shape[1:])  # of the states before the chunks of a step
    for step in reversed(steps):
        after, remaining = dstates[step], len(dbefore)
        after[:remaining] = dbefore
        after[remaining:] = 0.0 if dlast is None else dlast[remaining : len(after)]
        z[step] = s.mm(inverses[step].transpose(2, 3), s.add_mm(z[step], writing[step], after))
        dbefore = from_outputs[step].addcmul_(after, s.through[step])
        s.add_mm(dbefore, recalling[step], z[step], alpha=-1)
    dq, dk, dg = torch.empty_like(s.q), torch.empty_like(s.k), torch.empty_like(s.beta[..., 0])
    dbeta = torch.empty_like(dg)
    for tile in s.tiles():
        grads = _of_tile(s, tile, dy[tile], w[tile], z[tile], states[tile], dstates[tile])
        dq[tile], dk[tile], dg[tile], dbeta[tile] = grads
    dq *= scale
    if normalize:
        dq, dk = _through_unit(dq, s.layout.cut(q, s.dtype)), _through_unit(dk, s.layout.cut(k, s.dtype))
    return Gradients(
        s.layout.join(dq, q.dtype),
        s.layout.join(dk, k.dtype),
        s.layout.join(z.mul_(s.beta), v.dtype),
        s.layout.join(dg, g.dtype),
        s.layout.join(dbeta, beta.dtype),
        s.layout.as_given(dbefore),
    )


def _of_tile(
    s: Chunks, tile: slice, dy: Tensor, w: Tensor, z: Tensor, states: Tensor, dstates: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q (times scale), k, g and beta of a run of chunks."""
    q, k, beta, from_start = s.q[tile], s.k[tile], s.beta[tile], s.from_start[tile]
    decays, scores, similarities = s.decays(tile), s.scores(tile), s.similarities(tile)
    dscores = s.mm(dy, w.transpose(2, 3)).mul_(decays)
    dsimilarities = s.mm(z, w.transpose(2, 3)).neg_().mul_(decays.tril_(-1))  # over beta
    dbeta = (dsimilarities * similarities).sum(-1)
    dsimilarities *= beta
    # Between the tokens of the chunk, and to its end. What exp(b[i] - b[j]) gives goes to g of j+1 to i.
    through_decay = torch.mul(dscores, scores).addcmul_(dsimilarities, similarities)
    ones = torch.ones_like(through_decay[0, 0]).triu_()
    dg = torch.matmul(ones, through_decay).tril_(-1).sum(-1)
    dk_writing = s.mm(w, dstates.transpose(2, 3)).mul_(s.to_end[tile])
    to_end = (k * dk_writing).sum(-1)
    dg[..., 1:] += to_end.cumsum(-1)[..., :-1]
    dg += ((states * dstates).sum((-1, -2)) * s.through[tile][..., 0, 0]).unsqueeze(-1)
    # From the state before the chunk: what exp(b[i]) gives goes to g of tokens up to i.
    dq = s.mm(dy, states.transpose(2, 3)).mul_(from_start)
    dk_recalling = s.mm(z, states.transpose(2, 3)).mul_(from_start)
    recalled = (k * dk_recalling).sum(-1)
    dbeta += (z * s.v[tile]).sum(-1) - recalled
    from_before = (q * dq).sum(-1) - recalled * beta[..., 0]
    dg += from_before.flip(-1).cumsum(-1).flip(-1)
    s.add_mm(dq, dscores, k)
    dk = dk_writing.addcmul_(dk_recalling, beta, value=-1)
    s.add_mm(dk, dscores.transpose(2, 3), q)
    s.add_mm(dk, dsimilarities + dsimilarities.transpose(2, 3), k)
    return dq, dk, dg, dbeta


def _through_unit(dy: Tensor, x: Tensor) -> Tensor:
    """Gradient of x from that of x / sqrt(sum x^2 + EPS)."""
    rstd = torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS)
    unit = x * rstd
    return (dy - unit * (unit * dy).sum(-1, keepdim=True)) * rstd
