"""Triton kernels for linear attention with a decay a key dimension: GLA, HGRN2.

The four products of a layer are those of `lasp.kernels.triton.head_decay`, on chunks of C tokens with the state on chip
across a segment. What differs is where the decay stands. In o and dv it is on the axis that a and b are multiplied along, in
dq and dk on the columns of c and of the result:

    ====  ===========================  ====================================================================
    out   (a, b, c)
    ====  ===========================  ====================================================================
    o     (q, k, v)                    out_i = S (aᵢ ⊙ e^{G_i}) + Σ_j (Σ_d a_id b_jd e^{G_id − G_jd}) cⱼ
    dv    (k, q, do)                   the same from the end
    dq    (do, v, k)                   out_i = e^{G_i} ⊙ (S aᵢ) + Σ_j (aᵢ · bⱼ) e^{G_i − G_j} ⊙ cⱼ
    dk    (v, do, q)                   the same from the end
    ====  ===========================  ====================================================================

For products of tiles ``e^{G_i − G_j}`` is a factor of i times a factor of j (GLA, https://arxiv.org/abs/2312.06635, section
4.3). Here the tokens of a chunk meet in its middle, the chunk's *anchor*, where the state meets them too: G is counted from
there. Anchors are the segment's start, every C tokens from it, and its end. One of the two factors may be above 1; it stays
far from overflow while no half of a chunk decays by more than `FARTHEST`. Where one does, which `cumulate_keys` finds out,
the segment is walked in short chunks; where half of one of these does, a token decays for no more than its part of `FARTHEST`,
below the last digit of the inputs beside 1: 2⁻¹²·⁵ in chunks of 16 tokens, 2⁻²⁵ for float32 in chunks of 8. No strength of
decay is out of bounds, and all but the factors runs on the tensor cores.

Factors, states and pairs are float32, and enter products of bfloat16 tiles in two parts, high and low: what is rounded to
bfloat16 is the result.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lasp.kernels.triton.language import LOG2E, add_product, fine_product, opaque, product, split, tokens_of

#: The least log-decay of one token, in powers of two.
LEAST: tl.constexpr = tl.constexpr(-40.0)
#: By how many powers of two half a chunk may decay.
FARTHEST: tl.constexpr = tl.constexpr(100.0)


@triton.jit
def _log_decays(g, at, mask):
    """In powers of two, no less than `LEAST`."""
    return tl.maximum(tl.load(g + at, mask=mask, other=0.0).to(tl.float32) * LOG2E, LEAST)


@triton.jit(do_not_specialize=["T", "H", "anchors"])
def cumulate_keys(
    g, G, between, farthest, bounds, chunks, T, H, anchors, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr
):
    """``G: [B, T, H, K]``: the sum of g from each token's nearest anchor to the token, above 0 where the anchor follows, in
    powers of two, float32; such sums from each anchor to the next, ``between: [B · H, anchors, K]``; and how far one is from
    a token at most, ``farthest: [B · H, segments, programs]``.

    Grid: (B · H, segments, programs that share a segment's chunks).
    """
    bh = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    start = tl.load(bounds + segment)
    length = (tl.load(bounds + segment + 1) - start).to(tl.int32)
    first_anchor = bh * anchors + tl.load(chunks + segment)
    columns = tl.arange(0, BK)
    rows = tl.arange(0, C)
    far = tl.zeros([BK], dtype=tl.float32)
    for i in range(tl.program_id(2), tl.cdiv(length, C), tl.num_programs(2)):
        t = i * C
        at = (((bh // H) * T + start + t + rows) * H + bh % H)[:, None] * K + columns[None, :]
        mask = (t + rows < length)[:, None] & (columns < K)[None, :]
        x = _log_decays(g, at, mask)
        all = tl.sum(x, 0)
        early = (rows < C // 2)[:, None]
        tl.store(G + at, tl.cumsum(x, 0) - tl.where(early, 0.0, all[None, :]), mask=mask)
        tl.store(between + (first_anchor + i) * K + columns, all, mask=columns < K)
        after = tl.sum(tl.where(early, x, 0.0), 0)
        far = tl.maximum(far, tl.maximum(-after, after - all))
    program = (bh * tl.num_programs(1) + segment) * tl.num_programs(2) + tl.program_id(2)
    tl.store(farthest + program, tl.max(far))


@triton.jit
def _sums_to_edge(g, first, t, length, heads, columns, rows, D: tl.constexpr, C: tl.constexpr, START: tl.constexpr):
    """From the chunk's start to each of its tokens, that one included, or from after each to the chunk's end."""
    row = heads.to(tl.int64) * D
    at = (first * D + (t + rows) * row)[:, None] + columns[None, :]
    inside = (columns < D)[None, :]
    if START:
        return tl.cumsum(_log_decays(g, at, (t + rows < length)[:, None] & inside), 0)
    following = (rows + 1 < tl.minimum(length - t, C))[:, None] & inside
    return tl.cumsum(_log_decays(g, at + row, following), 0, reverse=True)


@triton.jit(do_not_specialize=["T", "H", "n", "anchors"])
def summarise_keys(
    b,
    c,
    g,
    G,
    between,
    A,
    S,
    bounds,
    chunks,
    scale,
    T,
    H,
    n,
    anchors,
    DB: tl.constexpr,
    DC: tl.constexpr,
    BB: tl.constexpr,
    BC: tl.constexpr,
    C: tl.constexpr,
    REVERSE: tl.constexpr,
    EXACT: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``S: [B, n, H, DB, DC]``: scale · Σ (e^{..} ⊙ b) cᵀ of each segment, and its whole decay ``A: [B, n, H, DB]``.

    Grid: (B · H, segments, blocks of BC columns). EXACT: sums of log-decays are no differences of longer ones.
    """
    bh = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    block = tl.program_id(2)
    batch, head = bh // H, bh % H
    start = tl.load(bounds + segment)
    length = (tl.load(bounds + segment + 1) - start).to(tl.int32)
    first = (batch * T + start) * H + head
    bs = tokens_of(b, first, length, H, DB, C, BB)
    cs = tokens_of(c, first, length, H, DC, C, BC)
    gs = tokens_of(G, first, length, H, DB, C, BB)
    between += (bh * anchors + tl.load(chunks + segment)) * DB
    rows = tl.arange(0, C)
    columns = tl.arange(0, BB)
    state = tl.zeros([BB, BC], dtype=tl.float32)
    decayed = tl.zeros([BB], dtype=tl.float32)
    # Between anchors: tokens that are not counted from where the state goes are counted from the other.
    other = rows >= C // 2 if REVERSE else rows < C // 2
    count = tl.cdiv(length, C)
    for i in tl.range(0, count, num_stages=STAGES):
        j = count - 1 - i if REVERSE else i
        tb = bs.load([j * C, 0])
        tc = cs.load([j * C, block * BC])
        whole = tl.load(between + j * DB + columns, mask=columns < DB, other=0.0)
        if EXACT:
            sums = _sums_to_edge(g, first, j * C, length, H, columns, rows, DB, C, REVERSE)
        else:
            sums = gs.load([j * C, 0])
            sums = tl.where(other[:, None], whole[None, :], 0.0) + (sums if REVERSE else -sums)
        tb = tb.to(tl.float32) * tl.exp2(sums)
        state *= tl.exp2(whole)[:, None]
        decayed += whole
        state = add_product(state, tl.trans(tb), tc, PRECISION)
    place = (batch * n + segment) * H + head
    across = block * BC + tl.arange(0, BC)
    tl.store(
        S + place * (DB * DC) + columns[:, None] * DC + across[None, :],
        state * scale,
        mask=(columns < DB)[:, None] & (across < DC)[None, :],
    )
    if block == 0:
        tl.store(A + place * DB + columns, tl.exp2(decayed), mask=columns < DB)


@triton.jit(do_not_specialize=["T", "H", "n", "anchors", "programs"])
def attend_keys(
    a,
    b,
    c,
    out,
    x,
    g,
    G,
    between,
    farthest,
    S,
    S_exit,
    partner,
    dg,
    bounds,
    chunks,
    scale,
    unscale,
    T,
    H,
    n,
    anchors,
    programs,
    DA: tl.constexpr,
    DC: tl.constexpr,
    BA: tl.constexpr,
    BC: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    SHORT: tl.constexpr,
    ALONG: tl.constexpr,
    REVERSE: tl.constexpr,
    GATED: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """o and, REVERSE, dv, where the decay is ALONG the axis of products; or dq and dk.

    Chunks of C tokens, 0 for short ones alone, in tiles of ROWS: C, or half of it, on one side of an anchor. SHORT: tokens of
    a short chunk, at most 16, in tiles of 16.
    Grid: (B · H, segments, blocks of BC columns). The states at the segments' starts, REVERSE: ends, are ``S: [B, n, H, DA,
    DC]`` ALONG, else ``[B, n, H, DC, DA]``.

    GATED: dq also leaves ``partner: [B, T, H, DC]`` = q ⊙ dq in float32, but for what a token gave to itself, and the states
    at the segments' ends in S_exit; dk makes of them ``dg: [B, T, H, DC]``, which may be the same memory. A gate at t decays
    what goes from tokens before t, or the entering state, to tokens from t on, or the leaving state. At the segment's end
    that is the leaving state's product with its gradient; each token then adds what ends at it and takes away what starts
    from it: ``dg_t = dg_{t+1} + q_t ⊙ dq_t − k_t ⊙ dk_t``.
    """
    bh = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    block = tl.program_id(2)
    start = tl.load(bounds + segment)
    length = (tl.load(bounds + segment + 1) - start).to(tl.int32)
    first = ((bh // H) * T + start) * H + bh % H
    down = block * BC + tl.arange(0, BC)
    right = tl.arange(0, BA)
    step_down, step_right = (1, DC) if ALONG else (DA, 1)
    at = ((bh // H * n + segment) * H + bh % H) * (DA * DC) + down[:, None] * step_down + right[None, :] * step_right
    inside = (down < DC)[:, None] & (right < DA)[None, :]
    state = tl.load(S + at, mask=inside, other=0.0) * unscale
    passing = tl.zeros([BC], dtype=tl.float32)
    if GATED and REVERSE:
        passing = tl.sum(tl.load(S_exit + at, mask=inside, other=0.0) * state, 1) * scale
    if C > 0:
        program = tl.arange(0, 64)
        own = tl.load(farthest + (bh * n + segment) * programs + program, mask=program < programs, other=0.0)
        far = tl.max(own) > FARTHEST
        between += (bh * anchors + tl.load(chunks + segment)) * (DA if ALONG else DC)
    else:
        far = length > 0
    if far:
        state = _walk(
            state, passing, a, b, c, out, x, g, g, partner, dg, first, length, block, scale, H,
            DA, DC, BA, BC, 0, 16, SHORT, ALONG, REVERSE, GATED, STAGES, PRECISION,
        )  # fmt: skip
    elif C > 0:  # noqa: SIM102, a constant beside what is not
        # A segment without tokens has an anchor, but no rows to be read.
        if length > 0:
            state = _walk(
                state, passing, a, b, c, out, x, G, between, partner, dg, first, length, block, scale, H,
                DA, DC, BA, BC, C, ROWS, SHORT, ALONG, REVERSE, GATED, STAGES, PRECISION,
            )  # fmt: skip
    if GATED and not REVERSE:
        tl.store(S_exit + at, state, mask=inside)


@triton.jit
def _walk(
    state, passing, a, b, c, out, x, G, between, partner, dg, first, length, block, scale, H,
    DA: tl.constexpr, DC: tl.constexpr, BA: tl.constexpr, BC: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
    SHORT: tl.constexpr, ALONG: tl.constexpr, REVERSE: tl.constexpr, GATED: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One segment and one block of columns, from the state ``[BC, BA]`` at its start (REVERSE: its end) to the other's.

    C: as of `attend_keys`; 0: chunks are short ones, and G the log-decays as they were given.
    """
    DG: tl.constexpr = DA if ALONG else DC
    keys = tl.arange(0, BA) if ALONG else block * BC + tl.arange(0, BC)
    g_block = 0 if ALONG else block * BC
    as_ = tokens_of(a, first, length, H, DA, ROWS, BA)
    bs = tokens_of(b, first, length, H, DA, ROWS, BA)
    cs = tokens_of(c, first, length, H, DC, ROWS, BC)
    if C > 0:
        gs = tokens_of(G, first, length, H, DG, ROWS, BA if ALONG else BC)
    if GATED:
        xs = tokens_of(x, first, length, H, DC, ROWS, BC)
        if REVERSE:
            partners = tokens_of(partner, first, length, H, DC, ROWS, BC)
    rows = tl.arange(0, ROWS)
    if REVERSE:
        seen = rows[:, None] > rows[None, :] if GATED else rows[:, None] >= rows[None, :]
    else:
        seen = rows[:, None] < rows[None, :] if GATED else rows[:, None] <= rows[None, :]
    nothing = tl.zeros([BC, ROWS], dtype=tl.float32)
    if C == 0:
        count = tl.cdiv(length, SHORT)
    elif ROWS == C:
        # An anchor in the middle of each: the first is the segment's start.
        count = tl.cdiv(length + C // 2, C)
    else:
        count = tl.cdiv(length, ROWS)
    if C > 0 and REVERSE:
        state = _decayed(state, _between(between, count - 1, length, keys, DG, C, ROWS), ALONG)
    for i in tl.range(0, count, num_stages=STAGES):
        j = count - 1 - i if REVERSE else i
        if C > 0:
            t = j * ROWS - (ROWS - C // 2)
            sums = gs.load([t, g_block])
            if REVERSE:
                sums = -sums
            leave = tl.exp2(-sums)
            end = length
        else:
            t = j * SHORT
            # The rows beyond are the next chunk's.
            end = tl.minimum(length, t + SHORT)
            valid = t + rows < end
            sums, before, after = _short_sums(G, first, t, length, H, keys, rows, DG, SHORT)
            if REVERSE:
                before, after = after, before
                sums = -sums
            state = _decayed(state, before, ALONG)
            leave = tl.where(valid[:, None], tl.exp2(-sums), 0.0)
        ta = as_.load([t, 0])
        tb = bs.load([t, 0])
        tc = cs.load([t, block * BC])
        if ALONG:
            a_here, b_here = tl.trans(ta.to(tl.float32) * tl.exp2(sums)), tb.to(tl.float32) * leave
            p = tl.zeros([ROWS, ROWS], dtype=tl.float32)
            if PRECISION == "bf16":
                # Split here, so that the left operands are made once: see `opaque`.
                a_high, a_low = split(a_here)
                b_high, b_low = split(b_here)
                b_high, b_low = opaque(b_high), opaque(b_low)
                p = add_product(p, b_high, a_high, PRECISION)
                p = add_product(p, b_low, a_high, PRECISION)
                p = add_product(p, b_high, a_low, PRECISION)
                a_here, b_here = a_high, b_high
            else:
                p = fine_product(p, b_here, a_here, PRECISION)
            p = tl.where(seen, p, 0.0)
            # Of a factor and a state one is rounded.
            o = fine_product(nothing, state, a_here, PRECISION)
            o = fine_product(o, tl.trans(tc), p, PRECISION)
            state = add_product(state, tl.trans(tc), b_here, PRECISION)
        else:
            p = product(tb, tl.trans(ta), PRECISION)
            if GATED:
                # What a token gives to itself decays by nothing; added last, it does not drown what dg needs.
                itself = tl.sum(tl.where(rows[:, None] == rows[None, :], p, 0.0), 0)
            p = tl.where(seen, p, 0.0)
            c_here = tl.trans(tc.to(tl.float32) * leave)
            o = fine_product(nothing, state, tl.trans(ta), PRECISION)
            o = fine_product(o, c_here, p, PRECISION) * tl.trans(tl.exp2(sums))
            state = fine_product(state, c_here, tb, PRECISION)
        if GATED:
            with_x = tl.trans(xs.load([t, block * BC])).to(tl.float32) * o * scale
            if REVERSE:
                change = tl.trans(partners.load([t, block * BC])) - with_x
                if C == 0:
                    change = tl.where(valid[None, :], change, 0.0)
                if PRECISION == "bf16":
                    # Sums from each token on, as a product: a scan is slower.
                    onwards = tl.where(rows[:, None] >= rows[None, :], 1.0, 0.0).to(tl.bfloat16)
                    gradient = fine_product(nothing + passing[:, None], change, onwards, PRECISION)
                else:
                    gradient = passing[:, None] + tl.cumsum(change, 1, reverse=True)
                _store(dg, gradient, t, first, end, block, H, DC, BC, ROWS)
                passing += tl.sum(change, 1)
            else:
                _store(partner, with_x, t, first, end, block, H, DC, BC, ROWS)
            o += tl.trans(tc) * itself[None, :]
        _store(out, o * scale, t, first, end, block, H, DC, BC, ROWS)
        if C == 0:
            state = _decayed(state, after, ALONG)
        else:
            onward = _between(between, j - 1 if REVERSE else j, length, keys, DG, C, ROWS)
            state = _decayed(state, onward, ALONG)
    return state


@triton.jit
def _short_sums(g, first, t, length, heads, keys, rows, D: tl.constexpr, SHORT: tl.constexpr):
    """Of a short chunk: the sum between its anchor and each token, and those of its halves."""
    row = heads.to(tl.int64) * D
    at = (first * D + (t + rows) * row)[:, None] + keys[None, :]
    early = rows < SHORT // 2
    late = (rows >= SHORT // 2) & (rows < SHORT)
    inside = (t + rows < length)[:, None] & (keys < D)[None, :]
    following = (t + rows + 1 < length)[:, None] & (keys < D)[None, :]
    own = _log_decays(g, at, early[:, None] & inside)
    # Sums from a token to the anchor are made of what follows the token: a difference of two sums would round.
    onward = _log_decays(g, at + row, (rows < SHORT // 2 - 1)[:, None] & following)
    beyond = _log_decays(g, at, late[:, None] & inside)
    least = -FARTHEST / (SHORT // 2)
    far = (tl.sum(own, 0) < -FARTHEST)[None, :]
    own, onward = tl.where(far, tl.maximum(own, least), own), tl.where(far, tl.maximum(onward, least), onward)
    beyond = tl.where((tl.sum(beyond, 0) < -FARTHEST)[None, :], tl.maximum(beyond, least), beyond)
    sums = tl.cumsum(beyond, 0) - tl.cumsum(onward, 0, reverse=True)
    return sums, tl.sum(own, 0), tl.sum(beyond, 0)


@triton.jit
def _between(between, tile, length, keys, D: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr):
    """The sums from a tile's anchor to that of the next, or the segment's end."""
    anchor = tile // (C // ROWS)
    onward = (tile >= 0) & (anchor * C < length)
    if ROWS < C:
        # Tiles on both sides of an anchor share it.
        onward &= tile % 2 == 0
    return tl.load(between + anchor * D + keys, mask=(keys < D) & onward, other=0.0)


@triton.jit
def _decayed(state, sums, ALONG: tl.constexpr):
    decay = tl.exp2(sums)
    return state * decay[None, :] if ALONG else state * decay[:, None]


@triton.jit
def _store(x, tile, t, first, end, block, heads, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr):
    """Write a chunk's results, given transposed: ``[BD, ROWS]``. A descriptor does not write from before its start."""
    rows = t + tl.arange(0, ROWS)
    columns = block * BD + tl.arange(0, BD)
    at = (first + rows * heads.to(tl.int64))[:, None] * D + columns[None, :]
    inside = ((rows >= 0) & (rows < end))[:, None] & (columns < D)[None, :]
    tl.store(x + at, tl.trans(tile).to(x.dtype.element_ty), mask=inside)
