"""The order in which summaries compose: a plan made once on the host, and the composition itself.

Along the sequence for the states, from its end to its start for their gradients; among the segments of a device, or among
the runs of all ranks: a `Course` is all of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lasp.kernels import triton
from lasp.kernels.summary import Summary, dense_kernels


@dataclass(frozen=True)
class Chain:
    """Maps that follow one another.

    Attributes:
        members: which maps, the first to act first.
        run: the run that they belong to.
        seed: the state that they start from, by its index: where a document starts (for gradients: ends) that is its own.
            None where it is the state that enters the run.
    """

    members: tuple[int, ...]
    run: int = 0
    seed: int | None = None


@dataclass(frozen=True)
class Itinerary:
    """Chains of maps as tables on a device, int64. P positions are the members of all chains in turn.

    Where only the device knows how many members there are, the tables of positions are as long as they may get.

    Attributes:
        order: the map at each position ``[P]``.
        first: the first position of each chain, and how many there are ``[chains + 1]``.
        until: the position after the last whose state is wanted, of each chain ``[chains]``.
        seed: the seed of each chain, −1 for none ``[chains]``.
        run: the run of each chain ``[chains]``.
        final: the last chain of each run ``[runs]``.
        slot: where the state before each position is written to ``[P]``, −1 for nowhere.
        enters: the run of which what enters reaches each slot ``[slots]``, −1 after a seed.
    """

    order: Tensor
    first: Tensor
    until: Tensor
    seed: Tensor
    run: Tensor
    final: Tensor
    slot: Tensor
    enters: Tensor


@dataclass(frozen=True)
class _Walk:
    """A chain as the host walks it: its members, of how many the state is wanted, and where that goes, −1 for nowhere."""

    members: Sequence[int]
    wanted: int
    slots: Sequence[int]
    run: int
    seed: int | None


class Course:
    """Chains of maps, what they compose to, and the states between them.

    Args:
        chains: the maps that are looked at, each in one of them. The last chain of a run says what leaves the run.
        runs: how many runs there are.
        slots: the maps before which the state is wanted, in the order in which it is; every map when None.
    """

    def __init__(self, chains: Sequence[Chain], runs: int, slots: Sequence[int] | None = None):
        members = [m for chain in chains for m in chain.members]
        wanted = range(len(members)) if slots is None else slots
        slot_of = {member: slot for slot, member in enumerate(wanted)}
        first = [0]
        until = []
        for chain in chains:
            until.append(first[-1] + max((i + 1 for i, m in enumerate(chain.members) if m in slot_of), default=0))
            first.append(first[-1] + len(chain.members))
        final = {chain.run: c for c, chain in enumerate(chains)}
        reached = {member: chain.run for chain in chains if chain.seed is None for member in chain.members}
        self._hold(
            Itinerary(
                order=_index(members),
                first=_index(first),
                until=_index(until),
                seed=_index([-1 if chain.seed is None else chain.seed for chain in chains]),
                run=_index([chain.run for chain in chains]),
                final=_index([final[run] for run in range(runs)]),
                slot=_index([slot_of.get(member, -1) for member in members]),
                enters=_index([reached.get(member, -1) for member in wanted]),
            )
        )

    @classmethod
    def along(cls, itinerary: Itinerary) -> Course:
        """The course that tables describe, which a device has made: it is not waited for where kernels compose the maps."""
        course = cls.__new__(cls)
        course._hold(itinerary)
        return course

    def _hold(self, itinerary: Itinerary) -> None:
        self.runs, self.slots = len(itinerary.final), len(itinerary.enters)
        #: Whether there is any map.
        self.moves = len(itinerary.order) > 0
        self._given = itinerary
        self._on = {itinerary.order.device: itinerary}

    @cached_property
    def _walks(self) -> list[_Walk]:
        order, first, until, seeds, runs, slots = (
            x.tolist()
            for x in (getattr(self._given, name) for name in ("order", "first", "until", "seed", "run", "slot"))
        )
        bounds = zip(first, first[1:], until, strict=False)
        return [
            _Walk(order[begin:end], far - begin, slots[begin:end], run, None if seed < 0 else seed)
            for (begin, end, far), run, seed in zip(bounds, runs, seeds, strict=True)
        ]

    @cached_property
    def _last(self) -> list[_Walk]:
        """The last chain of each run."""
        return [self._walks[chain] for chain in self._given.final.tolist()]

    def on(self, device: torch.device) -> Itinerary:
        """The tables on a device, copied there once."""
        if device not in self._on:
            self._on[device] = Itinerary(**{name: x.to(device) for name, x in vars(self._given).items()})
        return self._on[device]

    def leaving(self, maps: Summary, seeds: Tensor | None) -> Summary:
        """For each run the map from the state that enters it to the state that leaves it.

        Args:
            maps: every map.
            seeds: the states that chains start from ``[B, N, H, K, V]``; zero when None.
        """
        scan = _scan(maps)
        if scan is not None and self.moves:
            return scan.leaving(self, maps, seeds)
        out = maps.empty(self.runs)
        for run, chain in enumerate(self._last):
            A, B = out.A[:, run], out.B[:, run]
            state = None if chain.seed is None else _state(seeds, chain.seed, B)
            if chain.seed is not None:
                A.zero_()
            elif chain.members:
                A.copy_(maps.A[:, chain.members[0]])
            else:
                A.copy_(_nothing_done(A))
            if not chain.members:
                B.zero_() if state is None else B.copy_(state)
                continue
            first, *rest = chain.members
            _after(maps, first, state, B)
            for member in rest:
                if chain.seed is None:
                    step = maps.A[:, member]
                    A.copy_(_then(A, step))
                _after(maps, member, B, B)
        return out

    def ahead(self, maps: Summary, seeds: Tensor | None) -> Ahead:
        """`leaving`, and what makes `states` of what enters once it is there."""
        scan = _scan(maps)
        if scan is not None and self.moves:
            ahead: Ahead = scan.ahead(self, maps, seeds)
            return ahead
        return Ahead(self, maps, seeds, self.leaving(maps, seeds))

    def states(self, maps: Summary, seeds: Tensor | None, entering: Tensor | None) -> Tensor:
        """The state before each slot's member ``[B, slots, H, K, V]``.

        Args:
            maps: every map.
            seeds: as above.
            entering: what enters the runs ``[B, runs, H, K, V]``; zero when None.
        """
        scan = _scan(maps)
        if scan is not None and self.moves:
            return scan.states(self, maps, seeds, entering)
        batch, _, *state_shape = maps.B.shape
        out = maps.B.new_empty(batch, self.slots, *state_shape)
        for chain in self._walks:
            source, which = (entering, chain.run) if chain.seed is None else (seeds, chain.seed)
            state = _state(source, which, out)
            for i in range(chain.wanted):
                place = None if chain.slots[i] < 0 else out[:, chain.slots[i]]
                if i > 0:
                    state = _after(maps, chain.members[i - 1], state, place)
                elif place is not None:
                    place.zero_() if state is None else place.copy_(state)
        return out


@dataclass
class Ahead:
    """Maps composed along a course before it is known what enters the runs.

    Attributes:
        course: the chains.
        maps: every map.
        seeds: the states that chains start from.
        leaving: for each run the map from the state that enters it to the state that leaves it.
    """

    course: Course
    maps: Summary
    seeds: Tensor | None
    leaving: Summary

    def states(self, entering: Tensor | None) -> Tensor:
        """`Course.states`, to be asked for once."""
        return self.course.states(self.maps, self.seeds, entering)


def _scan(maps: Summary) -> Any:
    """The module whose kernels compose such maps: its `leaving`, `ahead` and `states` are those of a course."""
    if maps.A.dim() == 5 or not triton.serves(maps.B):
        return dense_kernels(maps)
    from lasp.kernels.triton import scan

    return scan


def _state(states: Tensor | None, which: int, like: Tensor) -> Tensor | None:
    """One of the states, of the right dtype; None for zero."""
    return None if states is None else states[:, which].to(like.dtype)


def _after(maps: Summary, member: int, state: Tensor | None, out: Tensor | None) -> Tensor:
    """The state after one of the maps, when `state` is that before it (None for zero); written to `out` if there is one."""
    A, B = maps.A[:, member], maps.B[:, member]
    if state is None:
        return B if out is None else out.copy_(B)
    if A.dim() == state.dim():
        # On a GPU a product of float32 may be of less, by a setting that is not ours.
        after = (A.double() @ state.double() + B).to(B.dtype) if A.is_cuda else A @ state + B
        return after if out is None else out.copy_(after)
    return torch.addcmul(B, A[(...,) + (None,) * (state.dim() - A.dim())], state, out=out)


def _nothing_done(A: Tensor) -> Tensor:
    """The transition of no token, like A: ``[B, H]``, ``[B, H, K]`` or ``[B, H, K, K]``."""
    if A.dim() < 4:
        return torch.ones_like(A)
    return torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).expand_as(A)


def _then(A: Tensor, step: Tensor) -> Tensor:
    """One transition after another."""
    if A.dim() < 4:
        return step * A
    return (step.double() @ A.double()).to(A.dtype) if A.is_cuda else step @ A


def _index(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.long)
