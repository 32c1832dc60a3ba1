"""How mLSTM cuts a sequence into chunks, and the mathematics of it.

B batch, T length, L chunk size, C chunks in a row, K = B*C chunks in all, H heads, D channels of queries and
keys, E channels of values and, behind them, a 1 that sums up the normaliser.

With b[i] the sum of log f up to and with token i of the chunk, and a[j] = log i[j] - b[j], a token weighs
exp(b[i] + a[j]) in the output i, and the state S before the chunk exp(b[i]) (times its own exp(m)):
    u[i] = sum_{j <= i} exp(a[j] - top[i]) (q[i].k[j]) v[j] + exp(m - top[i]) q[i] S,
    S'   = exp(b[L-1] + m - m') S + sum_j exp(b[L-1] + a[j] - m') k[j] v[j]^T,
where top[i] = max(m, a[j] for j <= i) and m' = b[L-1] + max(m, a[j]): no exponent is above 0.
Documents (segment ids) cut the sums by masks. Tokens beyond T are padding with i = 0 and f = 1, which leaves
the state alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.kernels.library import statistics_dtype
from triptych.kernels.mlstm.reference import NOTHING
from triptych.kernels.ssd.chunks import TILE_ELEMENTS, TILE_ELEMENTS_ELSEWHERE, matmul, pad_time


@dataclass
class Chunks:
    """The inputs cut into chunks; sums and exponents of gates in fp64."""

    q: Tensor  # (K, H, L, D), times scale
    k: Tensor  # (K, H, L, D)
    v: Tensor  # (K, H, L, E + 1), ones last
    b: Tensor  # (K, H, L)
    a: Tensor  # (K, H, L)
    mask: Tensor  # (1 or K, L, L): -inf where i does not see j, else 0
    sees_before: Tensor | None  # bool (K, 1, L): tokens of the document that the chunk begins in; None: all
    in_last: Tensor | None  # bool (K, 1, L): tokens of the document that the chunk ends in; None: all
    through: Tensor | None  # bool (B, C, 1): chunks of one document, that of the token before; None: all
    matmul_dtype: torch.dtype

    @property
    def dtype(self) -> torch.dtype:
        """Of states and sums."""
        return self.q.dtype

    def mm(self, x: Tensor, y: Tensor) -> Tensor:
        """(K, H, ., .) products, accumulated and returned in fp32 (fp64)."""
        product = matmul(x.flatten(0, 1), y.flatten(0, 1), self.matmul_dtype, self.dtype)
        return product.view(*x.shape[:2], *product.shape[1:])

    def tiles(self) -> list[slice]:
        """Runs of chunks whose (L, L) matrices fit the bound."""
        chunks, heads, length = self.b.shape
        bound = TILE_ELEMENTS.get(self.b.device.type, TILE_ELEMENTS_ELSEWHERE)
        size = max(1, bound // (heads * length * length))
        return [slice(i, min(i + size, chunks)) for i in range(0, chunks, size)]

    def scales(self, m: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """From m (B, H) of the first state: m before each chunk (B, C, H) and the last (B, H); in fp32 (fp64)
        how much is kept of the state before a chunk (B, C, H), and what a token weighs in the state behind
        it (K, H, L)."""
        ends = self.b[..., -1].reshape(m.shape[0], -1, m.shape[1])  # (B, C, H)
        a = self.a if self.in_last is None else self.a.masked_fill(~self.in_last, -torch.inf)
        tops = a.amax(-1).view(ends.shape)
        befores, kept = [], []
        for c in range(ends.shape[1]):
            befores.append(m)
            known = m.double()
            if self.through is not None:
                known = known.masked_fill(~self.through[:, c], NOTHING)
            # Rounded first, so that state and m fit together exactly.
            m = (ends[:, c] + torch.maximum(tops[:, c], known)).clamp(min=NOTHING).to(m.dtype)
            kept.append(ends[:, c] + known - m)
        before = torch.stack(befores, 1)
        after = torch.cat([before[:, 1:], m.unsqueeze(1)], 1)
        keep = torch.stack(kept, 1).exp().to(self.dtype)
        if self.through is not None:
            keep = keep * self.through
        entering = (ends - after).view(a.shape[:2]).unsqueeze(-1) + a
        return before, m, keep, entering.exp().to(self.dtype)

    def tops(self, before: Tensor) -> tuple[Tensor, Tensor]:
        """From m before each chunk (B, C, H): top (K, H, L), and in fp32 (fp64) exp(m - top), 0 where a token
        does not see the state before the chunk."""
        m = before.flatten(0, 1).double().unsqueeze(-1)
        if self.sees_before is None:
            top = torch.maximum(self.a.cummax(-1).values, m)
            return top, (m - top).exp().to(self.dtype)
        seen = [(self.a[tile].unsqueeze(-2) + self.mask[tile].unsqueeze(1)).amax(-1) for tile in self.tiles()]
        m = torch.where(self.sees_before, m, NOTHING)
        top = torch.maximum(torch.cat(seen), m)
        return top, (m - top).exp().to(self.dtype) * self.sees_before

    def denominators(self, normaliser: Tensor, tile: slice, top: Tensor) -> Tensor:
        """max(|n|, exp(-m)) of a tile: (tile, H, L), like n."""
        info = torch.finfo(self.dtype)
        one = torch.exp(-(self.b[tile] + top[tile])).clamp(info.tiny, info.max).to(self.dtype)
        return torch.maximum(normaliser.abs(), one)

    def weights(self, tile: slice, top: Tensor) -> Tensor:
        """exp(a[j] - top[i]) where i sees j, else 0: (tile, H, L, L)."""
        mask = self.mask if self.mask.shape[0] == 1 else self.mask[tile]
        exponent = (self.a[tile].unsqueeze(-2) - top[tile].unsqueeze(-1)).add_(mask.unsqueeze(1))
        return exponent.to(self.dtype).exp_()


def chunked(x: Tensor, size: int) -> Tensor:
    """(B, T, H, ...) as (K, H, L, ...), zeros behind the last token."""
    x = pad_time(x, -x.shape[1] % size)
    return x.reshape(-1, size, *x.shape[2:]).transpose(1, 2)


def cut(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    segments: Tensor | None,
    scale: float,
    chunk_size: int,
) -> Chunks:
    """Cut (B, T, ...) inputs into chunks; segments (B, T) or None."""
    dtype = statistics_dtype(q, v, igate)
    # Half-precision matmuls pay on accelerators; on CPU they are slower than fp32 ones.
    matmul_dtype = q.dtype if q.device.type != "cpu" and q.dtype.itemsize == 2 else dtype
    batch, length, heads = igate.shape
    size = min(chunk_size, length)
    padding = -length % size
    shape = (batch * ((length + padding) // size), size)

    log_i = F.pad(igate.double(), (0, 0, 0, padding), value=-torch.inf)
    b = chunked(F.logsigmoid(fgate.to(dtype)), size).double().cumsum(-1)
    order = torch.arange(size, device=q.device)
    hidden = (order.unsqueeze(1) < order).unsqueeze(0)
    sees_before = in_last = through = None
    if segments is not None:
        ids = torch.cat([segments, segments[:, -1:].expand(-1, padding)], dim=1).reshape(batch, -1, size)
        before = torch.cat([ids[:, :1, :1], ids[:, :-1, -1:]], dim=1)  # of the token before the chunk
        through = ids[:, :, -1:] == before
        sees_before = (ids == before).reshape(shape).unsqueeze(1)
        in_last = (ids == ids[:, :, -1:]).reshape(shape).unsqueeze(1)
        ids = ids.reshape(shape)
        hidden = hidden | (ids.unsqueeze(2) != ids.unsqueeze(1))
    return Chunks(
        q=(chunked(q, size).to(dtype) * scale),
        k=chunked(k, size).to(dtype),
        v=F.pad(chunked(v, size).to(dtype), (0, 1), value=1.0),
        b=b,
        a=log_i.reshape(*shape, heads).transpose(1, 2) - b,
        mask=torch.zeros(hidden.shape, dtype=torch.float64, device=q.device).masked_fill_(hidden, -torch.inf),
        sees_before=sees_before,
        in_last=in_last,
        through=through,
        matmul_dtype=matmul_dtype,
    )
