"""Triton kernels for the delta rule with a decay of each key dimension, beside those of `delta`.

A pair of tokens j < i of a chunk decays from j to the middle of the least block of 2, 4, 8 .. tokens that holds both, and from
there to i: two factors of at most 1, of which neither underflows unless their product does. So pairs are products of tiles at
each size of blocks, at any strength of the decay (as `lasp.kernels.chunk.KeyDecay` has it). `scale_keys` and `scale_queries`
make them once, with keys and queries as the states at the chunk's ends meet them. What walks along the chunks then knows no
decay but that of a whole chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lasp.kernels.triton.delta import inverse
from lasp.kernels.triton.language import LOG2E, fine_product, product, segment_of, tokens_of


@triton.jit
def _row(x, PLACE: tl.constexpr, SPAN: tl.constexpr, C: tl.constexpr, BK: tl.constexpr):
    """Of ``x: [C, BK]`` that row of each block of SPAN rows, for all rows of the block."""
    blocks: tl.constexpr = C // SPAN
    here = (tl.arange(0, SPAN) == PLACE)[None, :, None]
    one = tl.sum(tl.where(here, tl.reshape(x, (blocks, SPAN, BK)), 0.0), 1)
    return tl.reshape(one[:, None, :] + tl.zeros([blocks, SPAN, BK], dtype=tl.float32), (C, BK))


@triton.jit
def _within(rows, HALF: tl.constexpr):
    """Which rows are in the second half of their block of 2 · HALF, and which pairs are in one block."""
    second = ((rows // HALF) % 2 == 1)[:, None]
    same = (rows // (2 * HALF))[:, None] == (rows // (2 * HALF))[None, :]
    return second, same


@triton.jit
def _longer(before, after, second, HALF: tl.constexpr, C: tl.constexpr, BK: tl.constexpr):
    """Sums of log-decays from the start of a row's block to it, and from it to the end: of blocks twice as long as given."""
    first_half = _row(before, HALF - 1, 2 * HALF, C, BK)
    second_half = _row(before, 2 * HALF - 1, 2 * HALF, C, BK)
    return before + tl.where(second, first_half, 0.0), after + tl.where(second, 0.0, second_half)


@triton.jit
def _log_decays(gs, t):
    return gs.load([t, 0]).to(tl.float32) * LOG2E


@triton.jit(do_not_specialize=["T", "H", "anchors"])
def scale_keys(
    k,
    beta,
    g,
    starts,
    ends,
    W,
    M,
    whole,
    bounds,
    chunks,
    T,
    H,
    anchors,
    K: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    SIZES: tl.constexpr,
    SOLVED: tl.constexpr,
    LEVELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Keys decayed from their chunk's start and to its end, ``[B, T, H, K]``, and what chunks are solved with.

    That is the pairs of keys M and the systems' solutions W (`delta.invert`), ``[B, T, H, C]``, and the chunks' log-decays
    ``whole: [B, H, anchors, K]``, in powers of two. SIZES: of blocks, 2^SIZES = C. Grid: (B · H, segments, chunks of the
    longest).
    """
    bh = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    batch, head, start, length, first = segment_of(bounds, T, H)
    ks = tokens_of(k, first, length, H, K, C, BK)
    gs = tokens_of(g, first, length, H, K, C, BK)
    starting = tokens_of(starts, first, length, H, K, C, BK)
    ending = tokens_of(ends, first, length, H, K, C, BK)
    ws = tokens_of(W, first, length, H, C, C, C)
    ms = tokens_of(M, first, length, H, C, C, C)
    rows = tl.arange(0, C)
    t = tl.program_id(2) * C
    if t < length:
        tk = ks.load([t, 0]).to(tl.float32)
        before = _log_decays(gs, t)
        after = tl.zeros([C, BK], dtype=tl.float32)
        pairs = tl.zeros([C, C], dtype=tl.float32)
        for size in tl.static_range(SIZES):
            second, same = _within(rows, 1 << size)
            later = tl.where(second, tk * tl.exp2(before), 0.0)
            earlier = tl.where(second, 0.0, tk * tl.exp2(after))
            pairs += tl.where(same, product(later, tl.trans(earlier), PRECISION), 0.0)
            before, after = _longer(before, after, second, 1 << size, C, BK)
        b = tl.load(beta + (batch * T + start + t + rows) * H + head, mask=rows < length - t, other=0.0).to(tl.float32)
        ms.store([t, 0], pairs.to(M.dtype.element_ty))
        ws.store(
            [t, 0], (inverse(-b[:, None] * pairs, C, SOLVED, LEVELS, PRECISION) * b[None, :]).to(W.dtype.element_ty)
        )
        starting.store([t, 0], (tk * tl.exp2(before)).to(starts.dtype.element_ty))
        ending.store([t, 0], (tk * tl.exp2(after)).to(ends.dtype.element_ty))
        across = tl.arange(0, BK)
        at = whole + (bh * anchors + tl.load(chunks + segment) + tl.program_id(2)) * K + across
        tl.store(at, tl.sum(tl.where(rows[:, None] == C - 1, before, 0.0), 0), mask=across < K)


@triton.jit(do_not_specialize=["T", "H"])
def scale_queries(
    q,
    k,
    g,
    starts,
    P,
    bounds,
    T,
    H,
    K: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    SIZES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Queries decayed from their chunk's start, ``[B, T, H, K]``, and their pairs with keys ``P: [B, T, H, C]``.

    Grid: as of `scale_keys`.
    """
    _, _, _, length, first = segment_of(bounds, T, H)
    qs = tokens_of(q, first, length, H, K, C, BK)
    ks = tokens_of(k, first, length, H, K, C, BK)
    gs = tokens_of(g, first, length, H, K, C, BK)
    starting = tokens_of(starts, first, length, H, K, C, BK)
    ps = tokens_of(P, first, length, H, C, C, C)
    rows = tl.arange(0, C)
    t = tl.program_id(2) * C
    if t < length:
        tq, tk = qs.load([t, 0]).to(tl.float32), ks.load([t, 0]).to(tl.float32)
        before = _log_decays(gs, t)
        after = tl.zeros([C, BK], dtype=tl.float32)
        pairs = tl.where(rows[:, None] == rows[None, :], tl.sum(tq * tk, 1)[:, None], 0.0)
        for size in tl.static_range(SIZES):
            second, same = _within(rows, 1 << size)
            later = tl.where(second, tq * tl.exp2(before), 0.0)
            earlier = tl.where(second, 0.0, tk * tl.exp2(after))
            pairs += tl.where(same, product(later, tl.trans(earlier), PRECISION), 0.0)
            before, after = _longer(before, after, second, 1 << size, C, BK)
        ps.store([t, 0], pairs.to(P.dtype.element_ty))
        starting.store([t, 0], (tq * tl.exp2(before)).to(starts.dtype.element_ty))


@triton.jit(do_not_specialize=["T", "H", "n", "anchors"])
def read_states(
    a,
    u,
    ends,
    out,
    whole,
    S,
    bounds,
    chunks,
    T,
    H,
    n,
    anchors,
    K: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    BC: tl.constexpr,
    C: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out: [B, T, H, K]``, float32: of each token's a what the state at its chunk's start makes.

    Grid: (B · H, segments, blocks of BC rows of the state).
    """
    bh = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    block = tl.program_id(2)
    batch, head, _, length, first = segment_of(bounds, T, H)
    reading = tokens_of(a, first, length, H, V, C, BV)
    us = tokens_of(u, first, length, H, V, C, BV)
    ending = tokens_of(ends, first, length, H, K, C, BC)
    outs = tokens_of(out, first, length, H, K, C, BC)
    down, right = block * BC + tl.arange(0, BC), tl.arange(0, BV)
    at = ((batch * n + segment) * H + head) * (K * V) + down[:, None] * V + right[None, :]
    St = tl.load(S + at, mask=(down < K)[:, None] & (right < V)[None, :], other=0.0)
    decays = whole + (bh * anchors + tl.load(chunks + segment)) * K + down
    nothing = tl.zeros([BC, C], dtype=tl.float32)
    for i in tl.range(0, tl.cdiv(length, C), num_stages=STAGES):
        read = fine_product(nothing, St, tl.trans(reading.load([i * C, 0])), PRECISION)
        outs.store([i * C, block * BC], tl.trans(read))
        St *= tl.exp2(tl.load(decays + i * K, mask=down < K, other=0.0))[:, None]
        St = fine_product(St, tl.trans(ending.load([i * C, block * BC])), us.load([i * C, 0]), PRECISION)


@triton.jit(do_not_specialize=["T", "H", "n", "anchors"])
def read_gradients(
    u,
    do,
    dv,
    queries,
    keys,
    out,
    whole,
    dS,
    S,
    S_dS,
    bounds,
    chunks,
    scale,
    T,
    H,
    n,
    anchors,
    K: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    BC: tl.constexpr,
    C: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out: [B, T, H, K]``, float32: of each token's u what the gradient of the state at its chunk's end makes.

    Also the products of the states that enter segments with their gradients, ``S_dS: [B, n, H, K]``. Grid: as of `read_states`.
    """
    bh = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    block = tl.program_id(2)
    batch, head, _, length, first = segment_of(bounds, T, H)
    us = tokens_of(u, first, length, H, V, C, BV)
    dos = tokens_of(do, first, length, H, V, C, BV)
    dvs = tokens_of(dv, first, length, H, V, C, BV)
    asking = tokens_of(queries, first, length, H, K, C, BC)
    starting = tokens_of(keys, first, length, H, K, C, BC)
    outs = tokens_of(out, first, length, H, K, C, BC)
    down, right = block * BC + tl.arange(0, BC), tl.arange(0, BV)
    place = (batch * n + segment) * H + head
    at = place * (K * V) + down[:, None] * V + right[None, :]
    inside = (down < K)[:, None] & (right < V)[None, :]
    St = tl.load(dS + at, mask=inside, other=0.0)
    decays = whole + (bh * anchors + tl.load(chunks + segment)) * K + down
    nothing = tl.zeros([BC, C], dtype=tl.float32)
    count = tl.cdiv(length, C)
    for i in tl.range(0, count, num_stages=STAGES):
        chunk = count - 1 - i
        read = fine_product(nothing, St, tl.trans(us.load([chunk * C, 0])), PRECISION)
        outs.store([chunk * C, block * BC], tl.trans(read))
        St *= tl.exp2(tl.load(decays + chunk * K, mask=down < K, other=0.0))[:, None]
        asked = tl.trans(asking.load([chunk * C, block * BC])).to(tl.float32) * scale
        St = fine_product(St, asked, dos.load([chunk * C, 0]), PRECISION)
        asked = -tl.trans(starting.load([chunk * C, block * BC])).to(tl.float32)
        St = fine_product(St, asked.to(keys.dtype.element_ty), dvs.load([chunk * C, 0]), PRECISION)
    both = tl.load(S + at, mask=inside, other=0.0) * St
    tl.store(S_dS + place * K + down, tl.sum(both, 1), mask=down < K)


@triton.jit(do_not_specialize=["T", "H"])
def query_gradient(
    q,
    k,
    u,
    do,
    g,
    read,
    dq,
    change,
    bounds,
    scale,
    T,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    SIZES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq, of what `read_states` gives for do and of the chunk's pairs. Grid: as of `scale_keys`.

    Also ``change: [B, T, H, K]``, float32: q ⊙ dq without what a token gives to itself.
    """
    _, _, _, length, first = segment_of(bounds, T, H)
    qs = tokens_of(q, first, length, H, K, C, BK)
    ks = tokens_of(k, first, length, H, K, C, BK)
    gs = tokens_of(g, first, length, H, K, C, BK)
    us = tokens_of(u, first, length, H, V, C, BV)
    dos = tokens_of(do, first, length, H, V, C, BV)
    reads = tokens_of(read, first, length, H, K, C, BK)
    dqs = tokens_of(dq, first, length, H, K, C, BK)
    changes = tokens_of(change, first, length, H, K, C, BK)
    rows = tl.arange(0, C)
    t = tl.program_id(2) * C
    if t < length:
        tk = ks.load([t, 0]).to(tl.float32)
        weights = product(dos.load([t, 0]), tl.trans(us.load([t, 0])), PRECISION)
        itself = tl.sum(tl.where(rows[:, None] == rows[None, :], weights, 0.0), 1)[:, None]
        before = _log_decays(gs, t)
        after = tl.zeros([C, BK], dtype=tl.float32)
        found = tl.zeros([C, BK], dtype=tl.float32)
        nothing = tl.zeros([C, BK], dtype=tl.float32)
        for size in tl.static_range(SIZES):
            second, same = _within(rows, 1 << size)
            earlier = tl.where(second, 0.0, tk * tl.exp2(after))
            of_pairs = fine_product(nothing, tl.where(same, weights, 0.0), earlier, PRECISION)
            found += tl.where(second, of_pairs * tl.exp2(before), 0.0)
            before, after = _longer(before, after, second, 1 << size, C, BK)
        found += reads.load([t, 0]) * tl.exp2(before)
        changes.store([t, 0], qs.load([t, 0]).to(tl.float32) * found * scale)
        dqs.store([t, 0], ((found + itself * tk) * scale).to(dq.dtype.element_ty))


@triton.jit(do_not_specialize=["T", "H"])
def key_gradient(
    q,
    k,
    u,
    do,
    dv,
    g,
    starts,
    ends,
    dk,
    change,
    bounds,
    scale,
    T,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    SIZES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk, of the chunk's pairs, of what the state at its start makes of dv, ``starts``, and its gradient at the end, ``ends``.

    To ``change``, that of `query_gradient`, comes what k has of it: as a query less as a key. Grid: as of `scale_keys`.
    """
    _, _, _, length, first = segment_of(bounds, T, H)
    qs = tokens_of(q, first, length, H, K, C, BK)
    ks = tokens_of(k, first, length, H, K, C, BK)
    gs = tokens_of(g, first, length, H, K, C, BK)
    us = tokens_of(u, first, length, H, V, C, BV)
    dos = tokens_of(do, first, length, H, V, C, BV)
    dvs = tokens_of(dv, first, length, H, V, C, BV)
    starting = tokens_of(starts, first, length, H, K, C, BK)
    ending = tokens_of(ends, first, length, H, K, C, BK)
    dks = tokens_of(dk, first, length, H, K, C, BK)
    changes = tokens_of(change, first, length, H, K, C, BK)
    rows = tl.arange(0, C)
    t = tl.program_id(2) * C
    if t < length:
        tq, tk = qs.load([t, 0]).to(tl.float32) * scale, ks.load([t, 0]).to(tl.float32)
        tu, tdo, tdv = us.load([t, 0]), dos.load([t, 0]), dvs.load([t, 0])
        # Rows are the earlier tokens, and in the last the later ones: no product is turned.
        asked = product(tu, tl.trans(tdo), PRECISION)
        corrected = product(tu, tl.trans(tdv), PRECISION)
        correcting = product(tdv, tl.trans(tu), PRECISION)
        itself = tl.sum(tl.where(rows[:, None] == rows[None, :], asked, 0.0), 1)[:, None]
        before = _log_decays(gs, t)
        after = tl.zeros([C, BK], dtype=tl.float32)
        as_key, as_query, nothing = after, after, after
        for size in tl.static_range(SIZES):
            second, same = _within(rows, 1 << size)
            decayed = tl.exp2(before)
            later = fine_product(nothing, tl.where(same, asked, 0.0), tl.where(second, tq * decayed, 0.0), PRECISION)
            keys = tl.where(second, tk * decayed, 0.0)
            later = fine_product(later, tl.where(same, -corrected, 0.0), keys, PRECISION)
            earlier = tl.where(second, 0.0, tk * tl.exp2(after))
            earlier = fine_product(nothing, tl.where(same, -correcting, 0.0), earlier, PRECISION)
            as_key += tl.where(second, 0.0, later * tl.exp2(after))
            as_query += tl.where(second, earlier * decayed, 0.0)
            before, after = _longer(before, after, second, 1 << size, C, BK)
        as_key += ending.load([t, 0]) * tl.exp2(after)
        as_query -= starting.load([t, 0]) * tl.exp2(before)
        changes.store([t, 0], changes.load([t, 0]) + tk * (as_query - as_key))
        dks.store([t, 0], (as_key + as_query + itself * tq).to(dk.dtype.element_ty))


@triton.jit(do_not_specialize=["T", "H", "n"])
def gate_gradient(change, S_dS, dg, bounds, T, H, n, K: tl.constexpr, C: tl.constexpr, BC: tl.constexpr):
    """``dg: [B, T, H, K]``: at a segment's start the state's product with its gradient, then less each token's change.

    Grid: (B · H, segments, blocks of BC key dimensions).
    """
    segment = tl.program_id(1)
    batch, head, start, length, _ = segment_of(bounds, T, H)
    across = tl.program_id(2) * BC + tl.arange(0, BC)
    rows = tl.arange(0, C)
    known = tl.load(S_dS + ((batch * n + segment) * H + head) * K + across, mask=across < K, other=0.0)
    at = ((batch * T + start + rows[:, None]) * H + head) * K + across[None, :]
    for t in range(0, length, C):
        mask = (rows[:, None] < length - t) & (across < K)[None, :]
        here = at + t * H.to(tl.int64) * K
        # That of the token before: a sum from which its own is taken would keep the digits of what it does.
        before = tl.load(change + here - H.to(tl.int64) * K, mask=mask & (rows[:, None] + t > 0), other=0.0)
        found = known[None, :] - tl.cumsum(before, 0)
        tl.store(dg + here, found.to(dg.dtype.element_ty), mask=mask)
        known -= tl.sum(before, 0)
