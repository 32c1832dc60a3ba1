"""The linear recurrence, a token at a time.

B batch, T length, D channels, docs packed documents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triptych.kernels.library import statistics_dtype
from triptych.kernels.segments import document_bounds


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
    dtype = statistics_dtype(a, b)
    batch, length, channels = b.shape
    decays, inputs = a.to(dtype).flatten(0, 1), b.to(dtype).flatten(0, 1)
    if log_decay:
        decays = decays.exp()
    if cu_seqlens is None:
        bounds = [(row * length, (row + 1) * length) for row in range(batch)]
    else:
        bounds = document_bounds(cu_seqlens)
    hs, states = [], []
    for i, (start, end) in enumerate(bounds):
        state = inputs.new_zeros(channels) if initial_state is None else initial_state[i].to(dtype)
        # unbind and stack: indexing a[t] would make backward quadratic in T.
        for a_t, b_t in zip(decays[start:end].unbind(0), inputs[start:end].unbind(0)):
            state = a_t * state + b_t
            hs.append(state)
        states.append(state)
    h = torch.stack(hs).view(b.shape).to(b.dtype)
    return h, torch.stack(states) if with_final_state else None
