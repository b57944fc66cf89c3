"""LASP-2's exchange (https://arxiv.org/abs/2502.07563, Algorithm 2): one all-gather of all summaries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.kernels import Summary
from lasp.parallel.collectives import all_gather_rows
from lasp.parallel.exchange.base import Exchange, PendingStates, Route


class AllGather(Exchange):
    """Every rank receives every summary in one collective and composes what it needs: (W−1)·S bytes a rank, one step."""

    def start(self, runs: Summary, route: Route) -> PendingStates:
        rows = runs.pack()
        if route.world_size == 1:
            return _Gathered(runs, rows, None, route)
        missing = route.slots - rows.shape[0]
        sent = torch.cat([rows, rows.new_zeros(missing, rows.shape[1])]) if missing else rows
        received, work = all_gather_rows(sent, self.group)
        return _Gathered(runs, received, work, route)


@dataclass
class _Gathered(PendingStates):
    """The runs of all ranks, a row each; those of a rank with fewer than `Route.slots` are followed by rows of zeros."""

    pattern: Summary
    rows: Tensor
    work: dist.Work | None
    route: Route

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.route.course.states(self.pattern.unpack(self.rows), None, None)
