"""How SSD cuts a sequence into chunks, and the mathematics of it.

B batch, T length, L chunk size, C chunks in a row, K = B*C chunks in all, H heads, G groups, R = H/G,
P head dim, N state.

Within a chunk, with q[i] the cumulative log2 decay up to and with token i (arXiv 2405.21060, section 6):
    y[i] = sum_{j <= i} 2^(q[i] - q[j]) (c[i].b[j]) xdt[j]  +  2^q[i] S c[i]  +  d x[i],
    S'   = 2^q[L-1] S + sum_j 2^(q[L-1] - q[j]) xdt[j] b[j]^T,    xdt = dt x.
Logarithms are to base 2 as exp2 is cheaper than exp, on CPUs by far. Documents (segment ids) cut the sums by
masks; a reset is never a decay of -inf, whose differences would be NaN. S is the state of the document of the
chunk's first token. The score matrix c.b is computed once per group. Tokens beyond T are padding with dt = 0,
which leaves the state alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.kernels.library import statistics_dtype

# Elements of the (L, L) decay matrices that exist at a time: bounds memory, and keeps them in a CPU's cache.
TILE_ELEMENTS = {"cpu": 1 << 19}
TILE_ELEMENTS_ELSEWHERE = 1 << 26
# How far, in log2, below the smallest normal number every exponential is 0, subnormal numbers included.
VANISHED = 60.0


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype, out_dtype: torch.dtype) -> Tensor:
    """Batched a @ b with operands in `dtype`, result in `out_dtype`; on CUDA the fp32 accumulator is kept."""
    a, b = a.to(dtype), b.to(dtype)
    if dtype != out_dtype and a.is_cuda:
        return torch.bmm(a, b, out_dtype=out_dtype)
    return torch.bmm(a, b).to(out_dtype)


@dataclass
class Chunks:
    """The inputs cut into chunks, and the decays, all in the accumulation dtype but for x, b and c."""

    x: Tensor  # (K, L, G, R, P)
    dt: Tensor  # (K, L, G, R)
    b: Tensor  # (K*G, L, N), in the matmul dtype
    c: Tensor  # (K*G, L, N), in the matmul dtype
    cumulative: Tensor  # q: (K, G, R, L), in fp64
    from_start: (
        Tensor  # (K, L, G, R): decay from the state before the chunk to each token, 0 across documents
    )
    to_end: Tensor  # (K, L, G, R): decay from each token to the end of the chunk
    through: Tensor  # (B, C, H): decay of the whole chunk
    continues: (
        Tensor | None
    )  # (B, C, 1, 1, 1): 1 where the chunk's first token goes on with a document, else 0
    mask: Tensor  # (1 or K, L, L): -inf where i does not see j, else 0
    matmul_dtype: torch.dtype

    @property
    def dtype(self) -> torch.dtype:
        """Of decays, states and sums."""
        return self.dt.dtype

    def mm(self, a: Tensor, b: Tensor) -> Tensor:
        """Batched product, accumulated and returned in fp32 (fp64)."""
        return matmul(a, b, self.matmul_dtype, self.dtype)

    def grouped(self, values: Tensor, factor: Tensor) -> Tensor:
        """(K, L, G, R, P) times (K, L, G, R), laid out (K*G, L, R*P)."""
        k, length, groups, repeats, dim = values.shape
        out = torch.empty(k, groups, length, repeats, dim, dtype=self.dtype, device=values.device)
        torch.mul(values.transpose(1, 2), factor.transpose(1, 2).unsqueeze(-1), out=out)
        return out.view(k * groups, length, repeats * dim)

    def per_head(self, values: Tensor, factor: Tensor | None = None) -> Tensor:
        """(K, L, G, R, P), times (K, L, G, R) if given, laid out (K*H, L, P)."""
        k, length, groups, repeats, dim = values.shape
        out = torch.empty(k, groups, repeats, length, dim, dtype=self.dtype, device=values.device)
        if factor is None:
            out.copy_(values.permute(0, 2, 3, 1, 4))
        else:
            torch.mul(values.permute(0, 2, 3, 1, 4), factor.permute(0, 2, 3, 1).unsqueeze(-1), out=out)
        return out.view(-1, length, dim)

    def tiles(self) -> list[slice]:
        """Runs of chunks whose decay matrices fit the bound."""
        k, groups, repeats, length = self.cumulative.shape
        bound = TILE_ELEMENTS.get(self.x.device.type, TILE_ELEMENTS_ELSEWHERE)
        size = max(1, bound // (groups * repeats * length * length))
        return [slice(i, min(i + size, k)) for i in range(0, k, size)]

    def decays(self, tile: slice) -> Tensor:
        """2^(q[i] - q[j]) for j <= i of one document, else 0: (tile, G, R, L, L)."""
        q = self.cumulative[tile]
        mask = self.mask if self.mask.shape[0] == 1 else self.mask[tile]
        difference = torch.empty(*q.shape, q.shape[-1], dtype=self.dtype, device=q.device)
        torch.sub(q.unsqueeze(-1), q.unsqueeze(-2), out=difference)
        # Masked before the exponential: above the diagonal it would overflow.
        return difference.add_(mask[:, None, None]).exp2_()

    def scores(self, tile: slice) -> Tensor:
        """c[i].b[j]: (tile, G, 1, L, L), once per group."""
        groups, length = self.cumulative.shape[1], self.cumulative.shape[3]
        rows = slice(tile.start * groups, tile.stop * groups)
        return self.mm(self.c[rows], self.b[rows].transpose(1, 2)).view(-1, groups, 1, length, length)


def pad_time(x: Tensor, padding: int) -> Tensor:
    """Zeros after the last token of (B, T, ...)."""
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, padding)) if padding else x


def cut(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, segments: Tensor | None, chunk_size: int
) -> Chunks:
    """Cut (B, T, ...) inputs into chunks; segments (B, T) or None."""
    dtype = statistics_dtype(x, dt, a)
    # Half-precision matmuls pay on accelerators; on CPU they are slower than fp32 ones.
    matmul_dtype = x.dtype if x.device.type != "cpu" and x.dtype.itemsize == 2 else dtype
    batch, length, heads, _ = x.shape
    groups = b.shape[2]
    size = min(chunk_size, length)
    padding = -length % size
    x, dt, b, c = (pad_time(y, padding) for y in (x, dt.to(dtype), b, c))
    shape = (batch * ((length + padding) // size), size)
    # A step whose decay is 0 in this dtype may as well be the mildest such: the sums' rounding stays bounded.
    least = math.log2(torch.finfo(dtype).smallest_normal) - VANISHED
    log_decay = (dt * (a.to(dtype) / math.log(2))).clamp_min_(least)
    # Summed in fp64: in fp32 a difference of two sums is off by 1e-7 of the sums, whatever its own size.
    q = log_decay.reshape(*shape, groups, -1).permute(0, 2, 3, 1).double().cumsum(-1)  # (K, G, R, L)
    by_token = q.permute(0, 3, 1, 2)
    last = by_token[:, -1:]
    from_start, to_end = by_token.to(dtype).exp2(), (last - by_token).to(dtype).exp2()
    through = last.to(dtype).exp2().reshape(batch, -1, heads)
    continues = None
    order = torch.arange(size, device=x.device)
    hidden = (order.unsqueeze(1) < order).unsqueeze(0)
    if segments is not None:
        ids = torch.cat([segments, segments[:, -1:].expand(-1, padding)], dim=1).reshape(batch, -1, size)
        first = ids[:, :, :1]
        continues = F.pad(first[:, 1:] == ids[:, :-1, -1:], (0, 0, 1, 0)).to(dtype)[..., None, None]
        through = through * (ids[:, :, -1:] == first)
        from_start = from_start * (ids == first).view(*shape, 1, 1)
        to_end = to_end * (ids == ids[:, :, -1:]).view(*shape, 1, 1)
        ids = ids.reshape(shape)
        hidden = hidden | (ids.unsqueeze(1) != ids.unsqueeze(2))
    return Chunks(
        x=x.reshape(*shape, groups, heads // groups, -1),
        dt=dt.reshape(*shape, groups, -1),
        b=b.to(matmul_dtype).reshape(*shape, groups, -1).transpose(1, 2).flatten(0, 1),
        c=c.to(matmul_dtype).reshape(*shape, groups, -1).transpose(1, 2).flatten(0, 1),
        cumulative=q,
        from_start=from_start,
        to_end=to_end,
        through=through,
        continues=continues,
        mask=torch.zeros(hidden.shape, dtype=dtype, device=x.device).masked_fill_(hidden, float("-inf")),
        matmul_dtype=matmul_dtype,
    )
