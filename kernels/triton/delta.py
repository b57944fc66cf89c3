"""Triton kernels for the delta rule, without a decay or with one number a head.

Within a chunk of C tokens the corrections U solve ``(I + diag(β) M) U = diag(β) (V − K̃ S)`` (`lasp.kernels.delta`). `invert`
makes ``W = (I + diag(β) M)⁻¹ diag(β)``, C × C numbers a chunk. `correct` walks the chunks of a segment with the state on chip:
``U = W (V − K̃ S)``. With U for values the layer is linear attention, whose kernels make the rest (`head_decay`): o, dq. The
gradient of the state is walked from the end by `correct_back`,

    dU = Pᵀ dO + K̄ dS,    dV = Wᵀ dU,    dS_in = e^{G_C} dS + Q̃ᵀ dO − K̃ᵀ dV:

that of linear attention with the queries Q and −K, whose outputs' gradients are dO and dV. So a key's gradient has two parts:
as the query −k, by `head_decay.attend`, and as a key, by `key_gradient`.

Everything is computed transposed, as in `head_decay`: the state enters products from the registers that it is summed in, and
no product takes the transpose of another's result.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lasp.kernels.triton.head_decay import BY_TOKEN, NONE, running_sums, sums_after
from lasp.kernels.triton.language import (
    LOG2E,
    add_product,
    fine_product,
    load_rows,
    product,
    segment_of,
    store_rows,
    tokens_of,
)

#: A decay of each key dimension: keys, queries and pairs come decayed, from `key_delta`.
BY_KEY: tl.constexpr = tl.constexpr(3)


@triton.jit
def _decay(g, within, position, head, H, valid, rows, DOWN: tl.constexpr, EXACT: tl.constexpr):
    """How much goes from token j to token i ≥ j of a chunk, else 0: ``[i, j]``, or with DOWN ``[j, i]``."""
    if EXACT:
        own = tl.load(g + (position + rows) * H + head, mask=rows < valid, other=0.0).to(tl.float32) * LOG2E
        if DOWN:
            sums = tl.cumsum(tl.where(rows[None, :] > rows[:, None], own[None, :], 0.0), 1)
        else:
            sums = tl.cumsum(tl.where(rows[:, None] > rows[None, :], own[:, None], 0.0), 0)
    elif DOWN:
        sums = within[None, :] - within[:, None]
    else:
        sums = within[:, None] - within[None, :]
    seen = rows[None, :] >= rows[:, None] if DOWN else rows[:, None] >= rows[None, :]
    return tl.exp2(tl.where(seen, sums, float("-inf")))


@triton.jit
def chunk_sum(G, first, t, columns, length, H, K: tl.constexpr, C: tl.constexpr):
    """The log-decays of the whole chunk from t, a number a key dimension; G: as of `key_delta.cumulate_keys`."""
    last = tl.minimum(t + C, length) - 1
    return tl.load(G + (first + last * H.to(tl.int64)) * K + columns, mask=columns < K, other=0.0)


@triton.jit
def inverse(N, C: tl.constexpr, SOLVED: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """``(I − N)⁻¹`` for a strictly lower ``N: [C, C]``: row by row within blocks of SOLVED rows, by products beyond them.

    With X the blocks' own inverses and Y = X N without the blocks it is ``(I + Y)(I + Y²)(I + Y⁴) .. X``: a product of as many
    as LEVELS, for ``SOLVED · 2^LEVELS = C``. Row by row, as nothing cancels there: powers of N itself could be large.
    """
    blocks: tl.constexpr = C // SOLVED
    block = tl.arange(0, blocks)
    row = tl.arange(0, SOLVED)
    own = (block[:, None] == block[None, :])[:, None, :, None]
    inner = tl.sum(tl.where(own, tl.reshape(N, (blocks, SOLVED, blocks, SOLVED)), 0.0), 2)
    X = tl.where((row[:, None] == row[None, :])[None], 1.0, 0.0) + tl.zeros_like(inner)
    for i in range(1, SOLVED):
        here = (row == i)[None, :, None]
        coefficients = tl.sum(tl.where(here, inner, 0.0), 1)
        X += tl.where(here, tl.sum(coefficients[:, :, None] * X, 1)[:, None, :], 0.0)
    wide = tl.where(own, X[:, :, None, :], 0.0) + tl.zeros([blocks, SOLVED, blocks, SOLVED], dtype=tl.float32)
    X = tl.reshape(wide, (C, C))
    at = tl.arange(0, C) // SOLVED
    nothing = tl.zeros([C, C], dtype=tl.float32)
    Y = fine_product(nothing, X, tl.where(at[:, None] > at[None, :], N, 0.0), PRECISION)
    X = fine_product(X, Y, X, PRECISION)
    for _ in tl.static_range(LEVELS - 1):
        Y = fine_product(nothing, Y, Y, PRECISION)
        X = fine_product(X, Y, X, PRECISION)
    return X


@triton.jit(do_not_specialize=["T", "H"])
def invert(
    k,
    beta,
    g,
    G,
    W,
    bounds,
    T,
    H,
    K: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    SOLVED: tl.constexpr,
    LEVELS: tl.constexpr,
    DECAY: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``W: [B, T, H, C]`` of each chunk, a row a token. Grid: (B · H, segments, chunks of the longest)."""
    bh = tl.program_id(0).to(tl.int64)
    batch, head, start, length, first = segment_of(bounds, T, H)
    rows = tl.arange(0, C)
    t = tl.program_id(2) * C
    if t < length:
        row, left = first + t * H.to(tl.int64), length - t
        valid = tl.minimum(left, C)
        position = batch * T + start + t
        tk = load_rows(k, row, left, rows, tl.arange(0, BK), H, K)
        b = tl.load(beta + (position + rows) * H + head, mask=rows < valid, other=0.0).to(tl.float32)
        M = product(tk, tl.trans(tk), PRECISION)
        if DECAY != NONE:
            within, _ = running_sums(G + bh * T + start + t, left, rows, C)
            M *= _decay(g, within, position, head, H, valid, rows, False, EXACT)
        N = tl.where(rows[:, None] > rows[None, :], -b[:, None] * M, 0.0)
        store_rows(W, inverse(N, C, SOLVED, LEVELS, PRECISION) * b[None, :], row, left, rows, rows, H, C)


@triton.jit(do_not_specialize=["T", "H", "n"])
def correct(
    q,
    k,
    v,
    W,
    g,
    G,
    S,
    A,
    out,
    lacks,
    ends,
    P,
    M,
    bounds,
    scale,
    T,
    H,
    n,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
    C: tl.constexpr,
    DECAY: tl.constexpr,
    ROLE: tl.constexpr,
    GATED: tl.constexpr,
    EXACT: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A walk along a segment. Grid: (B · H, segments, blocks of BC columns of the state).

    ROLE: "summary" writes the state that a segment leaves from nothing, ``S: [B, n, H, K, V]``, and "transition" what it leaves
    of a state, ``A: [B, n, H, K, K]``; "corrections" writes ``U: [B, T, H, V]`` and "output" o, when S enters. GATED: with U
    also ``lacks``, what values lack of what the state before them gives for their keys: U is β times it. BY_KEY: q and k are
    those from the chunk's start, ``ends`` the keys to its end.
    """
    bh = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    block = tl.program_id(2)
    batch, head, start, length, first = segment_of(bounds, T, H)
    DC: tl.constexpr = K if ROLE == "transition" else V
    ks = tokens_of(k, first, length, H, K, C, BK)
    ws = tokens_of(W, first, length, H, C, C, C)
    if DECAY == BY_KEY:
        ending = tokens_of(ends, first, length, H, K, C, BK)
        ps = tokens_of(P, first, length, H, C, C, C)
        ms = tokens_of(M, first, length, H, C, C, C)
    if ROLE != "transition":
        vs = tokens_of(v, first, length, H, V, C, BC)
    if ROLE == "output":
        qs = tokens_of(q, first, length, H, K, C, BK)
    if ROLE == "output" or ROLE == "corrections":
        outs = tokens_of(out, first, length, H, V, C, BC)
    if GATED:
        lacking = tokens_of(lacks, first, length, H, V, C, BC)
    down = block * BC + tl.arange(0, BC)
    right = tl.arange(0, BK)
    inside = (down < DC)[:, None] & (right < K)[None, :]
    place = (batch * n + segment) * H + head
    if ROLE == "transition":
        # What enters is one state for each of its rows.
        St = tl.where(down[:, None] == right[None, :], 1.0, 0.0)
    elif ROLE == "summary":
        St = tl.zeros([BC, BK], dtype=tl.float32)
    else:
        St = tl.load(S + place * (K * V) + right[None, :] * V + down[:, None], mask=inside, other=0.0)
    rows = tl.arange(0, C)
    count = tl.cdiv(length, C)
    for i in tl.range(0, count, num_stages=STAGES):
        t = i * C
        tk = ks.load([t, 0])
        lack = product(St, tl.trans(tk), PRECISION)
        if ROLE == "output":
            tq = tl.trans(qs.load([t, 0]))
            o = product(St, tq, PRECISION)
            if DECAY == BY_KEY:
                p = tl.trans(ps.load([t, 0]))
            else:
                p = product(tk, tq, PRECISION)
        if DECAY == BY_TOKEN:
            valid = tl.minimum(length - t, C)
            within, whole = running_sums(G + bh * T + start + t, length - t, rows, C)
            lack *= tl.exp2(within)[None, :]
            if EXACT:
                leave = sums_after(g, batch * T + start + t, head, H, valid, rows)
            else:
                leave = whole - within
            if ROLE == "output":
                o *= tl.exp2(within)[None, :]
                p *= _decay(g, within, batch * T + start + t, head, H, valid, rows, True, EXACT)
        elif ROLE == "output" and DECAY == NONE:
            p = tl.where(rows[:, None] <= rows[None, :], p, 0.0)
        if ROLE == "transition":
            lack = -lack
        else:
            lack = tl.trans(vs.load([t, block * BC])).to(tl.float32) - lack
        u = product(lack, tl.trans(ws.load([t, 0])), PRECISION)
        if ROLE == "output":
            o = add_product(o, u, p, PRECISION)
            outs.store([t, block * BC], tl.trans((o * scale).to(out.dtype.element_ty)))
        if ROLE == "corrections":
            outs.store([t, block * BC], tl.trans(u.to(out.dtype.element_ty)))
        if GATED:
            # Not U over β: what is wrong with U comes in again times M, which is small.
            if DECAY == BY_KEY:
                lack -= product(u, tl.trans(ms.load([t, 0])), PRECISION)
            else:
                m = product(tk, tl.trans(tk), PRECISION)
                if DECAY == BY_TOKEN:
                    m *= _decay(g, within, batch * T + start + t, head, H, valid, rows, True, EXACT)
                lack -= product(u, tl.where(rows[:, None] < rows[None, :], m, 0.0), PRECISION)
            lacking.store([t, block * BC], tl.trans(lack.to(lacks.dtype.element_ty)))
        if DECAY == BY_KEY:
            St *= tl.exp2(chunk_sum(G, first, t, right, length, H, K, C).to(tl.float32))[None, :]
            St = add_product(St, u, ending.load([t, 0]), PRECISION)
        else:
            if DECAY == BY_TOKEN:
                St *= tl.exp2(whole)
                u *= tl.exp2(leave)[None, :]
            St = add_product(St, u, tk, PRECISION)
    if ROLE == "transition":
        tl.store(A + place * (K * K) + right[None, :] * K + down[:, None], St, mask=inside)
    elif ROLE == "summary":
        tl.store(S + place * (K * V) + right[None, :] * V + down[:, None], St, mask=inside)


@triton.jit(do_not_specialize=["T", "H", "n"])
def correct_back(
    q,
    k,
    do,
    W,
    g,
    G,
    dS,
    A,
    lacks,
    dv,
    dbeta,
    ends,
    P,
    M,
    bounds,
    scale,
    unscale,
    T,
    H,
    n,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
    C: tl.constexpr,
    DECAY: tl.constexpr,
    ROLE: tl.constexpr,
    GATED: tl.constexpr,
    EXACT: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The walk of the state's gradient from a segment's end to its start. Grid: as of `correct`.

    ROLE: "summary" writes the gradient that goes on from a segment which nothing reaches, ``dS: [B, n, H, K, V]``, and
    "transition" what goes on of one that does, ``A: [B, n, H, K, K]``; "values" writes ``dv: [B, T, H, V]`` when dS reaches the
    end, and GATED ``dbeta: [blocks, B, H, T]``, to be summed.
    """
    bh = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    block = tl.program_id(2)
    batch, head, start, length, first = segment_of(bounds, T, H)
    DC: tl.constexpr = K if ROLE == "transition" else V
    ks = tokens_of(k, first, length, H, K, C, BK)
    ws = tokens_of(W, first, length, H, C, C, C)
    if DECAY == BY_KEY:
        ending = tokens_of(ends, first, length, H, K, C, BK)
        ps = tokens_of(P, first, length, H, C, C, C)
        ms = tokens_of(M, first, length, H, C, C, C)
    if ROLE != "transition":
        qs = tokens_of(q, first, length, H, K, C, BK)
        dos = tokens_of(do, first, length, H, V, C, BC)
    if ROLE == "values":
        dvs = tokens_of(dv, first, length, H, V, C, BC)
        if GATED:
            lacking = tokens_of(lacks, first, length, H, V, C, BC)
    down = block * BC + tl.arange(0, BC)
    right = tl.arange(0, BK)
    inside = (down < DC)[:, None] & (right < K)[None, :]
    place = (batch * n + segment) * H + head
    # All is in units of the scale, which queries have.
    if ROLE == "transition":
        St = tl.where(down[:, None] == right[None, :], 1.0, 0.0)
    elif ROLE == "summary":
        St = tl.zeros([BC, BK], dtype=tl.float32)
    else:
        St = tl.load(dS + place * (K * V) + right[None, :] * V + down[:, None], mask=inside, other=0.0) * unscale
    rows = tl.arange(0, C)
    count = tl.cdiv(length, C)
    along = (block * tl.num_programs(0).to(tl.int64) + bh) * T + start
    for i in tl.range(0, count, num_stages=STAGES):
        t = (count - 1 - i) * C
        tk = ks.load([t, 0])
        if DECAY == BY_KEY:
            du = product(St, tl.trans(ending.load([t, 0])), PRECISION)
        else:
            du = product(St, tl.trans(tk), PRECISION)
        if ROLE != "transition":
            tq = qs.load([t, 0])
            if DECAY == BY_KEY:
                p = ps.load([t, 0])
            else:
                p = product(tq, tl.trans(tk), PRECISION)
            tdo = tl.trans(dos.load([t, block * BC]))
        if DECAY == BY_TOKEN:
            valid = tl.minimum(length - t, C)
            within, whole = running_sums(G + bh * T + start + t, length - t, rows, C)
            if EXACT:
                leave = sums_after(g, batch * T + start + t, head, H, valid, rows)
            else:
                leave = whole - within
            du *= tl.exp2(leave)[None, :]
            if ROLE != "transition":
                p *= _decay(g, within, batch * T + start + t, head, H, valid, rows, False, EXACT)
        elif ROLE != "transition" and DECAY == NONE:
            p = tl.where(rows[:, None] >= rows[None, :], p, 0.0)
        if ROLE != "transition":
            du = add_product(du, tdo, p, PRECISION)
        z = product(du, ws.load([t, 0]), PRECISION)
        if ROLE == "values":
            dvs.store([t, block * BC], tl.trans((z * scale).to(dv.dtype.element_ty)))
            if GATED:
                # dv over β, as in `correct`.
                if DECAY == BY_KEY:
                    du -= product(z, ms.load([t, 0]), PRECISION)
                else:
                    m = product(tk, tl.trans(tk), PRECISION)
                    if DECAY == BY_TOKEN:
                        m *= _decay(g, within, batch * T + start + t, head, H, valid, rows, False, EXACT)
                    du -= product(z, tl.where(rows[:, None] > rows[None, :], m, 0.0), PRECISION)
                du *= tl.trans(lacking.load([t, block * BC])).to(tl.float32)
                tl.store(dbeta + along + t + rows, tl.sum(du, 0) * scale, mask=rows < length - t)
        if DECAY != BY_TOKEN:
            if DECAY == BY_KEY:
                St *= tl.exp2(chunk_sum(G, first, t, right, length, H, K, C).to(tl.float32))[None, :]
            if ROLE != "transition":
                St = add_product(St, tdo, tq, PRECISION)
            St = add_product(St, -z, tk, PRECISION)
        else:
            St *= tl.exp2(whole)
            if ROLE != "transition":
                St = add_product(St, tdo * tl.exp2(within)[None, :], tq, PRECISION)
            St = add_product(St, -z * tl.exp2(within)[None, :], tk, PRECISION)
    if ROLE == "transition":
        tl.store(A + place * (K * K) + right[None, :] * K + down[:, None], St, mask=inside)
    elif ROLE == "summary":
        tl.store(dS + place * (K * V) + right[None, :] * V + down[:, None], St * scale, mask=inside)


@triton.jit(do_not_specialize=["T", "H", "n"])
def key_gradient(
    q,
    k,
    u,
    do,
    dv,
    dk,
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
    BV: tl.constexpr,
    BC: tl.constexpr,
    C: tl.constexpr,
    DECAY: tl.constexpr,
    GATED: tl.constexpr,
    EXACT: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds to dk what a key has as a key, of the queries q and −k. Grid: (B · H, segments, blocks of BC columns of keys).

    GATED: also ``k_dk: [blocks, B, H, T]``, the products of k with the part of that which comes from the state's gradient, and
    those of the states that enter segments with their gradients, ``S_dS: [blocks, B, H, n]``.
    """
    bh = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    block = tl.program_id(2)
    batch, head, start, length, first = segment_of(bounds, T, H)
    qs = tokens_of(q, first, length, H, K, C, BC)
    ks = tokens_of(k, first, length, H, K, C, BC)
    dks = tokens_of(dk, first, length, H, K, C, BC)
    us = tokens_of(u, first, length, H, V, C, BV)
    dos = tokens_of(do, first, length, H, V, C, BV)
    dvs = tokens_of(dv, first, length, H, V, C, BV)
    down = block * BC + tl.arange(0, BC)
    right = tl.arange(0, BV)
    at = ((batch * n + segment) * H + head) * (K * V) + down[:, None] * V + right[None, :]
    inside = (down < K)[:, None] & (right < V)[None, :]
    St = tl.load(dS + at, mask=inside, other=0.0) * unscale
    rows = tl.arange(0, C)
    count = tl.cdiv(length, C)
    programs = tl.num_programs(0).to(tl.int64)
    along = (block * programs + bh) * T + start
    for i in tl.range(0, count, num_stages=STAGES):
        t = (count - 1 - i) * C
        tu = tl.trans(us.load([t, 0]))
        tdo = dos.load([t, 0])
        tdv = dvs.load([t, 0])
        if GATED:
            o = fine_product(tl.zeros([BC, C], dtype=tl.float32), St, tu, PRECISION)
        else:
            o = product(St, tu, PRECISION)
        # Rows are the later tokens.
        p = product(tdo, tu, PRECISION)
        z = product(tdv, tu, PRECISION) * -unscale
        if DECAY != NONE:
            valid = tl.minimum(length - t, C)
            within, whole = running_sums(G + bh * T + start + t, length - t, rows, C)
            if EXACT:
                leave = sums_after(g, batch * T + start + t, head, H, valid, rows)
            else:
                leave = whole - within
            o *= tl.exp2(leave)[None, :]
            between = _decay(g, within, batch * T + start + t, head, H, valid, rows, False, EXACT)
            p *= between
            z *= between
        p = tl.where(rows[:, None] >= rows[None, :], p, 0.0)
        z = tl.where(rows[:, None] > rows[None, :], z, 0.0)
        tq = tl.trans(qs.load([t, block * BC]))
        tk = tl.trans(ks.load([t, block * BC]))
        if GATED:
            with_k = tl.sum(tk.to(tl.float32) * o, 0)
            tl.store(k_dk + along + t + rows, with_k * scale, mask=rows < length - t)
        o = add_product(o, tq, p, PRECISION)
        o = add_product(o, tk, z, PRECISION)
        before = tl.trans(dks.load([t, block * BC])).to(tl.float32)
        dks.store([t, block * BC], tl.trans((before + o * scale).to(dk.dtype.element_ty)))
        if DECAY == NONE:
            St = add_product(St, tq, tdo, PRECISION)
            St = fine_product(St, tk.to(tl.float32) * -unscale, tdv, PRECISION)
        else:
            enter = tl.exp2(within)[None, :]
            St *= tl.exp2(whole)
            if GATED:
                St = fine_product(St, tq * enter, tdo, PRECISION)
                St = fine_product(St, tk * enter * -unscale, tdv, PRECISION)
            else:
                St = add_product(St, tq * enter, tdo, PRECISION)
                St = add_product(St, tk * enter * -unscale, tdv, PRECISION)
    if GATED:
        both = tl.load(S + at, mask=inside, other=0.0) * St * scale
        tl.store(S_dS + (block * programs + bh) * n + segment, tl.sum(both))
