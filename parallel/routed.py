"""Tokens that choose among memories, as segments: a memory is one more head, and what it runs over are its tokens.

Mixture of Memories, https://arxiv.org/abs/2502.13685. The tokens of a rank are sorted by the memory that they chose, the row
of the batch, and the piece (`lasp.parallel.layout.Piece`): a *group*. Memories share nothing, so their states travel as those
of heads do, all of them in one exchange. How many tokens chose a memory is known to the device alone, and nothing waits for
it: shapes depend on how many tokens there are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lasp.kernels import Course, Cut, Dispatch, Groups, Itinerary, Recurrence, Segments, Summary
from lasp.kernels.convolution import Pieces
from lasp.parallel.sequence_parallel import SequenceParallel


@dataclass(frozen=True)
class Routed:
    """Which memories a rank's tokens chose, and where that puts them.

    Attributes:
        sp: the ranks and the layout.
        batch: B, rows of the batch.
        memories: M, how many there are to choose from.
        dispatch: the choices, sorted by group.
    """

    sp: SequenceParallel
    batch: int
    memories: int
    dispatch: Dispatch
    _plans: dict[int, RoutedPlan] = field(default_factory=dict, compare=False, repr=False)
    _pieces: dict[int, Pieces] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, chosen: Tensor, memories: int, sp: SequenceParallel) -> Routed:
        """Sort a rank's tokens by what they chose: int64 ``[B, T_local, k]``, from 0 to M − 1."""
        count = chosen.shape[0] * len(sp.layout.pieces(sp.rank)) * memories
        return cls(sp, chosen.shape[0], memories, Dispatch.of(groups(chosen, sp), count))

    @property
    def whole(self) -> bool:
        """Whether every row is one document of this rank's: then its memories may start from states, and have final ones."""
        return self.sp.world_size == 1 and self.sp.num_documents == 1

    @property
    def tokens(self) -> int:
        """How many there are, a choice each."""
        return self.dispatch.token.shape[0]

    @cached_property
    def of_memories(self) -> Groups:
        """Which places are which memory's: they stand together, memory after memory."""
        return Groups(self.dispatch.counts.view(self.memories, -1).sum(1), self.tokens)

    def plan(self, recurrence: Recurrence) -> RoutedPlan:
        """The segments for a recurrence, made once."""
        size = recurrence.segment_size
        if size not in self._plans:
            self._plans[size] = RoutedPlan(self, size)
        return self._plans[size]

    def pieces(self, reach: int) -> Pieces:
        """The groups for a convolution that reaches back over as many tokens, made once."""
        if reach not in self._pieces:
            self._pieces[reach] = Pieces.counted(self.dispatch.counts, reach, self.tokens)
        return self._pieces[reach]


def groups(memories: Tensor, sp: SequenceParallel) -> Tensor:
    """The group of each choice ``[B · T, k]``, int64, which `lasp.kernels.Dispatch` sorts by.

    Args:
        memories: the memories that the rank's tokens chose, int64 ``[B, T, k]``.
        sp: the ranks and the layout.
    """
    pieces, device = sp.layout.pieces(sp.rank), memories.device

    def build() -> Tensor:
        lengths = torch.tensor([piece.length for piece in pieces], dtype=torch.long)
        return torch.arange(len(pieces)).repeat_interleave(lengths).to(device)

    row = torch.arange(memories.shape[0], device=device)
    own = row[:, None] * len(pieces) + sp.layout.cached(("piece of each token", sp.rank, device), build)
    return (memories * (memories.shape[0] * len(pieces)) + own.unsqueeze(-1)).flatten(0, 1)


class RoutedPlan:
    """A rank's routed tokens as segments, none across a group's boundary: what `lasp.parallel.plan.Plan` is for a layout.

    Args:
        routed: how the tokens are routed.
        segment_size: of how many tokens a segment is at most.

    Attributes:
        segments: the segments of the sorted tokens, in one row.
        forward: how the states go through them; a run of a row and of a memory is a run.
        backward: how the states' gradients do.
    """

    def __init__(self, routed: Routed, segment_size: int):
        counts = routed.dispatch.counts
        self.batch, self.memories = routed.batch, routed.memories
        self.runs = len(routed.sp.layout.runs_of(routed.sp.rank))
        cut = Cut.of(counts, segment_size, routed.tokens)
        self.segments = Segments.at(
            torch.cat([cut.start, counts.new_full((1,), routed.tokens)]), segment_size, routed.tokens
        )
        chains = _Chains.of(routed.sp, routed.batch, routed.memories, counts.device)
        segment = torch.arange(cut.count, device=counts.device)
        # From the last segment to the first; empty ones stand after all others here too.
        back, first_back = (cut.first[-1] - 1 - segment).clamp(min=0), cut.first[-1] - cut.first.flip(0)
        self.forward = _course(
            segment, cut.first, chains.opens, chains.run, chains.final, chains.entered(chains.opens, cut)
        )
        self.backward = _course(
            back,
            first_back,
            chains.closes.flip(0),
            chains.run.flip(0),
            chains.final_back,
            chains.entered(chains.closes, cut),
        )

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


@dataclass(frozen=True)
class _Chains:
    """What is known of groups before tokens choose, int64. Runs count rows, then runs, then memories; seeds likewise.

    Attributes:
        run: the run of each group ``[G]``.
        opens: the seed of each group in which its document begins, else −1 ``[G]``.
        closes: likewise where it ends.
        final: the last group of each run ``[runs]``.
        final_back: the first, counted from the last group.
    """

    run: Tensor
    opens: Tensor
    closes: Tensor
    final: Tensor
    final_back: Tensor

    @classmethod
    def of(cls, sp: SequenceParallel, batch: int, memories: int, device: torch.device) -> _Chains:
        """Made once for a layout."""
        return sp.layout.cached(
            ("routed chains", sp.rank, batch, memories, device), lambda: cls._make(sp, batch, memories, device)
        )

    @classmethod
    def _make(cls, sp: SequenceParallel, batch: int, memories: int, device: torch.device) -> _Chains:
        pieces, runs = sp.layout.pieces(sp.rank), len(sp.layout.runs_of(sp.rank))
        run: list[int] = []
        opens, closes = [], []
        final: dict[int, int] = {}
        first: dict[int, int] = {}
        for memory in range(memories):
            for row in range(batch):
                for piece in pieces:
                    own = (row * runs + piece.run) * memories + memory
                    seed = (row * sp.num_documents + piece.document) * memories + memory
                    final[own] = len(run)
                    first.setdefault(own, len(run))
                    run.append(own)
                    opens.append(seed if piece.opens else -1)
                    closes.append(seed if piece.closes else -1)
        count = batch * runs * memories
        last = [final[own] for own in range(count)], [len(run) - 1 - first[own] for own in range(count)]
        return cls(*(torch.tensor(x, dtype=torch.long).to(device) for x in (run, opens, closes, *last)))

    def entered(self, seeds: Tensor, cut: Cut) -> Tensor:
        """The run of which what enters reaches each segment, −1 where it comes from a seed ``[segments]``."""
        return torch.where(cut.filled & (seeds[cut.piece] < 0), self.run[cut.piece], -1)


def _course(order: Tensor, first: Tensor, seed: Tensor, run: Tensor, final: Tensor, enters: Tensor) -> Course:
    """The state is wanted before every segment, in its own slot."""
    return Course.along(Itinerary(order, first, first[1:].clone(), seed, run, final, order, enters))
