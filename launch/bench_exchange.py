"""How long each exchange takes between the ranks that the launcher started, how many bytes it sends, and what auto picks.

``torchrun ... -m lasp.launch.bench_exchange --result exchanges.json``. The links are measured first, so that ``auto`` knows
them; exchanges are timed by turns. With ``--interface`` bytes are read off that network interface of each node.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from lasp import SequenceLayout
from lasp.kernels import Summary
from lasp.launch.calibrate import measure_links
from lasp.launch.record import command_of, record
from lasp.parallel.exchange import EXCHANGES, Route, build_exchange
from lasp.parallel.exchange.base import Size
from lasp.parallel.exchange.cost import use_links
from lasp.parallel.mesh import processes
from lasp.parallel.topology import Topology

FAMILIES = ("identity", "scalar", "diagonal", "dense")


@dataclass(frozen=True)
class Options:
    """What is measured."""

    #: Exchanges, of those that `SequenceParallel` takes.
    exchanges: tuple[str, ...] = (*EXCHANGES, "auto")
    #: The family of the recurrence: identity, scalar, diagonal or dense.
    family: str = "scalar"
    #: Heads of a state, each width × width numbers in float32.
    heads: int = 16
    width: int = 128
    #: contiguous or zigzag.
    layout: str = "contiguous"
    #: Timed exchanges of each kind, of which the median counts.
    calls: int = 10
    #: The network interface of a node whose sent bytes are counted.
    interface: str | None = None
    #: cpu (gloo), cuda (NCCL), or auto: cuda where there is a GPU.
    device: str = "auto"
    #: Where the JSON goes.
    result: Path = Path("bench_exchange.json")
    #: Draw what was measured before, these JSONs side by side, in place of measuring; the plot's path is the result's.
    draw: tuple[Path, ...] = ()


@dataclass
class Row:
    """One exchange.

    Attributes:
        seconds: the median of the slowest rank's times.
        model: the seconds by the cost model.
        between: bytes that cross nodes by the cost model's steps.
        counted: bytes that left the nodes' interfaces, headers included, an exchange; where they were counted.
        chosen: what auto took.
    """

    exchange: str
    seconds: float
    model: float
    between: int
    counted: float | None
    chosen: str


def run(options: Options, device: torch.device) -> dict[str, Any]:
    """Measure everything; the figures are the same on all ranks."""
    group = dist.group.WORLD
    assert group is not None
    rank, world = dist.get_rank(), dist.get_world_size()
    topology = Topology.of(group)
    found = measure_links(group, topology, device, options.calls)
    use_links(found)
    build = {"contiguous": SequenceLayout.contiguous, "zigzag": SequenceLayout.zigzag}[options.layout]
    route = Route.forward(build(2 * world, world), rank)
    H, D, R = options.heads, options.width, route.runs_per_rank[rank]
    shape = {"identity": (1, R, 1), "scalar": (1, R, H), "diagonal": (1, R, H, D), "dense": (1, R, H, D, D)}[
        options.family
    ]
    runs = Summary(torch.ones(shape, device=device), torch.ones(1, R, H, D, D, device=device))
    built = {name: build_exchange(name, group, topology) for name in options.exchanges}
    times: dict[str, list[float]] = {name: [] for name in built}
    sent: dict[str, int] = dict.fromkeys(built, 0)
    for call in range(options.calls + 2):
        for name, exchange in built.items():
            dist.barrier()
            before = _sent(options.interface)
            start = time.perf_counter()
            exchange.start(runs, route).wait()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            took = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=device)
            dist.barrier()
            after = _sent(options.interface)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            if call >= 2:
                times[name].append(float(took))
                sent[name] += after - before
    size = Size.of(runs)
    # One rank a node counts its interface.
    first = topology.node_of(rank)[0] == rank
    rows = []
    for name, exchange in built.items():
        counted = torch.tensor(float(sent[name]) / options.calls if first else 0.0, dtype=torch.float64, device=device)
        dist.all_reduce(counted)
        crossing = sum(
            some
            for step in exchange.steps(route, size)
            for a, b, some in step
            if topology.nodes[a] != topology.nodes[b]
        )
        rows.append(
            Row(
                name,
                median(times[name]),
                exchange.seconds(route, size),
                crossing,
                float(counted) if options.interface else None,
                exchange.describe(route, size),
            )
        )
    return {"state_bytes": size.state, "nodes": topology.nodes, "links": found, "exchanges": rows}


def _sent(interface: str | None) -> int:
    """Bytes that this node has sent so far."""
    return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text()) if interface else 0


def table(rows: Sequence[Row]) -> str:
    """For people."""
    lines = [f"{'exchange':12} {'median':>10} {'model':>10} {'crosses nodes':>14} {'counted':>12}"]
    for row in rows:
        counted = "" if row.counted is None else f"{row.counted / 2**20:8.2f} MiB"
        lines.append(
            f"{row.exchange:12} {row.seconds * 1000:7.2f} ms {row.model * 1000:7.2f} ms {row.between / 2**20:10.2f} MiB "
            f"{counted:>12}  {row.chosen if row.chosen != row.exchange else ''}"
        )
    return "\n".join(lines)


def plot(results: Sequence[Path], path: Path) -> None:
    """The medians of each result, by exchange."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figures = {result.stem.rpartition("_")[2]: json.loads(result.read_text())["figures"] for result in results}
    names = [row["exchange"] for row in next(iter(figures.values()))["exchanges"]]
    chart, axis = plt.subplots(figsize=(1.8 + 1.8 * len(figures), 4))
    for i, name in enumerate(names):
        at = [x + (i - len(names) / 2) * 0.8 / len(names) for x in range(len(figures))]
        rows = [next(row for row in f["exchanges"] if row["exchange"] == name) for f in figures.values()]
        axis.bar(at, [1000 * row["seconds"] for row in rows], 0.8 / len(names), label=name, align="edge")
    axis.set(yscale="log", ylabel="milliseconds an exchange", xticks=range(len(figures)), xticklabels=[*figures])
    axis.grid(axis="y", alpha=0.3)
    axis.legend(ncols=3, fontsize=8)
    chart.tight_layout()
    chart.savefig(path, dpi=120)
    plt.close(chart)


def main() -> None:
    import tyro

    options = tyro.cli(Options, description=__doc__)
    if options.family not in FAMILIES:
        sys.exit(f"unknown --family {options.family}: expected one of {', '.join(FAMILIES)}")
    if options.draw:
        plot(options.draw, options.result.with_suffix(".png"))
        return
    unknown = [name for name in options.exchanges if name not in (*EXCHANGES, "auto")]
    if unknown:
        sys.exit(f"unknown --exchanges {', '.join(unknown)}: expected some of {', '.join((*EXCHANGES, 'auto'))}")
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    with processes(kind) as device:
        figures = run(options, device)
        if dist.get_rank() == 0:
            record(options.result, command_of("lasp.launch.bench_exchange"), figures)
            print(table(figures["exchanges"]), flush=True)


if __name__ == "__main__":
    main()
