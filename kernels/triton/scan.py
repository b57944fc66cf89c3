"""The composition of elementwise maps on a GPU: `lasp.kernels.course` in one kernel."""

from __future__ import annotations

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.course import Ahead, Course
from lasp.kernels.summary import Summary
from lasp.kernels.triton.launch import Kernel, Launch, ready


@triton.jit
def _place(H, KV: tl.constexpr, V: tl.constexpr, DIAGONAL: tl.constexpr, BLOCK: tl.constexpr):
    """A program's batch, head and numbers of a state, on a grid (.., B · H, blocks), and where the numbers' transitions are."""
    batch = (tl.program_id(1) // H).to(tl.int64)
    head = (tl.program_id(1) % H).to(tl.int64)
    cell = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    # A number a row of the state, or one for all.
    return batch, head, cell, cell < KV, cell // V if DIAGONAL else cell * 0


# Summaries may be parts of rows, which begin anywhere.
@triton.jit(do_not_specialize=["H"], do_not_specialize_on_alignment=["A", "B", "seeds", "A_out", "B_out"])
def leave_runs(
    A,
    B,
    seeds,
    A_out,
    B_out,
    order,
    first,
    seed_of,
    final,
    H,
    Ab: tl.int64,
    An: tl.int64,
    Ah: tl.int64,
    Bb: tl.int64,
    Bn: tl.int64,
    Sb: tl.int64,
    Wb: tl.int64,
    Wn: tl.int64,
    Wh: tl.int64,
    Xb: tl.int64,
    Xn: tl.int64,
    SEEDED: tl.constexpr,
    KV: tl.constexpr,
    V: tl.constexpr,
    DIAGONAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`Course.leaving`. Grid: (runs, B · H, blocks of BLOCK numbers of a state). Strides are those of b, n (maps) and h."""
    run = tl.program_id(0)
    chain = tl.load(final + run)
    batch, head, cell, inside, row = _place(H, KV, V, DIAGONAL, BLOCK)
    seed = tl.load(seed_of + chain)
    a = tl.full([BLOCK], 1.0, tl.float32)
    s = tl.zeros([BLOCK], dtype=tl.float32)
    if seed >= 0:
        a = tl.zeros([BLOCK], dtype=tl.float32)
        if SEEDED:
            s = tl.load(seeds + batch * Sb + (seed * H + head) * KV + cell, mask=inside, other=0.0).to(tl.float32)
    A += batch * Ab + head * Ah + row
    B += batch * Bb + head * KV + cell
    begin, end = tl.load(first + chain), tl.load(first + chain + 1)
    if begin < end:
        # A map is read while the one before it is composed.
        member = tl.load(order + begin)
        next_a = tl.load(A + member * An, mask=inside, other=0.0)
        next_s = tl.load(B + member * Bn, mask=inside, other=0.0)
        member = tl.load(order + tl.minimum(begin + 1, end - 1))
        for position in range(begin, end):
            step, add = next_a, next_s
            next_a = tl.load(A + member * An, mask=inside, other=0.0)
            next_s = tl.load(B + member * Bn, mask=inside, other=0.0)
            member = tl.load(order + tl.minimum(position + 2, end - 1))
            s = s * step + add
            a *= step
    tl.store(A_out + batch * Wb + run * Wn + head * Wh + row, a, mask=inside)
    tl.store(B_out + batch * Xb + run * Xn + head * KV + cell, s, mask=inside)


# Here too.
@triton.jit(do_not_specialize=["H"], do_not_specialize_on_alignment=["A", "B", "seeds", "entering"])
def fill_slots(
    A,
    B,
    seeds,
    entering,
    out,
    order,
    first,
    until,
    seed_of,
    run_of,
    slot_of,
    H,
    Ab: tl.int64,
    An: tl.int64,
    Ah: tl.int64,
    Bb: tl.int64,
    Bn: tl.int64,
    Sb: tl.int64,
    Eb: tl.int64,
    En: tl.int64,
    Ob: tl.int64,
    On: tl.int64,
    SEEDED: tl.constexpr,
    ENTERED: tl.constexpr,
    KV: tl.constexpr,
    V: tl.constexpr,
    DIAGONAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`Course.states`. Grid: (chains, B · H, blocks of BLOCK numbers of a state). Strides are those of b, n (maps) and h."""
    chain = tl.program_id(0)
    batch, head, cell, inside, row = _place(H, KV, V, DIAGONAL, BLOCK)
    seed = tl.load(seed_of + chain)
    s = tl.zeros([BLOCK], dtype=tl.float32)
    if seed >= 0:
        if SEEDED:
            s = tl.load(seeds + batch * Sb + (seed * H + head) * KV + cell, mask=inside, other=0.0).to(tl.float32)
    elif ENTERED:
        run = tl.load(run_of + chain)
        s = tl.load(entering + batch * Eb + run * En + head * KV + cell, mask=inside, other=0.0)
    A += batch * Ab + head * Ah + row
    B += batch * Bb + head * KV + cell
    out += batch * Ob + head * KV + cell
    begin, end = tl.load(first + chain), tl.load(until + chain)
    if begin < end:
        # A map is read while the one before it acts.
        member = tl.load(order + begin)
        next_a = tl.load(A + member * An, mask=inside, other=0.0)
        next_s = tl.load(B + member * Bn, mask=inside, other=0.0)
        member = tl.load(order + tl.minimum(begin + 1, end - 1))
        for position in range(begin, end):
            slot = tl.load(slot_of + position)
            step, add = next_a, next_s
            next_a = tl.load(A + member * An, mask=inside, other=0.0)
            next_s = tl.load(B + member * Bn, mask=inside, other=0.0)
            member = tl.load(order + tl.minimum(position + 2, end - 1))
            if slot >= 0:
                tl.store(out + slot * On, s, mask=inside)
            s = s * step + add


_leave = Kernel(leave_runs)
_fill = Kernel(fill_slots)


def leaving(course: Course, maps: Summary, seeds: Tensor | None) -> Summary:
    """`Course.leaving` for maps of the identity, scalar and diagonal families on a GPU."""
    A, B = maps.A, maps.B
    out = maps.empty(course.runs)
    at = course.on(B.device)
    seeds = None if seeds is None else ready(seeds)
    strides = (*_strides(A), *B.stride()[:2], _step(seeds), *_strides(out.A), *out.B.stride()[:2])
    launch = _launch(_leave, course.runs, A.dim() == 4, B.shape, strides, (seeds is not None,))
    launch(A, B, B if seeds is None else seeds, out.A, out.B, at.order, at.first, at.seed, at.final)
    return out


def ahead(course: Course, maps: Summary, seeds: Tensor | None) -> Ahead:
    """`Course.ahead` likewise: numbers compose so fast that the states are walked again."""
    return Ahead(course, maps, seeds, leaving(course, maps, seeds))


def states(course: Course, maps: Summary, seeds: Tensor | None, entering: Tensor | None) -> Tensor:
    """`Course.states` likewise."""
    A, B = maps.A, maps.B
    batch, _, *state = B.shape
    out = B.new_empty(batch, course.slots, *state)
    at = course.on(B.device)
    seeds = None if seeds is None else ready(seeds)
    enters = (0, 0) if entering is None else entering.stride()[:2]
    strides = (*_strides(A), *B.stride()[:2], _step(seeds), *enters, *out.stride()[:2])
    launch = _launch(_fill, len(at.seed), A.dim() == 4, B.shape, strides, (seeds is not None, entering is not None))
    launch(
        A, B, B if seeds is None else seeds, B if entering is None else entering, out,
        at.order, at.first, at.until, at.seed, at.run, at.slot,
    )  # fmt: skip
    return out


@lru_cache(maxsize=4096)
def _launch(
    kernel: Kernel, programs: int, diagonal: bool, shape: tuple[int, ...], strides: tuple[int, ...], given: tuple[bool, ...]
) -> Launch:  # fmt: skip
    batch, _, H, K, V = shape
    block = min(1024, 1 << (K * V - 1).bit_length())
    flags = dict(zip(("SEEDED", "ENTERED"), given, strict=False))
    return kernel.launch(
        (programs, batch * H, -(-K * V // block)), H, *strides, **flags, KV=K * V, V=V, DIAGONAL=diagonal, BLOCK=block, warps=4
    )  # fmt: skip


def _step(seeds: Tensor | None) -> int:
    return 0 if seeds is None else seeds.stride(0)


def _strides(A: Tensor) -> tuple[int, int, int]:
    """Those of a transition's batch, map and head. The identity family has one number for all."""
    batch, map, head, *_ = A.stride()
    return (batch if A.shape[0] > 1 else 0, map, head if A.shape[2] > 1 else 0)
