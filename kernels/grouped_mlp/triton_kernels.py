"""Experts' feed-forwards, up to the down-projection, with the activation where the products end.

A rows sorted by expert, E experts, C channels, F inner channels; tiles as in grouped_linear's kernels.

    u = x up[e].T + up_bias[e],  g = x gate[e].T + gate_bias[e],  h = u silu(g),  or h = gelu(u) without gate
    s = sigmoid(g):                   dh/du = g s,  dh/dg = u s (1 + g (1 - s))
    gelu(u) = u s, s = sigmoid(2 z),  z = sqrt(2 / pi) (u + 0.044715 u^3):  dh/du = s + 2 u s (1 - s) z'
"""

import triton
import triton.language as tl

from triptych.kernels.grouped_linear.triton_kernels import (
    add_product,
    bounds_of_tile,
    rows_tile,
    tile_of_program,
    weight_tile,
)

ROOT = tl.constexpr(0.7978845608028654)
CUBE = tl.constexpr(0.044715)


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def gelu_sigmoid(u):
    """s of gelu(u) = u s."""
    return sigmoid(2 * ROOT * (u + CUBE * u * u * u))


@triton.jit
def inner_kernel(
    x, up, gate, up_bias, gate_bias, out_up, out_gate, h, counts, rows, tiles_m, stride, stride_e, stride_n,
    stride_k,
    E: tl.constexpr, POW_E: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr,
    UP_BIASED: tl.constexpr, GATE_BIASED: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """u, g and h of a tile: both products read the rows once. h is that of u and g as they are stored."""
    tile_m, tile_n = tile_of_program(tiles_m, N, BLOCK_N, GROUP)
    expert, start, end = bounds_of_tile(tile_m, counts, rows, E, POW_E, BLOCK_M)
    if expert >= E:
        return
    m = start + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    u = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    g = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    up += expert.to(tl.int64) * stride_e
    gate += expert.to(tl.int64) * stride_e
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        left = rows_tile(x, m, end, k, stride, K)
        right = weight_tile(up, n, k, stride_n, stride_k, N, K)
        u = tl.dot(left, right, u, input_precision=PRECISION, out_dtype=ACC)
        if GATED:
            right = weight_tile(gate, n, k, stride_n, stride_k, N, K)
            g = tl.dot(left, right, g, input_precision=PRECISION, out_dtype=ACC)
    at = m[:, None] * N + n[None, :]
    inside = (m[:, None] < end) & (n[None, :] < N)
    if UP_BIASED:
        u += tl.load(up_bias + expert * N + n, mask=n < N, other=0.0).to(ACC)[None, :]
    stored = u.to(out_up.dtype.element_ty)
    tl.store(out_up + at, stored, mask=inside)
    u = stored.to(ACC)
    if GATED:
        if GATE_BIASED:
            g += tl.load(gate_bias + expert * N + n, mask=n < N, other=0.0).to(ACC)[None, :]
        stored = g.to(out_gate.dtype.element_ty)
        tl.store(out_gate + at, stored, mask=inside)
        g = stored.to(ACC)
        u *= g * sigmoid(g)
    else:
        u *= gelu_sigmoid(u)
    tl.store(h + at, u.to(h.dtype.element_ty), mask=inside)


@triton.jit
def inner_backward_kernel(
    dy, down, up, gate, h, dup, dgate, counts, rows, tiles_m, stride, stride_e, stride_n, stride_k,
    E: tl.constexpr, POW_E: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dh = dy down[e], and from it h once more, du and dg of a tile."""
    tile_m, tile_n = tile_of_program(tiles_m, N, BLOCK_N, GROUP)
    expert, start, end = bounds_of_tile(tile_m, counts, rows, E, POW_E, BLOCK_M)
    if expert >= E:
        return
    m = start + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    own = down + expert.to(tl.int64) * stride_e
    dh = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    dh = add_product(dh, dy, own, m, n, end, stride, stride_n, stride_k, N, K, PRECISION, BLOCK_K)
    at = m[:, None] * N + n[None, :]
    inside = (m[:, None] < end) & (n[None, :] < N)
    u = tl.load(up + at, mask=inside, other=0.0).to(ACC)
    if GATED:
        g = tl.load(gate + at, mask=inside, other=0.0).to(ACC)
        s = sigmoid(g)
        tl.store(h + at, (u * g * s).to(h.dtype.element_ty), mask=inside)
        tl.store(dup + at, (dh * g * s).to(dup.dtype.element_ty), mask=inside)
        tl.store(dgate + at, (dh * u * s * (1 + g * (1 - s))).to(dgate.dtype.element_ty), mask=inside)
    else:
        s = gelu_sigmoid(u)
        slope = s + 2 * u * s * (1 - s) * ROOT * (1 + 3 * CUBE * u * u)
        tl.store(h + at, (u * s).to(h.dtype.element_ty), mask=inside)
        tl.store(dup + at, (dh * slope).to(dup.dtype.element_ty), mask=inside)
