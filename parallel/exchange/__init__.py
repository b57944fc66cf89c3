"""How the states travel between ranks. Each exchange is a file; the table is where they get their names."""

from __future__ import annotations

import torch.distributed as dist

from lasp.parallel.exchange.all_gather import AllGather
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
    """The exchange of that name.

    Raises:
        ValueError: where it does not work on such nodes.
    """
    return TwoLevel(group, topology, Scan) if name == TwoLevel.name else FLAT[name](group, topology)


__all__ = ["EXCHANGES", "FLAT", "AllGather", "Exchange", "Pipelined", "Ring", "Route", "Running", "Scan", "TwoLevel"]
__all__ += ["build_exchange"]
