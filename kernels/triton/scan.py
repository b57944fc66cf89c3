"""The composition of elementwise maps on a GPU: `lasp.kernels.course` in one kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.summary import Summary
from lasp.kernels.triton.launch import Kernel, ready

if TYPE_CHECKING:
    from lasp.kernels.course import Course


@triton.jit
def _place(H, KV: tl.constexpr, V: tl.constexpr, DIAGONAL: tl.constexpr, BLOCK: tl.constexpr):
    """A program's batch, head and numbers of a state, on a grid (.., B · H, blocks), and where the numbers' transitions are."""
    batch = (tl.program_id(1) // H).to(tl.int64)
    head = (tl.program_id(1) % H).to(tl.int64)
    cell = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    # A number a row of the state, or one for all.
    return batch, head, cell, cell < KV, cell // V if DIAGONAL else cell * 0


# Summaries may be parts of rows, which begin anywhere.
@triton.jit(
    do_not_specialize=["H"],
    do_not_specialize_on_alignment=["A", "B", "seeds", "A_before", "B_before", "A_whole", "B_whole"],
)
def compose_chains(
    A,
    B,
    seeds,
    A_before,
    B_before,
    A_whole,
    B_whole,
    order,
    first,
    seed_of,
    whole_of,
    slot_of,
    H,
    Ab: tl.int64,
    An: tl.int64,
    Ah: tl.int64,
    Bb: tl.int64,
    Bn: tl.int64,
    Sb: tl.int64,
    Ub: tl.int64,
    Un: tl.int64,
    Uh: tl.int64,
    Vb: tl.int64,
    Vn: tl.int64,
    Wb: tl.int64,
    Wn: tl.int64,
    Wh: tl.int64,
    Xb: tl.int64,
    Xn: tl.int64,
    KV: tl.constexpr,
    V: tl.constexpr,
    DIAGONAL: tl.constexpr,
    SEEDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (chains, B · H, blocks of BLOCK numbers of a state). Strides are those of b, n (maps) and h."""
    chain = tl.program_id(0)
    batch, head, cell, inside, row = _place(H, KV, V, DIAGONAL, BLOCK)
    seed = tl.load(seed_of + chain)
    STATE: tl.constexpr = B.dtype.element_ty
    a = tl.full([BLOCK], 1.0, STATE)
    s = tl.zeros([BLOCK], dtype=STATE)
    if seed >= 0:
        a = tl.zeros([BLOCK], dtype=STATE)
        if SEEDED:
            s = tl.load(seeds + batch * Sb + (seed * H + head) * KV + cell, mask=inside, other=0.0).to(STATE)
    for position in range(tl.load(first + chain), tl.load(first + chain + 1)):
        member = tl.load(order + position)
        slot = tl.load(slot_of + position)
        if slot >= 0:
            tl.store(A_before + batch * Ub + slot * Un + head * Uh + row, a, mask=inside)
            tl.store(B_before + batch * Vb + slot * Vn + head * KV + cell, s, mask=inside)
        step = tl.load(A + batch * Ab + member * An + head * Ah + row, mask=inside, other=0.0)
        s = s * step + tl.load(B + batch * Bb + member * Bn + head * KV + cell, mask=inside, other=0.0)
        a *= step
    run = tl.load(whole_of + chain)
    if run >= 0:
        tl.store(A_whole + batch * Wb + run * Wn + head * Wh + row, a, mask=inside)
        tl.store(B_whole + batch * Xb + run * Xn + head * KV + cell, s, mask=inside)


# Here too.
@triton.jit(do_not_specialize=["H"], do_not_specialize_on_alignment=["A", "B", "S"])
def enter_slots(
    A,
    B,
    S,
    out,
    run,
    H,
    Ab: tl.int64,
    An: tl.int64,
    Ah: tl.int64,
    Bb: tl.int64,
    Bn: tl.int64,
    Sb: tl.int64,
    Sn: tl.int64,
    Ob: tl.int64,
    On: tl.int64,
    KV: tl.constexpr,
    V: tl.constexpr,
    DIAGONAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``A · S + B`` with the state of each slot's run. Grid: (slots, B · H, blocks of BLOCK numbers of a state)."""
    slot = tl.program_id(0)
    batch, head, cell, inside, row = _place(H, KV, V, DIAGONAL, BLOCK)
    a = tl.load(A + batch * Ab + slot * An + head * Ah + row, mask=inside, other=0.0)
    s = tl.load(S + batch * Sb + tl.load(run + slot) * Sn + head * KV + cell, mask=inside, other=0.0)
    s = s * a + tl.load(B + batch * Bb + slot * Bn + head * KV + cell, mask=inside, other=0.0)
    tl.store(out + batch * Ob + slot * On + head * KV + cell, s, mask=inside)


_compose = Kernel(compose_chains)
_enter = Kernel(enter_slots)


def compose(course: Course, maps: Summary, seeds: Tensor | None) -> tuple[Summary, Summary]:
    """`Course.compose` for maps of the identity, scalar and diagonal families on a GPU."""
    A, B = maps.A, maps.B
    batch, _, H, K, V = B.shape
    # What enters the segments is read by kernels, what the runs amount to is sent: in rows.
    before = Summary(A.new_empty(A.shape[0], course.slots, *A.shape[2:]), B.new_empty(batch, course.slots, H, K, V))
    whole = maps.empty(course.runs)
    at = course.on(B.device)
    chains = len(at.seed)
    block = min(2048, 1 << (K * V - 1).bit_length())
    if seeds is not None:
        seeds = ready(seeds)

    _compose(
        (chains, batch * H, -(-K * V // block)),
        A, B, B if seeds is None else seeds, before.A, before.B, whole.A, whole.B,
        at.order, at.first, at.seed, at.whole, at.slot, H,
        *_strides(A), *B.stride()[:2], 0 if seeds is None else seeds.stride(0),
        *_strides(before.A), *before.B.stride()[:2], *_strides(whole.A), *whole.B.stride()[:2],
        KV=K * V, V=V, DIAGONAL=A.dim() == 4, SEEDED=seeds is not None, BLOCK=block, warps=4,
    )  # fmt: skip
    return before, whole


def enter(course: Course, before: Summary, entering: Tensor) -> Tensor:
    """`Course.enter` likewise, where something enters."""
    A, B = before.A, before.B
    batch, slots, H, K, V = B.shape
    out = torch.empty_like(B, memory_format=torch.contiguous_format)
    block = min(2048, 1 << (K * V - 1).bit_length())
    _enter(
        (slots, batch * H, -(-K * V // block)),
        A, B, entering, out, course.on(B.device).run, H,
        *_strides(A), *B.stride()[:2], *entering.stride()[:2], *out.stride()[:2],
        KV=K * V, V=V, DIAGONAL=A.dim() == 4, BLOCK=block, warps=4,
    )  # fmt: skip
    return out


def _strides(A: Tensor) -> tuple[int, int, int]:
    """Those of a transition's batch, map and head. The identity family has one number for all."""
    batch, map, head, *_ = A.stride()
    return (batch if A.shape[0] > 1 else 0, map, head if A.shape[2] > 1 else 0)
