"""The contract of an exchange, and the route that it follows."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lasp.kernels import Chain, Course, Summary
from lasp.parallel.exchange.cost import Step
from lasp.parallel.exchange.lane import Lane, Peers, Running
from lasp.parallel.layout import SequenceLayout
from lasp.parallel.topology import Topology


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
    def _cache(self) -> dict[Any, Any]:
        return {}

    def cached(self, key: Any, build: Callable[[], Any]) -> Any:
        """What `build` returns, built once for this route."""
        if key not in self._cache:
            self._cache[key] = build()
        return self._cache[key]

    @cached_property
    def course(self) -> Course:
        """All runs in order, from rows of ``world_size · slots`` runs, to the states before this rank's."""
        row = {key: key[0] * self.slots + key[1] for key in self.order}
        mine = [row[self.rank, run] for run in range(self.runs_per_rank[self.rank])]
        return Course([Chain(tuple(row[key] for key in self.order))] if self.order else [], 0, mine)


@dataclass(frozen=True)
class Size:
    """What one run's summary has: bytes of its state and of its transition, heads, and columns of a state."""

    state: int
    transition: int
    heads: int
    columns: int

    @classmethod
    def of(cls, runs: Summary) -> Size:
        (batch, _, H, K, V), A = runs.B.shape, runs.A
        width = runs.B.element_size()
        return cls(batch * H * K * V * width, A.shape[0] * math.prod(A.shape[2:]) * width, H, V)

    @property
    def summary(self) -> int:
        """Bytes of both."""
        return self.state + self.transition


class Exchange(ABC):
    """Moves the summaries of runs between ranks. It knows neither recurrences nor layouts.

    Args:
        group: the sequence-parallel ranks; None for a single one.
        topology: their nodes.
        sharers: how many ranks of each node, this one among them, do the like at once with others of their own.
    """

    #: As options call it.
    name: str

    def __init__(self, group: dist.ProcessGroup | None, topology: Topology, sharers: int = 1):
        self.group, self.topology, self.sharers = group, topology, sharers

    def start(self, runs: Summary, route: Route) -> Running:
        """Start sending this rank's R runs (R may be 0) and return at once.

        Every rank of the group calls it, wherever the route has more than one run. What is waited for is the state that enters
        each of this rank's runs ``[B, R, H, K, V]``: what all runs before it compose to.
        """
        if route.world_size == 1 or self.group is None:
            return Alone(route.course.states(runs, None, None))
        peers = Peers.all(self.group)
        return Lane.of(self.group).run(lambda: self.states(runs, route, peers), (runs.A, runs.B))

    @abstractmethod
    def states(self, runs: Summary, route: Route, peers: Peers) -> Tensor:
        """The same in one go, between ranks that are numbered as in the route."""

    @abstractmethod
    def steps(self, route: Route, size: Size) -> Iterable[Step]:
        """What travels in each step, between which ranks."""

    def describe(self, route: Route, size: Size) -> str:
        """What states of that size travel by, in words."""
        return self.name

    def explain(self) -> str:
        """Why the states travel as they do, for people."""
        return f"exchange {self.name}: as it was asked for"

    @abstractmethod
    def seconds(self, route: Route, size: Size) -> float:
        """How long it takes by the model of `lasp.parallel.exchange.cost`."""


@dataclass
class Alone:
    """What is there already."""

    result: Tensor

    def wait(self) -> Tensor:
        return self.result
