"""Gated linear attention in Triton as a registered operator; saves its inputs alone.

Forward: the scores inside chunks, the state from chunk to chunk, the outputs, a kernel each. Backward does
the first two again, carries the gradient of the state the other way with the kernel that carries the state,
and has the gradient of v from the kernel of the outputs. Letters as in chunks.py.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triptych.kernels.gated_linear_attention import triton_kernels as kernels
from triptych.kernels.library import define, statistics_dtype
from triptych.kernels.triton_launch import accumulator, dot_precision, launch, power_of_2

# Programs that keep a GPU of about 130 processors busy.
ENOUGH_PROGRAMS = 256


@dataclass(frozen=True)
class Places:
    """Where chunks lie. starts int64 (K,), counts int32 (K,): their first tokens and numbers of tokens, 0 for
    spare chunks. bounds (docs + 1,): of documents. first_chunks int64 (docs,): the first chunk of each."""

    starts: Tensor
    counts: Tensor
    bounds: Tensor
    first_chunks: Tensor

    @property
    def chunks(self) -> int:
        return self.starts.shape[0]

    @property
    def documents(self) -> int:
        return self.first_chunks.shape[0]


def _places(batch: int, length: int, cu_seqlens: Tensor | None, size: int, device: torch.device) -> Places:
    if cu_seqlens is None:
        return _row_places(batch, length, size, device)
    return _packed_places(cu_seqlens, batch * length, size)


@functools.lru_cache(maxsize=64)
def _row_places(batch: int, length: int, size: int, device: torch.device) -> Places:
    bounds = torch.arange(batch + 1, device=device) * length
    return _packed_places(bounds, batch * length, size, batch * -(-length // size))


def _packed_places(bounds: Tensor, tokens: int, size: int, chunks: int | None = None) -> Places:
    """chunks: their number; None: the most there can be, as counting them would wait for the device."""
    lengths = bounds.diff().long()
    chunks = (tokens + lengths.numel() * (size - 1)) // size if chunks is None else chunks
    ends = ((lengths + size - 1) // size).cumsum(0)
    first_chunks = ends - (lengths + size - 1) // size
    chunk = torch.arange(chunks, device=bounds.device)
    document = torch.searchsorted(ends, chunk, right=True).clamp_(max=lengths.numel() - 1)
    inside = (chunk - first_chunks[document]) * size
    counts = (lengths[document] - inside).clamp_(0, size).int()
    return Places(bounds[document] + inside, counts, bounds, first_chunks)


@functools.lru_cache(maxsize=32)
def _tables(size: int, exclusive: bool, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """takes (levels + 2, L, L) of `dtype`: which decays j lie between token i and the border at which its
    window of each level meets its sibling; last, between i and the start and the end of the chunk. meets int8
    (levels, L, L): which tokens i of odd windows meet which j of even ones."""
    i, j = torch.arange(size, device=device).view(-1, 1), torch.arange(size, device=device)
    to_start, to_end = j < i if exclusive else j <= i, j > i
    takes, meets = [], []
    for level in range(size.bit_length() - 1):
        odd = (i >> level) % 2 == 1
        takes.append(((i >> level) == (j >> level)) & torch.where(odd, to_start, to_end))
        meets.append(((i ^ j) >> level == 1) & odd)
    return torch.stack([*takes, to_start, to_end]).to(dtype), torch.stack(meets).to(torch.int8)


class _Call:
    """One call: contiguous inputs, sizes of blocks, and the steps that forward and backward share."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        bonus: Tensor | None,
        cu_seqlens: Tensor | None,
        scale: float,
        chunk_size: int,
    ) -> None:
        self.q, self.k, self.v, self.g = (x.contiguous() for x in (q, k, v, g))
        self.bonus = None if bonus is None else bonus.contiguous()
        self.scale, self.size = scale, chunk_size
        self.places = _places(q.shape[0], q.shape[1], cu_seqlens, chunk_size, q.device)
        self.heads, self.dim, self.value_dim = q.shape[2], q.shape[3], v.shape[3]
        self.dtype = statistics_dtype(q, k, v, g)
        self.per_channel = g.dim() == 4
        # Columns of a tile: where many tiles are at work, narrow ones, for registers' sake.
        self.wide = {"BD": self._block(self.dim, 64), "BE": self._block(self.value_dim, 64)}
        self.narrow = {"BD": self._block(self.dim, 32), "BE": self._block(self.value_dim, 32)}
        # Three tf32 products are as good as one of fp32, which tensor cores do not have.
        precision = "tf32x3" if dot_precision(q.dtype) == "ieee" else "tf32"
        self.options = {"L": chunk_size, "ACC": accumulator(self.dtype), "PRECISION": precision}
        # Numbers of bf16 that hold g: of half inputs, whose errors are far above those of two.
        split = 0 if q.dtype.itemsize > 2 else 1 if g.dtype == torch.bfloat16 else 2
        self.levels = {"LEVELS": chunk_size.bit_length() - 1, "EXCLUSIVE": bonus is not None, "SPLIT": split}

        self.tables = _tables(
            chunk_size, bonus is not None, torch.bfloat16 if split else self.dtype, q.device
        )

    def _block(self, dim: int, most: int) -> int:
        # Wider numbers have less shared memory to spare.
        return min(power_of_2(dim), most if self.q.dtype.itemsize == 2 else 32)

    def kept(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.q.dtype, device=self.q.device)

    def scores(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A (B*T, H, L), readers and writers (B, T, H, D), through (K, H, D)."""
        places = self.places
        scores = self.kept(self.q.shape[0] * self.q.shape[1], self.heads, self.size)
        readers, writers = torch.empty_like(self.q), torch.empty_like(self.q)
        through = self.kept(places.chunks, self.heads, self.dim, dtype=self.dtype)
        results = (scores, readers, writers, through)
        grid = (places.chunks * self.heads,)
        at = (places.starts, places.counts)
        rest = {"D": self.dim, **self.options, "num_warps": 4, "num_stages": 1}
        tensors: tuple[Tensor | None, ...]
        if self.per_channel:
            tensors = (self.q, self.k, self.g, self.bonus, *self.tables, *at, *results)
            kernel, options = kernels.channel_scores_kernel, {"BD": self.narrow["BD"], **self.levels}
        else:
            tensors = (self.q, self.k, self.g, *at, *results)
            kernel, options = kernels.head_scores_kernel, {"BD": self.wide["BD"]}
        launch(kernel, grid, *tensors, self.scale, self.heads, **options, **rest)
        return results

    def carry(
        self, left: Tensor, right: Tensor, through: Tensor, entering: Tensor | None, *, reverse: bool
    ) -> tuple[Tensor, Tensor]:
        """States before each chunk (K, H, D, E), behind it if reverse; and behind (before) the documents."""
        places, dims = self.places, (self.dim, self.value_dim)
        states = self.kept(places.chunks, self.heads, *dims)
        leaving = self.kept(places.documents, self.heads, *dims, dtype=self.dtype)
        blocks = dict(self.wide)
        programs = self._programs(blocks)
        if programs < ENOUGH_PROGRAMS:
            blocks["BE"] = self.narrow["BE"]
            programs = self._programs(blocks)
        tensors = (left, right, through, entering, places.bounds, places.first_chunks, states, leaving)
        launch(
            kernels.carry_kernel,
            (programs,),
            *tensors,
            self.heads,
            D=self.dim,
            E=self.value_dim,
            **blocks,
            REVERSE=reverse,
            ENTERS=entering is not None,
            **self.options,
            num_warps=4,
            num_stages=3,
        )
        return states, leaving

    def _programs(self, blocks: dict[str, int]) -> int:
        tiles = triton.cdiv(self.dim, blocks["BD"]) * triton.cdiv(self.value_dim, blocks["BE"])
        return self.places.documents * self.heads * tiles

    def outputs(
        self, scores: Tensor, values: Tensor, readers: Tensor, states: Tensor, *, transposed: bool
    ) -> Tensor:
        """A values + readers S, (B, T, H, E)."""
        out = torch.empty_like(self.v)
        places = self.places
        launch(
            kernels.outputs_kernel,
            (places.chunks * self.heads * triton.cdiv(self.value_dim, self.wide["BE"]),),
            *(scores, values, readers, states, places.starts, places.counts, out),
            self.heads,
            D=self.dim,
            E=self.value_dim,
            **self.wide,
            TRANSPOSED=transposed,
            **self.options,
            num_warps=4,
            num_stages=2,
        )
        return out

    def gradients(
        self, dy: Tensor, states: Tensor, dstates: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """dq, dk, dg and dbonus (H, D)."""
        places = self.places
        dq, dk, dg = (torch.empty_like(x) for x in (self.q, self.k, self.g))
        at = (dy, states, dstates, places.starts, places.counts, dq, dk, dg)
        rest = {"D": self.dim, "E": self.value_dim, **self.narrow, **self.options, "num_stages": 1}
        tensors: tuple[Tensor | float | None, ...]
        if not self.per_channel:
            tensors = (self.q, self.k, self.v, self.g, *at, self.scale, self.heads)
            grid = (places.chunks * self.heads,)
            launch(kernels.head_gradients_kernel, grid, *tensors, num_warps=8, **rest)
            return dq, dk, dg, None
        dbonus = None
        if self.bonus is not None:
            # Spare chunks leave theirs as it is.
            dbonus = torch.zeros(places.chunks, self.heads, self.dim, dtype=self.dtype, device=dy.device)
        tensors = (self.q, self.k, self.v, self.g, self.bonus, *self.tables, *at, dbonus)
        grid = (places.chunks * self.heads * triton.cdiv(self.dim, self.narrow["BD"]),)
        rest["SUMS"] = tl.bfloat16 if self.q.dtype == torch.bfloat16 else self.options["ACC"]
        rest |= {"num_warps": 4, **self.levels}
        launch(kernels.channel_gradients_kernel, grid, *tensors, self.scale, self.heads, **rest)
        return dq, dk, dg, None if dbonus is None else dbonus.sum(0)


@define("gated_linear_attention_triton")
def gated_linear_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """y (B, T, H, E), final states (B | docs, H, D, E)."""
    call = _Call(q, k, v, g, bonus, cu_seqlens, scale, chunk_size)
    scores, readers, writers, through = call.scores()
    initial = None if initial_state is None else initial_state.contiguous()
    states, final_state = call.carry(writers, call.v, through, initial, reverse=False)
    return call.outputs(scores, call.v, readers, states, transposed=False), final_state


@gated_linear_attention_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    documents = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = (documents, *q.shape[2:], v.shape[3])
    return v.new_empty(v.shape), q.new_empty(state, dtype=statistics_dtype(q, k, v, g))


@define("gated_linear_attention_triton_backward")
def gated_linear_attention_backward_op(
    dy: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, bonus (empty where there is none) and the initial state."""
    call = _Call(q, k, v, g, bonus, cu_seqlens, scale, chunk_size)
    dy = dy.contiguous()
    scores, readers, writers, through = call.scores()
    initial = None if initial_state is None else initial_state.contiguous()
    final = None if dfinal is None else dfinal.contiguous()
    states, _ = call.carry(writers, call.v, through, initial, reverse=False)
    dstates, dinitial = call.carry(readers, dy, through, final, reverse=True)
    dv = call.outputs(scores, dy, writers, dstates, transposed=True)
    dq, dk, dg, dbonus = call.gradients(dy, states, dstates)
    dbonus = q.new_empty(0) if bonus is None or dbonus is None else dbonus.to(bonus.dtype)
    return dq, dk, dv, dg, dbonus, dinitial


@gated_linear_attention_backward_op.register_fake
def _(
    dy: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dg = (x.new_empty(x.shape) for x in (q, k, v, g))
    dbonus = q.new_empty(0) if bonus is None else bonus.new_empty(bonus.shape)
    documents = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = (documents, *q.shape[2:], v.shape[3])
    return dq, dk, dv, dg, dbonus, q.new_empty(state, dtype=statistics_dtype(q, k, v, g))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.chunk_size = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
    q, k, v, g, bonus, initial_state, cu_seqlens = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(v)
    *grads, dbonus, dinitial = gated_linear_attention_backward_op(
        dy, dfinal, q, k, v, g, bonus, initial_state, cu_seqlens, ctx.scale, ctx.chunk_size
    )
    dbonus = None if bonus is None else dbonus
    dinitial = None if initial_state is None else dinitial.to(initial_state.dtype)
    return *grads, dbonus, dinitial, None, None, None


gated_linear_attention_op.register_autograd(_backward, setup_context=_setup)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    bonus: Tensor | None = None,
    scale: float,
    initial_state: Tensor | None,
    return_final_state: bool,
    cu_seqlens: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in the public function; bonus (H, D) chooses the exclusive form at the head of chunks.py."""
    if g.dim() == 1:
        g = g.expand(q.shape[:3])
    return gated_linear_attention_op(q, k, v, g, bonus, initial_state, cu_seqlens, scale, chunk_size)


def gated_linear_attention(q: Tensor, k: Tensor, v: Tensor, g: Tensor, **options: Any) -> Any:
    """Arguments as of the reference."""
    return attend(q, k, v, g, **options)
