"""Packed documents with states of their own, among the chunks of SSD.

A document's state goes in, and its last one comes out, at edges of chunks, or within one: then the tokens
from its start to the edge are its *head*, those from the edge to its end its *tail* (from its start, if the
chunk holds all of it). What these and the states have to do with each other is worked out here.
K chunks in all, L chunk size, H heads, G groups, R = H/G, P head dim, N state; n tokens of a head or tail.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from triptych.kernels.segments import document_bounds
from triptych.kernels.ssd.chunks import Chunks


@dataclass(frozen=True)
class Document:
    """Chunks are numbered 0 to K-1, tokens within their chunk."""

    first: int
    """The chunk in which it starts."""
    start: int
    """Its first token there."""
    last: int
    """The chunk in which it ends."""
    end: int
    """One past its last token there; L where it ends with the chunk or the row."""

    @property
    def entry(self) -> int | None:
        """The chunk before which its initial state is needed, if there is one."""
        entry = self.first if self.start == 0 else self.first + 1
        return entry if entry <= self.last else None


def locate(cu_seqlens: Tensor, length: int, chunk_size: int) -> list[Document]:
    """The documents of rows of T tokens."""
    size = min(chunk_size, length)
    per_row = -(-length // size)
    found = []
    for begin, end in document_bounds(cu_seqlens):
        row, first = divmod(begin, length)
        last = end - 1 - row * length
        stop = size if last + 1 == length else last % size + 1
        chunk = row * per_row
        found.append(Document(chunk + first // size, first % size, chunk + last // size, stop))
    return found


class Documents:
    """The documents of one call: what their initial states give, what their final ones take."""

    def __init__(self, chunks: Chunks, cu_seqlens: Tensor, length: int, initial: Tensor | None) -> None:
        self.s = chunks
        self.size = chunks.x.shape[1]
        self.all = locate(cu_seqlens, length, self.size)
        self.initial = None if initial is None else initial.to(chunks.dtype)

    def decay(self, chunk: int, start: int, end: int) -> Tensor:
        """2^(q[end-1] - q[start-1]), (H, 1, 1); q[-1] is 0."""
        q = self.s.cumulative[chunk].flatten(0, 1)
        last = q[:, end - 1]
        return (last - q[:, start - 1] if start else last).to(self.s.dtype).exp2()[:, None, None]

    def from_before(self, chunk: int, start: int, end: int) -> Tensor:
        """2^(q[i] - q[start-1]) of these tokens, (n, G, R, 1)."""
        q = self.s.cumulative[chunk]
        weights = q[..., start:end] - q[..., start - 1 : start]
        return weights.to(self.s.dtype).exp2_().permute(2, 0, 1).unsqueeze(-1)

    def to_end(self, chunk: int, start: int, end: int) -> Tensor:
        """2^(q[end-1] - q[i]) of these tokens, (n, G, R, 1)."""
        q = self.s.cumulative[chunk]
        weights = q[..., end - 1 : end] - q[..., start:end]
        return weights.to(self.s.dtype).exp2_().permute(2, 0, 1).unsqueeze(-1)

    def rows(self, keys: Tensor, chunk: int, start: int, end: int) -> Tensor:
        """The tokens of b or c, or of a gradient of theirs: (G, n, N)."""
        groups = self.s.x.shape[2]
        return keys[chunk * groups : (chunk + 1) * groups, start:end]

    def by_group(self, state: Tensor) -> Tensor:
        """(H, P, N) as (G, R*P, N)."""
        return state.reshape(self.s.x.shape[2], -1, state.shape[-1])

    def flat(self, values: Tensor) -> Tensor:
        """(n, G, R, P) as (G, n, R*P)."""
        return values.flatten(2).transpose(0, 1)

    def tokens(self, values: Tensor) -> Tensor:
        """(G, n, R*P) as (n, G, R, P)."""
        return values.transpose(0, 1).unflatten(2, self.s.x.shape[3:])

    def head(self, document: Document) -> tuple[int, int, int] | None:
        """Chunk, first token and end of a document's head, if it has one."""
        if document.start == 0:
            return None
        end = document.end if document.first == document.last else self.size
        return document.first, document.start, end

    def tail(self, document: Document) -> tuple[int, int, int] | None:
        """Chunk, first token and end of a document's tail, if it has one."""
        return None if document.end == self.size else self.ending(document)

    def enter(self, states: Tensor) -> None:
        """Write initial states, decayed through heads, to the states before chunks (K, H, P, N)."""
        if self.initial is None:
            return
        for document, state in zip(self.all, self.initial):
            if document.entry is not None:
                head = self.head(document)
                states[document.entry] = state if head is None else self.decay(*head) * state

    def read(self, y: Tensor) -> None:
        """Add to y (K, L, G, R, P) what initial states give within heads."""
        if self.initial is None:
            return
        for document, state in zip(self.all, self.initial):
            if head := self.head(document):
                chunk, start, end = head
                outputs = self.s.mm(self.rows(self.s.c, *head), self.by_group(state).mT)
                y[chunk, start:end].addcmul_(self.tokens(outputs), self.from_before(*head))

    def leave(self, states: Tensor, after: Tensor) -> Tensor:
        """Final states (docs, H, P, N), from the states before and after chunks (K, H, P, N)."""
        finals = states.new_empty(len(self.all), *states.shape[1:])
        for i, document in enumerate(self.all):
            if tail := self.tail(document):
                chunk, start, end = tail
                weights = self.to_end(*tail) * self.s.dt[chunk, start:end].unsqueeze(-1)
                weighted = self.flat(self.s.x[chunk, start:end] * weights)
                finals[i] = self.s.mm(weighted.mT, self.rows(self.s.b, *tail)).view(states.shape[1:])
            else:
                finals[i] = after[document.last]
            before = self.carried(i, document, states)
            if before is not None:
                finals[i].addcmul_(before, self.decay(*self.ending(document)))
        return finals

    def ending(self, document: Document) -> tuple[int, int, int]:
        """Chunk, first token and end of the part of a document that lies in its last chunk."""
        return document.last, document.start if document.first == document.last else 0, document.end

    def carried(self, i: int, document: Document, states: Tensor) -> Tensor | None:
        """The state to which the tail, or a head that is all there is, adds; None where `after` holds all."""
        if document.entry is None:
            return None if self.initial is None else self.initial[i]
        return states[document.last] if document.end < self.size else None


class DocumentGradients:
    """Backward of `Documents`, in two steps around that of the chunks."""

    def __init__(self, documents: Documents, states: Tensor, dfinal: Tensor | None) -> None:
        self.documents, self.states, self.dfinal = documents, states, dfinal
        # Gradient of q that does not come with a token of a tile, (K, G, R, L).
        self.dq = torch.zeros_like(documents.s.cumulative)
        count = len(documents.all)
        self.dinitial = states.new_zeros(count, *states.shape[1:])

    def leave(self, dbefore: Tensor, dafter: Tensor) -> None:
        """Add to the gradients of the states before and after chunks (K, H, P, N)."""
        if self.dfinal is None:
            return
        documents = self.documents
        for i, document in enumerate(documents.all):
            if documents.tail(document) is None:
                dafter[document.last] = self.dfinal[i]
            before = documents.carried(i, document, self.states)
            if before is None:
                continue
            ending = documents.ending(document)
            decay = documents.decay(*ending)
            target = self.dinitial[i] if document.entry is None else dbefore[document.last]
            target.addcmul_(self.dfinal[i], decay)
            self._decayed(*ending, (self.dfinal[i] * before).sum((1, 2)) * decay[:, 0, 0])

    def enter(self, dbefore: Tensor) -> Tensor:
        """Gradient of the initial states, but for `heads`; those of the states before chunks are complete."""
        documents = self.documents
        for i, document in enumerate(documents.all):
            if document.entry is None:
                continue
            head, dstate = documents.head(document), dbefore[document.entry]
            if head is None:
                self.dinitial[i] += dstate
            elif documents.initial is not None:
                decay = documents.decay(*head)
                self.dinitial[i].addcmul_(dstate, decay)
                self._decayed(*head, (dstate * documents.initial[i]).sum((1, 2)) * decay[:, 0, 0])
        return self.dinitial

    def _decayed(self, chunk: int, start: int, end: int, gradient: Tensor) -> None:
        """To q, the gradient (H,) of the logarithm of `decay`."""
        dq = self.dq[chunk].flatten(0, 1)
        dq[:, end - 1] += gradient
        if start:
            dq[:, start - 1] -= gradient

    def heads(self, dy: Tensor, dc: Tensor) -> None:
        """Through `read`: adds to dc (K*G, L, N), dq and dinitial; dy (K, L, G, R, P)."""
        documents = self.documents
        if documents.initial is None:
            return
        s = documents.s
        for i, document in enumerate(documents.all):
            if head := documents.head(document):
                chunk, start, end = head
                state, c = documents.by_group(documents.initial[i]), documents.rows(s.c, *head)
                decayed = dy[chunk, start:end] * documents.from_before(*head)
                flat = documents.flat(decayed)
                documents.rows(dc, *head).add_(s.mm(flat, state))
                self.dinitial[i] += s.mm(flat.mT, c).view(self.dinitial.shape[1:])
                dq = (documents.tokens(s.mm(c, state.mT)) * decayed).sum(-1).permute(1, 2, 0)
                self.dq[chunk, ..., start:end] += dq
                self.dq[chunk, ..., start - 1] -= dq.sum(-1)

    def tails(self, dx: Tensor, ddt: Tensor, db: Tensor) -> None:
        """Through `leave`: adds to dx (K, L, G, R, P), ddt (K, L, G, R), db (K*G, L, N) and dq."""
        documents = self.documents
        if self.dfinal is None:
            return
        s = documents.s
        for document, dfinal in zip(documents.all, self.dfinal):
            if tail := documents.tail(document):
                chunk, start, end = tail
                x, dt = s.x[chunk, start:end], s.dt[chunk, start:end]
                dstate, b = documents.by_group(dfinal), documents.rows(s.b, *tail)
                to_end = documents.to_end(*tail)
                dxdt = documents.tokens(s.mm(b, dstate.mT)) * to_end
                dx[chunk, start:end].addcmul_(dxdt, dt.unsqueeze(-1))
                by_token = (dxdt * x).sum(-1)
                ddt[chunk, start:end] += by_token
                documents.rows(db, *tail).add_(s.mm(documents.flat(x * (to_end * dt.unsqueeze(-1))), dstate))
                dq = (by_token * dt).permute(1, 2, 0)
                self.dq[chunk, ..., start:end] -= dq
                self.dq[chunk, ..., end - 1] += dq.sum(-1)
