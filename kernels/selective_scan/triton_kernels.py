"""Triton kernels of the selective scan; `triton.py` launches them.

B batch, T length, D channels, N state per channel, docs documents. A program takes some channels of a row, a
thread each, and walks along a part of its tokens, a tile (tokens, channels) at a time. Within a tile it takes
one state index n after the other, and walks along the tokens, which are all in the thread's registers:
    h[t] = exp(s[t] a) h[t-1] + s[t] x[t] b[t],   y[t] = sum_n c[t] h[t] + d x[t]
Backward has the states before each chunk of tiles. It walks a chunk forwards for the states before its tiles,
then backwards (dy is the gradient before the gate):
    g[t] = c[t] dy[t] + exp(s[t+1] a) g[t+1]                             gradient of h[t]
    w[t] = exp(s[t] a) h[t-1] = h[t] - s[t] x[t] b[t],  dlog = g w,      ds = sum_n dlog a,  da = sum_t dlog s
    db = sum_d g s x,  dc = sum_d h dy: sums over a program's channels, which `triton.py` adds up.
As in the linear recurrence, a row is cut into parts where its channels alone do not keep a GPU busy; a first
launch then finds of every part the product of its decays and the state it ends with from zero.

Conditions on arguments that may be None, and on constants, are settled when a kernel is compiled; nested in
them, those on documents are not.
"""

import triton
import triton.language as tl

from triptych.kernels.linear_recurrence.triton import add, lines, place, walk


@triton.jit
def step_size(dt, bias, known, SOFTPLUS: tl.constexpr):
    """s; 0 past the end, where a state then stays as it is."""
    s = dt + bias[None, :]
    if SOFTPLUS:
        # log(1 + exp(s)) without overflow, and exact where exp(s) is small.
        e = tl.exp(-tl.abs(s))
        u = 1 + e
        log1p = tl.where(u == 1, e, tl.log(u) * (e / tl.where(u == 1, 1, u - 1)))
        s = tl.maximum(s, 0) + log1p
    return tl.where(known[:, None], s, 0)


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def row_of(values, n, N: tl.constexpr):
    """Row n of (N, channels)."""
    return tl.reduce(tl.where(tl.arange(0, N)[:, None] == n, values, 0.0), 0, add)


@triton.jit
def with_row(values, n, row, N: tl.constexpr):
    """(N, channels) with another row n."""
    return tl.where(tl.arange(0, N)[:, None] == n, row[None, :], values)


@triton.jit
def carried(
    state, ends, products, row, part, states, inside, N: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr
):
    """The states (N, channels) ahead of a part, from those ahead of the first. states: their places."""
    for before in range(PARTS - 1):
        at = (row * PARTS + before) * N * D + states
        passed = inside & (before < part)
        end = tl.load(ends + at, mask=passed, other=0.0)
        state = end + tl.load(products + at, mask=passed, other=1.0) * state
    return state


@triton.jit
def documents(docs, row, t, known, T):
    """Document of each token, whether it is its first token, and whether its last."""
    doc = tl.load(docs + row * T + t, mask=known, other=0).to(tl.int64)
    before = tl.load(docs + row * T + t - 1, mask=known & (t > 0), other=-1)
    after = tl.load(docs + row * T + t + 1, mask=known & (t + 1 < T), other=-1)
    return doc, known & (doc != before), known & (doc != after)


@triton.jit(do_not_specialize=["x_row", "dt_row", "z_row"])
def forward_kernel(
    x,
    dt,
    a,
    b,
    c,
    d,
    z,
    bias,
    first,
    docs,
    y,
    final,
    saved,
    ends,
    products,
    T,
    columns,
    chunks,
    x_row,
    dt_row,
    z_row,
    D: tl.constexpr,
    N: tl.constexpr,
    X_STRIDE: tl.constexpr,
    DT_STRIDE: tl.constexpr,
    Z_STRIDE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PACKED: tl.constexpr,
    SUMMARY: tl.constexpr,
    PARTS: tl.constexpr,
    PART_CHUNKS: tl.constexpr,
    CHUNK_TILES: tl.constexpr,
    ACC: tl.constexpr,
    STATES: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row, part, channels = place(columns, PARTS, BLOCK)
    inside = channels < D
    n_range = tl.arange(0, STATES)
    states = n_range[:, None] * D + channels[None, :]
    all_states = (n_range < N)[:, None] & inside[None, :]
    h = tl.zeros((STATES, BLOCK), ACC)
    total = tl.full((STATES, BLOCK), 1.0, ACC)
    if first is not None and not PACKED and not SUMMARY:
        h += tl.load(first + row * N * D + states, mask=all_states, other=0.0)
    if PARTS > 1 and not SUMMARY:
        h = carried(h, ends, products, row, part, states, all_states, N, D, PARTS)
    shift = tl.zeros((BLOCK,), ACC)
    if bias is not None:
        shift += tl.load(bias + channels, mask=inside, other=0.0).to(ACC)
    steps = tl.arange(0, TOKENS)
    begin = part * (PART_CHUNKS * CHUNK_TILES * TOKENS)
    for tile in range(PART_CHUNKS * CHUNK_TILES):
        token = begin + tile * TOKENS
        t = token + steps
        known = t < T
        here = known[:, None] & inside[None, :]
        if not SUMMARY:
            at_saved = saved + (row * chunks + token // (CHUNK_TILES * TOKENS)) * N * D + states
            tl.store(at_saved, h, mask=all_states & (tile % CHUNK_TILES == 0) & (token < T))
        at_x = lines(x, row, x_row, token, steps, channels, X_STRIDE, 1)
        at_dt = lines(dt, row, dt_row, token, steps, channels, DT_STRIDE, 1)
        x_ = tl.load(at_x, mask=here, other=0.0).to(ACC)
        s = step_size(tl.load(at_dt, mask=here, other=0.0).to(ACC), shift, known, SOFTPLUS)
        sx = s * x_
        if PACKED:
            doc, begins, finishes = documents(docs, row, t, known, T)
            any_begins = tl.max(begins.to(tl.int32), 0) > 0
            any_finishes = tl.max(finishes.to(tl.int32), 0) > 0
        out = tl.zeros((TOKENS, BLOCK), ACC)
        for n in range(N):
            a_n = tl.load(a + n * D + channels, mask=inside, other=0.0)
            b_n = tl.load(b + (row * T + t) * N + n, mask=known, other=0.0).to(ACC)
            decay = tl.exp2(s * a_n[None, :])
            value = sx * b_n[:, None]
            if PACKED:
                of_doc = (doc * N + n)[:, None] * D + channels[None, :]
                if first is not None:  # noqa: SIM102
                    if any_begins:
                        value += decay * tl.load(first + of_doc, mask=begins[:, None] & here, other=0.0)
                decay = tl.where(begins[:, None], 0.0, decay)
            hs, h_last = walk(decay, value, row_of(h, n, STATES), TOKENS)
            h = with_row(h, n, h_last, STATES)
            if SUMMARY:
                _, product = walk(decay, value * 0.0, row_of(total, n, STATES), TOKENS)
                total = with_row(total, n, product, STATES)
            else:
                c_n = tl.load(c + (row * T + t) * N + n, mask=known, other=0.0).to(ACC)
                out += c_n[:, None] * hs
                if PACKED:  # noqa: SIM102
                    if any_finishes:
                        tl.store(final + of_doc, hs, mask=finishes[:, None] & here)
        if not SUMMARY:
            if d is not None:
                out += tl.load(d + channels, mask=inside, other=0.0).to(ACC)[None, :] * x_
            if z is not None:
                at_z = lines(z, row, z_row, token, steps, channels, Z_STRIDE, 1)
                z_ = tl.load(at_z, mask=here, other=0.0).to(ACC)
                out *= z_ * sigmoid(z_)
            tl.store(lines(y, row, tl.cast(T, tl.int64) * D, token, steps, channels, D, 1), out, mask=here)
    at = (row * PARTS + part) * N * D + states
    if SUMMARY:
        tl.store(ends + at, h, mask=all_states)
        tl.store(products + at, total, mask=all_states)
    elif not PACKED:
        tl.store(final + row * N * D + states, h, mask=all_states & (part == PARTS - 1))


@triton.jit(do_not_specialize=["dy_row", "x_row", "dt_row", "z_row"])
def backward_kernel(
    dy,
    dfinal,
    x,
    dt,
    a,
    b,
    c,
    d,
    z,
    bias,
    first,
    docs,
    saved,
    dx,
    ddt,
    dz,
    da,
    db,
    dc,
    dd,
    dbias,
    dfirst,
    scratch,
    ends,
    products,
    T,
    columns,
    chunks,
    batch,
    dy_row,
    x_row,
    dt_row,
    z_row,
    D: tl.constexpr,
    N: tl.constexpr,
    DY_STRIDE: tl.constexpr,
    X_STRIDE: tl.constexpr,
    DT_STRIDE: tl.constexpr,
    Z_STRIDE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PACKED: tl.constexpr,
    SUMMARY: tl.constexpr,
    PARTS: tl.constexpr,
    PART_CHUNKS: tl.constexpr,
    CHUNK_TILES: tl.constexpr,
    ACC: tl.constexpr,
    STATES: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    # Parts are numbered from the end of the row, as gradients come from there.
    row, part, channels = place(columns, PARTS, BLOCK)
    column = tl.program_id(0).to(tl.int64) % columns
    inside = channels < D
    n_range = tl.arange(0, STATES)
    states = n_range[:, None] * D + channels[None, :]
    all_states = (n_range < N)[:, None] & inside[None, :]
    g_after = tl.zeros((STATES, BLOCK), ACC)
    total = tl.full((STATES, BLOCK), 1.0, ACC)
    if dfinal is not None and not PACKED and not SUMMARY:
        g_after += tl.load(dfinal + row * N * D + states, mask=all_states, other=0.0)
    if PARTS > 1 and not SUMMARY:
        g_after = carried(g_after, ends, products, row, part, states, all_states, N, D, PARTS)
    da_sum = tl.zeros((STATES, BLOCK), ACC)
    dd_sum = tl.zeros((BLOCK,), ACC)
    dbias_sum = tl.zeros((BLOCK,), ACC)
    shift = tl.zeros((BLOCK,), ACC)
    if bias is not None:
        shift += tl.load(bias + channels, mask=inside, other=0.0).to(ACC)
    d_ = tl.zeros((BLOCK,), ACC)
    if d is not None:
        d_ += tl.load(d + channels, mask=inside, other=0.0).to(ACC)
    steps = tl.arange(0, TOKENS)
    whole = tl.cast(T, tl.int64) * D
    # States before the tiles of a chunk, of this program.
    own = scratch + tl.program_id(0).to(tl.int64) * CHUNK_TILES * N * BLOCK + tl.arange(0, BLOCK)
    for back in range(PART_CHUNKS):
        chunk = (PARTS - part) * PART_CHUNKS - 1 - back
        begin = chunk * (CHUNK_TILES * TOKENS)
        if not SUMMARY:
            h = tl.load(
                saved + (row * chunks + chunk) * N * D + states, mask=all_states & (begin < T), other=0.0
            )
            for tile in range(CHUNK_TILES):
                token = begin + tile * TOKENS
                t = token + steps
                known = t < T
                here = known[:, None] & inside[None, :]
                at_x = lines(x, row, x_row, token, steps, channels, X_STRIDE, 1)
                at_dt = lines(dt, row, dt_row, token, steps, channels, DT_STRIDE, 1)
                x_ = tl.load(at_x, mask=here, other=0.0).to(ACC)
                s = step_size(tl.load(at_dt, mask=here, other=0.0).to(ACC), shift, known, SOFTPLUS)
                sx = s * x_
                if PACKED:
                    doc, begins, finishes = documents(docs, row, t, known, T)
                    any_begins = tl.max(begins.to(tl.int32), 0) > 0
                for n in range(N):
                    h_n = row_of(h, n, STATES)
                    tl.store(own + (tile * N + n) * BLOCK, h_n)
                    if tile < CHUNK_TILES - 1:
                        a_n = tl.load(a + n * D + channels, mask=inside, other=0.0)
                        b_n = tl.load(b + (row * T + t) * N + n, mask=known, other=0.0).to(ACC)
                        decay = tl.exp2(s * a_n[None, :])
                        value = sx * b_n[:, None]
                        if PACKED:
                            if first is not None:  # noqa: SIM102
                                if any_begins:
                                    of_doc = (doc * N + n)[:, None] * D + channels[None, :]
                                    opening = begins[:, None] & here
                                    value += decay * tl.load(first + of_doc, mask=opening, other=0.0)
                            decay = tl.where(begins[:, None], 0.0, decay)
                        _, h_last = walk(decay, value, h_n, TOKENS)
                        h = with_row(h, n, h_last, STATES)
            tl.debug_barrier()
        for backwards in range(CHUNK_TILES):
            tile = CHUNK_TILES - 1 - backwards
            token = begin + tile * TOKENS
            t = token + steps
            known = t < T
            here = known[:, None] & inside[None, :]
            at_dy = lines(dy, row, dy_row, token, steps, channels, DY_STRIDE, 1)
            at_after = lines(dt, row, dt_row, token + 1, steps, channels, DT_STRIDE, 1)
            dy_ = tl.load(at_dy, mask=here, other=0.0).to(ACC)
            after_known = t + 1 < T
            after = tl.load(at_after, mask=after_known[:, None] & inside[None, :], other=0.0).to(ACC)
            s_after = step_size(after, shift, after_known, SOFTPLUS)
            if z is not None:
                at_z = lines(z, row, z_row, token, steps, channels, Z_STRIDE, 1)
                z_ = tl.load(at_z, mask=here, other=0.0).to(ACC)
                gate = sigmoid(z_)
                dout = dy_ * z_ * gate
            else:
                dout = dy_
            if PACKED:
                doc, begins, finishes = documents(docs, row, t, known, T)
                any_begins = tl.max(begins.to(tl.int32), 0) > 0
                any_finishes = tl.max(finishes.to(tl.int32), 0) > 0
            if not SUMMARY:
                at_x = lines(x, row, x_row, token, steps, channels, X_STRIDE, 1)
                at_dt = lines(dt, row, dt_row, token, steps, channels, DT_STRIDE, 1)
                x_ = tl.load(at_x, mask=here, other=0.0).to(ACC)
                s = step_size(tl.load(at_dt, mask=here, other=0.0).to(ACC), shift, known, SOFTPLUS)
                sx = s * x_
                out = d_[None, :] * x_
                dsx = tl.zeros((TOKENS, BLOCK), ACC)
                ds = tl.zeros((TOKENS, BLOCK), ACC)
            for n in range(N):
                a_n = tl.load(a + n * D + channels, mask=inside, other=0.0)
                c_n = tl.load(c + (row * T + t) * N + n, mask=known, other=0.0).to(ACC)
                value = dout * c_n[:, None]
                decay_after = tl.exp2(s_after * a_n[None, :])
                if PACKED:
                    of_doc = (doc * N + n)[:, None] * D + channels[None, :]
                    if dfinal is not None:  # noqa: SIM102
                        if any_finishes:
                            value += tl.load(dfinal + of_doc, mask=finishes[:, None] & here, other=0.0)
                    decay_after = tl.where(finishes[:, None], 0.0, decay_after)
                g, g_first = walk(decay_after, value, row_of(g_after, n, STATES), TOKENS, True)
                g_after = with_row(g_after, n, g_first, STATES)
                if SUMMARY:
                    _, product = walk(decay_after, value * 0.0, row_of(total, n, STATES), TOKENS, True)
                    total = with_row(total, n, product, STATES)
                else:
                    b_n = tl.load(b + (row * T + t) * N + n, mask=known, other=0.0).to(ACC)
                    h_n = tl.load(own + (tile * N + n) * BLOCK)
                    decay = tl.exp2(s * a_n[None, :])
                    input_ = sx * b_n[:, None]
                    value = input_
                    if PACKED:
                        if any_begins:
                            if first is not None:
                                value += decay * tl.load(
                                    first + of_doc, mask=begins[:, None] & here, other=0.0
                                )
                            tl.store(dfirst + of_doc, decay * g, mask=begins[:, None] & here)
                        decay = tl.where(begins[:, None], 0.0, decay)
                    elif token == 0:
                        at_first = dfirst + (row * N + n) * D + channels
                        tl.store(at_first, row_of(decay, 0, TOKENS) * g_first, mask=inside)
                    hs, _ = walk(decay, value, h_n, TOKENS)
                    at_sums = ((column * batch + row) * N + n) * T + t
                    tl.store(db + at_sums, tl.sum(g * sx, 1), mask=known)
                    tl.store(dc + at_sums, tl.sum(hs * dout, 1), mask=known)
                    if z is not None:
                        out += c_n[:, None] * hs
                    dlog = g * (hs - input_)
                    dsx += b_n[:, None] * g
                    # a is in units of log 2, as exp2 has it.
                    ds += dlog * (a_n * 0.6931471805599453)[None, :]
                    da_sum = with_row(da_sum, n, row_of(da_sum, n, STATES) + tl.sum(dlog * s, 0), STATES)
            if not SUMMARY:
                ds += dsx * x_
                if SOFTPLUS:
                    # Slope of the softplus, 1 - exp(-s); of the series where s is small.
                    ds *= tl.where(s < 1e-4, s - 0.5 * s * s, 1 - tl.exp(-s))
                tl.store(lines(ddt, row, whole, token, steps, channels, D, 1), ds, mask=here)
                dx_ = dsx * s + d_[None, :] * dout
                tl.store(lines(dx, row, whole, token, steps, channels, D, 1), dx_, mask=here)
                dd_sum += tl.sum(dout * x_, 0)
                dbias_sum += tl.sum(ds, 0)
                if z is not None:
                    dz_ = dy_ * out * gate * (1 + z_ * (1 - gate))
                    tl.store(lines(dz, row, whole, token, steps, channels, D, 1), dz_, mask=here)
    at = (row * PARTS + part) * N * D + states
    if SUMMARY:
        tl.store(ends + at, g_after, mask=all_states)
        tl.store(products + at, total, mask=all_states)
    else:
        at_channels = (row * PARTS + part) * D + channels
        tl.store(da + at, da_sum, mask=all_states)
        tl.store(dd + at_channels, dd_sum, mask=inside)
        tl.store(dbias + at_channels, dbias_sum, mask=inside)
