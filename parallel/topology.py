"""Which ranks share a node: links inside a node are faster than those between nodes."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch.distributed as dist


@dataclass(frozen=True)
class Topology:
    """The nodes of a group's ranks.

    Attributes:
        nodes: the node of each rank, numbered from 0.
    """

    nodes: tuple[int, ...]

    @classmethod
    def of(cls, group: dist.ProcessGroup | None, nodes: Sequence[int] | None = None) -> Topology:
        """By the ranks' host names, which are gathered once for a group; or as given.

        Args:
            group: the ranks; None for a single one.
            nodes: the node of each rank.

        Raises:
            ValueError: where `nodes` names another number of ranks.
        """
        if group is None:
            return cls((0,))
        size = dist.get_world_size(group)
        if nodes is not None:
            if len(nodes) != size:
                raise ValueError(f"nodes= names the nodes of {len(nodes)} ranks, the group has {size}")
            return cls.by_name(nodes)
        if group not in _known:
            names: list[str] = [""] * size
            dist.all_gather_object(names, socket.gethostname(), group=group)
            _known[group] = cls.by_name(names)
        return _known[group]

    @classmethod
    def by_name(cls, names: Sequence[object]) -> Topology:
        """Ranks of one name share a node."""
        order = {name: i for i, name in enumerate(dict.fromkeys(names))}
        return cls(tuple(order[name] for name in names))

    @property
    def count(self) -> int:
        """How many nodes there are."""
        return max(self.nodes) + 1

    @property
    def even(self) -> bool:
        """Whether all nodes have as many ranks."""
        return len({self.nodes.count(node) for node in range(self.count)}) == 1

    def node_of(self, rank: int) -> tuple[int, ...]:
        """The ranks on the node of `rank`."""
        return tuple(r for r, node in enumerate(self.nodes) if node == self.nodes[rank])

    def peers_of(self, rank: int) -> tuple[int, ...]:
        """The ranks that have the place on their nodes that `rank` has on its own, one a node."""
        place = self.node_of(rank).index(rank)
        seen = [0] * self.count
        peers = []
        for r, node in enumerate(self.nodes):
            if seen[node] == place:
                peers.append(r)
            seen[node] += 1
        return tuple(peers)


_known: WeakKeyDictionary[dist.ProcessGroup, Topology] = WeakKeyDictionary()
