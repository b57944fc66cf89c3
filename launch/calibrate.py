"""What the links of a cluster take: a latency and a bandwidth inside nodes and between them.

``torchrun ... -m lasp.launch.calibrate --result links.json`` on the nodes that will train; then ``LASP_LINKS=links.json``
for the trainings there, whose ``exchange="auto"`` goes by it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.kernels import Summary
from lasp.launch.record import command_of, record
from lasp.parallel.exchange.cost import Link, Links
from lasp.parallel.exchange.lane import Peers
from lasp.parallel.mesh import processes
from lasp.parallel.topology import Topology

#: Bytes of a message that costs its latency, and of one that costs its bandwidth.
SMALL, LARGE = 64, 2**22
#: Heads of 128 × 128 of the largest state that is composed, 8 MiB.
SUMMARY_HEADS = 128


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
    """What links take, the same on all ranks of the group. What there is only one of is left as `Links` has it.

    All pairs of ranks, or of nodes, are at work at once, as they are in an exchange: what they share, they share here.
    """
    usual = Links()
    nodes = [topology.node_of(topology.nodes.index(node)) for node in range(topology.count)]
    inside, between, cards = usual.inside, usual.between, usual.cards
    neighbours = [pair for members in nodes for pair in zip(members[::2], members[1::2], strict=False)]
    if neighbours:
        inside = _link(group, neighbours, device, calls)
    if len(nodes) > 1:
        facing = list(zip(nodes[::2], nodes[1::2], strict=False))
        between = _link(group, [(here[0], there[0]) for here, there in facing], device, calls)
        sharers = min(len(members) for members in nodes)
        alike = [pair for here, there in facing for pair in zip(here[:sharers], there[:sharers], strict=True)]
        together = _link(group, alike, device, calls)
        # So many times a card's bandwidth passes when all ranks of a node send at once.
        cards = min(sharers, max(1, round(sharers * together.bandwidth / between.bandwidth)))
    return Links(inside, between, cards, _kernel(group, device, calls))


def _kernel(group: dist.ProcessGroup, device: torch.device, calls: int) -> Link:
    """Of one rank, while the others wait: in a chain they do."""
    seconds = []
    for heads in (1, SUMMARY_HEADS):
        one = Summary(torch.ones(1, 1, heads, device=device), torch.ones(1, 1, heads, 128, 128, device=device))
        times = [
            _timed(partial(one.compose, one), device) for _ in range(calls + 2 if dist.get_rank(group) == 0 else 0)
        ]
        seconds.append(_told(group, median(times[2:] or [0.0]), device))
    return _line(seconds, [4 * 128 * 128, 4 * 128 * 128 * SUMMARY_HEADS])


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
    return _line(seconds, [SMALL, LARGE])


def _line(seconds: list[float], sizes: list[int]) -> Link:
    """Through the times of a small and of a large size."""
    (small, large), (few, many) = seconds, sizes
    a_byte = max(large - small, 1e-9) / (many - few)
    return Link(max(small - few * a_byte, 1e-7), 1 / a_byte)


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
            record(options.result, command_of("lasp.launch.calibrate"), found)
            print(f"{topology.count} nodes, {len(topology.nodes)} ranks: {found}\nwritten to {options.result}")


if __name__ == "__main__":
    main()
