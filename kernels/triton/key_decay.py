"""Triton kernels for linear attention with a decay a key dimension: GLA, HGRN2.

The four products of a layer are those of `lasp.kernels.triton.head_decay`, on chunks of 16 tokens with the state on chip
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
https://arxiv.org/abs/2312.06635, section 4.3). Tokens of different halves of a chunk meet at its middle: both factors are at
most 1. Tokens of one half of 8 meet at that half's middle, where factors above 1 occur; a log-decay below
``_LEAST`` a token counts as that there, so that four of them stay far from overflow. ``2^_LEAST`` is under a float32's last
digit of what it is added to. So no strength of decay is out of bounds, and all but the sums of log-decays runs on the tensor
cores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lasp.kernels.triton.language import LOG2E, add_product, product, tokens_of

#: Tokens a chunk.
CHUNK: tl.constexpr = tl.constexpr(16)
_HALF: tl.constexpr = tl.constexpr(8)
_QUARTER: tl.constexpr = tl.constexpr(4)
#: The least log-decay of one token between two tokens of one half, in powers of two.
_LEAST: tl.constexpr = tl.constexpr(-25.0)


@triton.jit
def _decays(g):
    """Of a chunk's log-decays ``[CHUNK, D]`` in powers of two: the sums

    from its start to each token, the token itself included; from each token, itself left out, to its end; between its
    middle and each token; between the middle of the token's half and the token, negative from the middle on; and
    ``[D]`` over the chunk.
    """
    D: tl.constexpr = g.shape[1]
    halves = tl.reshape(g, [2, _HALF, D])
    second = (tl.arange(0, 2) == 1)[:, None]
    before = tl.cumsum(halves, 1)
    after = tl.cumsum(halves, 1, reverse=True) - halves
    sums = tl.sum(halves, 1)
    total = tl.sum(sums, 0)
    # What the other half adds: the first half's sum to the second, and the reverse.
    other = total[None, :] - sums
    enter = before + tl.where(second, other, 0.0)[:, None, :]
    leave = after + tl.where(second, 0.0, other)[:, None, :]
    across = tl.where(second[:, :, None], before, after)
    bounded = tl.maximum(halves, _LEAST)
    first_quarter = (tl.arange(0, _HALF) < _QUARTER)[None, :, None]
    within = tl.cumsum(bounded, 1) - tl.sum(tl.where(first_quarter, bounded, 0.0), 1)[:, None, :]
    return (
        tl.reshape(enter, [CHUNK, D]),
        tl.reshape(leave, [CHUNK, D]),
        tl.reshape(across, [CHUNK, D]),
        tl.reshape(within, [CHUNK, D]),
        total,
    )


@triton.jit(do_not_specialize=["T", "H", "n"])
def summarise_keys(
    b,
    c,
    g,
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
    gs = tokens_of(g, first, length, H, DB, C, BB)
    state = tl.zeros([BB, BC], dtype=tl.float32)
    decayed = tl.zeros([BB], dtype=tl.float32)
    count = tl.cdiv(length, C)
    for i in tl.range(0, count, num_stages=STAGES):
        t = (count - 1 - i) * C if REVERSE else i * C
        tb = bs.load([t, 0])
        tc = cs.load([t, block * BC])
        tg = gs.load([t, 0]).to(tl.float32) * LOG2E
        if REVERSE:
            sums = tl.cumsum(tg, 0)
        else:
            sums = tl.cumsum(tg, 0, reverse=True) - tg
        whole = tl.sum(tg, 0)
        tb = (tb * tl.exp2(sums)).to(tb.dtype)
        state *= tl.exp2(whole)[:, None]
        decayed += whole
        state = add_product(state, tl.trans(tb), tc, PRECISION)
    place = (batch * n + segment) * H + head
    down = tl.arange(0, BB)
    across = block * BC + tl.arange(0, BC)
    tl.store(
        S + place * (DB * DC) + down[:, None] * DC + across[None, :],
        state * scale,
        mask=(down < DB)[:, None] & (across < DC)[None, :],
    )
    if block == 0:
        tl.store(A + place * DB + down, tl.exp2(decayed), mask=down < DB)


@triton.jit(do_not_specialize=["T", "H", "n"])
def attend_along_keys(
    a,
    b,
    c,
    out,
    g,
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
    REVERSE: tl.constexpr,
    STAGES: tl.constexpr,
    PAIRS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """o, or REVERSE dv, from the states ``S: [B, n, H, DA, DC]`` at the segments' starts, or ends. Grid: as `summarise_keys`.

    PAIRS: the precision of the products of a and b.
    """
    bh = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    block = tl.program_id(2)
    batch, head = bh // H, bh % H
    start = tl.load(bounds + segment)
    length = (tl.load(bounds + segment + 1) - start).to(tl.int32)
    first = (batch * T + start) * H + head
    as_ = tokens_of(a, first, length, H, DA, CHUNK, BA)
    bs = tokens_of(b, first, length, H, DA, CHUNK, BA)
    gs = tokens_of(g, first, length, H, DA, CHUNK, BA)
    cs = tokens_of(c, first, length, H, DC, CHUNK, BC)
    outs = tokens_of(out, first, length, H, DC, CHUNK, BC)

    down = block * BC + tl.arange(0, BC)
    right = tl.arange(0, BA)
    place = ((batch * n + segment) * H + head) * (DA * DC)
    at = S + place + down[:, None] + right[None, :] * DC
    state = tl.load(at, mask=(down < DC)[:, None] & (right < DA)[None, :], other=0.0) * unscale
    rows = tl.arange(0, CHUNK)
    seen = rows[:, None] >= rows[None, :] if REVERSE else rows[:, None] <= rows[None, :]
    near = rows[:, None] // _HALF == rows[None, :] // _HALF
    count = tl.cdiv(length, CHUNK)
    for i in tl.range(0, count, num_stages=STAGES):
        t = (count - 1 - i) * CHUNK if REVERSE else i * CHUNK
        raw = as_.load([t, 0])
        ta = raw.to(tl.float32)
        tb = bs.load([t, 0]).to(tl.float32)
        tc = tl.trans(cs.load([t, block * BC]))
        enter, leave, across, within, whole = _decays(gs.load([t, 0]).to(tl.float32) * LOG2E)
        if REVERSE:
            enter, leave, within = leave, enter, -within
        o = product(state, tl.trans((ta * tl.exp2(enter)).to(raw.dtype)), PRECISION)
        meet = tl.exp2(across)
        far_pairs = product(tb * meet, tl.trans(ta * meet), PAIRS)
        near_pairs = product(tb * tl.exp2(-within), tl.trans(ta * tl.exp2(within)), PAIRS)
        p = tl.where(seen, tl.where(near, near_pairs, far_pairs), 0.0)
        o = add_product(o, tc, p, PRECISION)
        outs.store([t, block * BC], tl.trans((o * scale).to(out.dtype.element_ty)))
        state *= tl.exp2(whole)[None, :]
        state = add_product(state, tc, (tb * tl.exp2(leave)).to(raw.dtype), PRECISION)


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
    g,
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
    REVERSE: tl.constexpr,
    GATED: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq, or REVERSE dk, from the states ``S: [B, n, H, DC, DA]`` at the segments' starts, or ends. Grid: (B · H, segments,
    blocks of BC columns).

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
    as_ = tokens_of(a, first, length, H, DA, CHUNK, BA)
    bs = tokens_of(b, first, length, H, DA, CHUNK, BA)
    cs = tokens_of(c, first, length, H, DC, CHUNK, BC)
    gs = tokens_of(g, first, length, H, DC, CHUNK, BC)
    outs = tokens_of(out, first, length, H, DC, CHUNK, BC)
    if GATED:
        xs = tokens_of(x, first, length, H, DC, CHUNK, BC)
        partners = tokens_of(partner, first, length, H, DC, CHUNK, BC)

    down = block * BC + tl.arange(0, BC)
    right = tl.arange(0, BA)
    mask = (down < DC)[:, None] & (right < DA)[None, :]
    at = ((batch * n + segment) * H + head) * (DA * DC) + down[:, None] * DA + right[None, :]
    state = tl.load(S + at, mask=mask, other=0.0) * unscale
    if GATED and REVERSE:
        dgs = tokens_of(dg, first, length, H, DC, CHUNK, BC)
        passing = tl.sum(tl.load(S_exit + at, mask=mask, other=0.0) * state, 1) * scale
    rows = tl.arange(0, CHUNK)
    if REVERSE:
        seen = rows[:, None] > rows[None, :]
    else:
        seen = rows[:, None] < rows[None, :]
    near = rows[:, None] // _HALF == rows[None, :] // _HALF
    itself = rows[:, None] == rows[None, :]
    nothing = tl.zeros([BC, CHUNK], dtype=tl.float32)
    count = tl.cdiv(length, CHUNK)
    for i in tl.range(0, count, num_stages=STAGES):
        t = (count - 1 - i) * CHUNK if REVERSE else i * CHUNK
        ta = tl.trans(as_.load([t, 0]))
        tb = bs.load([t, 0])
        tc = cs.load([t, block * BC]).to(tl.float32)
        enter, leave, across, within, whole = _decays(gs.load([t, block * BC]).to(tl.float32) * LOG2E)
        if REVERSE:
            enter, leave, within = leave, enter, -within
        p = product(tb, ta, PRECISION)
        # What a token gives to itself decays by nothing; added last, it does not drown what the gates' gradient needs.
        own = tl.sum(tl.where(itself, p, 0.0), 0)
        p = tl.where(seen, p, 0.0)
        meet = tl.exp2(across)
        o = tl.trans(tl.exp2(enter)) * _split_product(nothing, state, ta, GATED, PRECISION)
        far_columns, near_columns = tl.trans(tc * meet), tl.trans(tc * tl.exp2(-within))
        o += tl.trans(meet) * _split_product(nothing, far_columns, tl.where(near, 0.0, p), GATED, PRECISION)
        o += tl.trans(tl.exp2(within)) * _split_product(nothing, near_columns, tl.where(near, p, 0.0), GATED, PRECISION)
        if GATED:
            with_x = tl.trans(xs.load([t, block * BC])).to(tl.float32) * o * scale
            if REVERSE:
                change = tl.trans(partners.load([t, block * BC])) - with_x
                here = passing[:, None] + tl.cumsum(change, 1, reverse=True)
                dgs.store([t, block * BC], tl.trans(here.to(dg.dtype.element_ty)))
                passing += tl.sum(change, 1)
            else:
                partners.store([t, block * BC], tl.trans(with_x))
        o += tl.trans(tc) * own[None, :]
        outs.store([t, block * BC], tl.trans((o * scale).to(out.dtype.element_ty)))
        state *= tl.exp2(whole)[:, None]
        state = _split_product(state, tl.trans(tc * tl.exp2(leave)), tb, GATED, PRECISION)
    if GATED and not REVERSE:
        tl.store(S_exit + at, state, mask=mask)
