"""The contract of an exchange, and the route that it follows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch.distributed as dist
from torch import Tensor

from lasp.kernels import Chain, Course, Summary
from lasp.parallel.layout import SequenceLayout


@dataclass(frozen=True)
class Route:
    """The order in which the runs of all ranks compose, seen from one rank.

    Attributes:
        rank: this rank.
        runs_per_rank: how many runs each rank holds.
        order: all runs as ``(rank, index among the rank's runs)``, the first to compose first.
    """

    rank: int
    runs_per_rank: tuple[int, ...]
    order: tuple[tuple[int, int], ...]

    @classmethod
    def forward(cls, layout: SequenceLayout, rank: int) -> Route:
        """Along the sequence: the way the states go."""
        return layout.cached(
            ("forward route", rank), lambda: cls(rank, tuple(len(runs) for runs in layout.runs), layout.order())
        )

    @classmethod
    def backward(cls, layout: SequenceLayout, rank: int) -> Route:
        """From the end of the sequence to its start: the way the states' gradients go."""
        forward = cls.forward(layout, rank)
        return layout.cached(
            ("backward route", rank), lambda: cls(rank, forward.runs_per_rank, tuple(reversed(forward.order)))
        )

    @property
    def world_size(self) -> int:
        """How many ranks take part, those without a run included."""
        return len(self.runs_per_rank)

    @cached_property
    def slots(self) -> int:
        """How many runs a rank sends: as many as the rank that holds most."""
        return max(self.runs_per_rank)

    @cached_property
    def course(self) -> Course:
        """All runs in order, from rows of ``world_size · slots`` runs, to the states before this rank's."""
        row = {key: key[0] * self.slots + key[1] for key in self.order}
        mine = [row[self.rank, run] for run in range(self.runs_per_rank[self.rank])]
        return Course([Chain(tuple(row[key] for key in self.order))] if self.order else [], 0, mine)


class PendingStates(ABC):
    """An exchange that is under way."""

    @abstractmethod
    def wait(self) -> Tensor:
        """The state that enters each of this rank's runs ``[B, R, H, K, V]``: what all runs before it compose to."""


class Exchange(ABC):
    """Moves the summaries of runs between ranks. It knows neither recurrences nor layouts.

    Args:
        group: the sequence-parallel ranks; None for a single one.
    """

    def __init__(self, group: dist.ProcessGroup | None):
        self.group = group

    @abstractmethod
    def start(self, runs: Summary, route: Route) -> PendingStates:
        """Start sending this rank's R runs (R may be 0) and return at once.

        Every rank of the group calls it, wherever the route has more than one run.
        """
