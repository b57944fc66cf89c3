"""Nodes first: each of a node's ranks composes a part of the node's states and sends it between the nodes over its own card.

Heads do not feel each other, nor do columns of a state. So inside a node of G ranks each rank gets a G-th of the heads of all
the node's summaries, composes them to what the node does to the state, takes part in any other exchange with its like in the
other nodes, and hands the states that enter the runs back: two all-to-alls inside the node, and between nodes a G-th of the
bytes of the exchange between N nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.kernels import Chain, Course, Summary
from lasp.parallel.exchange.base import Exchange, Route, Size
from lasp.parallel.exchange.cost import Step, links
from lasp.parallel.exchange.lane import Peers
from lasp.parallel.topology import Topology


class TwoLevel(Exchange):
    """Inside the nodes, then between them.

    Args:
        group: the sequence-parallel ranks; None for a single one.
        topology: their nodes, of as many ranks each.
        outer: makes the exchange between nodes, for the topology of a rank's like on them and how many ranks of a node do so.

    Raises:
        ValueError: where nodes differ in their number of ranks.
    """

    name = "two-level"

    def __init__(self, group: dist.ProcessGroup | None, topology: Topology, outer: Callable[[Topology, int], Exchange]):
        super().__init__(group, topology)
        if not topology.even:
            counts = [topology.nodes.count(node) for node in range(topology.count)]
            raise ValueError(
                f"exchange='two-level' needs as many ranks on every node, given {counts}: choose exchange='scan' instead"
            )
        self.outer = outer(Topology(tuple(range(topology.count))), len(topology.node_of(0)))

    def steps(self, route: Route, size: Size) -> Iterable[Step]:
        node, inside, ranks = self._node_of(route), self._inside(route, size), self._ranks(route)
        yield from inside[:1]
        if len(node.route.order) > 1:
            for step in self.outer.steps(node.route, self._part_of(size)):
                yield [(ranks[a][i], ranks[b][i], some) for a, b, some in step for i in range(len(node.members))]
        yield from inside[1:]

    def _ranks(self, route: Route) -> list[tuple[int, ...]]:
        """Those of each node, the nodes numbered as in the route between them."""
        return [self.topology.node_of(peer) for peer in self.topology.peers_of(route.rank)]

    def _inside(self, route: Route, size: Size) -> list[Step]:
        """The two all-to-alls; none where a node has one rank."""
        G, held = len(self._node_of(route).members), route.runs_per_rank
        pairs = [(a, b) for members in self._ranks(route) for a in members for b in members if a != b]
        there = [(a, b, size.summary * held[a] // G) for a, b in pairs]
        back = [(a, b, size.state * held[b] // G) for a, b in pairs]
        return [there, back] if pairs else []

    def describe(self, route: Route, size: Size) -> str:
        between = self._node_of(route).route
        if len(between.order) == 1:
            return self.name
        return f"{self.name} over {self.outer.describe(between, self._part_of(size))}"

    def seconds(self, route: Route, size: Size) -> float:
        node, part = self._node_of(route), self._part_of(size)
        ways, own = links(), part.state * sum(route.runs_per_rank[rank] for rank in node.members)
        took = ways.seconds(self._inside(route, size), self.topology) + ways.composing(1, own)
        if len(node.route.order) == 1:
            return took
        return took + ways.composing(1, own) + self.outer.seconds(node.route, part)

    def _node_of(self, route: Route) -> _Node:
        node: _Node = route.cached(("node", self.topology.nodes), lambda: _Node.of(route, self.topology))
        return node

    def _part_of(self, size: Size) -> Size:
        """What a rank has of each summary of its node."""
        G = len(self.topology.node_of(0))
        by_heads = size.heads >= G
        return Size(
            -(-size.state // G),
            -(-size.transition // G) if by_heads else size.transition,
            -(-size.heads // G) if by_heads else size.heads,
            size.columns if by_heads else -(-size.columns // G),
        )

    def states(self, runs: Summary, route: Route, peers: Peers) -> Tensor:
        node = self._node_of(route)
        inside = Peers(peers.group, tuple(peers.ranks[rank] for rank in node.members))
        parts = _parts(runs, len(node.members))
        # The node's runs, as far as this rank's heads go: those of each member in turn.
        pattern = parts[node.place].of(runs)
        counts = [route.runs_per_rank[rank] for rank in node.members]
        rows = runs.B.new_empty(sum(counts), pattern.numbers)
        _swap([part.of(runs).pack() for part in parts], list(rows.split(counts)), node.place, inside)
        here = pattern.unpack(rows)
        entering = None
        if len(node.route.order) > 1:
            alike = Peers(peers.group, tuple(peers.ranks[rank] for rank in self.topology.peers_of(route.rank)))
            entering = self.outer.states(node.course.leaving(here, None), node.route, alike)
        states = node.course.states(here, None, entering).movedim(1, 0).contiguous()
        # And back: to each member the states of its runs. What is in one piece is received where it belongs.
        out = torch.empty_like(runs.B, memory_format=torch.contiguous_format)
        places = [out.narrow(part.axis, part.start, part.length).movedim(1, 0) for part in parts]
        came = [place if place.is_contiguous() else place.contiguous() for place in places]
        _swap(list(states.split(counts)), came, node.place, inside)
        for place, part in zip(places, came, strict=True):
            if part is not place:
                place.copy_(part)
        return out


@dataclass(frozen=True)
class _Node:
    """A node's part of a route.

    Attributes:
        members: its ranks.
        place: which of them this rank is.
        course: the runs of all members in turn, as chains of those that follow one another along the sequence.
        route: the chains of all nodes, as the runs of an exchange between nodes.
    """

    members: tuple[int, ...]
    place: int
    course: Course
    route: Route

    @classmethod
    def of(cls, route: Route, topology: Topology) -> _Node:
        members = topology.node_of(route.rank)
        peers = topology.peers_of(route.rank)
        # Nodes are numbered as this rank's like in them are, in the group that they form.
        number = {topology.nodes[rank]: i for i, rank in enumerate(peers)}
        offsets = {rank: sum(route.runs_per_rank[r] for r in members if r < rank) for rank in members}
        order: list[tuple[int, int]] = []
        counts = [0] * len(peers)
        chains: list[list[int]] = []
        last = None
        for rank, run in route.order:
            node = number[topology.nodes[rank]]
            if node != last:
                order.append((node, counts[node]))
                counts[node] += 1
                if rank in offsets:
                    chains.append([])
            if rank in offsets:
                chains[-1].append(offsets[rank] + run)
            last = node
        total = sum(route.runs_per_rank[rank] for rank in members)
        course = Course([Chain(tuple(own), i) for i, own in enumerate(chains)], len(chains), range(total))
        between = Route(number[topology.nodes[route.rank]], tuple(counts), tuple(order))
        return cls(members, members.index(route.rank), course, between)


@dataclass(frozen=True)
class _Part:
    """Some heads, or some columns, of states."""

    axis: int
    start: int
    length: int

    def of(self, runs: Summary) -> Summary:
        """That part of the runs' maps."""
        A = runs.A
        if self.axis == 2 and A.shape[2] > 1:
            A = A.narrow(2, self.start, self.length)
        return Summary(A, runs.B.narrow(self.axis, self.start, self.length))


def _parts(runs: Summary, count: int) -> list[_Part]:
    """Parts for so many ranks: of the heads where there are as many, else of the columns."""
    axis = 2 if runs.B.shape[2] >= count else 4
    bounds = [runs.B.shape[axis] * i // count for i in range(count + 1)]
    return [_Part(axis, start, end - start) for start, end in pairwise(bounds)]


def _swap(sent: Sequence[Tensor], received: Sequence[Tensor], place: int, peers: Peers) -> None:
    """A tensor to each rank, and one from each."""
    others = [rank for rank in range(len(sent)) if rank != place]
    peers.transfer([(rank, sent[rank]) for rank in others], [(rank, received[rank]) for rank in others])
    received[place].copy_(sent[place])
