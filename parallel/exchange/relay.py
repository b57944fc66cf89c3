"""The running state goes from run to run along the sequence: LASP's ring, and the same in blocks, which is ZeCO's All-Scan.

A run receives the state that enters it, acts on it, and sends on what leaves. In K blocks of the state's columns, which do
not feel each other, block b enters run i in step i + b: all runs are at work at once. W ranks take W − 2 + K steps of S / K
bytes each.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor

from lasp.kernels import Summary, act
from lasp.parallel.exchange.base import Exchange, Route, Size
from lasp.parallel.exchange.cost import Link, Step, best_blocks, links
from lasp.parallel.exchange.lane import Peers


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

    def work(self, route: Route, size: Size) -> int:
        return len(route.order) - 2 + self.blocks(route, size)

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
        ways = links()
        link = ways.inside
        if self.topology.count > 1:
            share = min(1.0, ways.cards / self.sharers) if ways.cards else 1.0
            link = Link(ways.between.latency, ways.between.bandwidth * share)
        return best_blocks(link, len(route.order) - 1, size.state, size.columns)
