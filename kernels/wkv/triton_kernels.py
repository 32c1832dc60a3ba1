"""Kernels of WKV in Triton.

B batch, T length, C channels. Mathematics and names are those of scan.py, with logarithms to base e: a
*sweep* carries sums of two values, each e^top times what is kept, over the tokens in one direction,

    top' = max(top - w, log),    sum' = exp(top - w - top') sum + exp(log - top') value,

and leaves at every token the sums of those before it. One over the inputs (log k, values v and 1) gives the
outputs; one over the outputs the other way (log -log den, values dy and dy y) gives the gradients. Only the
sweeps go token by token; what they leave is put together for all tokens at once.

The top is carried in fp64, since rounding of it would add up over a long row; all else is fp32.
Sums are kept as (directions, 3, B, T, C): top, and the sums of both values.
"""

# Triton has no starred tuples.
# ruff: noqa: RUF005
# To mypy a tuple that grows changes its type.
# mypy: disable-error-code="assignment, misc"

import triton
import triton.language as tl

UNROLL = tl.constexpr(4)
NOTHING = tl.constexpr(-1e30)  # the top of no tokens: beside any real one it vanishes


@triton.jit
def _tokens(ptr, step, length, token, towards, num_channels, channels, mask, ACC: tl.constexpr):
    """UNROLL tokens of (B, T, C), from step `step` on, which comes to `token`; towards: 1 or -1."""
    found = ()
    for i in tl.static_range(UNROLL):
        place = (token + i * towards) * num_channels + channels
        value = tl.load(ptr + place, mask=mask & (step + i < length), other=0.0).to(ACC)
        found = found + (value,)
    return found


@triton.jit
def sweep_kernel(
    log_ptr,
    a_ptr,
    b_ptr,
    w_ptr,
    scale_ptr,
    starts_ptr,
    ends_ptr,
    first_ptr,
    sums_ptr,
    last_ptr,
    rows,
    length,
    num_channels,
    INPUTS: tl.constexpr,
    PACKED: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    """Grid: rows, blocks of channels, directions. INPUTS: of log as it is, a and ones, the first direction
    forwards; else of -log, a and a b, the first direction backwards. first, last: (3, B, C), what the first
    direction begins and ends with.
    """
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    direction = tl.program_id(2).to(tl.int64)
    backwards = direction if INPUTS else 1 - direction
    mask = channels < num_channels
    w = tl.load(w_ptr + channels, mask=mask, other=0.0).to(tl.float64)
    top = tl.full([BLOCK_C], NOTHING, tl.float64)
    sum_a = tl.zeros([BLOCK_C], ACC)
    sum_b = tl.zeros([BLOCK_C], ACC)
    state = row * num_channels + channels
    states = tl.cast(rows, tl.int64) * num_channels
    if HAS_FIRST:
        has = mask & (direction == 0)
        top = tl.maximum(tl.load(first_ptr + state, mask=has, other=NOTHING).to(tl.float64), NOTHING)
        sum_a = tl.load(first_ptr + states + state, mask=has, other=0.0).to(ACC)
        sum_b = tl.load(first_ptr + 2 * states + state, mask=has, other=0.0).to(ACC)
    size = states * length
    out = sums_ptr + direction * 3 * size + channels
    towards = 1 - 2 * backwards
    start = row * length + (length - 1) * backwards
    step = row * 0
    while step < length:
        first = start + step * towards
        logs = _tokens(log_ptr, step, length, first, towards, num_channels, channels, mask, ACC)
        values = _tokens(a_ptr, step, length, first, towards, num_channels, channels, mask, ACC)
        others = values
        if not INPUTS:
            others = _tokens(b_ptr, step, length, first, towards, num_channels, channels, mask, ACC)
        for i in tl.static_range(UNROLL):
            inside = step + i < length
            token = first + i * towards
            if PACKED:
                starts = tl.load(starts_ptr + token, mask=inside, other=0)
                ends = tl.load(ends_ptr + token, mask=inside, other=0)
                border = tl.where(backwards == 1, ends, starts) != 0
                top = tl.where(border, NOTHING, top)
                sum_a = tl.where(border, 0.0, sum_a)
                sum_b = tl.where(border, 0.0, sum_b)
            store = mask & inside
            tl.store(out + token * num_channels, top.to(ACC), mask=store)
            tl.store(out + size + token * num_channels, sum_a, mask=store)
            tl.store(out + 2 * size + token * num_channels, sum_b, mask=store)
            kept = top - w
            if SCALED:
                kept = top - w * tl.load(scale_ptr + token, mask=inside, other=0.0).to(tl.float64)
            log = logs[i].to(tl.float64)
            value = values[i]
            if INPUTS:
                other = tl.full([BLOCK_C], 1.0, ACC)
            else:
                log = -log
                other = value * others[i]
            following = tl.maximum(kept, log)
            old = tl.exp((kept - following).to(ACC))
            new = tl.exp((log - following).to(ACC))
            # Behind the end of the row nothing changes any more.
            top = tl.where(inside, following, top)
            sum_a = tl.where(inside, sum_a * old + value * new, sum_a)
            sum_b = tl.where(inside, sum_b * old + other * new, sum_b)
        step += UNROLL
    store = mask & (direction == 0)
    tl.store(last_ptr + state, top.to(ACC), mask=store)
    tl.store(last_ptr + states + state, sum_a, mask=store)
    tl.store(last_ptr + 2 * states + state, sum_b, mask=store)


@triton.jit
def _scale(scale_ptr, tokens, inside, SCALED: tl.constexpr, ACC: tl.constexpr):
    """What the decay of each token is multiplied with, a column."""
    if SCALED:
        scale = tl.load(scale_ptr + tokens, mask=inside, other=0.0).to(ACC)[:, None]
    else:
        scale = tl.full([1, 1], 1.0, ACC)
    return scale


@triton.jit
def output_kernel(
    k_ptr,
    v_ptr,
    u_ptr,
    scale_ptr,
    sums_ptr,
    y_ptr,
    log_ptr,
    num_tokens,
    num_channels,
    DIRECTIONS: tl.constexpr,
    SCALED: tl.constexpr,
    SCALE_U: tl.constexpr,
    KEEP_LOG: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    """y, and the logarithm of its denominator. Grid: blocks of all tokens, blocks of channels."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = tokens < num_tokens
    mask = inside[:, None] & (channels < num_channels)[None, :]
    place = tokens[:, None] * num_channels + channels[None, :]
    u = tl.load(u_ptr + channels, mask=channels < num_channels, other=0.0).to(ACC)[None, :]
    if SCALE_U:
        u = u * _scale(scale_ptr, tokens, inside, SCALED, ACC)
    own = tl.load(k_ptr + place, mask=mask, other=0.0).to(ACC) + u
    size = tl.cast(num_tokens, tl.int64) * num_channels
    top = own
    for d in tl.static_range(DIRECTIONS):
        top = tl.maximum(top, tl.load(sums_ptr + d * 3 * size + place, mask=mask, other=NOTHING))
    denominator = tl.exp(own - top)
    numerator = denominator * tl.load(v_ptr + place, mask=mask, other=0.0).to(ACC)
    for d in tl.static_range(DIRECTIONS):
        sums = sums_ptr + d * 3 * size + place
        weight = tl.exp(tl.load(sums, mask=mask, other=NOTHING) - top)
        numerator += weight * tl.load(sums + size, mask=mask, other=0.0)
        denominator += weight * tl.load(sums + 2 * size, mask=mask, other=0.0)
    tl.store(y_ptr + place, (numerator / denominator).to(y_ptr.dtype.element_ty), mask=mask)
    if KEEP_LOG:
        tl.store(log_ptr + place, top + tl.log(denominator), mask=mask)


@triton.jit
def gradient_kernel(
    dy_ptr,
    k_ptr,
    v_ptr,
    w_ptr,
    u_ptr,
    scale_ptr,
    y_ptr,
    log_ptr,
    sums_ptr,
    adjoints_ptr,
    dk_ptr,
    dv_ptr,
    dparameters_ptr,
    num_tokens,
    num_channels,
    DIRECTIONS: tl.constexpr,
    SCALED: tl.constexpr,
    SCALE_U: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    """dk, dv, and of each block of tokens its sums for dw and du, (blocks, 2, C). Grid: as of the outputs."""
    block = tl.program_id(0).to(tl.int64)
    tokens = block * BLOCK_T + tl.arange(0, BLOCK_T)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside, existing = tokens < num_tokens, channels < num_channels
    mask = inside[:, None] & existing[None, :]
    place = tokens[:, None] * num_channels + channels[None, :]
    scale = _scale(scale_ptr, tokens, inside, SCALED, ACC)
    w = tl.load(w_ptr + channels, mask=existing, other=0.0).to(ACC)[None, :] * scale
    u = tl.load(u_ptr + channels, mask=existing, other=0.0).to(ACC)[None, :]
    if SCALE_U:
        u = u * scale
    k = tl.load(k_ptr + place, mask=mask, other=0.0).to(ACC)
    v = tl.load(v_ptr + place, mask=mask, other=0.0).to(ACC)
    y = tl.load(y_ptr + place, mask=mask, other=0.0)
    dv = tl.exp(k + u - tl.load(log_ptr + place, mask=mask, other=0.0))
    dv *= tl.load(dy_ptr + place, mask=mask, other=0.0).to(ACC)
    dlog = dv * y
    du = tl.where(mask, v * dv - dlog, 0.0)
    if SCALE_U:
        du *= scale
    dw = tl.zeros([BLOCK_T, BLOCK_C], ACC)
    size = tl.cast(num_tokens, tl.int64) * num_channels
    for d in tl.static_range(DIRECTIONS):
        # What a token gave to the outputs behind it, and what those before it gave across it.
        before, after = sums_ptr + d * 3 * size + place, adjoints_ptr + d * 3 * size + place
        top = tl.load(after, mask=mask, other=NOTHING)
        of_dy = tl.load(after + size, mask=mask, other=0.0)
        of_dy_y = tl.load(after + 2 * size, mask=mask, other=0.0)
        weight = tl.exp(k + top)
        dv += weight * of_dy
        dlog += weight * of_dy_y
        between = tl.exp(tl.load(before, mask=mask, other=NOTHING) + top - w)
        across = tl.load(before + size, mask=mask, other=0.0) * of_dy
        across -= tl.load(before + 2 * size, mask=mask, other=0.0) * of_dy_y
        dw -= across * between
    dw = tl.where(mask, dw * scale, 0.0)
    tl.store(dk_ptr + place, (dv * v - dlog).to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + place, dv.to(dv_ptr.dtype.element_ty), mask=mask)
    sums_of_block = dparameters_ptr + block * 2 * num_channels + channels
    tl.store(sums_of_block, tl.sum(dw, 0), mask=existing)
    tl.store(sums_of_block + num_channels, tl.sum(du, 0), mask=existing)
