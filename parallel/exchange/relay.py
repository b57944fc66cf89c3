"""The running state goes from run to run along the sequence: LASP's ring, and the same in blocks, which is ZeCO's All-Scan.

A run receives the state that enters it, acts on it, and sends on what leaves. In K blocks of the state's columns, which do
not feel each other, block b enters run i in step i + b: all runs are at work at once. W ranks take W − 2 + K steps of S / K
bytes each.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.kernels import Summary, act
from lasp.parallel.exchange.base import Exchange, Route
from lasp.parallel.exchange.lane import transfer

#: What a step costs beside its bytes, and how many bytes a second travel, where nothing was measured.
LATENCY, BANDWIDTH = 12e-6, 45e9


class Ring(Exchange):
    """LASP (https://arxiv.org/abs/2404.02882, Algorithm 2): the whole state at once, W − 1 steps of S bytes."""

    name = "ring"

    def blocks(self, route: Route, size: int, columns: int) -> int:
        """Into how many blocks a state of `size` bytes and so many columns is cut."""
        return 1

    def states(self, runs: Summary, route: Route, group: dist.ProcessGroup) -> Tensor:
        A, B = runs.A, runs.B
        batch, _, H, K, V = B.shape
        state_bytes = batch * H * K * V * B.element_size()
        widths = [len(part) for part in torch.arange(V).tensor_split(self.blocks(route, state_bytes, V))]
        entering = torch.zeros_like(B)
        parts = entering.split(widths, -1)
        leaving = B.split(widths, -1)
        # Where a state goes from or to this rank: the position that it leaves, and the two runs as (rank, index).
        hops = [
            (i, here, there)
            for i, (here, there) in enumerate(zip(route.order, route.order[1:], strict=False))
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
            transfer(sent, received, group)
            for place, state in arrived:
                place.copy_(state)
        return entering


class Pipelined(Ring):
    """ZeCO's All-Scan (https://arxiv.org/abs/2507.01004, section 3): as many blocks as make the whole take least."""

    name = "pipelined"

    def blocks(self, route: Route, size: int, columns: int) -> int:
        # (P − 2 + K) (latency + size / (K bandwidth)) is least at this K.
        best = math.sqrt(max(len(route.order) - 2, 0) * size / (BANDWIDTH * LATENCY))
        return min(max(1, round(best)), columns)
