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
from lasp.kernels.summary import Summary, act


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
        seed: the seed of each chain, −1 for none.
        whole: the run that each chain's composition is written to, −1 for none.
        slot: where the state before each position is written to ``[P]``, −1 for nowhere.
        run: the run of each slot.
        source: for each slot the position before it, or P + 0 for the run's own state, or P + 1 + the seed.
        last: the position at which each run's composition stands.
        seeded: the first positions of the chains with a seed, and
        seeds: these seeds.
        reaches: for each step of the doubling, the positions that have one of their own chain that far back.
    """

    order: Tensor
    first: Tensor
    seed: Tensor
    whole: Tensor
    slot: Tensor
    run: Tensor
    source: Tensor
    last: Tensor
    seeded: Tensor
    seeds: Tensor
    reaches: tuple[Tensor, ...]


class Course:
    """Chains of maps, their compositions, and the states between them.

    Args:
        chains: every map in one of them. The last chain of a run says what leaves the run.
        runs: how many runs there are; 0 where what leaves them is not wanted.
        slots: the maps before which the state is wanted, in the order in which it is; every map when None.
    """

    def __init__(self, chains: Sequence[Chain], runs: int, slots: Sequence[int] | None = None):
        self.runs = runs
        #: Whether nothing that enters a run is ever read.
        self.closed = all(chain.seed is not None for chain in chains)
        self._identity = [m for chain in chains for m in chain.members]
        members = self._identity
        wanted = range(len(members)) if slots is None else slots
        at = {member: position for position, member in enumerate(members)}
        self.slots = len(wanted)
        self.longest = max((len(chain.members) for chain in chains), default=0)
        of = [c for c, chain in enumerate(chains) for _ in chain.members]
        first = [0]
        for chain in chains:
            first.append(first[-1] + len(chain.members))
        last_of_run = {chain.run: c for c, chain in enumerate(chains)}
        slot = [-1] * len(members)
        source, run = [], []
        for i, member in enumerate(wanted):
            position = at[member]
            slot[position] = i
            chain = chains[of[position]]
            run.append(chain.run)
            if position != first[of[position]]:
                source.append(position - 1)
            else:
                source.append(len(members) + (0 if chain.seed is None else 1 + chain.seed))
        back = [position - first[of[position]] for position in range(len(members))]
        steps = [1 << i for i in range(max(self.longest - 1, 0).bit_length())]
        self._host = _Tables(
            order=_index(members),
            first=_index(first),
            seed=_index([-1 if chain.seed is None else chain.seed for chain in chains]),
            whole=_index(
                [
                    chain.run if chain.run < runs and last_of_run[chain.run] == c else -1
                    for c, chain in enumerate(chains)
                ]
            ),
            slot=_index(slot),
            run=_index(run),
            source=_index(source),
            last=_index([first[last_of_run[r] + 1] - 1 for r in range(runs)]),
            seeded=_index([first[c] for c, chain in enumerate(chains) if chain.seed is not None]),
            seeds=_index([chain.seed for chain in chains if chain.seed is not None]),
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

    def compose(self, maps: Summary, seeds: Tensor | None) -> tuple[Summary, Summary]:
        """Compose the maps of every chain.

        Args:
            maps: every map.
            seeds: the states that chains start from ``[B, N, H, K, V]``; zero when None.

        Returns:
            For each slot the map from the state that enters the run to the state before the slot's member; and for each run
            the map from the state that enters it to the state that leaves it.
        """
        if not self.longest:
            return maps.empty(self.slots), maps.empty(self.runs)
        if maps.A.dim() < 5 and triton.serves(maps.B):
            from lasp.kernels.triton.scan import compose

            return compose(self, maps, seeds)
        at = self.on(maps.B.device)
        if not self._in_order:
            maps = maps.select(at.order)
        starts = torch.zeros_like(maps.B[:, :1]) if seeds is None else seeds.to(maps.B.dtype)
        A, B = maps.A, maps.B
        if len(at.seeded):
            if seeds is not None:
                B = B.index_add(1, at.seeded, act(A.index_select(1, at.seeded), starts.index_select(1, at.seeds)))
            A = A.index_fill(1, at.seeded, 0)
        for reach in at.reaches:
            step = B.shape[1] - len(reach)
            here, back = Summary(A[:, step:], B[:, step:]), Summary(A[:, :-step], B[:, :-step])
            joined = back.compose(here)
            A, B = (
                torch.cat([old[:, :step], torch.where(_along(reach, new), new, old[:, step:])], dim=1)
                for old, new in ((A, joined.A), (B, joined.B))
            )
        # The states before the slots stand in: every position's end, the run's own state, the seeds.
        one = (
            torch.ones_like(A[:, :1])
            if A.dim() < 5
            else torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).expand_as(A[:, :1])
        )
        kinds = [A, one, torch.zeros_like(A[:, :1]).expand(-1, starts.shape[1], *A.shape[2:])]
        source = at.source if seeds is not None else at.source.clamp(max=A.shape[1] + 1)
        before = Summary(
            torch.cat(kinds, dim=1).index_select(1, source),
            torch.cat([B, torch.zeros_like(B[:, :1]), starts], dim=1).index_select(1, source),
        )
        return before, Summary(A, B).select(at.last)

    def enter(self, before: Summary, entering: Tensor | None) -> Tensor:
        """The state before each slot ``[B, slots, H, K, V]`` when `entering` ``[B, R, H, K, V]``, zero if None, enters."""
        if entering is None or self.closed:
            return before.B
        if before.A.dim() < 5 and triton.serves(before.B):
            from lasp.kernels.triton.scan import enter

            return enter(self, before, entering)
        return before.apply(entering.index_select(1, self.on(entering.device).run))


def _index(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.long)


def _along(mask: Tensor, like: Tensor) -> Tensor:
    return mask.view(1, -1, *([1] * (like.dim() - 2)))
