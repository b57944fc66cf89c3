"""The contract of an exchange, and the route that it follows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.kernels import Chain, Summary
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
    def chain(self) -> Chain:
        """All runs, composed in order."""
        return Chain([len(self.order)])

    def places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """For each run in order, its row among ``world_size · slots``; for each run of this rank, its place in the order."""
        if device not in self._places:
            rows = [rank * self.slots + run for rank, run in self.order]
            mine = sorted((run, at) for at, (rank, run) in enumerate(self.order) if rank == self.rank)
            self._places[device] = (
                torch.tensor(rows, dtype=torch.long, device=device),
                torch.tensor([at for _, at in mine], dtype=torch.long, device=device),
            )
        return self._places[device]

    @cached_property
    def _places(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        return {}


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
        """Start sending this rank's R runs (R may be 0) and return at once. Every rank of the group calls it."""
