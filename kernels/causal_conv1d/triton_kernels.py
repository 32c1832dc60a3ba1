"""Kernels of causal_conv1d in Triton.

B batch, T length of a row, C channels, K taps (at most 4), docs documents: each row one where nothing is
packed.

A program walks through a strip of one row in time, for BLOCK_C channels: every input is read once, and the
last K-1 of them stay in registers as the window that the next tokens look back at. UNROLL tokens are loaded
together, so that their latencies overlap. Taps are numbered by how far they look back: weights[k] meets the
token k steps before.

    z[t] = bias + sum_k weights[k] x[t - k],    y = z or silu(z)
    dx[t - k] += weights[k] dz[t],    dweights[k] += dz[t] x[t - k]

A window is a tuple of rows, the oldest first. Tokens are counted from the first one of the batch wherever
documents are compared, and in the row wherever memory is addressed.
"""

# Triton has no starred tuples, and `if` of a constexpr has to stand alone.
# ruff: noqa: RUF005, SIM102
# To mypy a tuple that grows changes its type.
# mypy: disable-error-code="assignment, misc"

import triton
import triton.language as tl

UNROLL = tl.constexpr(4)
SEARCH = tl.constexpr(128)


@triton.jit
def _weights(ptr, channels, mask, stride_c, stride_k, TAPS: tl.constexpr, ACC: tl.constexpr):
    found = ()
    for k in tl.static_range(TAPS):
        tap = ptr + channels * stride_c + (TAPS - 1 - k) * stride_k
        found = found + (tl.load(tap, mask=mask, other=0.0).to(ACC),)
    return found


@triton.jit
def _document(cu_ptr, token, docs, DOC_BLOCKS: tl.constexpr):
    """The number of the document that holds a token: how many begin at or before it, the first left out."""
    begun = tl.zeros([SEARCH], tl.int32)
    for block in range(DOC_BLOCKS):
        number = 1 + block * SEARCH + tl.arange(0, SEARCH)
        inside = number < docs
        bounds = tl.load(cu_ptr + number, mask=inside, other=0)
        begun += (inside & (bounds <= token)).to(tl.int32)
    return tl.sum(begun, 0).to(tl.int64)


@triton.jit
def _bounds(cu_ptr, doc, length, PACKED: tl.constexpr):
    """First token of a document and the one behind its last."""
    if PACKED:
        begin = tl.load(cu_ptr + doc).to(tl.int64)
        end = tl.load(cu_ptr + doc + 1).to(tl.int64)
    else:
        begin = doc * length
        end = begin + length
    return begin, end


@triton.jit
def _state(ptr, doc, column, wanted, channels, mask, stride_d, stride_c, stride_k, ACC: tl.constexpr):
    """A column of a document's state, zeros where it is not wanted."""
    column = ptr + doc * stride_d + channels * stride_c + column * stride_k
    return tl.load(column, mask=mask & wanted, other=0.0).to(ACC)


@triton.jit
def _first_window(
    x_row,
    state_ptr,
    t,
    token,
    doc,
    begin,
    channels,
    mask,
    x_t,
    s_d,
    s_c,
    s_k,
    TAPS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    ACC: tl.constexpr,
):
    """The K-1 inputs before a token: of its document, then of that one's state, then zeros."""
    window = ()
    for k in tl.static_range(TAPS - 1, 0, -1):
        inside = token - k >= begin
        row = tl.load(x_row + (t - k) * x_t + channels, mask=mask & inside, other=0.0).to(ACC)
        if HAS_STATE:
            column = TAPS - 1 + token - k - begin
            row += _state(state_ptr, doc, column, token - k < begin, channels, mask, s_d, s_c, s_k, ACC)
        window = window + (row,)
    return window


@triton.jit
def _rows(row_ptr, t, length, channels, mask, stride, ACC: tl.constexpr):
    rows = ()
    for u in tl.static_range(UNROLL):
        row = tl.load(row_ptr + (t + u) * stride + channels, mask=mask & (t + u < length), other=0.0)
        rows = rows + (row.to(ACC),)
    return rows


@triton.jit
def _convolved(
    window,
    weights,
    bias,
    state_ptr,
    cu_ptr,
    start,
    t,
    length,
    doc,
    begin,
    end,
    channels,
    mask,
    s_d,
    s_c,
    s_k,
    TAPS: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_STATE: tl.constexpr,
    ACC: tl.constexpr,
):
    """z of UNROLL tokens, the rows that each of them meets (K a token, the latest first), each one's document
    with its first token and its end; and where that leaves the walk: document, begin and end."""
    zs = ()
    met = ()
    docs = ()
    begins = ()
    ends = ()
    for u in tl.static_range(UNROLL):
        token = start + t + u
        if PACKED:
            if (token >= end) & (t + u < length):
                doc += 1
                begin = end
                end = tl.load(cu_ptr + doc + 1).to(tl.int64)
        z = bias
        for k in tl.static_range(TAPS):
            row = window[TAPS - 1 + u - k]
            if PACKED and k > 0:
                row = tl.where(token - k >= begin, row, 0.0)
                if HAS_STATE:
                    column = state_ptr + doc * s_d + channels * s_c + (TAPS - 1 + token - k - begin) * s_k
                    row += tl.load(column, mask=mask & (token - k < begin), other=0.0).to(ACC)
            z += weights[k] * row
            met = met + (row,)
        zs = zs + (z,)
        docs = docs + (doc,)
        begins = begins + (begin,)
        ends = ends + (end,)
    return zs, met, docs, begins, ends, doc, begin, end


@triton.jit
def forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    state_ptr,
    cu_ptr,
    y_ptr,
    length,
    num_channels,
    docs,
    strips,
    x_b,
    x_t,
    w_c,
    w_k,
    s_d,
    s_c,
    s_k,
    TAPS: tl.constexpr,
    SILU: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    DOC_BLOCKS: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    """y (B, T, C). Grid: strips of all rows, blocks of channels."""
    strip = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = channels < num_channels
    row, first = strip // strips, strip % strips * STRIP
    start = row * length
    doc = _document(cu_ptr, start + first, docs, DOC_BLOCKS) if PACKED else row
    begin, end = _bounds(cu_ptr, doc, length, PACKED)
    weights = _weights(weight_ptr, channels, mask, w_c, w_k, TAPS, ACC)
    bias = tl.zeros([BLOCK_C], ACC)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + channels, mask=mask, other=0.0).to(ACC)
    x_row = x_ptr + row * x_b
    y_row = y_ptr + start * num_channels
    window = _first_window(
        x_row, state_ptr, first, start + first, doc, begin, channels, mask, x_t, s_d, s_c, s_k,
        TAPS, HAS_STATE, ACC,
    )  # fmt: skip
    for step in range(0, STRIP, UNROLL):
        t = first + step
        window = window + _rows(x_row, t, length, channels, mask, x_t, ACC)
        zs, _, _, _, _, doc, begin, end = _convolved(
            window, weights, bias, state_ptr, cu_ptr, start, t, length, doc, begin, end,
            channels, mask, s_d, s_c, s_k, TAPS, PACKED, HAS_STATE, ACC,
        )  # fmt: skip
        for u in tl.static_range(UNROLL):
            y = zs[u]
            if SILU:
                y = y / (1.0 + tl.exp(-y))
            y = y.to(y_ptr.dtype.element_ty)
            tl.store(y_row + (t + u) * num_channels + channels, y, mask=mask & (t + u < length))
        kept = ()
        for i in tl.static_range(TAPS - 1):
            kept = kept + (window[UNROLL + i],)
        window = kept


@triton.jit
def final_state_kernel(
    x_ptr,
    state_ptr,
    cu_ptr,
    final_ptr,
    length,
    num_channels,
    x_b,
    x_t,
    s_d,
    s_c,
    s_k,
    TAPS: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_STATE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    """The last K-1 inputs of each document, (docs, K-1, C). Grid: documents, blocks of channels."""
    doc = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = channels < num_channels
    begin, end = _bounds(cu_ptr, doc, length, PACKED)
    row = (end - 1) // length
    window = _first_window(
        x_ptr + row * x_b, state_ptr, end - row * length, end, doc, begin, channels, mask, x_t, s_d, s_c, s_k,
        TAPS, HAS_STATE, ACC,
    )  # fmt: skip
    for i in tl.static_range(TAPS - 1):
        column = final_ptr + (doc * (TAPS - 1) + i) * num_channels + channels
        tl.store(column, window[i].to(final_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    dy_ptr,
    dfinal_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    state_ptr,
    cu_ptr,
    dx_ptr,
    dparameters_ptr,
    length,
    num_channels,
    docs,
    strips,
    dy_b,
    dy_t,
    f_d,
    f_c,
    f_k,
    x_b,
    x_t,
    w_c,
    w_k,
    s_d,
    s_c,
    s_k,
    TAPS: tl.constexpr,
    SILU: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_DFINAL: tl.constexpr,
    DOC_BLOCKS: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    """dx (B, T, C), and of each strip its sums for the K weights and the bias, (strips of all rows, K+1, C).

    dx of a token is complete K-1 tokens later; until then its sum is one of the `waiting`. So a strip goes on
    by UNROLL tokens, whose shares of dweight belong to the next one.
    """
    strip = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = channels < num_channels
    row, first = strip // strips, strip % strips * STRIP
    start = row * length
    doc = _document(cu_ptr, start + first, docs, DOC_BLOCKS) if PACKED else row
    begin, end = _bounds(cu_ptr, doc, length, PACKED)
    weights = _weights(weight_ptr, channels, mask, w_c, w_k, TAPS, ACC)
    bias = tl.zeros([BLOCK_C], ACC)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + channels, mask=mask, other=0.0).to(ACC)
    x_row, dy_row = x_ptr + row * x_b, dy_ptr + row * dy_b
    dx_row = dx_ptr + start * num_channels
    window = _first_window(
        x_row, state_ptr, first, start + first, doc, begin, channels, mask, x_t, s_d, s_c, s_k,
        TAPS, HAS_STATE, ACC,
    )  # fmt: skip
    waiting = ()
    dweights = ()
    for _ in tl.static_range(TAPS - 1):
        waiting = waiting + (tl.zeros([BLOCK_C], ACC),)
    for _ in tl.static_range(TAPS):
        dweights = dweights + (tl.zeros([BLOCK_C], ACC),)
    dbias = tl.zeros([BLOCK_C], ACC)
    for step in range(0, STRIP + UNROLL, UNROLL):
        t = first + step
        window = window + _rows(x_row, t, length, channels, mask, x_t, ACC)
        dys = _rows(dy_row, t, length, channels, mask, dy_t, ACC)
        own = step < STRIP
        zs, met, docs_of, begins, ends, doc, begin, end = _convolved(
            window, weights, bias, state_ptr, cu_ptr, start, t, length, doc, begin, end,
            channels, mask, s_d, s_c, s_k, TAPS, PACKED, HAS_STATE, ACC,
        )  # fmt: skip
        for u in tl.static_range(UNROLL):
            token = start + t + u
            dz = dys[u]
            if SILU:
                sigmoid = 1.0 / (1.0 + tl.exp(-zs[u]))
                dz *= sigmoid * (1.0 + zs[u] * (1.0 - sigmoid))
            counted = tl.where(own, dz, 0.0)
            dbias += counted
            sums = ()
            for k in tl.static_range(TAPS):
                sums = sums + (dweights[k] + counted * met[u * TAPS + k],)
            dweights = sums
            # The oldest first, as in a window; the token's own comes last.
            dxs = ()
            for k in tl.static_range(TAPS - 1, 0, -1):
                share = weights[k] * dz
                if PACKED:
                    share = tl.where(token - k >= begins[u], share, 0.0)
                dxs = dxs + (waiting[TAPS - 1 - k] + share,)
            dx = weights[0] * dz
            if HAS_DFINAL:
                column = TAPS - 1 + token - ends[u]
                wanted = (column >= 0) & (column < TAPS - 1)
                cell = dfinal_ptr + docs_of[u] * f_d + channels * f_c + column * f_k
                dx += tl.load(cell, mask=mask & wanted, other=0.0).to(ACC)
            dxs = dxs + (dx,)
            done = t + u - (TAPS - 1)
            inside = (done >= first) & (done < first + STRIP) & (done < length)
            dx = dxs[0].to(dx_ptr.dtype.element_ty)
            tl.store(dx_row + done * num_channels + channels, dx, mask=mask & inside)
            waiting = ()
            for i in tl.static_range(TAPS - 1):
                waiting = waiting + (dxs[i + 1],)
        kept = ()
        for i in tl.static_range(TAPS - 1):
            kept = kept + (window[UNROLL + i],)
        window = kept
    sums_row = dparameters_ptr + strip * (TAPS + 1) * num_channels + channels
    for k in tl.static_range(TAPS):
        tl.store(sums_row + (TAPS - 1 - k) * num_channels, dweights[k], mask=mask)
    tl.store(sums_row + TAPS * num_channels, dbias, mask=mask)


@triton.jit
def dstate_kernel(
    dy_ptr,
    dfinal_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    state_ptr,
    cu_ptr,
    dstate_ptr,
    length,
    num_channels,
    dy_b,
    dy_t,
    f_d,
    f_c,
    f_k,
    x_b,
    x_t,
    w_c,
    w_k,
    s_d,
    s_c,
    s_k,
    TAPS: tl.constexpr,
    SILU: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DFINAL: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
) -> None:
    """Gradient of the initial states, (docs, K-1, C). Grid: documents, blocks of channels.

    Column j is met by the first j+1 tokens; of a document shorter than K-1 tokens the last columns go on into
    the final state.
    """
    doc = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = channels < num_channels
    begin, end = _bounds(cu_ptr, doc, length, PACKED)
    row = begin // length
    first = begin - row * length
    weights = _weights(weight_ptr, channels, mask, w_c, w_k, TAPS, ACC)
    bias = tl.zeros([BLOCK_C], ACC)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + channels, mask=mask, other=0.0).to(ACC)
    window = _first_window(
        x_ptr + row * x_b, state_ptr, first, begin, doc, begin, channels, mask, x_t, s_d, s_c, s_k,
        TAPS, True, ACC,
    )  # fmt: skip
    stop = end - row * length
    window = window + _rows(x_ptr + row * x_b, first, stop, channels, mask, x_t, ACC)
    dys = _rows(dy_ptr + row * dy_b, first, stop, channels, mask, dy_t, ACC)
    dzs = ()
    for m in tl.static_range(TAPS - 1):
        z = bias
        for k in tl.static_range(TAPS):
            z += weights[k] * window[TAPS - 1 + m - k]
        dz = dys[m]
        if SILU:
            sigmoid = 1.0 / (1.0 + tl.exp(-z))
            dz *= sigmoid * (1.0 + z * (1.0 - sigmoid))
        dzs = dzs + (dz,)
    for j in tl.static_range(TAPS - 1):
        gradient = tl.zeros([BLOCK_C], ACC)
        for m in tl.static_range(j + 1):
            gradient += weights[TAPS - 1 + m - j] * dzs[m]
        if HAS_DFINAL:
            column = j - (end - begin)
            gradient += _state(dfinal_ptr, doc, column, column >= 0, channels, mask, f_d, f_c, f_k, ACC)
        target = dstate_ptr + (doc * (TAPS - 1) + j) * num_channels + channels
        tl.store(target, gradient.to(dstate_ptr.dtype.element_ty), mask=mask)
