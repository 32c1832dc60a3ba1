"""The mLSTM recurrence, a token at a time.

B batch, T length, H heads, D channels of queries and keys, E channels of values, docs packed documents.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.kernels.library import statistics_dtype
from triptych.kernels.segments import document_bounds

NOTHING = -1e30
"""m of an empty memory: finite, so that differences are no NaN."""


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    *,
    scale: float,
    state: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """y (B, T, H, E) in the dtype of states, and the last state."""
    dtype = statistics_dtype(q, v, igate)
    q, k, v, igate, fgate = (x.to(dtype) for x in (q * scale, k, v, igate, fgate))
    # A value of 1 beside the others: the normaliser is one more column of the memory.
    v, log_f = F.pad(v, (0, 1), value=1.0), F.logsigmoid(fgate)
    if state is None:
        memory = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[3])
        m = q.new_full((q.shape[0], q.shape[2]), NOTHING)
    else:
        memory, m = (x.to(dtype) for x in state)
    ys = []
    # unbind and stack: indexing q[:, t] would make backward quadratic in T.
    for q_t, k_t, v_t, i_t, f_t in zip(*(x.unbind(1) for x in (q, k, v, igate, log_f))):
        # A constant: what the state stands for does not depend on m.
        before, m = m, torch.maximum(f_t + m, i_t).clamp(min=NOTHING).detach()
        f, i = torch.exp(f_t + before - m), torch.exp(i_t - m)
        memory = f[..., None, None] * memory + (i.unsqueeze(-1) * k_t).unsqueeze(-1) * v_t.unsqueeze(-2)
        top = (q_t.unsqueeze(-1) * memory).sum(-2)
        bound = torch.exp(-m).clamp(torch.finfo(dtype).tiny, torch.finfo(dtype).max)
        ys.append(top[..., :-1] / torch.maximum(top[..., -1].abs(), bound).unsqueeze(-1))
    return torch.stack(ys, 1), (memory, m)


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    *,
    scale: float,
    initial_state: tuple[Tensor, Tensor] | None,
    cu_seqlens: Tensor | None,
    chunk_size: int,
    with_final_state: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Shapes as in the public function; chunk_size has no meaning here."""
    batch, length = q.shape[:2]
    flat = [x.flatten(0, 1) for x in (q, k, v, igate, fgate)]
    bounds = (
        [(i * length, (i + 1) * length) for i in range(batch)]
        if cu_seqlens is None
        else document_bounds(cu_seqlens)
    )
    ys, memories, ms = [], [], []
    for i, (start, end) in enumerate(bounds):
        state = None if initial_state is None else (initial_state[0][i : i + 1], initial_state[1][i : i + 1])
        y, (memory, m) = scan(*(x[None, start:end] for x in flat), scale=scale, state=state)
        ys.append(y[0])
        memories.append(memory)
        ms.append(m)
    final_state = (torch.cat(memories), torch.cat(ms)) if with_final_state else None
    return torch.cat(ys).view(v.shape).to(v.dtype), final_state
