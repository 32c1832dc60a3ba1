"""SSD on a GPU: three kernels forward; backward two of them again and one more. No atomics.

A chunk is at most L tokens of one document; tokens beyond its end load as zeros. B batch, T length, H heads,
G groups, P head dim, N state. With q[i] the sum of the log2 decays from the chunk's start to its token i,
S the state before the chunk, D the gradient of the state after it (both (P, N)), and s[i,j] = c[i].b[j]:
    y[i]  = sum_{j <= i} 2^(q[i]-q[j]) s[i,j] dt[j] x[j] + 2^q[i] S c[i] + d x[i],
    S'    = 2^q[L-1] S + sum_j 2^(q[L-1]-q[j]) dt[j] x[j] b[j]^T,
    D'    = 2^q[L-1] D + sum_i 2^q[i] dy[i] c[i]^T    (of the state before the chunk),
    dx[j] = dt[j] (sum_{i >= j} 2^(q[i]-q[j]) s[i,j] dy[i] + 2^(q[L-1]-q[j]) D b[j]) + d dy[j],
    ds[i,j] = 2^(q[i]-q[j]) dt[j] dy[i].x[j],
    dc[i] = sum_j ds[i,j] b[j] + 2^q[i] S^T dy[i],
    db[j] = sum_i ds[i,j] c[i] + 2^(q[L-1]-q[j]) dt[j] D^T x[j],
the last three summed over a group's heads. The log decay at t weighs what passes from j < t to i >= t, which
is summed as such: no large terms are there to cancel.
One program takes the heads of a group one after another, so that s is computed, and ds multiplied, once.
Offsets are 64-bit, since `first`, a chunk's first token, is.
"""

import triton
import triton.language as tl


@triton.jit
def chunk_span(chunk, bounds, length, chunks, PACKED: tl.constexpr, L: tl.constexpr):
    """Row, first token within the row, and number of tokens of a chunk."""
    if PACKED:
        start = tl.load(bounds + 2 * chunk)
        count = tl.load(bounds + 2 * chunk + 1) - start
        row = start // length
        first = start - row * length
    else:
        row = chunk // chunks
        first = (chunk - row * chunks) * L
        count = tl.minimum(first + L, length) - first
    return row, first, count


@triton.jit
def step_size(dt, bias, LOW: tl.constexpr, HIGH: tl.constexpr, SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr):
    """clamp(softplus(dt + bias)) and its derivative; softplus is the identity above 20."""
    raw = dt + bias
    slope = tl.full(raw.shape, 1.0, raw.dtype)
    value = raw
    if SOFTPLUS:
        small = tl.exp(tl.minimum(raw, 20.0))
        # log(1 + small) without losing small against 1: Kahan's way to log1p.
        one_more = 1.0 + small
        rounded = one_more - 1.0
        log1p = tl.where(
            rounded == 0.0, small, tl.log(one_more) * (small / tl.where(rounded == 0.0, 1.0, rounded))
        )
        value = tl.where(raw > 20.0, raw, log1p)
        slope = tl.where(raw > 20.0, slope, small / one_more)
    if LIMITED:
        low, high = tl.full(raw.shape, LOW, raw.dtype), tl.full(raw.shape, HIGH, raw.dtype)
        slope = tl.where((value >= low) & (value <= high), slope, 0.0)
        value = tl.minimum(tl.maximum(value, low), high)
    return value, slope


@triton.jit
def steps_kernel(
    dt,
    bias,
    a,
    steps,
    sums,
    bounds,
    length,
    heads,
    chunks,
    dt_row,
    dt_token,
    dt_head,
    LEAST: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    LIMITED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PACKED: tl.constexpr,
    ACC: tl.constexpr,
    L: tl.constexpr,
    BH: tl.constexpr,
) -> None:
    """Step sizes and q, both (B, H, T): of one chunk and BH heads."""
    blocks = tl.cdiv(heads, BH)
    chunk = tl.program_id(0).to(tl.int64) // blocks
    row, first, count = chunk_span(chunk, bounds, length, chunks, PACKED, L)
    order = tl.arange(0, L)
    h = (tl.program_id(0) % blocks) * BH + tl.arange(0, BH)
    tokens = first + order
    inside = (order < count)[:, None] & (h < heads)[None, :]
    at = dt + row * dt_row + tokens[:, None] * dt_token + h[None, :] * dt_head
    raw = tl.load(at, mask=inside, other=0.0).to(ACC)
    shift = tl.zeros([BH], ACC)
    if HAS_BIAS:
        shift = tl.load(bias + h, mask=h < heads, other=0.0).to(ACC)
    value, _ = step_size(raw, shift[None, :], LOW, HIGH, SOFTPLUS, LIMITED)
    value = tl.where(inside, value, 0.0)
    rate = tl.load(a + h, mask=h < heads, other=0.0).to(ACC) * tl.full([BH], 1.4426950408889634, ACC)
    # A step whose decay is 0 in this dtype may as well be the mildest such: the sums' rounding stays bounded.
    log_decay = tl.maximum(value * rate[None, :], LEAST)
    out = (row * heads + h[None, :]) * length + tokens[:, None]
    tl.store(steps + out, value, mask=inside)
    tl.store(sums + out, tl.cumsum(log_decay, axis=0), mask=inside)


@triton.jit
def states_kernel(
    values,
    keys,
    steps,
    sums,
    entering,
    states,
    leaving,
    bounds,
    document_chunks,
    length,
    heads,
    repeats,
    head_dim,
    state_size,
    chunks,
    value_row,
    value_token,
    value_head,
    key_row,
    key_token,
    key_group,
    REVERSE: tl.constexpr,
    HAS_ENTERING: tl.constexpr,
    PACKED: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    L: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
) -> None:
    """S from x and b, first chunk to last; REVERSE: D from dy and c, last to first. A block of one head and
    document (row); written before each chunk and, in `leaving`, after all."""
    p_blocks, n_blocks = tl.cdiv(head_dim, BP), tl.cdiv(state_size, BN)
    pid = tl.program_id(0).to(tl.int64)
    n = (pid % n_blocks) * BN + tl.arange(0, BN)
    p = (pid // n_blocks % p_blocks) * BP + tl.arange(0, BP)
    head = pid // (n_blocks * p_blocks) % heads
    document = pid // (n_blocks * p_blocks * heads)
    in_p, in_n = p < head_dim, n < state_size
    block = p[:, None] * state_size + n[None, :]
    in_block = in_p[:, None] & in_n[None, :]
    size = head_dim * state_size
    if PACKED:
        begin, number = tl.load(document_chunks + document), tl.load(document_chunks + document + 1)
        number -= begin
    else:
        begin, number = document * chunks, tl.full([], 0, tl.int64) + chunks
    state = tl.zeros([BP, BN], ACC)
    if HAS_ENTERING:
        first_state = entering + (document * heads + head) * size + block
        state = tl.load(first_state, mask=in_block, other=0.0).to(ACC)
    order = tl.arange(0, L)
    for i in range(number):
        if REVERSE:
            chunk = begin + number - 1 - i
        else:
            chunk = begin + i
        tl.store(
            states + (chunk * heads + head) * size + block, state.to(states.dtype.element_ty), mask=in_block
        )
        row, first, count = chunk_span(chunk, bounds, length, chunks, PACKED, L)
        tokens, live = first + order, order < count
        by_head = (row * heads + head) * length
        q = tl.load(sums + by_head + tokens, mask=live, other=0.0)
        total = tl.load(sums + by_head + first + count - 1)
        if REVERSE:
            weight = tl.exp2(q)
        else:
            weight = tl.exp2(total - q) * tl.load(steps + by_head + tokens, mask=live, other=0.0)
        v_at = values + row * value_row + head * value_head + tokens[:, None] * value_token + p[None, :]
        v = tl.load(v_at, mask=live[:, None] & in_p[None, :], other=0.0)
        k_at = keys + row * key_row + (head // repeats) * key_group + tokens[:, None] * key_token + n[None, :]
        k = tl.load(k_at, mask=live[:, None] & in_n[None, :], other=0.0)
        k = (k.to(ACC) * weight[:, None]).to(v.dtype)
        state = state * tl.exp2(total) + tl.dot(tl.trans(v), k, input_precision=PRECISION)
    tl.store(leaving + (document * heads + head) * size + block, state, mask=in_block)


@triton.jit
def outputs_kernel(
    x,
    b,
    c,
    d,
    steps,
    sums,
    states,
    y,
    bounds,
    length,
    heads,
    groups,
    head_dim,
    state_size,
    chunks,
    heads_each,
    splits,
    x_row,
    x_token,
    x_head,
    b_row,
    b_token,
    b_group,
    c_row,
    c_token,
    c_group,
    HAS_D: tl.constexpr,
    PACKED: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    L: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
) -> None:
    """y of one chunk, BP channels and `heads_each` heads of a group, one after another."""
    p_blocks = tl.cdiv(head_dim, BP)
    pid = tl.program_id(0).to(tl.int64)
    split = pid % splits
    p = (pid // splits % p_blocks) * BP + tl.arange(0, BP)
    group = pid // (splits * p_blocks) % groups
    chunk = pid // (splits * p_blocks * groups)
    row, first, count = chunk_span(chunk, bounds, length, chunks, PACKED, L)
    if count <= 0:
        return
    order, n = tl.arange(0, L), tl.arange(0, BN)
    tokens, live = first + order, order < count
    in_p, in_n = p < head_dim, n < state_size
    in_keys = live[:, None] & in_n[None, :]
    c_ = tl.load(
        c + row * c_row + group * c_group + tokens[:, None] * c_token + n[None, :], mask=in_keys, other=0.0
    )
    b_ = tl.load(
        b + row * b_row + group * b_group + tokens[:, None] * b_token + n[None, :], mask=in_keys, other=0.0
    )
    scores = tl.dot(c_, tl.trans(b_), input_precision=PRECISION)
    visible = (order[:, None] >= order[None, :]) & live[:, None]
    size = head_dim * state_size
    block = n[:, None] + p[None, :] * state_size
    in_block = in_n[:, None] & in_p[None, :]
    last_head = tl.minimum(
        (group + 1) * (heads // groups), group * (heads // groups) + (split + 1) * heads_each
    )
    for head in range(group * (heads // groups) + split * heads_each, last_head):
        by_head = (row * heads + head) * length + tokens
        q = tl.load(sums + by_head, mask=live, other=0.0)
        step = tl.load(steps + by_head, mask=live, other=0.0)
        x_at = x + row * x_row + head * x_head + tokens[:, None] * x_token + p[None, :]
        x_ = tl.load(x_at, mask=live[:, None] & in_p[None, :], other=0.0)
        state = tl.load(states + (chunk * heads + head) * size + block, mask=in_block, other=0.0)
        # Masked before the exponential: above the diagonal it would overflow.
        decays = tl.exp2(tl.where(visible, q[:, None] - q[None, :], float("-inf")))
        weights = (scores * decays * step[None, :]).to(x_.dtype)
        out = tl.dot(c_, state, input_precision=PRECISION) * tl.exp2(q)[:, None]
        out += tl.dot(weights, x_, input_precision=PRECISION)
        if HAS_D:
            out += tl.load(d + head).to(ACC) * x_.to(ACC)
        y_at = y + ((row * length + tokens[:, None]) * heads + head) * head_dim + p[None, :]
        tl.store(y_at, out.to(y.dtype.element_ty), mask=live[:, None] & in_p[None, :])


@triton.jit
def gradients_kernel(
    dy,
    x,
    dt,
    bias,
    a,
    b,
    c,
    d,
    sums,
    states,
    dstates,
    dx,
    ddt,
    db,
    dc,
    per_head,
    bounds,
    batch,
    length,
    heads,
    groups,
    head_dim,
    state_size,
    chunks,
    heads_each,
    splits,
    dt_row,
    dt_token,
    dt_head,
    x_row,
    x_token,
    x_head,
    b_row,
    b_token,
    b_group,
    c_row,
    c_token,
    c_group,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    LIMITED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_D: tl.constexpr,
    PACKED: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    L: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    P_BLOCKS: tl.constexpr,
) -> None:
    """All gradients of one chunk and `heads_each` heads of a group: dx and ddt; the sums over these heads of
    db and dc, (splits, B, T, G, N); the sums over the chunk of da, dd and dbias, (3, K, H)."""
    pid = tl.program_id(0).to(tl.int64)
    split = pid % splits
    group = pid // splits % groups
    chunk = pid // (splits * groups)
    row, first, count = chunk_span(chunk, bounds, length, chunks, PACKED, L)
    if count <= 0:
        return
    order, n = tl.arange(0, L), tl.arange(0, BN)
    tokens, live = first + order, order < count
    in_n = n < state_size
    in_keys = live[:, None] & in_n[None, :]
    c_ = tl.load(
        c + row * c_row + group * c_group + tokens[:, None] * c_token + n[None, :], mask=in_keys, other=0.0
    )
    b_ = tl.load(
        b + row * b_row + group * b_group + tokens[:, None] * b_token + n[None, :], mask=in_keys, other=0.0
    )
    scores = tl.dot(c_, tl.trans(b_), input_precision=PRECISION)
    visible = (order[:, None] >= order[None, :]) & live[:, None]
    size = head_dim * state_size
    dscores = tl.zeros([L, L], ACC)
    dc_, db_ = tl.zeros([L, BN], ACC), tl.zeros([L, BN], ACC)
    last_head = tl.minimum(
        (group + 1) * (heads // groups), group * (heads // groups) + (split + 1) * heads_each
    )
    for head in range(group * (heads // groups) + split * heads_each, last_head):
        by_head = (row * heads + head) * length
        q = tl.load(sums + by_head + tokens, mask=live, other=0.0)
        total = tl.load(sums + by_head + first + count - 1)
        raw = tl.load(dt + row * dt_row + tokens * dt_token + head * dt_head, mask=live, other=0.0).to(ACC)
        shift = tl.zeros([L], ACC)
        if HAS_BIAS:
            shift += tl.load(bias + head).to(ACC)
        step, slope = step_size(raw, shift, LOW, HIGH, SOFTPLUS, LIMITED)
        step = tl.where(live, step, 0.0)
        rate = tl.load(a + head).to(ACC)
        skip = tl.zeros([], ACC)
        if HAS_D:
            skip += tl.load(d + head).to(ACC)
        decays = tl.exp2(tl.where(visible, q[:, None] - q[None, :], float("-inf")))
        from_start, to_end = tl.exp2(q), tl.exp2(total - q)
        weights = tl.trans((scores * decays).to(c_.dtype))
        dweights = tl.zeros([L, L], ACC)
        read, kept = tl.zeros([L], ACC), tl.zeros([L], ACC)
        through, dskip = tl.zeros([BP], ACC), tl.zeros([L], ACC)
        for p_block in tl.static_range(P_BLOCKS):
            p = p_block * BP + tl.arange(0, BP)
            in_x = live[:, None] & (p < head_dim)[None, :]
            x_at = row * x_row + head * x_head + tokens[:, None] * x_token + p[None, :]
            y_at = ((row * length + tokens[:, None]) * heads + head) * head_dim + p[None, :]
            x_ = tl.load(x + x_at, mask=in_x, other=0.0)
            dy_ = tl.load(dy + y_at, mask=in_x, other=0.0)
            s_at = (chunk * heads + head) * size + p[:, None] * state_size + n[None, :]
            in_state = (p < head_dim)[:, None] & in_n[None, :]
            state = tl.load(states + s_at, mask=in_state, other=0.0)
            dstate = tl.load(dstates + s_at, mask=in_state, other=0.0)
            dweights += tl.dot(dy_, tl.trans(x_), input_precision=PRECISION)
            through += tl.sum(state.to(ACC) * dstate.to(ACC), axis=1)
            dc_head = tl.dot(dy_, state, input_precision=PRECISION) * from_start[:, None]
            dc_ += dc_head
            read += tl.sum(dc_head * c_.to(ACC), axis=1)
            db_head = tl.dot(x_, dstate, input_precision=PRECISION) * to_end[:, None]
            db_ += db_head * step[:, None]
            kept += tl.sum(db_head * b_.to(ACC), axis=1)
            dx_ = tl.dot(b_, tl.trans(dstate), input_precision=PRECISION) * to_end[:, None]
            dx_ += tl.dot(weights, dy_, input_precision=PRECISION)
            dx_ *= step[:, None]
            if HAS_D:
                dx_ += skip * dy_.to(ACC)
                dskip += tl.sum(dy_.to(ACC) * x_.to(ACC), axis=1)
            dx_at = ((row * length + tokens[:, None]) * heads + head) * head_dim + p[None, :]
            tl.store(dx + dx_at, dx_.to(dx.dtype.element_ty), mask=in_x)
        dweights *= decays
        dscores += dweights * step[None, :]
        dweights *= scores
        ddt_ = tl.sum(dweights, axis=0) + kept
        # Of all i >= t, then of all j < t: what stays on one side of t is not there to cancel.
        passing = tl.cumsum(dweights * step[None, :], axis=0, reverse=True)
        dlog = tl.sum(tl.where(order[:, None] > order[None, :], passing, 0.0), axis=1)
        dlog += tl.sum(
            tl.where(order[:, None] >= order[None, :], read[:, None], (kept * step)[:, None]), axis=0
        )
        dlog += tl.sum(through, axis=0) * tl.exp2(total)
        ddt_ = tl.where(live, (ddt_ + dlog * rate) * slope, 0.0)
        ddt_at = (row * length + tokens) * heads + head
        tl.store(ddt + ddt_at, ddt_.to(ddt.dtype.element_ty), mask=live)
        out = per_head + chunk * heads + head
        plane = tl.num_programs(0).to(tl.int64) // (splits * groups) * heads
        tl.store(out, tl.sum(dlog * step, axis=0))
        tl.store(out + plane, tl.sum(dskip, axis=0))
        tl.store(out + 2 * plane, tl.sum(ddt_, axis=0))
    dscores_ = dscores.to(c_.dtype)
    dc_ += tl.dot(dscores_, b_, input_precision=PRECISION)
    db_ += tl.dot(tl.trans(dscores_), c_, input_precision=PRECISION)
    at = (((split * batch + row) * length + tokens[:, None]) * groups + group) * state_size + n[None, :]
    tl.store(dc + at, dc_, mask=in_keys)
    tl.store(db + at, db_, mask=in_keys)
