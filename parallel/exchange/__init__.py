"""How the states travel between ranks. Each exchange is a file; this table is where they get their names."""

from lasp.parallel.exchange.all_gather import AllGather
from lasp.parallel.exchange.base import Exchange, PendingStates, Route

EXCHANGES: dict[str, type[Exchange]] = {"all-gather": AllGather}

__all__ = ["EXCHANGES", "AllGather", "Exchange", "PendingStates", "Route"]
