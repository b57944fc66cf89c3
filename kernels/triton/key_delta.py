"""Triton kernels for the delta rule with a decay of each key dimension, beside those of `delta`.

A pair of tokens j < i of a chunk decays from j to the middle of a block of 2, 4, 8 .. tokens that holds both, and from there to
i. In the least such block, which the highest bit says in which their places differ, both factors are at most 1, and neither
underflows unless their product does: pairs are products of tiles at each size of blocks, at any strength of the decay (as
`lasp.kernels.chunk.KeyDecay` has it). Where no half of a larger block decays beyond what float32 holds, one product serves it
with all that are in it. How large such blocks are, a chunk's *reach*, `cumulate_keys` finds out; mostly it is the chunk.

`scale_keys` and `scale_queries` make the pairs once, with keys and queries as the states at the chunk's ends meet them. What
walks along the chunks then knows no decay but that of a whole chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lasp.kernels.triton.delta import chunk_sum, inverse
from lasp.kernels.triton.language import LOG2E, fine_product, load_rows, product, segment_of, store_rows, tokens_of

#: The least log-decay of one token, in powers of two: sums of it are subtracted.
LEAST: tl.constexpr = tl.constexpr(-40.0)
#: By how many powers of two half a block may decay whose pairs one product makes.
FARTHEST: tl.constexpr = tl.constexpr(100.0)


@triton.jit(do_not_specialize=["T", "H"])
def cumulate_keys(g, G, reaches, bounds, T, H, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, SIZES: tl.constexpr):
    """``G: [B, T, H, K]``: sums of g from a chunk's start to each of its tokens, in powers of two, in G's dtype.

    Differences of them must have the digits of the result: they are float64 where that is float32. Also the chunks' reaches,
    as exponents of two, at their first tokens' places in ``reaches: [B, T, H]``, int32. SIZES: of blocks, 2^SIZES = C.
    Grid: (B · H, segments, chunks of the longest).
    """
    _, _, _, length, first = segment_of(bounds, T, H)
    rows, columns = tl.arange(0, C), tl.arange(0, BK)
    t = tl.program_id(2) * C
    if t < length:
        row, left = first + t * H.to(tl.int64), length - t
        own = tl.maximum(load_rows(g, row, left, rows, columns, H, K).to(tl.float32) * LOG2E, LEAST)
        store_rows(G, tl.cumsum(own.to(G.dtype.element_ty), 0), row, left, rows, columns, H, K)
        reach = 1
        halves = tl.max(tl.abs(own), 1)
        for size in tl.static_range(1, SIZES):
            halves = tl.sum(tl.reshape(halves, (C >> size, 2)), 1)
            reach = tl.where((tl.max(halves) <= FARTHEST) & (reach == size), size + 1, reach)
        tl.store(reaches + row, reach)


@triton.jit
def _sums(G, row, left, rows, columns, H, K: tl.constexpr):
    """The sums at those tokens of a chunk (`load_rows`); past the segment's end, at its last."""
    at = G + row * K + tl.minimum(rows, left - 1)[:, None] * (H * K) + columns[None, :]
    return tl.load(at, mask=(columns < K)[None, :], other=0.0)


@triton.jit
def _to_end(sums, G, row, left, columns, H, K: tl.constexpr, C: tl.constexpr):
    """How much goes from each token to the chunk's end."""
    last = _sums(G, row, left, tl.full([1], C - 1, tl.int32), columns, H, K)
    return tl.exp2((last - sums).to(tl.float32))


@triton.jit
def _through_middle(sums, G, row, left, rows, columns, H, size, K: tl.constexpr):
    """How much goes from the middle of its block of 2^(size + 1) to each token, and how much from it to there.

    What is above `FARTHEST` is of tokens that do not meet at that size, and only finite.
    """
    middle = _sums(G, row, left, (((rows >> size) | 1) << size) - 1, columns, H, K)
    onwards = (sums - middle).to(tl.float32)
    return tl.exp2(tl.minimum(onwards, FARTHEST)), tl.exp2(tl.minimum(-onwards, FARTHEST))


@triton.jit
def _meeting(rows, size, least):
    """Which pairs of tokens are in one block of 2^(size + 1), and but for the least blocks not in one half of it."""
    apart = (rows[:, None] ^ rows[None, :]) >> size
    return (apart == 1) | ((apart == 0) & (size == least))


@triton.jit
def _add_pairs(
    pairs, x, k, sums, G, reach, row, left, rows, columns, H,
    K: tl.constexpr, C: tl.constexpr, SIZES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to ``pairs: [C, C]`` what x, the later tokens, have of k, the earlier ones, decayed between them: these columns."""
    nothing = tl.zeros([C, C], dtype=tl.float32)
    for size in tl.range(reach - 1, SIZES, num_stages=1):
        later, earlier = _through_middle(sums, G, row, left, rows, columns, H, size, K)
        here = fine_product(nothing, x * later, tl.trans(k * earlier), PRECISION)
        pairs += tl.where(_meeting(rows, size, reach - 1), here, 0.0)
    return pairs


@triton.jit(do_not_specialize=["T", "H"])
def scale_keys(
    k,
    beta,
    G,
    reaches,
    starts,
    ends,
    W,
    M,
    bounds,
    T,
    H,
    K: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    SIZES: tl.constexpr,
    SOLVED: tl.constexpr,
    LEVELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Keys decayed from their chunk's start and to its end, ``[B, T, H, K]``, and what chunks are solved with.

    That is the pairs of keys M and the systems' solutions W (`delta.invert`), ``[B, T, H, C]``.
    BK: how many key dimensions are taken at once. Grid: as of `cumulate_keys`.
    """
    batch, head, start, length, first = segment_of(bounds, T, H)
    rows = tl.arange(0, C)
    t = tl.program_id(2) * C
    if t < length:
        row, left = first + t * H.to(tl.int64), length - t
        reach = tl.load(reaches + row)
        pairs = tl.zeros([C, C], dtype=tl.float32)
        for block in tl.range(0, K, BK, num_stages=1):
            columns = block + tl.arange(0, BK)
            tk = load_rows(k, row, left, rows, columns, H, K).to(tl.float32)
            sums = _sums(G, row, left, rows, columns, H, K)
            pairs = _add_pairs(pairs, tk, tk, sums, G, reach, row, left, rows, columns, H, K, C, SIZES, PRECISION)
            store_rows(starts, tk * tl.exp2(sums.to(tl.float32)), row, left, rows, columns, H, K)
            store_rows(ends, tk * _to_end(sums, G, row, left, columns, H, K, C), row, left, rows, columns, H, K)
        pairs = tl.where(rows[:, None] > rows[None, :], pairs, 0.0)
        b = tl.load(beta + (batch * T + start + t + rows) * H + head, mask=rows < length - t, other=0.0).to(tl.float32)
        store_rows(M, pairs, row, left, rows, rows, H, C)
        solved = inverse(-b[:, None] * pairs, C, SOLVED, LEVELS, PRECISION) * b[None, :]
        store_rows(W, solved, row, left, rows, rows, H, C)


@triton.jit(do_not_specialize=["T", "H"])
def scale_queries(
    q,
    k,
    G,
    reaches,
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

    Grid: as of `cumulate_keys`.
    """
    _, _, _, length, first = segment_of(bounds, T, H)
    rows = tl.arange(0, C)
    t = tl.program_id(2) * C
    if t < length:
        row, left = first + t * H.to(tl.int64), length - t
        reach = tl.load(reaches + row)
        pairs = tl.zeros([C, C], dtype=tl.float32)
        for block in tl.range(0, K, BK, num_stages=1):
            columns = block + tl.arange(0, BK)
            tq, tk = load_rows(q, row, left, rows, columns, H, K), load_rows(k, row, left, rows, columns, H, K)
            tq, tk = tq.to(tl.float32), tk.to(tl.float32)
            sums = _sums(G, row, left, rows, columns, H, K)
            pairs = _add_pairs(pairs, tq, tk, sums, G, reach, row, left, rows, columns, H, K, C, SIZES, PRECISION)
            store_rows(starts, tq * tl.exp2(sums.to(tl.float32)), row, left, rows, columns, H, K)
        store_rows(P, tl.where(rows[:, None] >= rows[None, :], pairs, 0.0), row, left, rows, rows, H, C)


@triton.jit(do_not_specialize=["T", "H", "n"])
def read_states(
    a,
    u,
    k,
    out,
    G,
    S,
    bounds,
    T,
    H,
    n,
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
    segment = tl.program_id(1)
    block = tl.program_id(2)
    batch, head, _, length, first = segment_of(bounds, T, H)
    reading = tokens_of(a, first, length, H, V, C, BV)
    us = tokens_of(u, first, length, H, V, C, BV)
    ks = tokens_of(k, first, length, H, K, C, BC)
    gs = tokens_of(G, first, length, H, K, C, BC)
    outs = tokens_of(out, first, length, H, K, C, BC)
    down, right = block * BC + tl.arange(0, BC), tl.arange(0, BV)
    at = ((batch * n + segment) * H + head) * (K * V) + down[:, None] * V + right[None, :]
    St = tl.load(S + at, mask=(down < K)[:, None] & (right < V)[None, :], other=0.0)
    nothing = tl.zeros([BC, C], dtype=tl.float32)
    for i in tl.range(0, tl.cdiv(length, C), num_stages=STAGES):
        read = fine_product(nothing, St, tl.trans(reading.load([i * C, 0])), PRECISION)
        outs.store([i * C, block * BC], tl.trans(read))
        whole = chunk_sum(G, first, i * C, down, length, H, K, C)[:, None]
        keys = tl.trans(ks.load([i * C, block * BC])).to(tl.float32)
        # Not as rounded by `scale_keys`: what a gate's gradient is the small difference of would not meet.
        keys *= tl.exp2((whole - tl.trans(gs.load([i * C, block * BC]))).to(tl.float32))
        St = fine_product(St * tl.exp2(whole.to(tl.float32)), keys, us.load([i * C, 0]), PRECISION)


@triton.jit(do_not_specialize=["T", "H", "n"])
def read_gradients(
    u,
    do,
    dv,
    q,
    k,
    out,
    G,
    dS,
    S,
    S_dS,
    bounds,
    scale,
    T,
    H,
    n,
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
    segment = tl.program_id(1)
    block = tl.program_id(2)
    batch, head, _, length, first = segment_of(bounds, T, H)
    us = tokens_of(u, first, length, H, V, C, BV)
    dos = tokens_of(do, first, length, H, V, C, BV)
    dvs = tokens_of(dv, first, length, H, V, C, BV)
    qs = tokens_of(q, first, length, H, K, C, BC)
    ks = tokens_of(k, first, length, H, K, C, BC)
    gs = tokens_of(G, first, length, H, K, C, BC)
    outs = tokens_of(out, first, length, H, K, C, BC)
    down, right = block * BC + tl.arange(0, BC), tl.arange(0, BV)
    place = (batch * n + segment) * H + head
    at = place * (K * V) + down[:, None] * V + right[None, :]
    inside = (down < K)[:, None] & (right < V)[None, :]
    St = tl.load(dS + at, mask=inside, other=0.0)
    nothing = tl.zeros([BC, C], dtype=tl.float32)
    count = tl.cdiv(length, C)
    for i in tl.range(0, count, num_stages=STAGES):
        chunk = count - 1 - i
        read = fine_product(nothing, St, tl.trans(us.load([chunk * C, 0])), PRECISION)
        outs.store([chunk * C, block * BC], tl.trans(read))
        St *= tl.exp2(chunk_sum(G, first, chunk * C, down, length, H, K, C).to(tl.float32))[:, None]
        entering = tl.exp2(tl.trans(gs.load([chunk * C, block * BC])).to(tl.float32))
        asked = tl.trans(qs.load([chunk * C, block * BC])).to(tl.float32) * entering * scale
        St = fine_product(St, asked, dos.load([chunk * C, 0]), PRECISION)
        corrected = tl.trans(ks.load([chunk * C, block * BC])).to(tl.float32) * -entering
        St = fine_product(St, corrected, dvs.load([chunk * C, 0]), PRECISION)
    both = tl.load(S + at, mask=inside, other=0.0) * St
    tl.store(S_dS + place * K + down, tl.sum(both, 1), mask=down < K)


@triton.jit
def _diagonal(pairs, rows):
    """What each token has with itself, as a column."""
    return tl.sum(tl.where(rows[:, None] == rows[None, :], pairs, 0.0), 1)[:, None]


@triton.jit
def _of_pairs(
    weights, x, sums, G, reach, row, left, rows, columns, H,
    K: tl.constexpr, BC: tl.constexpr, C: tl.constexpr, SIZES: tl.constexpr, TO_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums of what each token meets of x, decayed between the two.

    Rows of weights are the later tokens, TO_KEYS the earlier ones; pairs in the other order are left out.
    """
    found = tl.zeros([C, BC], dtype=tl.float32)
    nothing = tl.zeros([C, BC], dtype=tl.float32)
    for size in tl.range(reach - 1, SIZES, num_stages=1):
        later, earlier = _through_middle(sums, G, row, left, rows, columns, H, size, K)
        meeting = _meeting(rows, size, reach - 1)
        if TO_KEYS:
            here = tl.where(meeting & (rows[:, None] < rows[None, :]), weights, 0.0)
            found += fine_product(nothing, here, x * later, PRECISION) * earlier
        else:
            here = tl.where(meeting & (rows[:, None] > rows[None, :]), weights, 0.0)
            found += fine_product(nothing, here, x * earlier, PRECISION) * later
    return found


@triton.jit(do_not_specialize=["T", "H"])
def query_gradient(
    x,
    k,
    u,
    a,
    G,
    reaches,
    read,
    dx,
    change,
    bounds,
    scale,
    T,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    BC: tl.constexpr,
    C: tl.constexpr,
    SIZES: tl.constexpr,
    AS_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of x as a query whose output has the gradient a: of what `read_states` gives, and of the chunk's pairs.

    Also ``change: [B, T, H, K]``, float32: x ⊙ dx without what a token gives to itself. AS_KEYS: x are the keys, to which they
    themselves give nothing, and this is added to the change that there is. dx may be the memory of what was read.
    Grid: (B · H, segments, chunks of the longest, for each of which the blocks of BC columns).
    """
    _, _, _, length, first = segment_of(bounds, T, H)
    blocks: tl.constexpr = (K + BC - 1) // BC
    block = tl.program_id(2) % blocks * BC
    rows, columns, across = tl.arange(0, C), block + tl.arange(0, BC), tl.arange(0, BV)
    t = tl.program_id(2) // blocks * C
    if t < length:
        row, left = first + t * H.to(tl.int64), length - t
        reach = tl.load(reaches + row)
        weights = product(
            load_rows(a, row, left, rows, across, H, V),
            tl.trans(load_rows(u, row, left, rows, across, H, V)),
            PRECISION,
        )
        tk = load_rows(k, row, left, rows, columns, H, K).to(tl.float32)
        sums = _sums(G, row, left, rows, columns, H, K)
        found = _of_pairs(weights, tk, sums, G, reach, row, left, rows, columns, H, K, BC, C, SIZES, False, PRECISION)
        found += load_rows(read, row, left, rows, columns, H, K) * tl.exp2(sums.to(tl.float32))
        tx = load_rows(x, row, left, rows, columns, H, K).to(tl.float32)
        change_here = tx * found * scale
        if AS_KEYS:
            change_here += load_rows(change, row, left, rows, columns, H, K)
        else:
            found += _diagonal(weights, rows) * tk
        store_rows(change, change_here, row, left, rows, columns, H, K)
        store_rows(dx, found * scale, row, left, rows, columns, H, K)


@triton.jit(do_not_specialize=["T", "H"])
def key_gradient(
    q,
    k,
    u,
    do,
    dv,
    G,
    reaches,
    as_query,
    read,
    dk,
    change,
    bounds,
    scale,
    T,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    BC: tl.constexpr,
    C: tl.constexpr,
    SIZES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk: what keys have as queries, and as keys of what `read_gradients` gives and of the chunk's pairs.

    From ``change`` is taken what they have of it as keys. Grid: as of `query_gradient`.
    """
    _, _, _, length, first = segment_of(bounds, T, H)
    blocks: tl.constexpr = (K + BC - 1) // BC
    block = tl.program_id(2) % blocks * BC
    rows, columns, across = tl.arange(0, C), block + tl.arange(0, BC), tl.arange(0, BV)
    t = tl.program_id(2) // blocks * C
    if t < length:
        row, left = first + t * H.to(tl.int64), length - t
        reach = tl.load(reaches + row)
        tk = load_rows(k, row, left, rows, columns, H, K).to(tl.float32)
        sums = _sums(G, row, left, rows, columns, H, K)
        # Rows are the earlier tokens: no product is turned.
        tu = load_rows(u, row, left, rows, across, H, V)
        weights = product(tu, tl.trans(load_rows(dv, row, left, rows, across, H, V)), PRECISION)
        found = -_of_pairs(weights, tk, sums, G, reach, row, left, rows, columns, H, K, BC, C, SIZES, True, PRECISION)
        weights = product(tu, tl.trans(load_rows(do, row, left, rows, across, H, V)), PRECISION) * scale
        tq = load_rows(q, row, left, rows, columns, H, K).to(tl.float32)
        found += _of_pairs(weights, tq, sums, G, reach, row, left, rows, columns, H, K, BC, C, SIZES, True, PRECISION)
        found += load_rows(read, row, left, rows, columns, H, K) * _to_end(sums, G, row, left, columns, H, K, C)
        change_here = load_rows(change, row, left, rows, columns, H, K) - tk * found
        store_rows(change, change_here, row, left, rows, columns, H, K)
        found += load_rows(as_query, row, left, rows, columns, H, K) + _diagonal(weights, rows) * tq
        store_rows(dk, found, row, left, rows, columns, H, K)


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
