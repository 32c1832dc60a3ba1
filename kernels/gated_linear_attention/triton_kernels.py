"""The kernels of gated linear attention. The mathematics and the letters are at the head of chunks.py.

One program has one chunk of one head (and a block of D or E), but for `carry_kernel`, which walks along a
document. starts, counts: first token and number of tokens of each chunk, none for spare ones. Tensors are
contiguous: tokens (B*T, H, .), scores (B*T, H, L), states (K, H, D, E), through (K, H, D).

Decays per channel: the levels of pairs are whole (L, L) products on tensor cores, of which a mask keeps the
blocks of odd windows with even ones; small products of those blocks alone would leave the cores idle. The
logarithms of p and r, too, are products of g with zeros and ones, g being split into bf16 parts where the
inputs are half precision: the products are exact and the sums in fp32. Both kinds of masks come from tables,
`_tables` in triton.py, which stay in a processor's cache: worked out here, they would fill its registers.
"""

import triton
import triton.language as tl

# Added up over a chunk this is finite, and its exponential 0.
FORGETS_ALL = tl.constexpr(-1e30)


@triton.jit
def load_logs(at, mask, ACC: tl.constexpr, SPLIT: tl.constexpr):
    """g as the operands of `log_sums`: what SPLIT bf16 numbers hold of it, or (SPLIT=0) all in the first."""
    logs = tl.maximum(tl.load(at, mask=mask, other=0.0).to(ACC), FORGETS_ALL)
    high = logs
    low = logs
    if SPLIT > 0:
        high = logs.to(tl.bfloat16)
        low = (logs - high.to(ACC)).to(tl.bfloat16)
    return high, low


@triton.jit
def log_sums(takes, high, low, ACC: tl.constexpr, SPLIT: tl.constexpr):
    """Sums of the logarithms of which `takes` (L, L) has ones, for each token, (L, BD)."""
    sums = tl.dot(takes, high, input_precision="tf32x3", out_dtype=ACC)
    if SPLIT == 2:
        sums = tl.dot(takes, low, sums, input_precision="tf32x3", out_dtype=ACC)
    return sums


@triton.jit
def channel_scores_kernel(
    q,
    k,
    g,
    bonus,
    takes_table,
    meets_table,
    starts,
    counts,
    scores,
    readers,
    writers,
    through,
    scale,
    H,
    D: tl.constexpr,
    L: tl.constexpr,
    LEVELS: tl.constexpr,
    BD: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    ACC: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A, the readers scale q a(-1, i], the writers k a(j, L-1] and the decays of whole chunks."""
    pid = tl.program_id(0).to(tl.int64)
    chunk, head = pid // H, pid % H
    count = tl.load(counts + chunk)
    if count == 0:
        return
    rows = tl.arange(0, L)
    i, j = rows[:, None], rows[None, :]
    square = i * L + j
    inside = rows < count
    origin = tl.load(starts + chunk) * H + head
    line = rows * H
    dtype = q.dtype.element_ty
    a = tl.zeros((L, L), ACC)
    for d in range(0, D, BD):
        cols = d + tl.arange(0, BD)
        at = line[:, None] * D + cols[None, :]
        mask = inside[:, None] & (cols < D)[None, :]
        queries = tl.load(q + origin * D + at, mask=mask, other=0.0).to(ACC) * scale
        keys = tl.load(k + origin * D + at, mask=mask, other=0.0).to(ACC)
        high, low = load_logs(g + origin * D + at, mask, ACC, SPLIT)
        if EXCLUSIVE:
            u = tl.load(bonus + head * D + cols, mask=cols < D, other=0.0).to(ACC)
            diagonal = tl.sum(queries * keys * u[None, :], 1)
        else:
            diagonal = tl.sum(queries * keys, 1)
        a += tl.where(i == j, diagonal[:, None], 0.0)
        for level in range(LEVELS):
            # p in the rows of odd windows, r in those of even ones.
            takes = tl.load(takes_table + level * (L * L) + square)
            factor = tl.exp(log_sums(takes, high, low, ACC, SPLIT))
            far, near = (queries * factor).to(dtype), (keys * factor).to(dtype)
            pairs = tl.dot(far, tl.trans(near), input_precision=PRECISION, out_dtype=ACC)
            a += tl.where(tl.load(meets_table + level * (L * L) + square) != 0, pairs, 0.0)
        from_start = log_sums(tl.load(takes_table + LEVELS * (L * L) + square), high, low, ACC, SPLIT)
        tl.store(readers + origin * D + at, (queries * tl.exp(from_start)).to(dtype), mask=mask)
        to_end = log_sums(tl.load(takes_table + (LEVELS + 1) * (L * L) + square), high, low, ACC, SPLIT)
        tl.store(writers + origin * D + at, (keys * tl.exp(to_end)).to(dtype), mask=mask)
        whole = tl.exp(tl.sum(high.to(ACC) + low.to(ACC), 0) if SPLIT == 2 else tl.sum(high.to(ACC), 0))
        tl.store(through + pid * D + cols, whole, mask=cols < D)
    tl.store(scores + origin * L + line[:, None] * L + j, a.to(dtype), mask=inside[:, None])


@triton.jit
def head_decays(g, inside, L: tl.constexpr, ACC: tl.constexpr):
    """a(j, i] (L, L), a(-1, i] (L,), a(j, L-1] (L,) and a(-1, L-1]. Each exponent is a sum of its own
    decays: a difference of two sums would lose what is small beside them."""
    rows = tl.arange(0, L)
    i, j = rows[:, None], rows[None, :]
    logs = tl.load(g, mask=inside, other=0.0).to(ACC)
    between = tl.cumsum(tl.where(i > j, logs[:, None], 0.0), 0)
    decays = tl.exp(tl.where(i >= j, between, float("-inf")))
    from_start = tl.exp(tl.sum(tl.where(i <= j, logs[:, None], 0.0), 0))
    to_end = tl.exp(tl.sum(tl.where(i > j, logs[:, None], 0.0), 0))
    return decays, from_start, to_end, tl.exp(tl.sum(logs, 0))


@triton.jit
def head_scores_kernel(
    q,
    k,
    g,
    starts,
    counts,
    scores,
    readers,
    writers,
    through,
    scale,
    H,
    D: tl.constexpr,
    L: tl.constexpr,
    BD: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What `channel_scores_kernel` gives, of one decay per head."""
    pid = tl.program_id(0).to(tl.int64)
    chunk, head = pid // H, pid % H
    count = tl.load(counts + chunk)
    if count == 0:
        return
    rows = tl.arange(0, L)
    j = rows[None, :]
    inside = rows < count
    origin = tl.load(starts + chunk) * H + head
    line = rows * H
    dtype = q.dtype.element_ty
    decays, from_start, to_end, through_all = head_decays(g + origin + line, inside, L, ACC)
    a = tl.zeros((L, L), ACC)
    for d in range(0, D, BD):
        cols = d + tl.arange(0, BD)
        at = line[:, None] * D + cols[None, :]
        mask = inside[:, None] & (cols < D)[None, :]
        queries = tl.load(q + origin * D + at, mask=mask, other=0.0)
        keys = tl.load(k + origin * D + at, mask=mask, other=0.0)
        a = tl.dot(queries, tl.trans(keys), a, input_precision=PRECISION, out_dtype=ACC)
        reader = queries.to(ACC) * (from_start * scale)[:, None]
        writer = keys.to(ACC) * to_end[:, None]
        tl.store(readers + origin * D + at, reader.to(dtype), mask=mask)
        tl.store(writers + origin * D + at, writer.to(dtype), mask=mask)
        tl.store(through + pid * D + cols, tl.zeros((BD,), ACC) + through_all, mask=cols < D)
    a *= decays * scale
    tl.store(scores + origin * L + line[:, None] * L + j, a.to(dtype), mask=inside[:, None] & (j < L))


@triton.jit
def carry_kernel(
    left,
    right,
    through,
    entering,
    bounds,
    first_chunks,
    states,
    leaving,
    H,
    D: tl.constexpr,
    E: tl.constexpr,
    L: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    REVERSE: tl.constexpr,
    ENTERS: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """State from chunk to chunk of a document: S <- through S + left^T right. Keeps what each chunk begins
    with, seen in the direction of the walk, and what is left at the end."""
    pid = tl.program_id(0).to(tl.int64)
    blocks_d = tl.cdiv(D, BD)
    blocks_e = tl.cdiv(E, BE)
    rows_d = (pid % blocks_d).to(tl.int32) * BD + tl.arange(0, BD)
    cols_e = (pid // blocks_d % blocks_e).to(tl.int32) * BE + tl.arange(0, BE)
    head = pid // (blocks_d * blocks_e) % H
    document = pid // (blocks_d * blocks_e) // H
    block = rows_d[:, None] * E + cols_e[None, :]
    fits = (rows_d < D)[:, None] & (cols_e < E)[None, :]
    begin = tl.load(bounds + document).to(tl.int64)
    end = tl.load(bounds + document + 1).to(tl.int64)
    first = tl.load(first_chunks + document)
    state = tl.zeros((BD, BE), ACC)
    if ENTERS:
        state += tl.load(entering + (document * H + head) * (D * E) + block, mask=fits, other=0.0).to(ACC)
    number = tl.cdiv(end - begin, L)
    line = (tl.arange(0, L) * H)[:, None]
    for step in range(number):
        n = number - 1 - step if REVERSE else step
        start = begin + n * L
        origin = start * H + head
        here = (first + n) * H + head
        inside = (start + tl.arange(0, L) < end)[:, None]
        of_d, of_e = line * D + rows_d[None, :], line * E + cols_e[None, :]
        x = tl.load(left + origin * D + of_d, mask=inside & (rows_d < D)[None, :], other=0.0)
        y = tl.load(right + origin * E + of_e, mask=inside & (cols_e < E)[None, :], other=0.0)
        decay = tl.load(through + here * D + rows_d, mask=rows_d < D, other=0.0)
        tl.store(states + here * (D * E) + block, state.to(states.dtype.element_ty), mask=fits)
        state = tl.dot(tl.trans(x), y, state * decay[:, None], input_precision=PRECISION, out_dtype=ACC)
    tl.store(leaving + (document * H + head) * (D * E) + block, state, mask=fits)


@triton.jit
def outputs_kernel(
    scores,
    values,
    readers,
    states,
    starts,
    counts,
    out,
    H,
    D: tl.constexpr,
    E: tl.constexpr,
    L: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A values + readers S, y of v; with A^T the gradient of v from that of y."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(E, BE)
    cols = (pid % blocks).to(tl.int32) * BE + tl.arange(0, BE)
    here = pid // blocks
    chunk, head = here // H, here % H
    count = tl.load(counts + chunk)
    if count == 0:
        return
    rows = tl.arange(0, L)
    inside = rows < count
    origin = tl.load(starts + chunk) * H + head
    line = rows * H
    at = line[:, None] * E + cols[None, :]
    mask = inside[:, None] & (cols < E)[None, :]
    a = tl.load(scores + origin * L + line[:, None] * L + rows[None, :], mask=inside[:, None], other=0.0)
    if TRANSPOSED:
        a = tl.trans(a)
    x = tl.load(values + origin * E + at, mask=mask, other=0.0)
    y = tl.dot(a, x, input_precision=PRECISION, out_dtype=ACC)
    for d in range(0, D, BD):
        keys = d + tl.arange(0, BD)
        fits = (keys < D)[None, :]
        of_reader = line[:, None] * D + keys[None, :]
        reader = tl.load(readers + origin * D + of_reader, mask=inside[:, None] & fits, other=0.0)
        state = tl.load(
            states + here * (D * E) + (keys[:, None] * E + cols[None, :]),
            mask=(keys < D)[:, None] & (cols < E)[None, :],
            other=0.0,
        )
        y = tl.dot(reader, state, y, input_precision=PRECISION, out_dtype=ACC)
    tl.store(out + origin * E + at, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def channel_gradients_kernel(
    q,
    k,
    v,
    g,
    bonus,
    takes_table,
    meets_table,
    dy,
    states,
    dstates,
    starts,
    counts,
    dq,
    dk,
    dg,
    dbonus,
    scale,
    H,
    D: tl.constexpr,
    E: tl.constexpr,
    L: tl.constexpr,
    LEVELS: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    ACC: tl.constexpr,
    SPLIT: tl.constexpr,
    SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq, dk, dg and the chunk's share of dbonus (K, H, D). SUMS: dtype of the sums over pairs in dg."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(D, BD)
    cols = (pid % blocks).to(tl.int32) * BD + tl.arange(0, BD)
    here = pid // blocks
    chunk, head = here // H, here % H
    count = tl.load(counts + chunk)
    if count == 0:
        return
    rows = tl.arange(0, L)
    i, j = rows[:, None], rows[None, :]
    square = i * L + j
    inside = rows < count
    origin = tl.load(starts + chunk) * H + head
    line = rows * H
    dtype = q.dtype.element_ty

    da = tl.zeros((L, L), ACC)
    dstart = tl.zeros((L, BD), ACC)
    dend = tl.zeros((L, BD), ACC)
    passed = tl.zeros((BD,), ACC)
    for e in range(0, E, BE):
        ends = e + tl.arange(0, BE)
        mask = inside[:, None] & (ends < E)[None, :]
        at = line[:, None] * E + ends[None, :]
        outputs = tl.load(dy + origin * E + at, mask=mask, other=0.0)
        values = tl.load(v + origin * E + at, mask=mask, other=0.0)
        block = cols[:, None] * E + ends[None, :]
        fits = (cols < D)[:, None] & (ends < E)[None, :]
        before = tl.load(states + here * (D * E) + block, mask=fits, other=0.0)
        dafter = tl.load(dstates + here * (D * E) + block, mask=fits, other=0.0)
        da = tl.dot(outputs, tl.trans(values), da, input_precision=PRECISION, out_dtype=ACC)
        dstart = tl.dot(outputs, tl.trans(before), dstart, input_precision=PRECISION, out_dtype=ACC)
        dend = tl.dot(values, tl.trans(dafter), dend, input_precision=PRECISION, out_dtype=ACC)
        passed += tl.sum(before.to(ACC) * dafter.to(ACC), 1)

    at = line[:, None] * D + cols[None, :]
    mask = inside[:, None] & (cols < D)[None, :]
    queries = tl.load(q + origin * D + at, mask=mask, other=0.0).to(ACC) * scale
    keys = tl.load(k + origin * D + at, mask=mask, other=0.0).to(ACC)
    high, low = load_logs(g + origin * D + at, mask, ACC, SPLIT)

    # By way of the states. g[t] is part of p[i] for i >= t, of r[j] for j < t; so too at each level.
    takes = tl.load(takes_table + LEVELS * (L * L) + square)
    dqueries = dstart * tl.exp(log_sums(takes, high, low, ACC, SPLIT))
    whole = tl.exp(tl.sum(high.to(ACC) + low.to(ACC), 0) if SPLIT == 2 else tl.sum(high.to(ACC), 0))
    dlogs = tl.zeros((L, BD), ACC) + (whole * passed)[None, :]
    parts = (queries * dqueries).to(SUMS)
    dlogs = tl.dot(tl.trans(takes.to(SUMS)), parts, dlogs, input_precision=PRECISION, out_dtype=ACC)
    takes = tl.load(takes_table + (LEVELS + 1) * (L * L) + square)
    dkeys = dend * tl.exp(log_sums(takes, high, low, ACC, SPLIT))
    parts = (keys * dkeys).to(SUMS)
    dlogs = tl.dot(tl.trans(takes.to(SUMS)), parts, dlogs, input_precision=PRECISION, out_dtype=ACC)

    diagonal = tl.sum(tl.where(i == j, da, 0.0), 1)[:, None]
    if EXCLUSIVE:
        u = tl.load(bonus + head * D + cols, mask=cols < D, other=0.0).to(ACC)[None, :]
        tl.store(dbonus + here * D + cols, tl.sum(diagonal * queries * keys, 0), mask=cols < D)
        dqueries += diagonal * keys * u
        dkeys += diagonal * queries * u
    else:
        dqueries += diagonal * keys
        dkeys += diagonal * queries
    for level in range(LEVELS):
        takes = tl.load(takes_table + level * (L * L) + square)
        factor = tl.exp(log_sums(takes, high, low, ACC, SPLIT))
        far, near = (queries * factor).to(dtype), (keys * factor).to(dtype)
        pairs = tl.where(tl.load(meets_table + level * (L * L) + square) != 0, da, 0.0).to(dtype)
        # Zero but in the odd windows, and in the even ones.
        dfar = factor * tl.dot(pairs, near, input_precision=PRECISION, out_dtype=ACC)
        dnear = factor * tl.dot(tl.trans(pairs), far, input_precision=PRECISION, out_dtype=ACC)
        dqueries += dfar
        dkeys += dnear
        parts = (queries * dfar + keys * dnear).to(SUMS)
        dlogs = tl.dot(tl.trans(takes.to(SUMS)), parts, dlogs, input_precision=PRECISION, out_dtype=ACC)
    tl.store(dq + origin * D + at, (dqueries * scale).to(dq.dtype.element_ty), mask=mask)
    tl.store(dk + origin * D + at, dkeys.to(dk.dtype.element_ty), mask=mask)
    tl.store(dg + origin * D + at, dlogs.to(dg.dtype.element_ty), mask=mask)


@triton.jit
def head_gradients_kernel(
    q,
    k,
    v,
    g,
    dy,
    states,
    dstates,
    starts,
    counts,
    dq,
    dk,
    dg,
    scale,
    H,
    D: tl.constexpr,
    E: tl.constexpr,
    L: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq, dk and dg of one decay per head."""
    pid = tl.program_id(0).to(tl.int64)
    chunk, head = pid // H, pid % H
    count = tl.load(counts + chunk)
    if count == 0:
        return
    rows = tl.arange(0, L)
    i, j = rows[:, None], rows[None, :]
    inside = rows < count
    origin = tl.load(starts + chunk) * H + head
    line = rows * H
    dtype = q.dtype.element_ty
    decays, from_start, to_end, through = head_decays(g + origin + line, inside, L, ACC)

    da = tl.zeros((L, L), ACC)
    for e in range(0, E, BE):
        ends = e + tl.arange(0, BE)
        mask = inside[:, None] & (ends < E)[None, :]
        at = line[:, None] * E + ends[None, :]
        outputs = tl.load(dy + origin * E + at, mask=mask, other=0.0)
        values = tl.load(v + origin * E + at, mask=mask, other=0.0)
        da = tl.dot(outputs, tl.trans(values), da, input_precision=PRECISION, out_dtype=ACC)
    da *= decays * scale
    pairs = da.to(dtype)

    products = tl.zeros((L, L), ACC)
    reads = tl.zeros((L,), ACC)
    writes = tl.zeros((L,), ACC)
    passes = tl.zeros((BD,), ACC)
    for d in range(0, D, BD):
        cols = d + tl.arange(0, BD)
        at = line[:, None] * D + cols[None, :]
        mask = inside[:, None] & (cols < D)[None, :]
        queries = tl.load(q + origin * D + at, mask=mask, other=0.0)
        keys = tl.load(k + origin * D + at, mask=mask, other=0.0)
        products = tl.dot(queries, tl.trans(keys), products, input_precision=PRECISION, out_dtype=ACC)
        dstart = tl.zeros((L, BD), ACC)
        dend = tl.zeros((L, BD), ACC)
        for e in range(0, E, BE):
            ends = e + tl.arange(0, BE)
            of_values = line[:, None] * E + ends[None, :]
            exists = inside[:, None] & (ends < E)[None, :]
            outputs = tl.load(dy + origin * E + of_values, mask=exists, other=0.0)
            values = tl.load(v + origin * E + of_values, mask=exists, other=0.0)
            block = cols[:, None] * E + ends[None, :]
            fits = (cols < D)[:, None] & (ends < E)[None, :]
            before = tl.load(states + pid * (D * E) + block, mask=fits, other=0.0)
            dafter = tl.load(dstates + pid * (D * E) + block, mask=fits, other=0.0)
            dstart = tl.dot(outputs, tl.trans(before), dstart, input_precision=PRECISION, out_dtype=ACC)
            dend = tl.dot(values, tl.trans(dafter), dend, input_precision=PRECISION, out_dtype=ACC)
            passes += tl.sum(before.to(ACC) * dafter.to(ACC), 1)
        dstart *= (from_start * scale)[:, None]
        dend *= to_end[:, None]
        reads += tl.sum(queries.to(ACC) * dstart, 1)
        writes += tl.sum(keys.to(ACC) * dend, 1)
        dqueries = tl.dot(pairs, keys, dstart, input_precision=PRECISION, out_dtype=ACC)
        dkeys = tl.dot(tl.trans(pairs), queries, dend, input_precision=PRECISION, out_dtype=ACC)
        tl.store(dq + origin * D + at, dqueries.to(dq.dtype.element_ty), mask=mask)
        tl.store(dk + origin * D + at, dkeys.to(dk.dtype.element_ty), mask=mask)

    # g[t] is part of the pairs j < t <= i, of what i >= t read of the first state and j < t left in the last.
    dlogs = tl.sum(tl.where(j < i, tl.cumsum(da * products, 0, reverse=True), 0.0), 1)
    dlogs += tl.sum(tl.where(j >= i, reads[None, :], writes[None, :]), 1)
    dlogs += through * tl.sum(passes, 0)
    tl.store(dg + origin + line, dlogs.to(dg.dtype.element_ty), mask=inside)
