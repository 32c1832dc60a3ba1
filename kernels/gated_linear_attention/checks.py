"""What the arguments have to be, and which of them the forms can take. RWKV-6 asks the same."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from triptych.kernels.segments import check_cu_seqlens

TRITON_CHUNK_SIZES = (16, 32, 64)


def check(
    op: str,
    names: tuple[str, str, str, str],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    *,
    per_channel: bool = False,
) -> None:
    """Raise ValueError for what does not fit. names: of q, k, v, g. per_channel: g must be (B, T, H, D)."""
    of_q, of_k, of_v, of_g = names
    if q.dim() != 4 or q.shape != k.shape:
        raise ValueError(
            f"{op}: {of_q} and {of_k} must both be (B, T, H, D), "
            f"they are {tuple(q.shape)} and {tuple(k.shape)}"
        )
    batch, length, heads, dim = q.shape
    if length == 0:
        raise ValueError(f"{op}: {of_q} {tuple(q.shape)} has no tokens; T must be at least 1")
    if v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"{op}: {of_v} must be (B, T, H, E) with (B, T, H) = {tuple(q.shape[:3])}, it is {tuple(v.shape)}"
        )
    if per_channel and g.shape != q.shape:
        raise ValueError(f"{op}: {of_g} must be (B, T, H, D) = {tuple(q.shape)}, it is {tuple(g.shape)}")
    if g.shape not in (q.shape, q.shape[:3], (heads,)):
        raise ValueError(
            f"{op}: {of_g} must be (B, T, H, D) = {tuple(q.shape)}, (B, T, H) = {tuple(q.shape[:3])} or "
            f"(H,) = ({heads},), it is {tuple(g.shape)}"
        )
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"{op}: chunk_size={chunk_size} must be a power of two; 64 is usual")
    count = batch
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, length)
        count = cu_seqlens.numel() - 1
    expected = (count, heads, dim, v.shape[3])
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(f"{op}: initial_state must be {expected}, it is {tuple(initial_state.shape)}")


def _one_dtype(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if q.dtype == k.dtype == v.dtype:
        return None
    return f"it needs one dtype of queries, keys and values, not {q.dtype}, {k.dtype} and {v.dtype}"


def supported_by_triton(q: Tensor, k: Tensor, v: Tensor, *args: Tensor, **options: Any) -> str | None:
    """None, or why the Triton form cannot serve the call."""
    if options["chunk_size"] not in TRITON_CHUNK_SIZES:
        return f"chunk_size={options['chunk_size']} is none of {TRITON_CHUNK_SIZES}"
    return _one_dtype(q, k, v)


def supported_by_fla(q: Tensor, k: Tensor, v: Tensor, *args: Tensor, **options: Any) -> str | None:
    """None, or why flash-linear-attention 0.6.0 cannot serve the call."""
    if q.dtype.itemsize == 8:
        return "it has no double precision"
    if q.shape[3] % 2 or v.shape[3] % 2:
        return f"odd head sizes, here {q.shape[3]} and {v.shape[3]}, fail in its backward"
    return _one_dtype(q, k, v)
