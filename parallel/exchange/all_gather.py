"""LASP-2's exchange (https://arxiv.org/abs/2502.07563, Algorithm 2): one all-gather of all summaries."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.kernels import Summary
from lasp.parallel.collectives import all_gather_rows
from lasp.parallel.exchange.base import Exchange, Route, Size
from lasp.parallel.exchange.cost import Step, links
from lasp.parallel.exchange.lane import Peers, Running, named_failure
from lasp.parallel.exposure import exposed


class AllGather(Exchange):
    """Every rank receives every summary in one collective and composes what it needs: (W−1)·S bytes a rank, one step."""

    name = "all-gather"

    def start(self, runs: Summary, route: Route) -> Running:
        # One collective needs no lane: it is asynchronous by itself.
        return super().start(runs, route) if route.world_size == 1 else self._gather(runs, route, self.group)

    def states(self, runs: Summary, route: Route, peers: Peers) -> Tensor:
        own = _padded(runs, route)
        rows = own.new_empty(route.world_size, *own.shape)
        rows[route.rank] = own
        others = [rank for rank in range(route.world_size) if rank != route.rank]
        peers.transfer([(rank, own) for rank in others], [(rank, rows[rank]) for rank in others])
        return _Gathered(runs, rows.flatten(0, 1), None, route).wait()

    def steps(self, route: Route, size: Size) -> Iterable[Step]:
        # Libraries send round a ring, or as much in fewer steps.
        W = route.world_size
        near = size.summary * route.slots * (W - 1) // max(1, (W - 1).bit_length())
        return [[(rank, (rank + 1) % W, near) for rank in range(W)]] * (W - 1).bit_length()

    def seconds(self, route: Route, size: Size) -> float:
        travel = links().seconds(self.steps(route, size), self.topology, self.sharers)
        return travel + links().composing(1, size.state * len(route.order))

    def _gather(self, runs: Summary, route: Route, group: dist.ProcessGroup | None) -> _Gathered:
        return _Gathered(runs, *all_gather_rows(_padded(runs, route), group), route)


def _padded(runs: Summary, route: Route) -> Tensor:
    """A row a run, and rows of zeros to as many as any rank has."""
    rows = runs.pack()
    missing = route.slots - rows.shape[0]
    return torch.cat([rows, rows.new_zeros(missing, rows.shape[1])]) if missing else rows


@dataclass
class _Gathered:
    """The runs of all ranks, a row each; those of a rank with fewer than `Route.slots` are followed by zeros."""

    pattern: Summary
    rows: Tensor
    work: dist.Work | None
    route: Route

    def wait(self) -> Tensor:
        if self.work is not None:
            with named_failure():
                exposed(self.work.wait, self.rows.device)
        return self.route.course.states(self.pattern.unpack(self.rows), None, None)
