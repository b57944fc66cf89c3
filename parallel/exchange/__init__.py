"""How the states travel between ranks. Each exchange is a file; the table is where they get their names."""

from __future__ import annotations

import torch.distributed as dist

from lasp.parallel.exchange.all_gather import AllGather
from lasp.parallel.exchange.auto import Auto
from lasp.parallel.exchange.base import Exchange, Route
from lasp.parallel.exchange.lane import Running
from lasp.parallel.exchange.relay import Pipelined, Ring
from lasp.parallel.exchange.scan import Scan
from lasp.parallel.exchange.two_level import TwoLevel
from lasp.parallel.topology import Topology

#: Those between any ranks.
FLAT: dict[str, type[Exchange]] = {kind.name: kind for kind in (AllGather, Ring, Pipelined, Scan)}
#: The names that options take.
EXCHANGES = (*FLAT, TwoLevel.name)


def build_exchange(name: str, group: dist.ProcessGroup | None, topology: Topology) -> Exchange:
    """The exchange of that name; of ``"auto"``, for each size of a state, that which the cost model holds for the fastest.

    Raises:
        ValueError: where it does not work on such nodes.
    """
    if name == Auto.name:
        usable = [*FLAT, *([TwoLevel.name] if topology.even and topology.count > 1 else [])]
        return Auto(group, topology, [build_exchange(kind, group, topology) for kind in usable])
    return TwoLevel(group, topology, _between_nodes) if name == TwoLevel.name else FLAT[name](group, topology)


def _between_nodes(topology: Topology, sharers: int) -> Exchange:
    return Auto(None, topology, [kind(None, topology, sharers) for kind in FLAT.values()], sharers)


__all__ = [
    "EXCHANGES",
    "FLAT",
    "AllGather",
    "Auto",
    "Exchange",
    "Pipelined",
    "Ring",
    "Route",
    "Running",
    "Scan",
    "TwoLevel",
]
__all__ += ["build_exchange"]
