"""A prefix scan by doubling: log2 W steps of S bytes (Hillis and Steele, https://doi.org/10.1145/7902.7903)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lasp.kernels import Summary
from lasp.parallel.exchange.base import Exchange, Route, Size
from lasp.parallel.exchange.cost import Step, links
from lasp.parallel.exchange.lane import Peers


class Scan(Exchange):
    """After step s every run knows what the 2^s runs before it, and itself, do to the state."""

    name = "scan"

    def steps(self, route: Route, size: Size) -> Iterable[Step]:
        owners = [rank for rank, _ in route.order]
        reach = 1
        while reach < len(owners):
            pairs = zip(owners, owners[reach:], strict=False)
            yield [(source, target, size.summary) for source, target in pairs if source != target]
            reach *= 2

    def seconds(self, route: Route, size: Size) -> float:
        times = (len(route.order) - 1).bit_length()
        travel = links().seconds(self.steps(route, size), self.topology, self.sharers)
        return travel + links().composing(times, times * size.summary)

    def states(self, runs: Summary, route: Route, peers: Peers) -> Tensor:
        mine = {position: run for position, (rank, run) in enumerate(route.order) if rank == route.rank}
        own = {p: Summary(runs.A[:, run : run + 1], runs.B[:, run : run + 1]) for p, run in mine.items()}
        # What the runs before each, as far as they are known, compose to; of all of them only the state.
        before: dict[int, Summary] = {}
        found: dict[int, Tensor] = {}
        reach = 1
        while reach < len(route.order):
            through = {
                p: before[p].compose(own[p]) if p in before else own[p] for p in mine if p + reach < len(route.order)
            }
            sent, received, came = [], [], {}
            for p in sorted({*mine, *(p - reach for p in mine)}):
                source, target = p, p + reach
                if source < 0 or target >= len(route.order):
                    continue
                if source in mine and target in mine:
                    came[target] = through[source]
                elif source in mine:
                    sent.append((route.order[target][0], through[source].pack()))
                elif target in mine:
                    rows = runs.empty(1).pack()
                    received.append((route.order[source][0], rows))
                    came[target] = runs.unpack(rows)
            peers.transfer(sent, received)
            last = 2 * reach >= len(route.order)
            for p, further in came.items():
                if last:
                    found[p] = before[p].apply(further.B) if p in before else further.B
                else:
                    before[p] = further.compose(before[p]) if p in before else further
            reach *= 2
        entering = torch.zeros_like(runs.B)
        for p, run in mine.items():
            if p in found or p in before:
                entering[:, run : run + 1] = found[p] if p in found else before[p].B
        return entering
