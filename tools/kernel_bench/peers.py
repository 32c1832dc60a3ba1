"""Other ways to what our operators compute: plain PyTorch forms that people use, and other packages.

Each takes the arguments of our operator and gives its results. Letters as in `problem.py`. Plain forms are
written here as their sources have them: a loop over time, or the formulation that the named package falls
back to; what a package brings itself is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _fallback(function: Any) -> Callable[..., Any]:
    """What transformers wraps in a dispatcher to kernels of its hub; nothing is to be downloaded."""
    return getattr(function, "__wrapped__", function)


# --- Mamba-2 ---


def ssd_transformers(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """The scan that transformers' Mamba-2 runs where mamba-ssm is not installed, with its chunk of 256."""
    from transformers.models.mamba2 import modeling_mamba2

    return _fallback(modeling_mamba2.mamba2_chunk_scan)(x, dt, a, b, c, 256, D=d)


def ssd_loop(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """A token after the other."""
    repeats = x.shape[2] // b.shape[2]
    b, c = b.repeat_interleave(repeats, 2), c.repeat_interleave(repeats, 2)
    decay, xdt = (dt * a).exp(), x * dt.unsqueeze(-1)
    state = x.new_zeros(x.shape[0], *x.shape[2:], b.shape[3])
    ys = []
    for decay_t, x_t, b_t, c_t in zip(decay.unbind(1), xdt.unbind(1), b.unbind(1), c.unbind(1)):
        state = decay_t[..., None, None] * state + x_t.unsqueeze(-1) * b_t.unsqueeze(2)
        ys.append((state * c_t.unsqueeze(2)).sum(-1))
    return torch.stack(ys, 1) + x * d.unsqueeze(-1)


def _segment_sums(x: Tensor) -> Tensor:
    """(..., L) -> (..., L, L): sums over j < k <= i, -inf above the diagonal."""
    length = x.shape[-1]
    spread = x.unsqueeze(-1).expand(*x.shape, length)
    below = torch.ones(length, length, dtype=torch.bool, device=x.device).tril(-1)
    sums = spread.masked_fill(~below, 0).cumsum(-2)
    return sums.masked_fill(
        ~below.logical_or(torch.eye(length, dtype=torch.bool, device=x.device)), -math.inf
    )


def ssd_einsum(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, chunk: int = 64) -> Tensor:
    """The listing of the paper (arXiv 2405.21060, listing 1): four einsums over chunks."""
    batch, _, heads, head_dim = x.shape
    repeats = heads // b.shape[2]
    xdt = (x * dt.unsqueeze(-1)).view(batch, -1, chunk, heads, head_dim)
    b, c = (y.repeat_interleave(repeats, 2).view(batch, -1, chunk, heads, y.shape[3]) for y in (b, c))
    log = (dt * a).view(batch, -1, chunk, heads).permute(0, 3, 1, 2)  # (B, H, chunks, chunk)
    sums = log.cumsum(-1)
    inside = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", c, b, _segment_sums(log).exp(), xdt)
    states = torch.einsum("bclhn,bhcl,bclhp->bchpn", b, (sums[..., -1:] - sums).exp(), xdt)
    states = torch.cat([torch.zeros_like(states[:, :1]), states], 1)
    between = _segment_sums(F.pad(sums[..., -1], (1, 0))).exp()
    states = torch.einsum("bhzc,bchpn->bzhpn", between, states)[:, :-1]
    carried = torch.einsum("bclhn,bchpn,bhcl->bclhp", c, states, sums.exp())
    return (inside + carried).reshape(x.shape) + x * d.unsqueeze(-1)


# --- Mamba-1 ---


def selective_scan_reference(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, z: Tensor, dt_bias: Tensor
) -> Tensor:
    """As mamba-ssm formulates its reference: all decays and inputs of states first, then a loop that picks
    each token by its index, in the layout (B, D, T)."""
    x, dt, z = (y.transpose(1, 2) for y in (x, dt, z))
    dt = F.softplus(dt + dt_bias.unsqueeze(-1))
    decays = torch.exp(torch.einsum("bdl,dn->bdln", dt, a))
    added = torch.einsum("bdl,bln,bdl->bdln", dt, b, x)
    state = x.new_zeros(*x.shape[:2], a.shape[1])
    ys = []
    for i in range(x.shape[2]):
        state = decays[:, :, i] * state + added[:, :, i]
        ys.append(torch.einsum("bdn,bn->bd", state, c[:, i]))
    y = torch.stack(ys, dim=2) + x * d.unsqueeze(-1)
    return (y * F.silu(z)).transpose(1, 2)


def selective_scan_transformers(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, z: Tensor, dt_bias: Tensor
) -> Tensor:
    """The scan that transformers' Mamba runs where mamba-ssm is not installed."""
    from transformers.models.mamba import modeling_mamba

    x, dt, z, b, c = (y.transpose(1, 2) for y in (x, dt, z, b, c))
    scan = _fallback(modeling_mamba.mamba_selective_scan)
    y = scan(x, dt, a, b, c, D=d, z=z, delta_bias=dt_bias, delta_softplus=True)
    return (y[0] if isinstance(y, tuple) else y).transpose(1, 2)


def selective_scan_loop(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, z: Tensor, dt_bias: Tensor
) -> Tensor:
    """A careful loop: tokens by unbind and stack, so that backward is linear in T."""
    dt = F.softplus(dt + dt_bias)
    state = x.new_zeros(x.shape[0], x.shape[2], a.shape[1])
    ys = []
    for x_t, dt_t, b_t, c_t in zip(x.unbind(1), dt.unbind(1), b.unbind(1), c.unbind(1)):
        state = torch.exp(dt_t.unsqueeze(-1) * a) * state + (dt_t * x_t).unsqueeze(-1) * b_t.unsqueeze(1)
        ys.append((state * c_t.unsqueeze(1)).sum(-1))
    return (torch.stack(ys, 1) + x * d) * F.silu(z)


# --- linear attention ---


def gla_fla(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """flash-linear-attention's naive recurrence, its own reference."""
    from fla.ops.gla.naive import naive_recurrent_gla

    return naive_recurrent_gla(q, k, v, g)[0]


def gla_loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """A careful loop."""
    scale, decay = q.shape[-1] ** -0.5, g.exp()
    state = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1])
    ys = []
    for q_t, k_t, v_t, decay_t in zip(q.unbind(1), k.unbind(1), v.unbind(1), decay.unbind(1)):
        state = decay_t.unsqueeze(-1) * state + k_t.unsqueeze(-1) * v_t.unsqueeze(-2)
        ys.append((q_t.unsqueeze(-1) * state).sum(-2) * scale)
    return torch.stack(ys, 1)


def wkv6_loop(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """A careful loop."""
    decay = w.exp()
    state = r.new_zeros(r.shape[0], *r.shape[2:], v.shape[-1])
    ys = []
    for r_t, k_t, v_t, decay_t in zip(r.unbind(1), k.unbind(1), v.unbind(1), decay.unbind(1)):
        product = k_t.unsqueeze(-1) * v_t.unsqueeze(-2)
        ys.append((r_t.unsqueeze(-1) * (state + u.unsqueeze(-1) * product)).sum(-2))
        state = decay_t.unsqueeze(-1) * state + product
    return torch.stack(ys, 1)


def delta_rule_transformers(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The chunked form that transformers' Qwen3-Next runs where fla is not installed."""
    from transformers.models.qwen3_next import modeling_qwen3_next

    return _fallback(modeling_qwen3_next.torch_chunk_gated_delta_rule)(q, k, v, g, beta)[0]


def delta_rule_loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """A careful loop."""
    scale, decay = q.shape[-1] ** -0.5, g.exp()
    state = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1])
    ys = []
    for q_t, k_t, v_t, decay_t, beta_t in zip(*(y.unbind(1) for y in (q, k, v, decay, beta))):
        state = decay_t[..., None, None] * state
        error = v_t - (k_t.unsqueeze(-1) * state).sum(-2)
        state = state + k_t.unsqueeze(-1) * (beta_t.unsqueeze(-1) * error).unsqueeze(-2)
        ys.append((q_t.unsqueeze(-1) * state).sum(-2) * scale)
    return torch.stack(ys, 1)


def linear_recurrence_loop(a: Tensor, b: Tensor) -> Tensor:
    """A careful loop."""
    state = torch.zeros_like(b[:, 0])
    states = []
    for a_t, b_t in zip(a.unbind(1), b.unbind(1)):
        state = a_t * state + b_t
        states.append(state)
    return torch.stack(states, 1)


# --- convolutions ---


def conv_pytorch(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """PyTorch's grouped convolution and SiLU, as models write them without a kernel."""
    channels, width = weight.shape
    y = F.conv1d(x.transpose(1, 2), weight.unsqueeze(1), bias, padding=width - 1, groups=channels)
    return F.silu(y[..., : x.shape[1]]).transpose(1, 2)


def long_conv_pytorch(x: Tensor, kernel: Tensor) -> Tensor:
    """PyTorch's grouped convolution, as long as the sequence."""
    channels, width = kernel.shape
    flipped = kernel.flip(-1).unsqueeze(1)
    return F.conv1d(F.pad(x.transpose(1, 2), (width - 1, 0)), flipped, groups=channels).transpose(1, 2)


# --- attention ---


def attention_eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention with materialised scores."""
    repeats = q.shape[2] // k.shape[2]
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return (scores.masked_fill(hidden, -math.inf).softmax(-1) @ v).transpose(1, 2)


# --- rows ---


def rms_norm_transformers(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers' Llama has it."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def rms_norm_pytorch(x: Tensor, weight: Tensor) -> Tensor:
    """PyTorch's own."""
    return F.rms_norm(x, weight.shape, weight, 1e-5)


def gated_rms_norm_plain(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    """As transformers' Mamba-2 has it."""
    return rms_norm_transformers(x * F.silu(z), weight)


def modulated_plain(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """As DiT has it."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def rotary_transformers(x: Tensor, positions: Tensor) -> Tensor:
    """As transformers' Llama has it, tables included."""
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.cat([positions.unsqueeze(-1) * frequencies] * 2, -1)[..., None, :]
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * angles.cos().to(x.dtype) + turned * angles.sin().to(x.dtype)


def swiglu_plain(gate: Tensor, up: Tensor) -> Tensor:
    """As models write it."""
    return F.silu(gate) * up


def geglu_plain(gate: Tensor, up: Tensor) -> Tensor:
    """As models write it."""
    return F.gelu(gate, approximate="tanh") * up


# --- losses and experts ---


def cross_entropy_eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Full logits, then PyTorch's cross-entropy."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")


def grouped_loop(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """A loop over experts."""
    parts = x.split(counts.tolist())
    return torch.cat([part @ one.T for part, one in zip(parts, weight.unbind(0))])
