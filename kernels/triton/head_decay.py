"""Triton kernels for linear attention with no decay, or one number a head: constant or by token.

All four products of a layer are one computation on tiles of C tokens, with the state on chip across a segment:

    out_i = S aᵢ e^{..} + Σ_{j seen by i} (aᵢ · bⱼ) e^{G_i − G_j} cⱼ,    S += Σ e^{..} cⱼ bⱼᵀ

    ====  ===========================  ================  ===========
    out   (a, b, c)                    S                 direction
    ====  ===========================  ================  ===========
    o     (q, k, v)                    the state, Sᵀ     along the tokens
    dq    (do, v, k)                   the state, S      along the tokens
    dv    (k, q, do)                   its gradient, Sᵀ  from the end
    dk    (v, do, q)                   its gradient, S   from the end
    ====  ===========================  ================  ===========

Everything is computed transposed, ``outᵀ: [D, C]`` and ``S: [D_c, D_a]``, so that the state enters its product from the
registers that it is accumulated in. No product takes the transpose of another product's result, which Triton 3.4 to 3.7.0
miscompiles on Hopper.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lasp.kernels.triton.language import LOG2E, add_product, fine_product, product, tokens_of

#: The kinds of decay.
NONE: tl.constexpr = tl.constexpr(0)
CONSTANT: tl.constexpr = tl.constexpr(1)
BY_TOKEN: tl.constexpr = tl.constexpr(2)


@triton.jit(do_not_specialize=["T", "H"])
def cumulate(g, G, bounds, T, H, C: tl.constexpr, BH: tl.constexpr):
    """``G: [B, H, T]``: the running sum of ``g: [B, T, H]`` from the start of each chunk of C tokens, in powers of two.

    Grid: (segments, programs that share a segment's chunks, B · blocks of BH heads).
    """
    start = tl.load(bounds + tl.program_id(0))
    end = tl.load(bounds + tl.program_id(0) + 1)
    blocks = tl.cdiv(H, BH)
    batch = (tl.program_id(2) // blocks).to(tl.int64)
    heads = (tl.program_id(2) % blocks) * BH + tl.arange(0, BH)
    rows = tl.arange(0, C)
    for t in range(start + tl.program_id(1) * C, end, tl.num_programs(1) * C):
        mask = (t + rows < end)[:, None] & (heads < H)[None, :]
        x = tl.load(g + (batch * T + t + rows)[:, None] * H + heads[None, :], mask=mask, other=0.0)
        sums = tl.cumsum(x.to(tl.float32) * LOG2E, 0)
        tl.store(G + (batch * H + heads)[None, :] * T + (t + rows)[:, None], sums, mask=mask)


@triton.jit
def running_sums(G, length, rows, C: tl.constexpr):
    """The running sums of a chunk, which beyond its end stay what they were, and the last of them."""
    valid = tl.minimum(length, C)
    return tl.load(G + tl.minimum(rows, valid - 1)), tl.load(G + valid - 1)


@triton.jit
def sums_after(g, position, head, H, valid, rows):
    """The sum of the log-decays after each token of a chunk, summed as such: a difference of two sums would round."""
    following = tl.load(g + (position + rows + 1) * H + head, mask=rows + 1 < valid, other=0.0)
    return tl.cumsum(following.to(tl.float32) * LOG2E, 0, reverse=True)


@triton.jit(do_not_specialize=["T", "H", "n"])
def summarise(
    b,
    c,
    g,
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
    DECAY: tl.constexpr,
    REVERSE: tl.constexpr,
    EXACT: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``S: [B, n, H, DB, DC]``: scale · Σ e^{..} b cᵀ of each segment, and its whole decay ``A: [B, n, H]``.

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
    rows = tl.arange(0, C)
    if DECAY == CONSTANT:
        rate = tl.load(g + head).to(tl.float32) * LOG2E
    S_chunk = tl.zeros([BB, BC], dtype=tl.float32)
    decayed = tl.zeros([], dtype=tl.float32)
    count = tl.cdiv(length, C)
    for i in tl.range(0, count, num_stages=STAGES):
        t = (count - 1 - i) * C if REVERSE else i * C
        tb = bs.load([t, 0])
        tc = cs.load([t, block * BC])
        if DECAY != NONE:
            valid = tl.minimum(length - t, C)
            if DECAY == CONSTANT:
                within = rate * tl.minimum(rows + 1, valid)
                whole = rate * valid
            else:
                within, whole = running_sums(G + bh * T + start + t, length - t, rows, C)
            if REVERSE:
                leave = within
            elif DECAY == CONSTANT:
                leave = rate * tl.maximum(valid - 1 - rows, 0)
            elif EXACT:
                leave = sums_after(g, batch * T + start + t, head, H, valid, rows)
            else:
                leave = whole - within
            tc = (tc * tl.exp2(leave)[:, None]).to(tc.dtype)
            S_chunk *= tl.exp2(whole)
            decayed += whole
        S_chunk = add_product(S_chunk, tl.trans(tb), tc, PRECISION)
    place = (batch * n + segment) * H + head
    down = tl.arange(0, BB)
    across = block * BC + tl.arange(0, BC)
    tl.store(
        S + place * (DB * DC) + down[:, None] * DC + across[None, :],
        S_chunk * scale,
        mask=(down < DB)[:, None] & (across < DC)[None, :],
    )
    if DECAY != NONE and block == 0:
        tl.store(A + place, tl.exp2(decayed))


@triton.jit(do_not_specialize=["T", "H", "n"])
def attend(
    a,
    b,
    c,
    out,
    g,
    G,
    S,
    x,
    x_out,
    bounds,
    scale,
    T,
    H,
    n,
    DA: tl.constexpr,
    DC: tl.constexpr,
    BA: tl.constexpr,
    BC: tl.constexpr,
    C: tl.constexpr,
    DECAY: tl.constexpr,
    ACROSS: tl.constexpr,
    STRICT: tl.constexpr,
    EXACT: tl.constexpr,
    GATED: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """o, or with ACROSS, where the state lies in memory as ``[DC, DA]``, dq. Grid: (B · H, segments, blocks of BC columns).

    STRICT: of what only the tokens before it give to a token.

    GATED: also ``x_out: [blocks, B, H, T]``, the products of x's tokens with theirs of out, less those of the chunk's keys with
    what these queries give to their gradients: to be summed for the gates, nothing on the way there is rounded. EXACT: what a
    token gives to itself, which is in both, is in neither.
    """
    bh = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    block = tl.program_id(2)
    place = ((bh // H * n + segment) * H + bh % H) * (DA * DC)
    down = block * BC + tl.arange(0, BC)
    right = tl.arange(0, BA)
    step_down, step_right = (DA, 1) if ACROSS else (1, DC)
    at = place + down[:, None] * step_down + right[None, :] * step_right
    start = tl.load(S + at, mask=(down < DC)[:, None] & (right < DA)[None, :], other=0.0)
    x_out += block * tl.num_programs(0).to(tl.int64) * T
    _attend(
        bh, segment, block, start, a, b, c, out, g, G, x, x_out, bounds, scale, T, H,
        DA, DC, BA, BC, C, DECAY, False, STRICT, EXACT, GATED, STAGES, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "H", "n"])
def attend_back(
    q,
    k,
    v,
    do,
    dk,
    dv,
    g,
    G,
    dS,
    S,
    k_dk,
    S_dS,
    bounds,
    scale,
    unscale,
    T,
    H,
    n,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BLOCK: tl.constexpr,
    C: tl.constexpr,
    ROLE: tl.constexpr,
    DECAY: tl.constexpr,
    EXACT: tl.constexpr,
    GATED: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dv, dk, or both where K = V and nothing is gated. Grid: (roles · blocks of BLOCK columns, B · H, segments).

    GATED: with dk also ``k_dk: [blocks, B, H, T]``, the products of k with the part of its gradient that comes from the state's
    (the rest is in `attend`'s), and those of the states that enter segments with their gradients, ``S_dS: [blocks, B, H, n]``.
    """
    bh = tl.program_id(1).to(tl.int64)
    segment = tl.program_id(2)
    if ROLE == "dv":
        block = tl.program_id(0)
        a, b, c, out = k, q, do, dv
        step_down, step_right = 1, V
    elif ROLE == "dk":
        block = tl.program_id(0)
        a, b, c, out = v, do, q, dk
        step_down, step_right = V, 1
    else:
        # Neighbours on the grid read the same four tensors.
        block = tl.program_id(0) // 2
        if tl.program_id(0) % 2 == 0:
            a, b, c, out = k, q, do, dv
            step_down, step_right = 1, V
        else:
            a, b, c, out = v, do, q, dk
            step_down, step_right = V, 1
    DA: tl.constexpr = V if ROLE == "dk" else K
    DC: tl.constexpr = K if ROLE == "dk" else V
    BA: tl.constexpr = BV if ROLE == "dk" else BK
    down = block * BLOCK + tl.arange(0, BLOCK)
    right = tl.arange(0, BA)
    at = ((bh // H * n + segment) * H + bh % H) * (K * V) + down[:, None] * step_down + right[None, :] * step_right
    mask = (down < DC)[:, None] & (right < DA)[None, :]
    end = tl.load(dS + at, mask=mask, other=0.0) * unscale
    programs = tl.num_programs(1).to(tl.int64)
    start = _attend(
        bh, segment, block, end, a, b, c, out, g, G, k, k_dk + block * programs * T, bounds, scale, T, H,
        DA, DC, BA, BLOCK, C, DECAY, True, False, EXACT, GATED, STAGES, PRECISION,
    )  # fmt: skip
    if GATED:
        both = tl.load(S + at, mask=mask, other=0.0) * start * scale
        tl.store(S_dS + (block * programs + bh) * n + segment, tl.sum(both))


@triton.jit
def _attend(
    bh, segment, block, S, a, b, c, out, g, G, x, x_out, bounds, scale, T, H,
    DA: tl.constexpr, DC: tl.constexpr, BA: tl.constexpr, BC: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr,
    REVERSE: tl.constexpr, STRICT: tl.constexpr, EXACT: tl.constexpr, GATED: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One segment and one block of columns, from the state ``S: [BC, BA]`` at its start (REVERSE: its end) to the other's."""
    batch, head = bh // H, bh % H
    start = tl.load(bounds + segment)
    length = (tl.load(bounds + segment + 1) - start).to(tl.int32)
    first = (batch * T + start) * H + head
    along = bh * T + start
    As = tokens_of(a, first, length, H, DA, C, BA)
    Bs = tokens_of(b, first, length, H, DA, C, BA)
    Cs = tokens_of(c, first, length, H, DC, C, BC)
    Os = tokens_of(out, first, length, H, DC, C, BC)
    if GATED:
        Xs = tokens_of(x, first, length, H, DC, C, BC)
    rows = tl.arange(0, C)
    if STRICT or (GATED and EXACT):
        seen = rows[:, None] > rows[None, :] if REVERSE else rows[:, None] < rows[None, :]
    else:
        seen = rows[:, None] >= rows[None, :] if REVERSE else rows[:, None] <= rows[None, :]
    if DECAY == CONSTANT:
        rate = tl.load(g + head).to(tl.float32) * LOG2E
        apart = tl.abs(rows[:, None] - rows[None, :])
        pairs = tl.where(seen, tl.exp2(rate * apart), 0.0)
    count = tl.cdiv(length, C)
    last = (count - 1) * C
    if DECAY == BY_TOKEN:
        # Read a chunk ahead: nothing else hides the wait for them.
        begin = last if REVERSE else 0
        next_within, next_whole = running_sums(G + along + begin, length - begin, rows, C)
    for i in tl.range(0, count, num_stages=STAGES):
        t = (count - 1 - i) * C if REVERSE else i * C
        ta = tl.trans(As.load([t, 0]))
        tb = Bs.load([t, 0])
        if GATED:
            o = fine_product(tl.zeros([BC, C], dtype=tl.float32), S, ta, PRECISION)
        else:
            o = product(S, ta, PRECISION)
        p = product(tb, ta, PRECISION)
        if GATED and EXACT:
            # What a token gives to itself decays by nothing. Where all else decays strongly it would drown the rest.
            itself = tl.sum(tl.where(rows[:, None] == rows[None, :], p, 0.0), 0)
        if DECAY == NONE:
            p = tl.where(seen, p, 0.0)
        else:
            valid = tl.minimum(length - t, C)
            if DECAY == CONSTANT:
                within = rate * tl.minimum(rows + 1, valid)
                whole = rate * valid
            else:
                within, whole = next_within, next_whole
                following = tl.maximum(t - C, 0) if REVERSE else tl.minimum(t + C, last)
                next_within, next_whole = running_sums(G + along + following, length - following, rows, C)
                if GATED and REVERSE:
                    # They would be spilled.
                    within = tl.load(G + along + t + tl.minimum(rows, valid - 1))
            enter = within
            if DECAY == CONSTANT:
                leave = rate * tl.maximum(valid - 1 - rows, 0)
            elif EXACT:
                leave = sums_after(g, first // H + t, head, H, valid, rows)
            else:
                leave = whole - within
            if REVERSE:
                enter, leave = leave, enter
            o *= tl.exp2(enter)[None, :]
            if DECAY == CONSTANT:
                p *= pairs
            elif EXACT:
                own = tl.load(g + (first // H + t + rows) * H + head, mask=rows < valid, other=0.0).to(tl.float32)
                own *= LOG2E
                if REVERSE:
                    between = tl.cumsum(tl.where(rows[:, None] > rows[None, :], own[:, None], 0.0), 0)
                else:
                    between = tl.cumsum(tl.where(rows[:, None] < rows[None, :], own[None, :], 0.0), 1)
                p = tl.where(seen, p * tl.exp2(between), 0.0)
            else:
                p *= tl.exp2(tl.where(seen, enter[None, :] - enter[:, None], float("-inf")))
        tc = tl.trans(Cs.load([t, block * BC]))
        if GATED:
            tx = Xs.load([t, block * BC])
            with_x = tl.sum(tl.trans(tx).to(tl.float32) * o, 0)
            if not REVERSE:
                # A pair of tokens gives the same product to q · dq of the one and k · dk of the other. It is made of
                # products with x: in o, p is rounded.
                pairs_x = p * product(Cs.load([t, block * BC]), tl.trans(tx), PRECISION)
                with_x += tl.sum(pairs_x, 0) - tl.sum(pairs_x, 1)
            tl.store(x_out + along + t + rows, with_x * scale, mask=rows < length - t)
            if EXACT and not STRICT:
                o += tc.to(tl.float32) * itself[None, :]
        o = add_product(o, tc, p, PRECISION)
        Os.store([t, block * BC], tl.trans((o * scale).to(out.dtype.element_ty)))
        if DECAY == NONE:
            S = add_product(S, tc, tb, PRECISION)
        elif GATED:
            S = fine_product(S * tl.exp2(whole), tc * tl.exp2(leave)[None, :], tb, PRECISION)
        else:
            S = add_product(S * tl.exp2(whole), tc * tl.exp2(leave)[None, :], tb, PRECISION)
    return S


@triton.jit(do_not_specialize=["T", "H", "n", "blocks"])
def gate_gradient(
    dg, q_dq, k_dk, S_dS, bounds, T, H, n, blocks, DECAY: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """``dg: [B, T, H]``, or ``[B, H, n]`` of a constant decay, whose parts are to be summed. Grid: (B · H, segments).

    A gate at t decays what goes from tokens before t, or the entering state, to tokens from t on, or the leaving state. At the
    segment's start that is the state's product with its gradient; then each token adds what starts from it and takes away
    what ends at it: ``dg_{t+1} = dg_t + k_t · dk_t − q_t · dq_t``.
    """
    bh = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    start = tl.load(bounds + segment)
    end = tl.load(bounds + segment + 1)
    all = tl.num_programs(0).to(tl.int64)
    rows = tl.arange(0, BLOCK)
    known = tl.zeros([], dtype=tl.float32)
    for block in range(blocks):
        known += tl.load(S_dS + (block * all + bh) * n + segment)
    total = tl.zeros([], dtype=tl.float32)
    for t in range(start, end, BLOCK):
        mask = t + rows < end
        # What changes between a token and the one before it: a sum that left the token itself out by subtraction would
        # keep the digits of what the token does, and lose those of a strong decay.
        change = tl.zeros([BLOCK], dtype=tl.float32)
        before = mask & (t + rows > start)
        for block in range(blocks):
            at = (block * all + bh) * T + t + rows - 1
            change += tl.load(k_dk + at, mask=before, other=0.0) - tl.load(q_dq + at, mask=before, other=0.0)
        here = known + tl.cumsum(change, 0)
        if DECAY == CONSTANT:
            total += tl.sum(tl.where(mask, here, 0.0))
        else:
            tl.store(dg + ((bh // H) * T + t + rows) * H + bh % H, here.to(dg.dtype.element_ty), mask=mask)
        known += tl.sum(change)
    if DECAY == CONSTANT:
        tl.store(dg + bh * n + segment, total)
