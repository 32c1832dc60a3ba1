"""flash-linear-attention's chunked delta rules, gated and plain; written to fla 0.6.0."""

from __future__ import annotations

from torch import Tensor


def fla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    normalize: bool,
    with_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Shapes as in the public function. Packed rows are one row to fla; its chunks have 64 tokens."""
    shape = v.shape
    if cu_seqlens is not None:
        q, k, v, beta = (x.flatten(0, 1).unsqueeze(0) for x in (q, k, v, beta))
        g = None if g is None else g.flatten(0, 1).unsqueeze(0)
        cu_seqlens = cu_seqlens.long()
    options = {
        "scale": scale,
        # It scans in fp32, from whatever state it is given.
        "initial_state": None if initial_state is None else initial_state.float(),
        "output_final_state": with_final_state,
        "use_qk_l2norm_in_kernel": normalize,
        "cu_seqlens": cu_seqlens,
    }
    if g is None:
        from fla.ops.delta_rule import chunk_delta_rule

        y, final_state = chunk_delta_rule(q, k, v, beta, **options)
    else:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        y, final_state = chunk_gated_delta_rule(q, k, v, g, beta, **options)
    return y.view(shape), final_state
