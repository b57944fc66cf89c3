"""The running state goes from run to run along the sequence: LASP's ring, and the same in blocks, which is ZeCO's All-Scan.

A run receives the state that enters it, acts on it, and sends on what leaves. In K blocks of the state's columns, which do
not feel each other, block b enters run i in step i + b: all runs are at work at once. W ranks take W − 2 + K steps of S / K
bytes each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lasp.kernels import Summary, act
from lasp.parallel.exchange.base import Exchange, Route, Size
from lasp.parallel.exchange.cost import Link, Step, links
from lasp.parallel.exchange.lane import Peers
from lasp.parallel.topology import Topology

#: Bytes of a message whose latency is of no account.
_MANY = 2**40


class Ring(Exchange):
    """LASP (https://arxiv.org/abs/2404.02882, Algorithm 2): the whole state at once, W − 1 steps of S bytes."""

    name = "ring"

    def blocks(self, route: Route, size: Size) -> int:
        """Into how many blocks of its columns a state is cut."""
        return 1

    def steps(self, route: Route, size: Size) -> Iterable[Step]:
        count = self.blocks(route, size)
        hops = [(here, there) for (here, _), (there, _) in pairwise(route.order)]
        for step in range(len(hops) - 1 + count):
            yield [
                (*hops[i], size.state // count)
                for i in range(max(0, step - count + 1), min(step, len(hops) - 1) + 1)
                if hops[i][0] != hops[i][1]
            ]

    def seconds(self, route: Route, size: Size) -> float:
        costs, count = self._costs(route), self.blocks(route, size)
        block = size.state / count
        return (
            costs.once.latency
            + block / costs.once.bandwidth
            + (count - 1) * (costs.again.latency + block / costs.again.bandwidth)
        )

    def _costs(self, route: Route) -> _Costs:
        costs: _Costs = route.cached(
            ("costs of a relay", self.topology, self.sharers, links()),
            lambda: _Costs.of(route, self.topology, self.sharers),
        )
        return costs

    def states(self, runs: Summary, route: Route, peers: Peers) -> Tensor:
        A, B = runs.A, runs.B
        batch, _, H, K, V = B.shape
        widths = [len(part) for part in torch.arange(V).tensor_split(self.blocks(route, Size.of(runs)))]
        entering = torch.zeros_like(B)
        parts = entering.split(widths, -1)
        leaving = B.split(widths, -1)
        # Where a state goes from or to this rank: the position that it leaves, and the two runs as (rank, index).
        hops = [
            (i, here, there)
            for i, (here, there) in enumerate(pairwise(route.order))
            if route.rank in (here[0], there[0])
        ]
        for step in range(len(route.order) - 2 + len(widths)):
            sent, received, arrived = [], [], []
            for i, (rank, run), (next_rank, next_run) in hops:
                block = step - i
                if not 0 <= block < len(widths):
                    continue
                if rank == route.rank:
                    state = act(A[:, run], parts[block][:, run]) + leaving[block][:, run]
                if rank != route.rank:
                    state = B.new_empty(batch, H, K, widths[block])
                    received.append((rank, state))
                elif next_rank != route.rank:
                    sent.append((next_rank, state.contiguous()))
                if next_rank == route.rank:
                    arrived.append((parts[block][:, next_run], state))
            peers.transfer(sent, received)
            for place, state in arrived:
                place.copy_(state)
        return entering


class Pipelined(Ring):
    """ZeCO's All-Scan (https://arxiv.org/abs/2507.01004, section 3): as many blocks as make the whole take least."""

    name = "pipelined"

    def blocks(self, route: Route, size: Size) -> int:
        return self._costs(route).best_blocks(size)


@dataclass(frozen=True)
class _Costs:
    """What a block takes by the model. Each hop ends in a kernel.

    Attributes:
        once: for the first block, over all hops one after the other.
        again: for each further one, which follows at the distance that the slowest hop keeps, all of them at once.
    """

    once: Link
    again: Link

    @classmethod
    def of(cls, route: Route, topology: Topology, sharers: int) -> _Costs:
        ways = links()
        hops = [(here, there) for (here, _), (there, _) in pairwise(route.order) if here != there]

        def link(steps: list[list[tuple[int, int]]], times: int) -> Link:
            """Of these steps and kernels: a line through what it takes without a byte and with many."""
            few, many = (
                ways.seconds([[(*hop, size) for hop in step] for step in steps], topology, sharers)
                + ways.composing(times, times * size)
                for size in (0, _MANY)
            )
            return Link(few, _MANY / (many - few))

        return cls(link([[hop] for hop in hops], len(route.order) - 1), link([hops], 1))

    def best_blocks(self, size: Size) -> int:
        """The number of blocks K for which ``once(S / K) + (K − 1) again(S / K)`` is least; no more than a state's columns."""
        saved = 1 / self.once.bandwidth - 1 / self.again.bandwidth
        best = math.sqrt(max(0.0, size.state * saved) / max(self.again.latency, 1e-9))
        return min(max(1, round(best)), size.columns)
