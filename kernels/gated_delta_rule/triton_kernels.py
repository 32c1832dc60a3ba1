"""The gated delta rule's Triton kernels. The equations are at the heads of chunks.py and scan.py.

L tokens of a chunk, H heads, D channels of queries and keys (BD: a power of two from D on), E channels of
values, worked on BE at a time. Tokens of all rows are numbered through: what belongs to token n and head h is
at n H + h. Chunks of all documents are numbered through too: `chunk` says where its state (D, E) is stored.

Five kernels. Forward: M of every chunk; states and writes w, chunk by chunk; outputs. Backward, after the
second again: what outputs give to w of their own chunk; gradients of states and z = M^T dw, chunk by chunk
from the end; all other gradients. No atomics; a sum over E is made within one program.
"""

import triton
import triton.language as tl

EPS = tl.constexpr(1e-6)
# As in the torch form: below it every exponential is 0, so a smaller log decay says nothing more.
FLOOR = tl.constexpr(-127.3)
FLOOR_DOUBLE = tl.constexpr(-748.3)


@triton.jit
def of_document(document, cu_seqlens, first_chunks, length, L: tl.constexpr, PACKED: tl.constexpr):
    """A document's first token, its end and its first chunk."""
    if PACKED:
        start = tl.load(cu_seqlens + document).to(tl.int64)
        end = tl.load(cu_seqlens + document + 1).to(tl.int64)
        chunk = tl.load(first_chunks + document).to(tl.int64)
    else:
        start = document * length
        end = start + length
        chunk = document * tl.cdiv(length, L)
    return start, end, chunk


@triton.jit
def of_chunk(chunk, cu_seqlens, first_chunks, documents, length, L: tl.constexpr, PACKED: tl.constexpr):
    """Numbers of a chunk's tokens, and which of them are in its document."""
    if PACKED:
        document = tl.load(documents + chunk).to(tl.int64)
    else:
        document = chunk // tl.cdiv(length, L)
    start, end, first = of_document(document, cu_seqlens, first_chunks, length, L, PACKED)
    tokens = start + (chunk - first) * L + tl.arange(0, L)
    return tokens, tokens < end


@triton.jit
def tile(x, rows, columns, inside, width):
    """Rows of `width` numbers each; zeros outside."""
    at = x + rows[:, None] * width + columns[None, :]
    return tl.load(at, mask=inside[:, None] & (columns < width)[None, :], other=0.0)


@triton.jit
def put(x, values, rows, columns, inside, width):
    at = x + rows[:, None] * width + columns[None, :]
    tl.store(at, values.to(x.dtype.element_ty), mask=inside[:, None] & (columns < width)[None, :])


@triton.jit
def unit(x, ACC: tl.constexpr):
    wide = x.to(ACC)
    rstd = 1 / tl.sqrt(tl.sum(wide * wide, 1) + EPS)
    return (wide * rstd[:, None]).to(x.dtype)


@triton.jit
def vectors(x, rows, columns, inside, width, NORMALIZE: tl.constexpr, ACC: tl.constexpr):
    """Queries or keys."""
    found = tile(x, rows, columns, inside, width)
    if NORMALIZE:
        found = unit(found, ACC)
    return found


@triton.jit
def decay_sums(g, rows, inside, ACC: tl.constexpr):
    """b of each token, and of the last, in fp64: differences of large sums stay exact."""
    floor = FLOOR_DOUBLE if tl.float64 == ACC else FLOOR
    log_decay = tl.maximum(tl.load(g + rows, mask=inside, other=0.0).to(tl.float64), floor)
    return tl.cumsum(log_decay, 0), tl.sum(log_decay, 0)


@triton.jit
def decays_between(b, L: tl.constexpr, ACC: tl.constexpr):
    """exp(b[i] - b[j]) for j <= i, else 0; masked before the exponential, which would overflow."""
    order = tl.arange(0, L)
    difference = (b[:, None] - b[None, :]).to(ACC)
    return tl.exp(tl.where(order[:, None] >= order[None, :], difference, float("-inf")))


@triton.jit
def inverse(system, L: tl.constexpr, ACC: tl.constexpr, EXACT: tl.constexpr):
    """(I + system)^-1 of a strictly lower triangular system: row by row in blocks of 16 on the diagonal,
    which then are merged two by two, [[X, 0], [F, Y]]^-1 = [[X^-1, 0], [-Y^-1 F X^-1, Y^-1]]."""
    BLOCKS: tl.constexpr = L // 16
    number = tl.arange(0, BLOCKS)
    diagonal = (number[:, None] == number[None, :])[:, None, :, None]
    parts = tl.sum(tl.where(diagonal, tl.reshape(system, (BLOCKS, 16, BLOCKS, 16)), 0.0), 2)
    row = tl.arange(0, 16)
    solved = tl.where((row[:, None] == row[None, :])[None, :, :], 1.0, tl.zeros((BLOCKS, 16, 16), ACC))
    for i in range(1, 16):
        this = (row == i)[None, :, None]
        factors = tl.sum(tl.where(this, parts, 0.0), 1)
        solved = tl.where(this, solved - tl.sum(factors[:, :, None] * solved, 1)[:, None, :], solved)
    found = tl.reshape(tl.where(diagonal, solved[:, :, None, :], 0.0), (L, L))
    order = tl.arange(0, L)
    if L > 16:
        found = merged(found, system, order, 16, EXACT)
    if L > 32:
        found = merged(found, system, order, 32, EXACT)
    return found


@triton.jit
def merged(found, system, order, SIZE: tl.constexpr, EXACT: tl.constexpr):
    """Inverses of diagonal blocks twice as large as SIZE."""
    pair = (order // (2 * SIZE))[:, None] == (order // (2 * SIZE))[None, :]
    below = pair & ((order // SIZE)[:, None] > (order // SIZE)[None, :])
    product = tl.dot(tl.where(below, system, 0.0), found, input_precision=EXACT, out_dtype=found.dtype)
    return found - tl.dot(found, product, input_precision=EXACT, out_dtype=found.dtype)


@triton.jit
def inverses_kernel(
    k,
    g,
    beta,
    inverses,
    cu_seqlens,
    first_chunks,
    documents,
    length,
    H,
    D,
    L: tl.constexpr,
    BD: tl.constexpr,
    PACKED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):
    """M of each chunk: row i beside its token. A program: one chunk of one head."""
    program = tl.program_id(0).to(tl.int64)
    head = program % H
    tokens, inside = of_chunk(program // H, cu_seqlens, first_chunks, documents, length, L, PACKED)
    rows = tokens * H + head
    keys = vectors(k, rows, tl.arange(0, BD), inside, D, NORMALIZE, ACC)
    b, _ = decay_sums(g, rows, inside, ACC)
    strength = tl.load(beta + rows, mask=inside, other=0.0).to(ACC)
    order = tl.arange(0, L)
    system = tl.dot(keys, tl.trans(keys), input_precision=PRECISION, out_dtype=ACC)
    system = tl.where(order[:, None] > order[None, :], system * decays_between(b, L, ACC), 0.0)
    found = inverse(system * strength[:, None], L, ACC, EXACT)
    put(inverses, found, rows, order, inside, L)


@triton.jit
def states_kernel(
    k,
    v,
    g,
    beta,
    inverses,
    initial,
    states,
    w,
    final,
    cu_seqlens,
    first_chunks,
    length,
    H,
    D,
    E,
    L: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    PACKED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The state before each chunk, and w. A program: BE columns of the state of one document and head."""
    program = tl.program_id(0).to(tl.int64)
    parts = tl.cdiv(E, BE)
    columns = (program % parts) * BE + tl.arange(0, BE)
    head = program // parts % H
    document = program // parts // H
    start, end, chunk = of_document(document, cu_seqlens, first_chunks, length, L, PACKED)
    channels = tl.arange(0, BD)
    here = channels < D
    state = tl.zeros((BD, BE), ACC)
    if HAS_INITIAL:
        state += tile(initial, (document * H + head) * D + channels, columns, here, E).to(ACC)
    order = tl.arange(0, L)
    for c in range(tl.cdiv(end - start, L)):
        tokens = start + c * L + order
        inside = tokens < end
        rows = tokens * H + head
        keys = vectors(k, rows, channels, inside, D, NORMALIZE, ACC)
        values = tile(v, rows, columns, inside, E).to(ACC)
        m = tile(inverses, rows, order, inside, L)
        strength = tl.load(beta + rows, mask=inside, other=0.0).to(ACC)
        b, last = decay_sums(g, rows, inside, ACC)
        before = state.to(keys.dtype)
        put(states, before, ((chunk + c) * H + head) * D + channels, columns, here, E)
        recalled = tl.dot(keys, before, input_precision=PRECISION, out_dtype=ACC)
        own = strength[:, None] * (values - tl.exp(b.to(ACC))[:, None] * recalled)
        written = tl.dot(m, own.to(m.dtype), input_precision=PRECISION, out_dtype=ACC)
        put(w, written, rows, columns, inside, E)
        kept = (tl.exp((last - b).to(ACC))[:, None] * written).to(keys.dtype)
        state = state * tl.exp(last.to(ACC))
        state += tl.dot(tl.trans(keys), kept, input_precision=PRECISION, out_dtype=ACC)
    if HAS_FINAL:
        put(final, state, (document * H + head) * D + channels, columns, here, E)


@triton.jit
def outputs_kernel(
    q,
    k,
    g,
    states,
    w,
    y,
    cu_seqlens,
    first_chunks,
    documents,
    scale,
    length,
    H,
    D,
    E,
    L: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    PACKED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y. A program: BE columns of one chunk of one head."""
    program = tl.program_id(0).to(tl.int64)
    parts = tl.cdiv(E, BE)
    columns = (program % parts) * BE + tl.arange(0, BE)
    head = program // parts % H
    chunk = program // parts // H
    tokens, inside = of_chunk(chunk, cu_seqlens, first_chunks, documents, length, L, PACKED)
    rows = tokens * H + head
    channels = tl.arange(0, BD)
    queries = vectors(q, rows, channels, inside, D, NORMALIZE, ACC)
    keys = vectors(k, rows, channels, inside, D, NORMALIZE, ACC)
    b, _ = decay_sums(g, rows, inside, ACC)
    state = tile(states, (chunk * H + head) * D + channels, columns, channels < D, E)
    written = tile(w, rows, columns, inside, E)
    weights = tl.dot(queries, tl.trans(keys), input_precision=PRECISION, out_dtype=ACC)
    weights = weights * decays_between(b, L, ACC)
    found = tl.dot(queries, state, input_precision=PRECISION, out_dtype=ACC) * tl.exp(b.to(ACC))[:, None]
    found += tl.dot(weights.to(written.dtype), written, input_precision=PRECISION, out_dtype=ACC)
    put(y, scale * found, rows, columns, inside, E)


@triton.jit
def writes_gradients_kernel(
    q,
    k,
    g,
    dy,
    dw,
    cu_seqlens,
    first_chunks,
    documents,
    scale,
    length,
    H,
    D,
    E,
    L: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    PACKED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dw from the outputs of the same chunk. A program: BE columns of one chunk of one head."""
    program = tl.program_id(0).to(tl.int64)
    parts = tl.cdiv(E, BE)
    columns = (program % parts) * BE + tl.arange(0, BE)
    head = program // parts % H
    chunk = program // parts // H
    tokens, inside = of_chunk(chunk, cu_seqlens, first_chunks, documents, length, L, PACKED)
    rows = tokens * H + head
    channels = tl.arange(0, BD)
    queries = vectors(q, rows, channels, inside, D, NORMALIZE, ACC)
    keys = vectors(k, rows, channels, inside, D, NORMALIZE, ACC)
    b, _ = decay_sums(g, rows, inside, ACC)
    weights = tl.dot(queries, tl.trans(keys), input_precision=PRECISION, out_dtype=ACC)
    weights = scale * weights * decays_between(b, L, ACC)
    outer = tile(dy, rows, columns, inside, E)
    found = tl.dot(tl.trans(weights.to(outer.dtype)), outer, input_precision=PRECISION, out_dtype=ACC)
    put(dw, found, rows, columns, inside, E)


@triton.jit
def states_gradients_kernel(
    q,
    k,
    g,
    beta,
    inverses,
    dy,
    dfinal,
    z,
    dstates,
    dinitial,
    cu_seqlens,
    first_chunks,
    scale,
    length,
    H,
    D,
    E,
    L: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    PACKED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of the state after each chunk, and z, which takes the place of dw. A program: BE columns
    of one document and head."""
    program = tl.program_id(0).to(tl.int64)
    parts = tl.cdiv(E, BE)
    columns = (program % parts) * BE + tl.arange(0, BE)
    head = program // parts % H
    document = program // parts // H
    start, end, chunk = of_document(document, cu_seqlens, first_chunks, length, L, PACKED)
    channels = tl.arange(0, BD)
    here = channels < D
    dstate = tl.zeros((BD, BE), ACC)
    if HAS_FINAL:
        dstate += tile(dfinal, (document * H + head) * D + channels, columns, here, E).to(ACC)
    order = tl.arange(0, L)
    chunks = tl.cdiv(end - start, L)
    for back in range(chunks):
        c = chunks - 1 - back
        tokens = start + c * L + order
        inside = tokens < end
        rows = tokens * H + head
        queries = vectors(q, rows, channels, inside, D, NORMALIZE, ACC)
        keys = vectors(k, rows, channels, inside, D, NORMALIZE, ACC)
        m = tile(inverses, rows, order, inside, L)
        outer = tile(dy, rows, columns, inside, E).to(ACC)
        dw = tile(z, rows, columns, inside, E).to(ACC)
        strength = tl.load(beta + rows, mask=inside, other=0.0).to(ACC)
        b, last = decay_sums(g, rows, inside, ACC)
        after = dstate.to(keys.dtype)
        put(dstates, after, ((chunk + c) * H + head) * D + channels, columns, here, E)
        kept = tl.dot(keys, after, input_precision=PRECISION, out_dtype=ACC)
        dw += tl.exp((last - b).to(ACC))[:, None] * kept
        solved = tl.dot(tl.trans(m), dw.to(m.dtype), input_precision=PRECISION, out_dtype=ACC)
        put(z, solved, rows, columns, inside, E)
        from_start = tl.exp(b.to(ACC))[:, None]
        read = (scale * from_start * outer).to(keys.dtype)
        recalled = (strength[:, None] * from_start * solved).to(keys.dtype)
        dstate = dstate * tl.exp(last.to(ACC))
        dstate += tl.dot(tl.trans(queries), read, input_precision=PRECISION, out_dtype=ACC)
        dstate -= tl.dot(tl.trans(keys), recalled, input_precision=PRECISION, out_dtype=ACC)
    put(dinitial, dstate, (document * H + head) * D + channels, columns, here, E)


@triton.jit
def through_unit(dy, y, x, rows, columns, inside, width, ACC: tl.constexpr):
    """Gradient of x from that of y = x / sqrt(sum x^2 + EPS)."""
    wide = tile(x, rows, columns, inside, width).to(ACC)
    rstd = 1 / tl.sqrt(tl.sum(wide * wide, 1) + EPS)
    y = wide * rstd[:, None]
    return (dy - y * tl.sum(y * dy, 1)[:, None]) * rstd[:, None]


@triton.jit
def gradients_kernel(
    q,
    k,
    v,
    g,
    beta,
    states,
    dstates,
    w,
    z,
    dy,
    dq,
    dk,
    dv,
    dg,
    dbeta,
    cu_seqlens,
    first_chunks,
    documents,
    scale,
    length,
    H,
    D,
    E,
    L: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    PACKED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Every gradient of the inputs. A program: one chunk of one head."""
    program = tl.program_id(0).to(tl.int64)
    head = program % H
    chunk = program // H
    tokens, inside = of_chunk(chunk, cu_seqlens, first_chunks, documents, length, L, PACKED)
    rows = tokens * H + head
    channels = tl.arange(0, BD)
    here = channels < D
    states_rows = (chunk * H + head) * D + channels
    strength = tl.load(beta + rows, mask=inside, other=0.0).to(ACC)
    yw = tl.zeros((L, L), ACC)  # dy[i].w[j]
    zw = tl.zeros((L, L), ACC)
    zv = tl.zeros((L,), ACC)
    ys = tl.zeros((L, BD), ACC)  # S dy[i]
    zs = tl.zeros((L, BD), ACC)
    ws = tl.zeros((L, BD), ACC)  # dS' w[i]
    passed = tl.zeros((BD,), ACC)
    for part in range(tl.cdiv(E, BE)):
        columns = part * BE + tl.arange(0, BE)
        before = tile(states, states_rows, columns, here, E)
        after = tile(dstates, states_rows, columns, here, E)
        written = tile(w, rows, columns, inside, E)
        solved = tile(z, rows, columns, inside, E)
        outer = tile(dy, rows, columns, inside, E)
        yw += tl.dot(outer, tl.trans(written), input_precision=PRECISION, out_dtype=ACC)
        zw += tl.dot(solved, tl.trans(written), input_precision=PRECISION, out_dtype=ACC)
        ys += tl.dot(outer, tl.trans(before), input_precision=PRECISION, out_dtype=ACC)
        zs += tl.dot(solved, tl.trans(before), input_precision=PRECISION, out_dtype=ACC)
        ws += tl.dot(written, tl.trans(after), input_precision=PRECISION, out_dtype=ACC)
        zv += tl.sum(solved.to(ACC) * tile(v, rows, columns, inside, E).to(ACC), 1)
        passed += tl.sum(before.to(ACC) * after.to(ACC), 1)
        put(dv, strength[:, None] * solved.to(ACC), rows, columns, inside, E)
    queries = vectors(q, rows, channels, inside, D, NORMALIZE, ACC)
    keys = vectors(k, rows, channels, inside, D, NORMALIZE, ACC)
    b, last = decay_sums(g, rows, inside, ACC)
    from_start = tl.exp(b.to(ACC))
    order = tl.arange(0, L)
    strictly = order[:, None] > order[None, :]
    # To and from the states.
    ys = scale * from_start[:, None] * ys
    zs = from_start[:, None] * zs
    ws = tl.exp((last - b).to(ACC))[:, None] * ws
    recalled = tl.sum(keys.to(ACC) * zs, 1)
    to_end = tl.sum(keys.to(ACC) * ws, 1)
    sums = tl.sum(queries.to(ACC) * ys, 1) - strength * recalled  # go to g of tokens up to i
    # Between tokens of the chunk.
    decays = decays_between(b, L, ACC)
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION, out_dtype=ACC)
    similarities = tl.dot(keys, tl.trans(keys), input_precision=PRECISION, out_dtype=ACC)
    yw = scale * decays * yw
    zw = tl.where(strictly, -decays * zw, 0.0)
    dstrength = zv - recalled + tl.sum(zw * similarities, 1)
    zw = strength[:, None] * zw
    between = tl.where(strictly, yw * scores + zw * similarities, 0.0)
    sums += tl.sum(between, 1) - tl.sum(between, 0)
    dsum = tl.cumsum(sums, 0, reverse=True) + tl.sum(tl.where(strictly, to_end[None, :], 0.0), 1)
    dsum += tl.exp(last.to(ACC)) * tl.sum(passed, 0)
    tl.store(dg + rows, dsum.to(dg.dtype.element_ty), mask=inside)
    tl.store(dbeta + rows, dstrength.to(dbeta.dtype.element_ty), mask=inside)
    scores = yw.to(keys.dtype)
    ys += tl.dot(scores, keys, input_precision=PRECISION, out_dtype=ACC)
    ws -= strength[:, None] * zs
    ws += tl.dot(tl.trans(scores), queries, input_precision=PRECISION, out_dtype=ACC)
    ws += tl.dot((zw + tl.trans(zw)).to(keys.dtype), keys, input_precision=PRECISION, out_dtype=ACC)
    if NORMALIZE:
        ys = through_unit(ys, queries, q, rows, channels, inside, D, ACC)
        ws = through_unit(ws, keys, k, rows, channels, inside, D, ACC)
    put(dq, ys, rows, channels, inside, D)
    put(dk, ws, rows, channels, inside, D)
