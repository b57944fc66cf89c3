"""The composition of dense maps on a GPU: `lasp.kernels.course` for transitions that are matrices.

Maps are float32, and what goes along a chain of them float64: Hopper's tensor cores multiply that too, and sums of float32
that they make lose a little of every product in one direction, which 256 maps add up to more than float32's own rounding.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.summary import Summary
from lasp.kernels.triton.launch import Kernel, Launch, ready
from lasp.kernels.triton.tiling import padded

if TYPE_CHECKING:
    from lasp.kernels.course import Course

#: The widest K whose transitions fit a processor.
WIDEST = 128


@triton.jit
def _matrix(x, down, right, WIDTH: tl.constexpr, K: tl.constexpr):
    """A tile of a ``[K, WIDTH]`` matrix, zero beyond it."""
    inside = (down < K)[:, None] & (right < WIDTH)[None, :]
    return tl.load(x + down[:, None] * WIDTH + right[None, :], mask=inside, other=0.0).to(tl.float64)


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
    Bb: tl.int64,
    Bn: tl.int64,
    Sb: tl.int64,
    Wb: tl.int64,
    Wn: tl.int64,
    Xb: tl.int64,
    Xn: tl.int64,
    SEEDED: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
):
    """`Course.leaving`. Grid: (runs, B · H, blocks of BC columns of the transition, then of the state). Strides: of b, n."""
    run = tl.program_id(0)
    chain = tl.load(final + run)
    batch, head = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    down, right = tl.arange(0, BK), tl.arange(0, BC)
    own: tl.constexpr = (K + BC - 1) // BC
    of_state = tl.program_id(2) >= own
    right += (tl.program_id(2) - tl.where(of_state, own, 0)) * BC
    seed = tl.load(seed_of + chain)
    # What a state starts from is its seed or nothing, a transition from where there is no seed.
    S = tl.where((down[:, None] == right[None, :]) & (seed < 0) & (tl.program_id(2) < own), 1.0, 0.0).to(tl.float64)
    if SEEDED:
        state = _matrix(seeds + batch * Sb + (tl.maximum(seed, 0) * H + head) * (K * V), down, right, V, K)
        S = tl.where(of_state & (seed >= 0), state, S)
    A += batch * Ab + head * (K * K)
    B += batch * Bb + head * (K * V)
    columns = tl.arange(0, BK)
    for position in range(tl.load(first + chain), tl.load(first + chain + 1)):
        member = tl.load(order + position)
        S = tl.dot(_matrix(A + member * An, down, columns, K, K), S, out_dtype=tl.float64)
        if of_state:
            S += _matrix(B + member * Bn, down, right, V, K)
    if of_state:
        inside = (down < K)[:, None] & (right < V)[None, :]
        tl.store(
            B_out + batch * Xb + run * Xn + head * (K * V) + down[:, None] * V + right[None, :],
            S.to(tl.float32),
            mask=inside,
        )
    else:
        inside = (down < K)[:, None] & (right < K)[None, :]
        tl.store(
            A_out + batch * Wb + run * Wn + head * (K * K) + down[:, None] * K + right[None, :],
            S.to(tl.float32),
            mask=inside,
        )


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
    Bb: tl.int64,
    Bn: tl.int64,
    Sb: tl.int64,
    Eb: tl.int64,
    En: tl.int64,
    Ob: tl.int64,
    On: tl.int64,
    SEEDED: tl.constexpr,
    ENTERED: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
):
    """`Course.states`. Grid: (chains, B · H, blocks of BC columns). Strides are those of b, n."""
    chain = tl.program_id(0)
    batch, head = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    down, right = tl.arange(0, BK), tl.program_id(2) * BC + tl.arange(0, BC)
    inside = (down < K)[:, None] & (right < V)[None, :]
    seed = tl.load(seed_of + chain)
    S = tl.zeros([BK, BC], dtype=tl.float64)
    if seed >= 0:
        if SEEDED:
            S = _matrix(seeds + batch * Sb + (seed * H + head) * (K * V), down, right, V, K)
    elif ENTERED:
        run = tl.load(run_of + chain)
        S = _matrix(entering + batch * Eb + run * En + head * (K * V), down, right, V, K)
    A += batch * Ab + head * (K * K)
    B += batch * Bb + head * (K * V)
    at = out + batch * Ob + head * (K * V) + down[:, None] * V + right[None, :]
    columns = tl.arange(0, BK)
    for position in range(tl.load(first + chain), tl.load(until + chain)):
        member = tl.load(order + position)
        slot = tl.load(slot_of + position)
        if slot >= 0:
            tl.store(at + slot * On, S.to(tl.float32), mask=inside)
        S = tl.dot(_matrix(A + member * An, down, columns, K, K), S, out_dtype=tl.float64)
        S += _matrix(B + member * Bn, down, right, V, K)


_leave = Kernel(leave_runs)
_fill = Kernel(fill_slots)


def leaving(course: Course, maps: Summary, seeds: Tensor | None) -> Summary:
    """`Course.leaving` for dense maps on a GPU."""
    A, B = _whole(maps.A), _whole(maps.B)
    out, at = maps.empty(course.runs), course.on(B.device)
    seeds = None if seeds is None else ready(seeds)
    strides = (*A.stride()[:2], *B.stride()[:2], _step(seeds), *out.A.stride()[:2], *out.B.stride()[:2])
    launch = _launch(_leave, course.runs, True, B.shape, strides, (seeds is not None,))
    launch(A, B, B if seeds is None else seeds, out.A, out.B, at.order, at.first, at.seed, at.final)
    return out


def states(course: Course, maps: Summary, seeds: Tensor | None, entering: Tensor | None) -> Tensor:
    """`Course.states` likewise."""
    A, B = _whole(maps.A), _whole(maps.B)
    batch, _, *state = B.shape
    out, at = B.new_empty(batch, course.slots, *state), course.on(B.device)
    seeds = None if seeds is None else ready(seeds)
    enters = (0, 0) if entering is None else entering.stride()[:2]
    strides = (*A.stride()[:2], *B.stride()[:2], _step(seeds), *enters, *out.stride()[:2])
    launch = _launch(_fill, len(at.seed), False, B.shape, strides, (seeds is not None, entering is not None))
    launch(
        A, B, B if seeds is None else seeds, B if entering is None else entering, out,
        at.order, at.first, at.until, at.seed, at.run, at.slot,
    )  # fmt: skip
    return out


@lru_cache(maxsize=4096)
def _launch(
    kernel: Kernel, programs: int, transitions: bool, shape: tuple[int, ...], strides: tuple[int, ...], given: tuple[bool, ...]
) -> Launch:  # fmt: skip
    batch, _, H, K, V = shape
    BC = 16
    blocks = -(-V // BC) + (-(-K // BC) if transitions else 0)
    flags = dict(zip(("SEEDED", "ENTERED"), given, strict=False))
    return kernel.launch((programs, batch * H, blocks), H, *strides, **flags, K=K, V=V, BK=padded(K), BC=BC, warps=8)


def _whole(x: Tensor) -> Tensor:
    """Maps whose numbers lie head after head, row after row, as kernels take them."""
    _, _, _, K, width = x.shape
    return x if x.stride()[2:] == (K * width, width, 1) else x.contiguous()


def _step(seeds: Tensor | None) -> int:
    return 0 if seeds is None else seeds.stride(0)
