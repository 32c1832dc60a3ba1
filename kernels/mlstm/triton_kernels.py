"""mLSTM's Triton kernels. The equations are at the head of chunks.py; here the normaliser is a vector n (D,)
beside the memory C (D, E), not one more column of it.

L tokens of a chunk, H heads, D channels of queries and keys (BD: a power of two from D on), E channels of
values, worked on BE at a time. How tokens and chunks are numbered: see gated_delta_rule/triton_kernels.py.

Forward: memories chunk by chunk; outputs. Backward, after the first again: the normaliser's gradient;
gradients of memories, chunk by chunk from the end; all other gradients. What weighs a log forget gate at t is
what passes from tokens before t to t and later, summed as such: no large terms cancel. No atomics.
"""

import triton
import triton.language as tl

from triptych.kernels.gated_delta_rule.triton_kernels import of_chunk, of_document, put, tile

NOTHING = tl.constexpr(-1e30)


@triton.jit
def gates(igate, fgate, rows, inside):
    """Of a chunk in fp64: a and b of each token, and b of the last."""
    f = tl.load(fgate + rows, mask=inside, other=0.0).to(tl.float64)
    log_f = tl.where(inside, tl.minimum(f, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(f))), 0.0)
    b = tl.cumsum(log_f, 0)
    log_i = tl.load(igate + rows, mask=inside, other=float("-inf")).to(tl.float64)
    return log_i - b, b, tl.sum(log_f, 0)


@triton.jit
def onwards(m, a, last, ACC: tl.constexpr):
    """m behind the chunk; how much is kept of the memory before it, and what each token adds, as factors."""
    # Rounded first, so that memory and m fit together exactly.
    after = tl.maximum(last + tl.maximum(tl.max(a, 0), m.to(tl.float64)), NOTHING).to(ACC)
    keep = tl.exp((last + m.to(tl.float64) - after.to(tl.float64)).to(ACC))
    entering = tl.exp((last + a - after.to(tl.float64)).to(ACC))
    return after, keep, entering


@triton.jit
def inwards(m, a, L: tl.constexpr, ACC: tl.constexpr):
    """top of each token; exp(a[j] - top[i]) where i sees j, else 0; exp(m - top)."""
    order = tl.arange(0, L)
    seen = tl.where(order[:, None] >= order[None, :], a[None, :], float("-inf"))
    top = tl.maximum(tl.max(seen, 1), m.to(tl.float64))
    return top, tl.exp((seen - top[:, None]).to(ACC)), tl.exp((m.to(tl.float64) - top).to(ACC))


@triton.jit
def memories_kernel(
    k,
    v,
    igate,
    fgate,
    initial,
    initial_m,
    memories,
    normalisers,
    ms,
    final,
    final_m,
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
    HAS_INITIAL: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """C, n and m before each chunk. A program: BE columns of one document and head; the first also n and
    m."""
    program = tl.program_id(0).to(tl.int64)
    parts = tl.cdiv(E, BE)
    part = program % parts
    columns = part * BE + tl.arange(0, BE)
    head = program // parts % H
    document = program // parts // H
    start, end, chunk = of_document(document, cu_seqlens, first_chunks, length, L, PACKED)
    channels = tl.arange(0, BD)
    here = channels < D
    inside_e = columns < E
    memory = tl.zeros((BD, BE), ACC)
    n = tl.zeros((BD,), ACC)
    m = tl.full((), NOTHING, ACC)
    # Rows of a given or final memory have E + 1 numbers, n last.
    state_rows = ((document * H + head) * D + channels) * (E + 1)
    state_at = state_rows[:, None] + columns[None, :]
    state_here = here[:, None] & inside_e[None, :]
    if HAS_INITIAL:
        memory += tl.load(initial + state_at, mask=state_here, other=0.0).to(ACC)
        n += tl.load(initial + state_rows + E, mask=here, other=0.0).to(ACC)
        m = tl.load(initial_m + document * H + head).to(ACC)
    order = tl.arange(0, L)
    for c in range(tl.cdiv(end - start, L)):
        tokens = start + c * L + order
        inside = tokens < end
        rows = tokens * H + head
        keys = tile(k, rows, channels, inside, D)
        values = tile(v, rows, columns, inside, E)
        a, _, last = gates(igate, fgate, rows, inside)
        at = (chunk + c) * H + head
        put(memories, memory, at * D + channels, columns, here, E)
        tl.store(normalisers + at * D + channels, n, mask=here & (part == 0))
        tl.store(ms + at, m, mask=part == 0)
        m, keep, entering = onwards(m, a, last, ACC)
        weighed = keys.to(ACC) * entering[:, None]
        n = keep * n + tl.sum(weighed, 0)
        added = tl.dot(tl.trans(weighed.to(keys.dtype)), values, input_precision=PRECISION, out_dtype=ACC)
        memory = keep * memory + added
    if HAS_FINAL:
        tl.store(final + state_at, memory, mask=state_here)
        tl.store(final + state_rows + E, n, mask=here & (part == 0))
        tl.store(final_m + document * H + head, m, mask=part == 0)


@triton.jit
def outputs_kernel(
    q,
    k,
    v,
    igate,
    fgate,
    memories,
    normalisers,
    ms,
    y,
    denominators,
    signs,
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
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
):
    """y; what it was divided by, and how that moves with n (-1, 0 or 1). A program: BE columns of one
    chunk."""
    program = tl.program_id(0).to(tl.int64)
    parts = tl.cdiv(E, BE)
    part = program % parts
    columns = part * BE + tl.arange(0, BE)
    head = program // parts % H
    chunk = program // parts // H
    tokens, inside = of_chunk(chunk, cu_seqlens, first_chunks, documents, length, L, PACKED)
    rows = tokens * H + head
    channels = tl.arange(0, BD)
    here = channels < D
    queries = tile(q, rows, channels, inside, D)
    keys = tile(k, rows, channels, inside, D)
    values = tile(v, rows, columns, inside, E)
    at = chunk * H + head
    memory = tile(memories, at * D + channels, columns, here, E)
    n = tl.load(normalisers + at * D + channels, mask=here, other=0.0)
    a, b, _ = gates(igate, fgate, rows, inside)
    top, weights, carried = inwards(tl.load(ms + at), a, L, ACC)
    scores = scale * weights * tl.dot(queries, tl.trans(keys), input_precision=PRECISION, out_dtype=ACC)
    carried = scale * carried
    normaliser = tl.sum(scores, 1) + carried * tl.sum(queries.to(ACC) * n[None, :], 1)
    one = tl.minimum(tl.maximum(tl.exp((-(b + top)).to(ACC)), LOW), HIGH)
    denominator = tl.maximum(tl.abs(normaliser), one)
    found = carried[:, None] * tl.dot(queries, memory, input_precision=PRECISION, out_dtype=ACC)
    found += tl.dot(scores.to(values.dtype), values, input_precision=PRECISION, out_dtype=ACC)
    put(y, found / denominator[:, None], rows, columns, inside, E)
    sign = tl.where(normaliser > 0, 1, tl.where(normaliser < 0, -1, 0))
    sign = tl.where(tl.abs(normaliser) >= one, sign, 0)
    tl.store(denominators + rows, denominator, mask=inside & (part == 0))
    tl.store(signs + rows, sign.to(signs.dtype.element_ty), mask=inside & (part == 0))


@triton.jit
def normalisers_gradients_kernel(
    dy,
    y,
    denominators,
    signs,
    dnormalisers,
    tokens,
    E,
    ROWS: tl.constexpr,
    BE: tl.constexpr,
    ACC: tl.constexpr,
):
    """Of y = u / max(|n|, 1), by n. A program: ROWS tokens and heads."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < tokens
    total = tl.zeros((ROWS,), ACC)
    for part in range(tl.cdiv(E, BE)):
        columns = part * BE + tl.arange(0, BE)
        outer = tile(dy, rows, columns, inside, E).to(ACC)
        total += tl.sum(outer * tile(y, rows, columns, inside, E).to(ACC), 1)
    denominator = tl.load(denominators + rows, mask=inside, other=1.0)
    sign = tl.load(signs + rows, mask=inside, other=0.0).to(ACC)
    tl.store(dnormalisers + rows, -sign * total / denominator, mask=inside)


@triton.jit
def memories_gradients_kernel(
    q,
    igate,
    fgate,
    ms,
    dy,
    denominators,
    dsums,
    dfinal,
    dmemories,
    dnormalisers,
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
    HAS_FINAL: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of C and n after each chunk, n's by the first program. A program: BE columns of one document
    and head."""
    program = tl.program_id(0).to(tl.int64)
    parts = tl.cdiv(E, BE)
    part = program % parts
    columns = part * BE + tl.arange(0, BE)
    head = program // parts % H
    document = program // parts // H
    start, end, chunk = of_document(document, cu_seqlens, first_chunks, length, L, PACKED)
    channels = tl.arange(0, BD)
    here = channels < D
    dmemory = tl.zeros((BD, BE), ACC)
    dn = tl.zeros((BD,), ACC)
    state_rows = ((document * H + head) * D + channels) * (E + 1)
    state_at = state_rows[:, None] + columns[None, :]
    state_here = here[:, None] & (columns < E)[None, :]
    if HAS_FINAL:
        dmemory += tl.load(dfinal + state_at, mask=state_here, other=0.0).to(ACC)
        dn += tl.load(dfinal + state_rows + E, mask=here, other=0.0).to(ACC)
    order = tl.arange(0, L)
    chunks = tl.cdiv(end - start, L)
    for back in range(chunks):
        c = chunks - 1 - back
        tokens = start + c * L + order
        inside = tokens < end
        rows = tokens * H + head
        queries = tile(q, rows, channels, inside, D)
        outer = tile(dy, rows, columns, inside, E).to(ACC)
        denominator = tl.load(denominators + rows, mask=inside, other=1.0)
        dsum = tl.load(dsums + rows, mask=inside, other=0.0)
        a, _, last = gates(igate, fgate, rows, inside)
        at = (chunk + c) * H + head
        put(dmemories, dmemory, at * D + channels, columns, here, E)
        tl.store(dnormalisers + at * D + channels, dn, mask=here & (part == 0))
        m = tl.load(ms + at)
        _, keep, _ = onwards(m, a, last, ACC)
        _, _, carried = inwards(m, a, L, ACC)
        carried = scale * carried
        dn = keep * dn + tl.sum(queries.to(ACC) * (carried * dsum)[:, None], 0)
        read = (outer * (carried / denominator)[:, None]).to(queries.dtype)
        dmemory = keep * dmemory
        dmemory += tl.dot(tl.trans(queries), read, input_precision=PRECISION, out_dtype=ACC)
    tl.store(dinitial + state_at, dmemory, mask=state_here)
    tl.store(dinitial + state_rows + E, dn, mask=here & (part == 0))


@triton.jit
def gradients_kernel(
    q,
    k,
    v,
    igate,
    fgate,
    memories,
    normalisers,
    ms,
    dy,
    denominators,
    dsums,
    dmemories,
    dnormalisers,
    dq,
    dk,
    dv,
    digate,
    dfgate,
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
    at = chunk * H + head
    queries = tile(q, rows, channels, inside, D)
    keys = tile(k, rows, channels, inside, D)
    a, _, last = gates(igate, fgate, rows, inside)
    m = tl.load(ms + at)
    _, keep, entering = onwards(m, a, last, ACC)
    _, weights, carried = inwards(m, a, L, ACC)
    weights = scale * weights
    carried = scale * carried
    inverse = 1 / tl.load(denominators + rows, mask=inside, other=1.0)
    dsum = tl.load(dsums + rows, mask=inside, other=0.0)
    products = tl.dot(queries, tl.trans(keys), input_precision=PRECISION, out_dtype=ACC)
    scores = (weights * products * inverse[:, None]).to(keys.dtype)
    dproducts = tl.zeros((L, L), ACC)  # first dy[i].v[j]
    ys = tl.zeros((L, BD), ACC)  # C dy[i]
    vs = tl.zeros((L, BD), ACC)  # dC' v[j]
    passed = tl.zeros((BD,), ACC)
    for part in range(tl.cdiv(E, BE)):
        columns = part * BE + tl.arange(0, BE)
        before = tile(memories, at * D + channels, columns, here, E)
        after = tile(dmemories, at * D + channels, columns, here, E)
        outer = tile(dy, rows, columns, inside, E)
        values = tile(v, rows, columns, inside, E)
        dproducts += tl.dot(outer, tl.trans(values), input_precision=PRECISION, out_dtype=ACC)
        ys += tl.dot(outer, tl.trans(before), input_precision=PRECISION, out_dtype=ACC)
        vs += tl.dot(values, tl.trans(after), input_precision=PRECISION, out_dtype=ACC)
        passed += tl.sum(before.to(ACC) * after.to(ACC), 1)
        dvalues = entering[:, None] * tl.dot(keys, after, input_precision=PRECISION, out_dtype=ACC)
        dvalues += tl.dot(tl.trans(scores), outer, input_precision=PRECISION, out_dtype=ACC)
        put(dv, dvalues, rows, columns, inside, E)
    n = tl.load(normalisers + at * D + channels, mask=here, other=0.0)
    dn = tl.load(dnormalisers + at * D + channels, mask=here, other=0.0)
    # To and from the memories.
    ys = carried[:, None] * (inverse[:, None] * ys + dsum[:, None] * n[None, :])
    vs = entering[:, None] * (vs + dn[None, :])
    from_before = tl.sum(queries.to(ACC) * ys, 1)
    to_end = tl.sum(keys.to(ACC) * vs, 1)
    # Between tokens of the chunk.
    dproducts = weights * (inverse[:, None] * dproducts + dsum[:, None])
    between = dproducts * products
    dlog_i = to_end + tl.sum(between, 0)
    order = tl.arange(0, L)
    strictly = order[:, None] > order[None, :]
    between = tl.where(strictly, between, 0.0)
    sums = from_before + tl.sum(between, 1) - tl.sum(between, 0)
    dlog_f = tl.cumsum(sums, 0, reverse=True) + tl.sum(tl.where(strictly, to_end[None, :], 0.0), 1)
    dlog_f += keep * tl.sum(passed + n * dn, 0)
    f = tl.load(fgate + rows, mask=inside, other=0.0).to(ACC)
    small = tl.exp(-tl.abs(f))
    dlog_f *= tl.where(f > 0, small, 1.0) / (1 + small)
    tl.store(digate + rows, dlog_i.to(digate.dtype.element_ty), mask=inside)
    tl.store(dfgate + rows, dlog_f.to(dfgate.dtype.element_ty), mask=inside)
    rounded = dproducts.to(keys.dtype)
    ys += tl.dot(rounded, keys, input_precision=PRECISION, out_dtype=ACC)
    vs += tl.dot(tl.trans(rounded), queries, input_precision=PRECISION, out_dtype=ACC)
    put(dq, ys, rows, channels, inside, D)
    put(dk, vs, rows, channels, inside, D)
