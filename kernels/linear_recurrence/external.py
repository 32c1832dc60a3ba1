"""Adapter to the HGRN kernels of flash-linear-attention; written for version 0.6.0."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def arguments(
    a: Tensor,
    b: Tensor,
    *,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    with_final_state: bool,
) -> tuple[str, dict[str, Any]]:
    """The function of fla.ops.hgrn that serves the call, and its arguments.

    chunk_hgrn runs parts of a row at a time, but knows no documents and gives states no gradients; the
    recurrent one does both, a token after the other. It takes documents in a single row.
    """
    if initial_state is None and cu_seqlens is None and not with_final_state:
        return "chunk_hgrn", {"x": b, "g": a}
    if cu_seqlens is not None:
        a, b = (x.flatten(0, 1).unsqueeze(0) for x in (a, b))
        cu_seqlens = cu_seqlens.long()
    states = {"initial_state": initial_state, "output_final_state": with_final_state}
    return "fused_recurrent_hgrn", {"x": b, "g": a, **states, "cu_seqlens": cu_seqlens}


def linear_recurrence(
    a: Tensor,
    b: Tensor,
    *,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    log_decay: bool,
    chunk_size: int,
    with_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in the public function; chunk_size has no meaning here."""
    from fla.ops import hgrn

    name, given = arguments(
        a, b, initial_state=initial_state, cu_seqlens=cu_seqlens, with_final_state=with_final_state
    )
    h, final_state = getattr(hgrn, name)(**given)
    return h.view(b.shape), final_state
