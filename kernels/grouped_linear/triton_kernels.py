"""Matrix products of rows sorted by expert, whose bounds stay on the device.

A rows, E experts, N outputs, K inputs. A program makes one tile of a result. Tiles never mix experts: an
expert with c rows has ceil(c / BLOCK_M) of them, so that there are at most A / BLOCK_M + E + 1 in all, the
grid. Which expert a tile belongs to is found from the counts, by comparing it with all ends at once; programs
of tiles that do not exist end at once. Rows past the last expert's are an expert E of their own, with
zeros.

Nothing is added atomically, and the order of sums is that of rows and channels.
"""

import triton
import triton.language as tl


@triton.jit
def bounds_of_tile(tile, counts, rows, E: tl.constexpr, POW_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of a tile of rows: its expert (above E if there is no such tile), its first row, its expert's end."""
    experts = tl.arange(0, POW_E)
    held = tl.load(counts + experts, mask=experts < E, other=0).to(tl.int64)
    held = tl.where(experts == E, rows - tl.sum(held, 0), held)
    tiles = (held + BLOCK_M - 1) // BLOCK_M
    expert = tl.sum(tl.where(tl.cumsum(tiles, 0) <= tile, 1, 0), 0)
    start = tl.sum(tl.where(experts < expert, held, 0), 0)
    end = tl.sum(tl.where(experts <= expert, held, 0), 0)
    first_tile = tl.sum(tl.where(experts < expert, tiles, 0), 0)
    return expert, start + (tile - first_tile) * BLOCK_M, end


@triton.jit
def tile_of_program(tiles_m, N: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Tile of rows and tile of columns: GROUP tiles of rows go over the columns together, so that these come
    from the cache."""
    program = tl.program_id(0)
    of_group = GROUP * ((N + BLOCK_N - 1) // BLOCK_N)
    first = program // of_group * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    within = program % of_group
    return first + within % size, within // size


@triton.jit
def rows_tile(x, m, end, k, stride, K: tl.constexpr):
    """x[m, k] (BLOCK_M, BLOCK_K), zeros from row `end` and channel K on."""
    inside = (m[:, None] < end) & (k[None, :] < K)
    return tl.load(x + m[:, None] * stride + k[None, :], mask=inside, other=0.0)


@triton.jit
def weight_tile(weight, n, k, stride_n, stride_k, N: tl.constexpr, K: tl.constexpr):
    """weight[n, k] transposed, (BLOCK_K, BLOCK_N)."""
    inside = (k[:, None] < K) & (n[None, :] < N)
    at = n.to(tl.int64)[None, :] * stride_n + k.to(tl.int64)[:, None] * stride_k
    return tl.load(weight + at, mask=inside, other=0.0)


@triton.jit
def add_product(
    total, x, weight, m, n, end, stride, stride_n, stride_k,
    N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """total + x[m] @ weight[n].T."""
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        left = rows_tile(x, m, end, k, stride, K)
        right = weight_tile(weight, n, k, stride_n, stride_k, N, K)
        total = tl.dot(left, right, total, input_precision=PRECISION, out_dtype=total.dtype)
    return total


@triton.jit
def linear_kernel(
    x, weight, x2, weight2, bias, y, counts, rows, tiles_m, stride, stride2, stride_e, stride_n, stride_k,
    E: tl.constexpr, POW_E: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TWO: tl.constexpr,
    BIASED: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y = x @ weight[e].T (+ x2 @ weight2[e].T) (+ bias[e])."""
    tile_m, tile_n = tile_of_program(tiles_m, N, BLOCK_N, GROUP)
    expert, start, end = bounds_of_tile(tile_m, counts, rows, E, POW_E, BLOCK_M)
    if expert > E:
        return
    m = start + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    if expert < E:
        own = weight + expert.to(tl.int64) * stride_e
        total = add_product(total, x, own, m, n, end, stride, stride_n, stride_k, N, K, PRECISION, BLOCK_K)
        if TWO:
            own = weight2 + expert.to(tl.int64) * stride_e
            total = add_product(
                total, x2, own, m, n, end, stride2, stride_n, stride_k, N, K, PRECISION, BLOCK_K
            )
        if BIASED:
            total += tl.load(bias + expert.to(tl.int64) * N + n, mask=n < N, other=0.0).to(ACC)[None, :]
    inside = (m[:, None] < end) & (n[None, :] < N)
    tl.store(y + m[:, None] * N + n[None, :], total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def weight_gradient_kernel(
    dy, x, dweight, dbias, counts, dy_stride, stride,
    E: tl.constexpr, POW_E: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BIASED: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dweight[e] = dy[rows of e].T @ x[rows of e] and dbias[e] = sum of dy[rows of e]; zero without rows."""
    tiles_n, tiles_k = (N + BLOCK_N - 1) // BLOCK_N, (K + BLOCK_K - 1) // BLOCK_K
    program = tl.program_id(0)
    expert, tile_n, tile_k = program // (tiles_n * tiles_k), program // tiles_k % tiles_n, program % tiles_k
    experts = tl.arange(0, POW_E)
    held = tl.load(counts + experts, mask=experts < E, other=0).to(tl.int64)
    start = tl.sum(tl.where(experts < expert, held, 0), 0)
    end = tl.sum(tl.where(experts <= expert, held, 0), 0)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_N, BLOCK_K], ACC)
    column = tl.zeros([BLOCK_N], ACC)
    for first in range(start, end, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        left = rows_tile(dy, m, end, n, dy_stride, N)
        right = rows_tile(x, m, end, k, stride, K)
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION, out_dtype=total.dtype)
        if BIASED:
            column += tl.sum(left.to(ACC), 0)
    base = expert.to(tl.int64) * N
    inside = (n[:, None] < N) & (k[None, :] < K)
    at = (base + n[:, None]) * K + k[None, :]
    tl.store(dweight + at, total.to(dweight.dtype.element_ty), mask=inside)
    if BIASED:
        tl.store(dbias + base + n, column.to(dbias.dtype.element_ty), mask=(n < N) & (tile_k == 0))
