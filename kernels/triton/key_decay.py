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

Within a chunk ``e^{G_i − G_j}`` is a product of a factor of i and one of j, for products of tiles (GLA,
https://arxiv.org/abs/2312.06635, section 4.3, has it at two levels). The chunk is halved again and again, down to `NEAR`
tokens. A pair of tokens on either side of a halving meets at its middle: both factors are at most 1. Tokens of the same
`NEAR` meet at their middle, where factors above 1 occur: a log-decay below `_LEAST` a token counts as that, so that they
stay far from overflow. ``2^_LEAST`` is below the last digit of a float32 beside 1. So no strength of decay is out of bounds,
and all but the factors runs on the tensor cores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lasp.kernels.triton.language import LOG2E, add_product, product, tokens_of

#: Tokens that are halved no further.
NEAR: tl.constexpr = tl.constexpr(8)
#: The least log-decay of one token, in powers of two.
_LEAST: tl.constexpr = tl.constexpr(-25.0)
#: As far from a near middle as four tokens of that can be.
_FARTHEST: tl.constexpr = tl.constexpr(100.0)


@triton.jit(do_not_specialize=["T", "H"])
def cumulate_keys(g, G, bounds, T, H, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr):
    """``G: [B, T, H, K]``: the running sum of g from the start of each chunk of C tokens, in powers of two, float32.

    Grid: (B · H, segments, programs that share a segment's chunks).
    """
    bh = tl.program_id(0).to(tl.int64)
    start = tl.load(bounds + tl.program_id(1))
    length = (tl.load(bounds + tl.program_id(1) + 1) - start).to(tl.int32)
    columns = tl.arange(0, BK)
    rows = tl.arange(0, C)
    for t in range(tl.program_id(2) * C, length, tl.num_programs(2) * C):
        at = (((bh // H) * T + start + t + rows) * H + bh % H)[:, None] * K + columns[None, :]
        mask = (t + rows < length)[:, None] & (columns < K)[None, :]
        x = tl.maximum(tl.load(g + at, mask=mask, other=0.0).to(tl.float32) * LOG2E, _LEAST)
        tl.store(G + at, tl.cumsum(x, 0), mask=mask)


@triton.jit
def _sums_at(G, rows, valid, heads, columns, D: tl.constexpr):
    """The rows of a chunk's running sums, those beyond its last valid token being that token's."""
    at = tl.minimum(rows, valid - 1).to(tl.int64)[:, None] * (heads.to(tl.int64) * D) + columns[None, :]
    return tl.load(G + at, mask=(columns < D)[None, :], other=0.0)


@triton.jit
def _whole(G, valid, heads, columns, D: tl.constexpr):
    """The sums over a whole chunk ``[columns]``."""
    return tl.load(G + (valid - 1).to(tl.int64) * heads * D + columns, mask=columns < D, other=0.0)


@triton.jit
def _middle(rows, BLOCK: tl.constexpr):
    """The last token before the middle of each token's block of BLOCK tokens."""
    return rows // BLOCK * BLOCK + BLOCK // 2 - 1


@triton.jit
def _between_halves(sums, G, rows, valid, heads, columns, D: tl.constexpr, SIZE: tl.constexpr):
    """The factor of each token to the middle of its block of 2 · SIZE tokens, before which or after which it stands."""
    return tl.exp2(-tl.abs(sums - _sums_at(G, _middle(rows, 2 * SIZE), valid, heads, columns, D)))


@triton.jit
def _near(sums, G, rows, valid, heads, columns, D: tl.constexpr):
    """The sum between the middle of each token's `NEAR` tokens and the token, in powers of two.

    Beyond a segment's end it is bounded, and of no account.
    """
    apart = sums - _sums_at(G, _middle(rows, NEAR), valid, heads, columns, D)
    return tl.minimum(tl.maximum(apart, -_FARTHEST), _FARTHEST)


@triton.jit(do_not_specialize=["T", "H", "n"])
def summarise_keys(
    b,
    c,
    G,
    A,
    S,
    bounds,
    scale,
    T,
    H,
    n,
    DB: tl.constexpr,
    DC: tl.constexpr,
    BB: tl.constexpr,
    BC: tl.constexpr,
    C: tl.constexpr,
    REVERSE: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``S: [B, n, H, DB, DC]``: scale · Σ (e^{..} ⊙ b) cᵀ of each segment, and its whole decay ``A: [B, n, H, DB]``.

    Grid: (B · H, segments, blocks of BC columns).
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
    columns = tl.arange(0, BB)
    state = tl.zeros([BB, BC], dtype=tl.float32)
    decayed = tl.zeros([BB], dtype=tl.float32)
    count = tl.cdiv(length, C)
    for i in tl.range(0, count, num_stages=STAGES):
        t = (count - 1 - i) * C if REVERSE else i * C
        tb = bs.load([t, 0])
        tc = cs.load([t, block * BC])
        sums = gs.load([t, 0])
        whole = _whole(G + (first + t * H) * DB, tl.minimum(length - t, C), H, columns, DB)
        if not REVERSE:
            sums = whole[None, :] - sums
        tb = tb.to(tl.float32) * tl.exp2(sums)
        state *= tl.exp2(whole)[:, None]
        decayed += whole
        state = add_product(state, tl.trans(tb), tc, PRECISION)
    place = (batch * n + segment) * H + head
    down = columns
    across = block * BC + tl.arange(0, BC)
    tl.store(
        S + place * (DB * DC) + down[:, None] * DC + across[None, :],
        state * scale,
        mask=(down < DB)[:, None] & (across < DC)[None, :],
    )
    if block == 0:
        tl.store(A + place * DB + down, tl.exp2(decayed), mask=down < DB)


@triton.jit(do_not_specialize=["T", "H"])
def pair_up(
    q,
    k,
    G,
    P,
    bounds,
    T,
    H,
    K: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``P: [B, T, H, C]``: the decayed products of each token's query with the keys of its chunk, 0 after the token.

    Grid: (B · H, segments, programs that share a segment's chunks). BK columns of K are taken at a time. LEVELS: how often a
    chunk of C tokens is halved to `NEAR`.
    """
    bh = tl.program_id(0).to(tl.int64)
    start = tl.load(bounds + tl.program_id(1))
    length = (tl.load(bounds + tl.program_id(1) + 1) - start).to(tl.int32)
    first = ((bh // H) * T + start) * H + bh % H
    qs = tokens_of(q, first, length, H, K, C, BK)
    ks = tokens_of(k, first, length, H, K, C, BK)
    gs = tokens_of(G, first, length, H, K, C, BK)
    ps = tokens_of(P, first, length, H, C, C, C)
    rows = tl.arange(0, C)
    seen = rows[:, None] >= rows[None, :]
    for t in range(tl.program_id(2) * C, length, tl.num_programs(2) * C):
        valid = tl.minimum(length - t, C)
        here = G + (first + t * H) * K
        p = tl.zeros([C, C], dtype=tl.float32)
        for column in range(0, K, BK):
            columns = column + tl.arange(0, BK)
            tq = qs.load([t, column]).to(tl.float32)
            tk = ks.load([t, column]).to(tl.float32)
            sums = gs.load([t, column])
            within = _near(sums, here, rows, valid, H, columns, K)
            near = product(tq * tl.exp2(within), tl.trans(tk * tl.exp2(-within)), PRECISION)
            p += tl.where(seen & (rows[:, None] // NEAR == rows[None, :] // NEAR), near, 0.0)
            for level in tl.static_range(LEVELS):
                meet = _between_halves(sums, here, rows, valid, H, columns, K, NEAR << level)
                far = product(tq * meet, tl.trans(tk * meet), PRECISION)
                parts = (rows[:, None] ^ rows[None, :]) // (NEAR << level) == 1
                p += tl.where(seen & parts, far, 0.0)
        ps.store([t, 0], p.to(P.dtype.element_ty))


@triton.jit(do_not_specialize=["T", "H", "n"])
def attend_along_keys(
    a,
    b,
    c,
    out,
    P,
    G,
    S,
    bounds,
    scale,
    unscale,
    T,
    H,
    n,
    DA: tl.constexpr,
    DC: tl.constexpr,
    BA: tl.constexpr,
    BC: tl.constexpr,
    C: tl.constexpr,
    REVERSE: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """o, or REVERSE dv, from the states ``S: [B, n, H, DA, DC]`` at the segments' starts, or ends, and `pair_up`'s P.

    Grid: (B · H, segments, blocks of BC columns).
    """
    bh = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    block = tl.program_id(2)
    batch, head = bh // H, bh % H
    start = tl.load(bounds + segment)
    length = (tl.load(bounds + segment + 1) - start).to(tl.int32)
    first = (batch * T + start) * H + head
    as_ = tokens_of(a, first, length, H, DA, C, BA)
    bs = tokens_of(b, first, length, H, DA, C, BA)
    gs = tokens_of(G, first, length, H, DA, C, BA)
    cs = tokens_of(c, first, length, H, DC, C, BC)
    ps = tokens_of(P, first, length, H, C, C, C)
    outs = tokens_of(out, first, length, H, DC, C, BC)

    down = block * BC + tl.arange(0, BC)
    right = tl.arange(0, BA)
    place = ((batch * n + segment) * H + head) * (DA * DC)
    at = S + place + down[:, None] + right[None, :] * DC
    state = tl.load(at, mask=(down < DC)[:, None] & (right < DA)[None, :], other=0.0) * unscale
    count = tl.cdiv(length, C)
    for i in tl.range(0, count, num_stages=STAGES):
        t = (count - 1 - i) * C if REVERSE else i * C
        valid = tl.minimum(length - t, C)
        here = G + (first + t * H) * DA
        ta = as_.load([t, 0])
        tb = bs.load([t, 0])
        tc = tl.trans(cs.load([t, block * BC]))
        sums = gs.load([t, 0])
        whole = _whole(here, valid, H, right, DA)
        enter, leave = sums, whole[None, :] - sums
        if REVERSE:
            enter, leave = leave, enter
        o = product(state, tl.trans(ta.to(tl.float32) * tl.exp2(enter)), PRECISION)
        if REVERSE:
            p = ps.load([t, 0])
        else:
            p = tl.trans(ps.load([t, 0]))
        o = add_product(o, tc, p, PRECISION)
        outs.store([t, block * BC], tl.trans((o * scale).to(out.dtype.element_ty)))
        state *= tl.exp2(whole)[None, :]
        state = add_product(state, tc, tb.to(tl.float32) * tl.exp2(leave), PRECISION)


@triton.jit
def _split_product(sum, x, y, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """``sum + x @ y`` with x in float32; SPLIT: what bfloat16 leaves of x counts too."""
    if SPLIT and PRECISION == "bf16":
        high = x.to(tl.bfloat16)
        sum = add_product(sum, x - high.to(tl.float32), y, PRECISION)
        return add_product(sum, high, y, PRECISION)
    return add_product(sum, x, y, PRECISION)


@triton.jit(do_not_specialize=["T", "H", "n"])
def attend_across_keys(
    a,
    b,
    c,
    out,
    x,
    G,
    S,
    S_exit,
    partner,
    dg,
    bounds,
    scale,
    unscale,
    T,
    H,
    n,
    DA: tl.constexpr,
    DC: tl.constexpr,
    BA: tl.constexpr,
    BC: tl.constexpr,
    C: tl.constexpr,
    SUMMED: tl.constexpr,
    REVERSE: tl.constexpr,
    GATED: tl.constexpr,
    LEVELS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq, or REVERSE dk, from the states ``S: [B, n, H, DC, DA]`` at the segments' starts, or ends. Grid: (B · H, segments,
    blocks of BC columns).

    G starts anew every SUMMED tokens, a multiple of C.

    GATED: dq also leaves ``partner: [B, T, H, DC]`` = q ⊙ dq in float32, but for what a token gave to itself, and the states
    at the segments' ends in S_exit; dk makes of them ``dg: [B, T, H, DC]``, which may be the same memory. A gate at t decays
    what goes from tokens before t, or the entering state, to tokens from t on, or the leaving state. At the segment's end
    that is the leaving state's product with its gradient; each token then adds what ends at it and takes away what starts
    from it: ``dg_t = dg_{t+1} + q_t ⊙ dq_t − k_t ⊙ dk_t``.
    """
    bh = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    block = tl.program_id(2)
    batch, head = bh // H, bh % H
    start = tl.load(bounds + segment)
    length = (tl.load(bounds + segment + 1) - start).to(tl.int32)
    first = (batch * T + start) * H + head
    as_ = tokens_of(a, first, length, H, DA, C, BA)
    bs = tokens_of(b, first, length, H, DA, C, BA)
    cs = tokens_of(c, first, length, H, DC, C, BC)
    gs = tokens_of(G, first, length, H, DC, C, BC)
    outs = tokens_of(out, first, length, H, DC, C, BC)
    if GATED:
        xs = tokens_of(x, first, length, H, DC, C, BC)
        partners = tokens_of(partner, first, length, H, DC, C, BC)

    down = block * BC + tl.arange(0, BC)
    right = tl.arange(0, BA)
    mask = (down < DC)[:, None] & (right < DA)[None, :]
    at = ((batch * n + segment) * H + head) * (DA * DC) + down[:, None] * DA + right[None, :]
    state = tl.load(S + at, mask=mask, other=0.0) * unscale
    if GATED and REVERSE:
        dgs = tokens_of(dg, first, length, H, DC, C, BC)
        passing = tl.sum(tl.load(S_exit + at, mask=mask, other=0.0) * state, 1) * scale
    rows = tl.arange(0, C)
    seen = rows[:, None] > rows[None, :] if REVERSE else rows[:, None] < rows[None, :]
    itself = rows[:, None] == rows[None, :]
    nothing = tl.zeros([BC, C], dtype=tl.float32)
    count = tl.cdiv(length, C)
    for i in tl.range(0, count, num_stages=STAGES):
        t = (count - 1 - i) * C if REVERSE else i * C
        valid = tl.minimum(length - t, C)
        here = G + (first + t * H) * DC
        ta = tl.trans(as_.load([t, 0]))
        tb = bs.load([t, 0])
        tc = cs.load([t, block * BC]).to(tl.float32)
        sums = gs.load([t, block * BC])
        # This chunk may be a later part of what G sums over.
        base = tl.load(here - H * DC + down, mask=(down < DC) & (t % SUMMED > 0), other=0.0)
        whole = _whole(here, valid, H, down, DC) - base
        enter = tl.minimum(sums - base[None, :], 0.0)
        leave = whole[None, :] - enter
        if REVERSE:
            enter, leave = leave, enter

        p = product(tb, ta, PRECISION)
        # What a token gives to itself decays by nothing; added last, it does not drown what the gates' gradient needs.
        own = tl.sum(tl.where(itself, p, 0.0), 0)
        o = tl.trans(tl.exp2(enter)) * _split_product(nothing, state, ta, GATED, PRECISION)
        within = _near(sums, here, rows, valid, H, down, DC)
        if REVERSE:
            within = -within
        columns = tl.trans(tc * tl.exp2(-within))
        near = tl.where(seen & (rows[:, None] // NEAR == rows[None, :] // NEAR), p, 0.0)
        o += tl.trans(tl.exp2(within)) * _split_product(nothing, columns, near, GATED, PRECISION)
        for level in tl.static_range(LEVELS):
            meet = _between_halves(sums, here, rows, valid, H, down, DC, NEAR << level)
            parts = (rows[:, None] ^ rows[None, :]) // (NEAR << level) == 1
            far = tl.where(seen & parts, p, 0.0)
            o += tl.trans(meet) * _split_product(nothing, tl.trans(tc * meet), far, GATED, PRECISION)

        if GATED:
            with_x = tl.trans(xs.load([t, block * BC])).to(tl.float32) * o * scale
            if REVERSE:
                change = tl.trans(partners.load([t, block * BC])) - with_x
                gradient = passing[:, None] + tl.cumsum(change, 1, reverse=True)
                dgs.store([t, block * BC], tl.trans(gradient.to(dg.dtype.element_ty)))
                passing += tl.sum(change, 1)
            else:
                partners.store([t, block * BC], tl.trans(with_x))
        o += tl.trans(tc) * own[None, :]
        outs.store([t, block * BC], tl.trans((o * scale).to(out.dtype.element_ty)))
        state *= tl.exp2(whole)[:, None]
        state = _split_product(state, tl.trans(tc * tl.exp2(leave)), tb, GATED, PRECISION)
    if GATED and not REVERSE:
        tl.store(S_exit + at, state, mask=mask)
