"""What the links of a cluster take: a latency and a bandwidth inside nodes and between them.

``torchrun ... -m lasp.launch.calibrate --result links.json`` on the nodes that will train; then ``LASP_LINKS=links.json``
for the trainings there, whose ``exchange="auto"`` goes by it.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.kernels import Summary
from lasp.launch.record import record
from lasp.parallel.exchange.cost import Link, Links
from lasp.parallel.exchange.lane import Peers
from lasp.parallel.mesh import processes
from lasp.parallel.topology import Topology

#: Bytes of a message that costs its latency, and of one that costs its bandwidth.
SMALL, LARGE = 64, 2**22


@dataclass(frozen=True)
class Options:
    """Where and how links are measured."""

    #: Where the JSON goes.
    result: Path = Path("links.json")
    #: Timed messages of each kind, of which the median counts.
    calls: int = 10
    #: cpu (gloo), cuda (NCCL), or auto: cuda where there is a GPU.
    device: str = "auto"


def measure_links(group: dist.ProcessGroup, topology: Topology, device: torch.device, calls: int) -> Links:
    """What links take, the same on all ranks of the group. What there is only one of is left as `Links` has it."""
    usual = Links()
    nodes = [topology.node_of(topology.nodes.index(node)) for node in range(topology.count)]
    inside, between, cards = usual.inside, usual.between, usual.cards
    full = next((members for members in nodes if len(members) > 1), None)
    if full is not None:
        inside = _link(group, [(full[0], full[1])], device, calls)
    if len(nodes) > 1:
        between = _link(group, [(nodes[0][0], nodes[1][0])], device, calls)
        sharers = min(len(nodes[0]), len(nodes[1]))
        together = _link(group, list(zip(nodes[0][:sharers], nodes[1][:sharers], strict=True)), device, calls)
        # So many times a card's bandwidth passes when all ranks of a node send at once.
        cards = min(sharers, max(1, round(sharers * together.bandwidth / between.bandwidth)))
    state = torch.ones(2, 1, 1, 16, 128, 128, device=device)
    one = Summary(torch.ones(1, 1, 16, device=device), state[0])
    kernel = _told(group, median(_timed(lambda: one.compose(one), device) for _ in range(calls + 2)), device)
    return Links(inside, between, cards, kernel)


def _link(group: dist.ProcessGroup, pairs: list[tuple[int, int]], device: torch.device, calls: int) -> Link:
    """Of the slowest of some pairs that send there and back at once."""
    rank, peers = dist.get_rank(group), Peers.all(group)
    seconds = []
    for size in (SMALL, LARGE):
        message = torch.zeros(size, dtype=torch.int8, device=device)
        times = []
        for _ in range(calls + 2):
            dist.barrier(group)
            start = time.perf_counter()
            for a, b in pairs:
                if rank == a:
                    peers.transfer([(b, message)], [])
                    peers.transfer([], [(b, message)])
                elif rank == b:
                    peers.transfer([], [(a, message)])
                    peers.transfer([(a, message)], [])
            _finish(device)
            times.append((time.perf_counter() - start) / 2)
        mine = median(times[2:]) if any(rank in pair for pair in pairs) else 0.0
        seconds.append(_told(group, mine, device))
    latency, large = seconds
    return Link(latency, LARGE / max(large - latency, 1e-9))


def _timed(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    _finish(device)
    return time.perf_counter() - start


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _told(group: dist.ProcessGroup, seconds: float, device: torch.device) -> float:
    """The longest of the ranks' times, on all of them."""
    told: Tensor = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(told, dist.ReduceOp.MAX, group=group)
    return float(told)


def main() -> None:
    import tyro

    options = tyro.cli(Options, description=__doc__)
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    with processes(kind) as device:
        group = dist.group.WORLD
        assert group is not None
        topology = Topology.of(group)
        found = measure_links(group, topology, device, options.calls)
        if dist.get_rank() == 0:
            command = "python -m lasp.launch.calibrate " + shlex.join(sys.argv[1:])
            record(options.result, command, found)
            print(f"{topology.count} nodes, {len(topology.nodes)} ranks: {found}\nwritten to {options.result}")


if __name__ == "__main__":
    main()
