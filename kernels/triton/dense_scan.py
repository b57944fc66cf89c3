"""The composition of dense maps on a GPU: `lasp.kernels.course` for transitions that are matrices.

Maps are float32, and what goes along a chain of them float64: Hopper's tensor cores multiply that too, and sums of float32
that they make lose a little of every product in one direction, which 256 maps add up to more than float32's own rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.course import Ahead, Course
from lasp.kernels.summary import Summary
from lasp.kernels.triton.language import add_product
from lasp.kernels.triton.launch import Kernel, Launch, ready
from lasp.kernels.triton.tiling import padded

#: The widest K whose transitions fit a processor.
WIDEST = 128


@triton.jit
def _matrix(x, down, right, WIDTH: tl.constexpr, K: tl.constexpr):
    """A tile of a ``[K, WIDTH]`` matrix, zero beyond it."""
    inside = (down < K)[:, None] & (right < WIDTH)[None, :]
    return tl.load(x + down[:, None] * WIDTH + right[None, :], mask=inside, other=0.0)


# Summaries may be parts of rows, which begin anywhere.
@triton.jit(do_not_specialize=["H"], do_not_specialize_on_alignment=["A", "B", "seeds", "entering", "A_out", "B_out"])
def walk_chains(
    A,
    B,
    seeds,
    entering,
    before,
    states,
    A_out,
    B_out,
    order,
    first,
    until,
    seed_of,
    run_of,
    slot_of,
    final,
    H,
    Ab: tl.int64,
    An: tl.int64,
    Bb: tl.int64,
    Bn: tl.int64,
    Sb: tl.int64,
    Eb: tl.int64,
    En: tl.int64,
    n: tl.int64,
    Wb: tl.int64,
    Wn: tl.int64,
    Xb: tl.int64,
    Xn: tl.int64,
    SEEDED: tl.constexpr,
    ENTERED: tl.constexpr,
    AHEAD: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
):
    """`Course.states`, in n slots. Grid: (chains, B · H, blocks of BC columns of the state). Strides are those of b, n.

    AHEAD: nothing enters; the slots have the states that seeds and members make, and ``before: [B, n, H, K, K]`` what the
    members make of whatever will enter, and A_out and B_out have `Course.leaving`. The blocks of those columns come first.
    """
    chain = tl.program_id(0)
    batch, head = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    own: tl.constexpr = (K + BC - 1) // BC if AHEAD else 0
    of_state = tl.program_id(2) >= own
    down, across = tl.arange(0, BK), tl.arange(0, BC)
    right = (tl.program_id(2) - tl.where(of_state, own, 0)) * BC + across
    run, seed = tl.load(run_of + chain), tl.load(seed_of + chain)
    # What the state starts from is its seed, what enters, or nothing; its transition, from where there is no seed.
    here = ((down[:, None] == right[None, :]) & (seed < 0)) & (tl.program_id(2) < own)
    S = tl.where(here, 1.0, 0.0).to(tl.float64)
    inside = (down < K)[:, None] & (right < V)[None, :]
    if SEEDED:
        at = seeds + batch * Sb + (tl.maximum(seed, 0) * H + head) * (K * V) + down[:, None] * V + right[None, :]
        S += tl.load(at, mask=inside & of_state & (seed >= 0), other=0.0)
    if ENTERED:
        at = entering + batch * Eb + run * En + head * (K * V) + down[:, None] * V + right[None, :]
        S += tl.load(at, mask=inside & (seed < 0), other=0.0)
    A += batch * Ab + head * (K * K)
    B += batch * Bb + head * (K * V) + down[:, None] * V + right[None, :]
    states += (batch * n * H + head) * (K * V) + down[:, None] * V + right[None, :]
    before += (batch * n * H + head) * (K * K) + down[:, None] * K + right[None, :]
    in_transition = (down < K)[:, None] & (right < K)[None, :] & (tl.program_id(2) < own)
    inside = inside & of_state
    last = tl.load(first + chain + 1) if AHEAD else tl.load(until + chain)
    for position in tl.range(tl.load(first + chain), last, num_stages=1):
        member = tl.load(order + position)
        slot = tl.load(slot_of + position)
        tl.store(states + slot * (H * K * V), S.to(tl.float32), mask=inside & (slot >= 0))
        if AHEAD:
            tl.store(before + slot * (H * K * K), S.to(tl.float32), mask=in_transition & (slot >= 0))
        more = tl.load(B + member * Bn, mask=inside, other=0.0)
        S = (
            tl.dot(_matrix(A + member * An, down, tl.arange(0, BK), K, K).to(tl.float64), S, out_dtype=tl.float64)
            + more
        )
    if AHEAD:
        ending = tl.load(final + run) == chain
        at = B_out + batch * Xb + run * Xn + head * (K * V) + down[:, None] * V + right[None, :]
        tl.store(at, S.to(tl.float32), mask=inside & ending)
        at = A_out + batch * Wb + run * Wn + head * (K * K) + down[:, None] * K + right[None, :]
        tl.store(at, S.to(tl.float32), mask=in_transition & ending)


@triton.jit(
    do_not_specialize=["H"],
    do_not_specialize_on_alignment=["A", "B", "before_A", "before_B", "out_A", "out_B", "which"],
)
def follow(
    A,
    B,
    before_A,
    before_B,
    out_A,
    out_B,
    which,
    H,
    Ab: tl.int64,
    An: tl.int64,
    Bb: tl.int64,
    Bn: tl.int64,
    Pb: tl.int64,
    Pn: tl.int64,
    Qb: tl.int64,
    Qn: tl.int64,
    Xb: tl.int64,
    Xn: tl.int64,
    Yb: tl.int64,
    Yn: tl.int64,
    CHOSEN: tl.constexpr,
    TRANSITION: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
):
    """Each map after the one before it: ``A · before_B + B``, and with TRANSITION ``A · before_A``. Strides are those of b, n.

    CHOSEN: before map i comes ``which[i]``; if that is negative nothing does, and nothing is written.
    Grid: (maps, B · H, blocks of BC columns: those of the transition come first).
    """
    member = tl.program_id(0).to(tl.int64)
    source = member
    if CHOSEN:
        source = tl.load(which + member)
    if source >= 0:
        batch, head = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
        own: tl.constexpr = (K + BC - 1) // BC if TRANSITION else 0
        down, across = tl.arange(0, BK), tl.arange(0, BK)
        A += batch * Ab + member * An + head * (K * K)
        if tl.program_id(2) < own:
            right = tl.program_id(2) * BC + tl.arange(0, BC)
            inside = (down < K)[:, None] & (right < K)[None, :]
            place = head * (K * K) + down[:, None] * K + right[None, :]
            S = tl.load(before_A + batch * Pb + source * Pn + place, mask=inside, other=0.0)
            moved = tl.dot(_matrix(A, down, across, K, K).to(tl.float64), S.to(tl.float64), out_dtype=tl.float64)
            tl.store(out_A + batch * Xb + member * Xn + place, moved.to(tl.float32), mask=inside)
        else:
            right = (tl.program_id(2) - own) * BC + tl.arange(0, BC)
            inside = (down < K)[:, None] & (right < V)[None, :]
            place = head * (K * V) + down[:, None] * V + right[None, :]
            S = tl.load(before_B + batch * Qb + source * Qn + place, mask=inside, other=0.0)
            more = tl.load(B + batch * Bb + member * Bn + place, mask=inside, other=0.0)
            if CHOSEN:
                # Many maps at once, and no chain of them: three parts of tf32 will do.
                step = _matrix(A, down, across, K, K)
                made = add_product(more, step, S.to(tl.float32), "tf32x3")
            else:
                made = (
                    tl.dot(_matrix(A, down, across, K, K).to(tl.float64), S.to(tl.float64), out_dtype=tl.float64) + more
                )
            tl.store(out_B + batch * Yb + member * Yn + place, made.to(tl.float32), mask=inside)


_walk = Kernel(walk_chains)
_follow = Kernel(follow)


@dataclass
class DenseAhead(Ahead):
    """`Course.ahead` for dense maps on a GPU: what follows when it is known what enters is no chain of products.

    Attributes:
        before: the transitions to each slot ``[B, slots, H, K, K]``.
        made: the states in slots that nothing enters.
    """

    before: Tensor
    made: Tensor

    def states(self, entering: Tensor | None) -> Tensor:
        if entering is not None:
            _followed(self.before, self.made, None, entering, None, self.made, self.course.on(entering.device).enters)
        return self.made


def ahead(course: Course, maps: Summary, seeds: Tensor | None) -> DenseAhead:
    """`Course.ahead` for dense maps on a GPU."""
    batch, _, H, K, _ = maps.B.shape
    before = maps.B.new_empty(batch, course.slots, H, K, K)
    leaving = maps.empty(course.runs)
    states = _walked(course, maps, seeds, None, before, leaving)
    return DenseAhead(course, maps, seeds, leaving, before, states)


def leaving(course: Course, maps: Summary, seeds: Tensor | None) -> Summary:
    """`Course.leaving` for dense maps on a GPU."""
    return ahead(course, maps, seeds).leaving


def states(course: Course, maps: Summary, seeds: Tensor | None, entering: Tensor | None) -> Tensor:
    """`Course.states` likewise."""
    return _walked(course, maps, seeds, entering, None, None)


def compose(first: Summary, then: Summary) -> Summary:
    """`Summary.compose` likewise."""
    out = first.empty(first.count)
    _followed(then.A, then.B, first.A, first.B, out.A, out.B, None)
    return out


def apply(maps: Summary, state: Tensor) -> Tensor:
    """`Summary.apply` likewise."""
    out = maps.B.new_empty(maps.B.shape)
    _followed(maps.A, maps.B, None, state, None, out, None)
    return out


def _followed(
    A: Tensor, B: Tensor, before_A: Tensor | None, before_B: Tensor, out_A: Tensor | None, out_B: Tensor, which: Tensor | None
) -> None:  # fmt: skip
    """`follow`; without `before_A` of states alone."""
    A, B, before_B = _whole(A), _whole(B), _whole(before_B)
    P, X = before_B if before_A is None else _whole(before_A), out_B if out_A is None else out_A
    strides = tuple(step for x in (A, B, P, before_B, X, out_B) for step in x.stride()[:2])
    launch = _following(B.shape, strides, which is not None, before_A is not None)
    launch(A, B, P, before_B, X, out_B, A if which is None else which)


def _walked(
    course: Course, maps: Summary, seeds: Tensor | None, entering: Tensor | None, before: Tensor | None, leaving: Summary | None
) -> Tensor:  # fmt: skip
    A, B, at = _whole(maps.A), _whole(maps.B), course.on(maps.B.device)
    batch, _, *state = B.shape
    out = B.new_empty(batch, course.slots, *state)
    seeds = None if seeds is None else ready(seeds)
    entering = None if entering is None else _whole(entering)
    strides = (
        *A.stride()[:2], *B.stride()[:2], 0 if seeds is None else seeds.stride(0),
        *((0, 0) if entering is None else entering.stride()[:2]), course.slots,
        *((0, 0, 0, 0) if leaving is None else (*leaving.A.stride()[:2], *leaving.B.stride()[:2])),
    )  # fmt: skip
    given = (seeds is not None, entering is not None, before is not None)
    launch = _walking(len(at.seed), B.shape, strides, given)
    launch(
        A, B, B if seeds is None else seeds, B if entering is None else entering, out if before is None else before, out,
        out if leaving is None else leaving.A, out if leaving is None else leaving.B,
        at.order, at.first, at.until, at.seed, at.run, at.slot, at.final,
    )  # fmt: skip
    return out


@lru_cache(maxsize=4096)
def _walking(chains: int, shape: tuple[int, ...], strides: tuple[int, ...], given: tuple[bool, bool, bool]) -> Launch:
    batch, _, H, K, V = shape
    flags = dict(zip(("SEEDED", "ENTERED", "AHEAD"), given, strict=True))
    # As many columns as let all programs run at once.
    BC = 32 if given[2] else 16
    blocks = -(-V // BC) + (-(-K // BC) if given[2] else 0)
    return _walk.launch((chains, batch * H, blocks), H, *strides, **flags, K=K, V=V, BK=padded(K), BC=BC, warps=8)


@lru_cache(maxsize=4096)
def _following(shape: tuple[int, ...], strides: tuple[int, ...], chosen: bool, transition: bool) -> Launch:
    batch, count, H, K, V = shape
    # Few maps are cut finer, so that they fill the device.
    BC = min(64 if count > 4 else 32, padded(V))
    blocks = -(-V // BC) + (-(-K // BC) if transition else 0)
    return _follow.launch(
        (count, batch * H, blocks), H, *strides,
        CHOSEN=chosen, TRANSITION=transition, K=K, V=V, BK=padded(K), BC=BC, warps=8,
    )  # fmt: skip


def _whole(x: Tensor) -> Tensor:
    """Maps and states whose numbers lie head after head, row after row, as kernels take them."""
    _, _, _, K, width = x.shape
    return x if x.stride()[2:] == (K * width, width, 1) else x.contiguous()
