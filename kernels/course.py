"""The order in which summaries compose: a plan made once on the host, and the composition itself.

Along the sequence for the states, from its end to its start for their gradients; among the segments of a device, or among
the runs of all ranks: a `Course` is all of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lasp.kernels import triton
from lasp.kernels.summary import Summary


@dataclass(frozen=True)
class Chain:
    """Maps that follow one another.

    Attributes:
        members: which maps, the first to act first; at least one.
        run: the run that they belong to.
        seed: the state that they start from, by its index: where a document starts (for gradients: ends) that is its own.
            None where it is the state that enters the run.
    """

    members: tuple[int, ...]
    run: int = 0
    seed: int | None = None


@dataclass(frozen=True)
class _Tables:
    """The course on a device. P positions are the members of all chains in turn.

    Attributes:
        order: the map at each position ``[P]``.
        first: the first position of each chain, and P ``[chains + 1]``.
        until: the position after the last whose state is wanted, of each chain ``[chains]``.
        seed: the seed of each chain, −1 for none ``[chains]``.
        run: the run of each chain ``[chains]``.
        final: the last chain of each run ``[runs]``.
        slot: where the state before each position is written to ``[P]``, −1 for nowhere.
        source: for each slot the position before it, or P + its chain where it is the chain's first.
        seeded: the first positions of the chains with a seed, and
        seeds: these seeds.
        reaches: for each step of the doubling, the positions that have one of their own chain that far back.
    """

    order: Tensor
    first: Tensor
    until: Tensor
    seed: Tensor
    run: Tensor
    final: Tensor
    slot: Tensor
    source: Tensor
    seeded: Tensor
    seeds: Tensor
    reaches: tuple[Tensor, ...]


class Course:
    """Chains of maps, what they compose to, and the states between them.

    Args:
        chains: the maps that are looked at, each in one of them. The last chain of a run says what leaves the run.
        runs: how many runs there are.
        slots: the maps before which the state is wanted, in the order in which it is; every map when None.
    """

    def __init__(self, chains: Sequence[Chain], runs: int, slots: Sequence[int] | None = None):
        self.runs = runs
        members = [m for chain in chains for m in chain.members]
        wanted = range(len(members)) if slots is None else slots
        at = {member: position for position, member in enumerate(members)}
        self.slots = len(wanted)
        self.longest = max((len(chain.members) for chain in chains), default=0)
        of = [c for c, chain in enumerate(chains) for _ in chain.members]
        first = [0]
        for chain in chains:
            first.append(first[-1] + len(chain.members))
        final = {chain.run: c for c, chain in enumerate(chains)}
        slot = [-1] * len(members)
        until = first[:-1]
        source = []
        for i, member in enumerate(wanted):
            position = at[member]
            chain_of = of[position]
            slot[position] = i
            until[chain_of] = max(until[chain_of], position + 1)
            source.append(position - 1 if position != first[chain_of] else len(members) + chain_of)
        back = [position - first[of[position]] for position in range(len(members))]
        steps = [1 << i for i in range(max(self.longest - 1, 0).bit_length())]
        seeded = [(first[c], chain.seed) for c, chain in enumerate(chains) if chain.seed is not None]
        self._host = _Tables(
            order=_index(members),
            first=_index(first),
            until=_index(until),
            seed=_index([-1 if chain.seed is None else chain.seed for chain in chains]),
            run=_index([chain.run for chain in chains]),
            final=_index([final[run] for run in range(runs)]),
            slot=_index(slot),
            source=_index(source),
            seeded=_index([position for position, _ in seeded]),
            seeds=_index([seed for _, seed in seeded]),
            reaches=tuple(torch.tensor([b >= step for b in back[step:]], dtype=torch.bool) for step in steps),
        )
        self._in_order = members == list(range(len(members)))
        self._tables: dict[torch.device, _Tables] = {}

    def on(self, device: torch.device) -> _Tables:
        """The tables on a device, copied there once."""
        if device not in self._tables:
            tables: dict[str, Any] = vars(self._host)
            reaches = tuple(mask.to(device) for mask in tables["reaches"])
            indices = {name: x.to(device) for name, x in tables.items() if name != "reaches"}
            self._tables[device] = _Tables(**indices, reaches=reaches)
        return self._tables[device]

    def leaving(self, maps: Summary, seeds: Tensor | None) -> Summary:
        """For each run the map from the state that enters it to the state that leaves it.

        Args:
            maps: every map.
            seeds: the states that chains start from ``[B, N, H, K, V]``; zero when None.
        """
        if not self.longest:
            return maps.empty(self.runs)
        if maps.A.dim() < 5 and triton.serves(maps.B):
            from lasp.kernels.triton.scan import leaving

            return leaving(self, maps, seeds)
        at = self.on(maps.B.device)
        if seeds is not None:
            seeds = seeds.index_select(1, at.seeds)
        return self._composed(maps, at.seeded, seeds).select(at.first[1:].index_select(0, at.final) - 1)

    def states(self, maps: Summary, seeds: Tensor | None, entering: Tensor | None) -> Tensor:
        """The state before each slot's member ``[B, slots, H, K, V]``.

        Args:
            maps: every map.
            seeds: as above.
            entering: what enters the runs ``[B, runs, H, K, V]``; zero when None.
        """
        if not self.longest:
            return maps.empty(self.slots).B
        if maps.A.dim() < 5 and triton.serves(maps.B):
            from lasp.kernels.triton.scan import states

            return states(self, maps, seeds, entering)
        at = self.on(maps.B.device)
        nothing = torch.zeros_like(maps.B[:, :1])
        # Whatever a chain starts from: nothing, a seed, or what enters its run.
        starts = torch.cat([nothing, *(x.to(nothing.dtype) for x in (seeds, entering) if x is not None)], dim=1)
        count = 0 if seeds is None else seeds.shape[1]
        seed = at.seed + 1 if count else torch.zeros_like(at.seed)
        start = torch.where(at.seed < 0, 0 if entering is None else 1 + count + at.run, seed)
        begun = starts.index_select(1, start)
        after = self._composed(maps, at.first[:-1], begun).B
        return torch.cat([after, begun], dim=1).index_select(1, at.source)

    def _composed(self, maps: Summary, first: Tensor, starts: Tensor | None) -> Summary:
        """Each position's map after all those before it in its chain, when states ``[B, m, H, K, V]`` enter m positions."""
        at = self.on(maps.B.device)
        if not self._in_order or len(at.order) < maps.count:
            maps = maps.select(at.order)
        A, B = maps.A, maps.B
        if len(first):
            if starts is not None:
                begun = Summary(A, B).select(first).apply(starts.to(B.dtype))
                B = B.index_copy(1, first, begun)
            A = A.index_fill(1, first, 0)
        for reach in at.reaches:
            step = B.shape[1] - len(reach)
            here, back = Summary(A[:, step:], B[:, step:]), Summary(A[:, :-step], B[:, :-step])
            joined = back.compose(here)
            A, B = (
                torch.cat([old[:, :step], torch.where(_along(reach, new), new, old[:, step:])], dim=1)
                for old, new in ((A, joined.A), (B, joined.B))
            )
        return Summary(A, B)


def _index(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.long)


def _along(mask: Tensor, like: Tensor) -> Tensor:
    return mask.view(1, -1, *([1] * (like.dim() - 2)))
