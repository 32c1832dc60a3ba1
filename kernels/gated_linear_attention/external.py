"""Adapters to flash-linear-attention (github.com/fla-org/flash-linear-attention, read at 0.6.0).

It takes packed documents as one row, states in fp32, and chooses its chunks itself. Its retention is the
simple decay with constants of its own, so that the same adapter serves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def in_one_row(
    function: Callable[..., tuple[Tensor, Tensor | None]],
    tokens: dict[str, Tensor],
    *,
    initial_state: Tensor | None,
    return_final_state: bool,
    cu_seqlens: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Call `function` of the package with the tensors (B, T, ...) of `tokens`, packed ones flattened."""
    shape = tokens["v"].shape
    if cu_seqlens is not None:
        tokens = {name: x.flatten(0, 1).unsqueeze(0) for name, x in tokens.items()}
        cu_seqlens = cu_seqlens.long()
    y, final_state = function(
        **{name: x.contiguous() for name, x in tokens.items()},
        initial_state=None if initial_state is None else initial_state.float().contiguous(),
        output_final_state=return_final_state,
        cu_seqlens=cu_seqlens,
        **options,
    )
    return y.view(shape), final_state


def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, chunk_size: int, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """chunk_gla for decays per channel, chunk_simple_gla for one per head. Arguments as of the reference."""
    tokens = {"q": q, "k": k, "v": v}
    if g.dim() == 4:
        from fla.ops.gla import chunk_gla

        return in_one_row(chunk_gla, {**tokens, "g": g}, **options)
    from fla.ops.simple_gla import chunk_simple_gla

    if g.dim() == 1 and not g.requires_grad:
        return in_one_row(chunk_simple_gla, tokens, g_gamma=g.float().contiguous(), **options)
    # Its constant decays have no gradient.
    return in_one_row(chunk_simple_gla, {**tokens, "g": g.expand(q.shape[:3])}, **options)
