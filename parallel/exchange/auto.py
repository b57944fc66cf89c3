"""The exchange that takes least by the cost model, for the ranks, the nodes and the size of a state at hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch.distributed as dist
from torch import Tensor

from lasp.kernels import Summary
from lasp.parallel.exchange.base import Exchange, Route, Size
from lasp.parallel.exchange.cost import Step, links
from lasp.parallel.exchange.lane import Peers, Running
from lasp.parallel.topology import Topology


class Auto(Exchange):
    """One of several, chosen alike on every rank: the choice depends on nothing that ranks do not share.

    Args:
        group: the sequence-parallel ranks; None for a single one.
        topology: their nodes.
        candidates: what there is to choose from, between the same ranks.
        sharers: as of `Exchange`.
    """

    name = "auto"

    def __init__(
        self, group: dist.ProcessGroup | None, topology: Topology, candidates: Sequence[Exchange], sharers: int = 1
    ):
        super().__init__(group, topology, sharers)
        self.candidates = tuple(candidates)
        # The routes are kept, so that their numbers stay theirs.
        self._chosen: dict[tuple[int, Size], tuple[Route, Exchange]] = {}

    def describe(self, route: Route, size: Size) -> str:
        return self.choose(route, size).describe(route, size)

    def explain(self) -> str:
        """What was chosen so far, and how long every candidate takes by the model, and by which links."""
        told = dict.fromkeys(self._table(route, size) for (_, size), (route, _) in self._chosen.items())
        return "\n".join([*told, links().explain()]) if told else "exchange auto: nothing has travelled yet"

    def _table(self, route: Route, size: Size) -> str:
        known = sorted((exchange.seconds(route, size), exchange.describe(route, size)) for exchange in self.candidates)
        first = (
            f"exchange auto: {route.world_size} ranks on {self.topology.count} nodes, {len(route.order)} runs, each with "
            f"{size.state / 2**20:.3g} MiB of states and {size.transition / 2**10:.3g} KiB of decays"
        )
        rows = [f"  {name:24} {1000 * seconds:10.3f} ms" for seconds, name in known]
        return "\n".join([first, rows[0] + "  chosen", *rows[1:]])

    def choose(self, route: Route, size: Size) -> Exchange:
        """The one that takes least."""
        key = (id(route), size)
        if key not in self._chosen:
            best = min(self.candidates, key=lambda exchange: exchange.seconds(route, size))
            self._chosen[key] = (route, best)
        return self._chosen[key][1]

    def start(self, runs: Summary, route: Route) -> Running:
        return self.choose(route, Size.of(runs)).start(runs, route)

    def states(self, runs: Summary, route: Route, peers: Peers) -> Tensor:
        return self.choose(route, Size.of(runs)).states(runs, route, peers)

    def steps(self, route: Route, size: Size) -> Iterable[Step]:
        return self.choose(route, size).steps(route, size)

    def seconds(self, route: Route, size: Size) -> float:
        return self.choose(route, size).seconds(route, size)
