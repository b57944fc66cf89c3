"""Tokens that choose among memories, as segments: a memory is one more head, and what it runs over are its tokens.

Mixture of Memories, https://arxiv.org/abs/2502.13685. The tokens of a rank are sorted by the row of the batch, the piece
(`lasp.parallel.layout.Piece`), and the memory that they chose: a *group*. Memories share nothing, so their states travel as
those of heads do, all of them in one exchange.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lasp.kernels import Chain, Course, Dispatch, Recurrence, Segments, Summary
from lasp.parallel.sequence_parallel import SequenceParallel


@dataclass(frozen=True)
class Routed:
    """Which memories a rank's tokens chose, and where that puts them.

    Attributes:
        sp: the ranks and the layout.
        batch: B, rows of the batch.
        memories: M, how many there are to choose from.
        dispatch: the choices, sorted by group.
        counts: how many tokens each group has, on the host.
    """

    sp: SequenceParallel
    batch: int
    memories: int
    dispatch: Dispatch
    counts: tuple[int, ...]
    _plans: dict[int, RoutedPlan] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, chosen: Tensor, memories: int, sp: SequenceParallel) -> Routed:
        """Sort a rank's tokens by what they chose: int64 ``[B, T_local, k]``, from 0 to M − 1."""
        count = chosen.shape[0] * len(sp.layout.pieces(sp.rank)) * memories
        dispatch = Dispatch.of(groups(chosen, sp, memories), count)
        return cls(sp, chosen.shape[0], memories, dispatch, tuple(dispatch.counts.tolist()))

    @property
    def whole(self) -> bool:
        """Whether every row is one document of this rank's: then its memories may start from states, and have final ones."""
        return self.sp.world_size == 1 and self.sp.num_documents == 1

    @property
    def tokens(self) -> int:
        """How many there are, a choice each."""
        return self.dispatch.token.shape[0]

    @property
    def memory_counts(self) -> tuple[int, ...]:
        """How many tokens chose each memory, of this rank's."""
        return tuple(sum(self.counts[memory :: self.memories]) for memory in range(self.memories))

    def by_memory(self, x: Tensor) -> list[Tensor]:
        """Routed tokens ``[1, N, ...]`` by the memory that they chose: M tensors ``[1, N_m, ...]``."""
        if len(self.counts) > self.memories:
            x = x.index_select(1, self._across[0])
        return list(x.split(self.memory_counts, dim=1))

    def together(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse."""
        x = torch.cat(list(parts), dim=1)
        return x.index_select(1, self._across[1]) if len(self.counts) > self.memories else x

    @cached_property
    def group(self) -> Tensor:
        """The group of each place, int64 ``[N]``."""
        counts = self.dispatch.counts
        return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts, output_size=self.tokens)

    @cached_property
    def _across(self) -> tuple[Tensor, Tensor]:
        """The places in the order of the memories, and where each place is in it."""
        order = torch.sort(self.group % self.memories, stable=True).indices
        back = torch.empty_like(order)
        back[order] = torch.arange(self.tokens, device=order.device)
        return order, back

    def plan(self, recurrence: Recurrence) -> RoutedPlan:
        """The segments for a recurrence, made once."""
        size = recurrence.segment_size
        if size not in self._plans:
            self._plans[size] = RoutedPlan(self.sp, self.batch, self.memories, self.counts, size)
        return self._plans[size]


def groups(memories: Tensor, sp: SequenceParallel, count: int) -> Tensor:
    """The group of each choice ``[B · T, k]``, int64, which `lasp.kernels.Dispatch` sorts by.

    Args:
        memories: the memories that the rank's tokens chose, int64 ``[B, T, k]``.
        sp: the ranks and the layout.
        count: M, how many memories there are.
    """
    pieces, device = sp.layout.pieces(sp.rank), memories.device

    def build() -> Tensor:
        lengths = torch.tensor([piece.length for piece in pieces], dtype=torch.long)
        return torch.arange(len(pieces)).repeat_interleave(lengths).to(device)

    row = torch.arange(memories.shape[0], device=device)
    own = row[:, None] * len(pieces) + sp.layout.cached(("piece of each token", sp.rank, device), build)
    return (own.unsqueeze(-1) * count + memories).flatten(0, 1)


class RoutedPlan:
    """A rank's routed tokens as segments, none across a group's boundary: what `lasp.parallel.plan.Plan` is for a layout.

    Args:
        sp: the ranks and the layout.
        batch: B, rows of the batch.
        memories: M.
        counts: how many tokens each group has, ``[B · pieces · M]``.
        segment_size: of how many tokens a segment is at most.

    Attributes:
        segments: the segments of the sorted tokens, in one row.
        forward: how the states go through them; a run of a row and of a memory is a run.
        backward: how the states' gradients do.
    """

    def __init__(self, sp: SequenceParallel, batch: int, memories: int, counts: Sequence[int], segment_size: int):
        pieces, runs = sp.layout.pieces(sp.rank), len(sp.layout.runs_of(sp.rank))
        assert len(counts) == batch * len(pieces) * memories, "a count for each group"
        self.batch, self.memories, self.runs = batch, memories, runs
        lengths: list[int] = []
        forward, backward = [], []
        for group, tokens in enumerate(counts):
            row, piece, memory = (
                group // memories // len(pieces),
                pieces[group // memories % len(pieces)],
                group % memories,
            )
            first = len(lengths)
            lengths += [min(segment_size, tokens - start) for start in range(0, tokens, segment_size)]
            own = tuple(range(first, len(lengths)))
            run = (row * runs + piece.run) * memories + memory
            seed = (row * sp.num_documents + piece.document) * memories + memory
            forward.append(Chain(own, run, seed if piece.opens else None))
            backward.append(Chain(own[::-1], run, seed if piece.closes else None))
        self.segments = Segments(lengths, segment_size)
        self.forward = Course(forward, batch * runs * memories, range(len(lengths)))
        self.backward = Course(backward[::-1], batch * runs * memories, range(len(lengths)))

    def sent(self, leaving: Summary) -> Summary:
        """The maps of runs ``[1, B · R · M, H, ...]`` as those of M · H heads: ``[B, R, M · H, ...]``."""
        H = leaving.B.shape[2]
        A = leaving.A if leaving.A.shape[2] == H else leaving.A.expand(*leaving.A.shape[:2], H)
        return Summary(*(x.reshape(self.batch, self.runs, self.memories * H, *x.shape[3:]) for x in (A, leaving.B)))

    def received(self, states: Tensor) -> Tensor:
        """The inverse, of states."""
        return states.reshape(1, -1, states.shape[2] // self.memories, *states.shape[3:])

    def final_states(self, maps: Summary, seeds: Tensor | None, entering: Tensor) -> Tensor:
        """The memories' final states ``[1, B · M, H, K, V]`` (`Routed.whole`): nothing enters a chain but its seed."""
        return self.forward.leaving(maps, seeds).B

    def initial_gradient(self, maps: Summary, dfinal: Tensor | None, leaving: Tensor) -> Tensor:
        """The gradients of the states that memories start from, likewise."""
        return self.backward.leaving(maps, dfinal).B
