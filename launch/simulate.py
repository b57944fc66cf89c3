"""A training step on W GPUs by a model of compute and links, held against the figures that LASP-2 and ZeCO published.

``python -m lasp.launch.simulate --result simulate.json`` needs no GPU. Compute is that of the kernels which
`lasp.launch.bench_kernels` measured on one H100, for an A100 in proportion to its memory's or its tensor cores' rate; exchanges
take what the classes of `lasp.parallel.exchange` say of themselves over given links. No constant belongs to one cell of a
table: `Inputs` has all of them and says where each is from. Prints tables; writes JSON, and beside it a plot.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from statistics import linear_regression
from typing import Any

import torch

from lasp import SequenceLayout
from lasp.launch.record import command_of, record
from lasp.models import LinearLlama3, LinearLlama3Config, preset
from lasp.parallel.exchange import EXCHANGES, Route, build_exchange
from lasp.parallel.exchange.base import Size
from lasp.parallel.exchange.cost import Link, Links, links, use_links
from lasp.parallel.topology import Topology

# -- what is published ------------------------------------------------------------------------------------------------

K = 1024
SHORT, LONG = 512 * K, 2048 * K
#: LASP-2 (https://arxiv.org/abs/2502.07563, section 4): percent that it is faster on 64 A100 than others, by tokens.
ADVANTAGE = {"LASP-1": {SHORT: 7.3, LONG: 15.2}, "Ring Attention": {SHORT: 17.8, LONG: 36.6}}
#: Tokens a second in all of LASP-2, batch 1, by the sequence's tokens and the A100s: from the same.
LASP2_SPEED = {
    256 * K: {16: 135635, 32: 132605, 64: 130215, 128: 131550},
    512 * K: {32: 250586, 64: 245353, 128: 233442},
    1024 * K: {64: 442221, 128: 416465},
    2048 * K: {128: 769030},
}
#: ZeCO (https://arxiv.org/abs/2507.01004; its tables as third-party notes give them): milliseconds an exchange, by H100s.
ZECO_EXCHANGE = {
    "all-gather": {8: 0.375, 16: 0.658, 32: 1.616, 64: 2.543, 128: 4.350, 256: 8.514},
    "All-Scan": {8: 0.226, 16: 0.297, 32: 0.448, 64: 0.739, 128: 1.272, 256: 2.165},
}
#: Tokens a second and H100 of a 1B GLA at 32K tokens each: from the same.
ZECO_SPEED = {
    "data parallel": {8: 49633, 64: 48230, 128: 47848, 256: 46588},
    "LASP-2": {8: 42946, 64: 37485, 128: 33327, 256: 25402},
    "ZeCO": {8: 47369, 64: 44468, 128: 43278, 256: 40967},
}

# -- what the model goes by -------------------------------------------------------------------------------------------

#: GPUs a node, GPUs of LASP-2's comparison, those of the tables, and tokens a GPU of the latter.
NODE, LASP_GPUS, GPUS, LOCAL = 8, 64, (8, 16, 32, 64, 128, 256, 512, 1024), 32 * K
USUAL = Links(cards=NODE)


@dataclass(frozen=True)
class Kernels:
    """What was measured on one H100.

    Attributes:
        copy: bytes a second, read and written ones.
        multiply: bfloat16 operations a second.
        passes: seconds of forward and of backward by ``"op tokens"``: B = 1, 16 heads of 128, bfloat16.
    """

    copy: float
    multiply: float
    passes: dict[str, tuple[float, float]]

    @classmethod
    def read(cls, path: Path) -> Kernels:
        """From the JSON of `lasp.launch.bench_kernels`.

        Raises:
            ValueError: where the file does not have them.
        """
        try:
            figures = json.loads(path.read_text())["figures"]
            times = {f"{row['op']} {row['shape']}": row["figures"]["lasp"] for row in figures["times"]}
            passes = {}
            for op, tokens in product(("linear_attn", "gla"), (8 * K, LOCAL)):
                took = times[f"{op} B=1 T={tokens} H=16 D=128"]
                passes[f"{op} {tokens}"] = (took["forward"] / 1000, (took["both"] - took["forward"]) / 1000)
            return cls(figures["copy_bytes_per_second"], figures["bf16_flop_per_second"], passes)
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} lacks kernels' times ({error!r}): make it by lasp.launch.bench_kernels"
            ) from error


def _links(inside: float, between: float) -> Links:
    """Of so many bytes a second, with the usual latencies and kernel."""
    return Links(Link(USUAL.inside.latency, inside), Link(USUAL.between.latency, between), NODE)


def _flat(latency: float, bandwidth: float) -> Links:
    """Alike inside nodes and between; the time of a kernel is part of the latency."""
    return Links(Link(latency, bandwidth), Link(latency, bandwidth), NODE, Link(0.0, 1e15))


@dataclass(frozen=True)
class Inputs:
    """Every constant; `SOURCES` says where each is from."""

    kernels: Kernels
    model: LinearLlama3Config = field(default=replace(preset("linear-llama3-1b"), mixer="gla", pattern="L"))
    a100_memory: float = 2.039e12
    h100_memory: float = 3.35e12
    a100_tensor: float = 312e12
    h100_tensor: float = 989e12
    usual: Links = USUAL
    nominal: Links = field(default=_links(600e9, 600e9))
    physical: Links = field(default=_links(300e9, 12.5e9))
    gather: Links = field(default=_flat(52e-6, 29e9))
    relay: Links = field(default=_flat(5.3e-6, 13e9))
    lasp1_tensors: tuple[int, int] = (2, 4)
    ring_tensors: tuple[int, int] = (2, 2)

    @property
    def size(self) -> Size:
        """Of one run's summary: a float32 state, and GLA's decays."""
        heads, width = self.model.heads, self.model.hidden // self.model.heads
        return Size(4 * heads * width**2, 4 * heads * width, heads, width)

    @cached_property
    def weights(self) -> int:
        """Numbers in the model's matrices, the head's included."""
        with torch.device("meta"):
            modules = LinearLlama3(self.model).modules()
        return sum(x.weight.numel() for x in modules if isinstance(x, torch.nn.Linear))


_HOP = "tensors [T_local, hidden], forward, backward"
#: The unit and the source of each input. LASP is https://arxiv.org/abs/2404.02882.
SOURCES = {
    "kernels": ("bytes/s, operations/s, s", "measured on an H100: launch/results/kernels.json"),
    "model": ("", "LASP-2, section 4; taken for ZeCO's 1B GLA too. A state is 1 MiB, in float32"),
    "a100_memory": ("bytes/s", "vendor: A100 SXM, 80 GB"),
    "h100_memory": ("bytes/s", "vendor: H100 SXM"),
    "a100_tensor": ("operations/s", "vendor: A100, dense bfloat16"),
    "h100_tensor": ("operations/s", "vendor: H100 SXM, dense bfloat16"),
    "usual": ("s, bytes/s", "assumed: the defaults of lasp.parallel.exchange.cost, 8 cards a node"),
    "nominal": ("s, bytes/s", "LASP, section 4: NVSwitch at 600 GB/s, taken for every hop; the rest: usual"),
    "physical": ("s, bytes/s", "vendor: NVLink, 300 GB/s a way; LASP, section 4: 800 Gb/s a node; the rest: usual"),
    "gather": ("s, bytes/s", "fitted: latency, bandwidth to ZeCO's all-gather column, for the least worst miss"),
    "relay": ("s, bytes/s", "fitted: latency, bandwidth to ZeCO's All-Scan column, for the least worst miss"),
    "lasp1_tensors": (
        _HOP,
        "chosen: by LASP, Algorithms 2 and 3, not its code (findings): q to O_inter; k, v to dk, dv",
    ),
    "ring_tensors": (_HOP, "chosen: K and V sent; the published figures leave no time for dK, dV (findings)"),
}


@contextmanager
def over(ways: Links) -> Iterator[None]:
    """The cost model goes by these links meanwhile."""
    before = links()
    use_links(ways)
    try:
        yield
    finally:
        use_links(before)


def nodes(gpus: int) -> Topology:
    """So many GPUs, 8 a node."""
    return Topology(tuple(rank // NODE for rank in range(gpus)))


def exchange(name: str, gpus: int, ways: Links, inputs: Inputs) -> tuple[float, str]:
    """Seconds of one exchange of the states, a run a GPU; and of two-level, what it takes between nodes."""
    built = build_exchange(name, None, nodes(gpus))
    route = Route.forward(SequenceLayout.contiguous(gpus, gpus), 0)
    with over(ways):
        return built.seconds(route, inputs.size), built.describe(route, inputs.size).partition(" over ")[2]


def compute(op: str, tokens: int, inputs: Inputs, tensor: float = 1.0, memory: float = 1.0) -> float:
    """Seconds that one GPU computes in a step: products with all matrices at the measured rate, and the op's kernels.

    `tensor` and `memory` are the rates of its tensor cores and its memory over an H100's. Gradients' sums are taken as hidden.
    """
    products = 6 * inputs.weights * tokens / (inputs.kernels.multiply * tensor)
    return products + inputs.model.layers * sum(inputs.kernels.passes[f"{op} {tokens}"]) / memory


def lasp2_step(tokens: int) -> float:
    """Seconds of a step of LASP-2 on A100s: ``a + b T``, least squares over all ten cells of `LASP2_SPEED`.

    As published, a step depends on the sequence's tokens T and hardly on the number of GPUs that share them.
    """
    cells = [(T, T / told) for T, column in LASP2_SPEED.items() for told in column.values()]
    b, a = linear_regression(*zip(*cells, strict=True))
    return a + b * tokens


def advantage(method: str, tokens: int, ways: Links, inputs: Inputs) -> float:
    """Percent that LASP-2 is faster than a method on 64 A100s, the steps alike but for what the exchange costs.

    LASP-2's all-gathers are hidden behind the layer's own kernels (its Algorithm 2), as far as these take. In a hop of LASP-1 a
    rank receives the state, computes what it needs it for at the memory's rate, and sends. In a hop of Ring Attention all ranks
    send at once, and accumulate in one kernel; its products are left out.
    """
    hops, local = LASP_GPUS - 1, tokens // LASP_GPUS
    memory, row = inputs.a100_memory / inputs.h100_memory, 2 * inputs.model.hidden
    gather, _ = exchange("all-gather", LASP_GPUS, ways, inputs)
    extra = -sum(max(0.0, gather - took / memory) for took in inputs.kernels.passes[f"linear_attn {local}"])
    if method == "LASP-1":
        used = sum(inputs.lasp1_tensors) * row * local / (inputs.kernels.copy * memory)
        extra += 2 * exchange("ring", LASP_GPUS, ways, inputs)[0] + hops * used
    else:
        for count in inputs.ring_tensors:
            step = [(rank, (rank + 1) % LASP_GPUS, count * row * local) for rank in range(LASP_GPUS)]
            extra += hops * (ways.seconds([step], nodes(LASP_GPUS)) + ways.kernel.latency)
    return 100 * inputs.model.layers * extra / lasp2_step(tokens)


def speed(took: float, computed: float, inputs: Inputs, hidden: float = 0.0) -> float:
    """Tokens a second and GPU at 32K tokens each. A layer's two exchanges take `took` seconds each, all else `computed`.

    The forward exchange is hidden behind `hidden` seconds of it, the backward one behind nothing.
    """
    return LOCAL / (computed + inputs.model.layers * (max(0.0, took - hidden) + took))


# -- the tables -------------------------------------------------------------------------------------------------------


@dataclass
class Cell:
    """A published value beside the model's, which misses it by points of percentages, of all else by percent of it.

    Where a limit is given, it may miss by no more.
    """

    table: str
    what: str
    at: str
    published: float
    model: float
    miss: float
    limit: float | None = None


@dataclass
class Row:
    """Exchanges at a number of GPUs, in milliseconds or tokens a second and GPU; what two-level takes between nodes."""

    table: str
    gpus: int
    values: dict[str, float]
    between: str


@dataclass
class Figures:
    """All that is printed and recorded; `faster` is how many times two-level is faster than All-Scan at 256 GPUs, by where."""

    inputs: list[dict[str, Any]]
    cells: list[Cell]
    rows: list[Row]
    faster: dict[str, float]
    findings: list[dict[str, Any]]

    def failures(self) -> list[str]:
        """What misses by more than it may."""
        cells = [x for x in self.cells if x.limit is not None and not abs(x.miss) <= x.limit]
        far = [f"{x.table}, {x.what}, {x.at}: misses by {x.miss:+.1f}, may by {x.limit}" for x in cells]
        return far + [f"two-level, {where}: {x:.1f} times" for where, x in self.faster.items() if not x >= 5]


def relative(table: str, what: str, at: str, told: float, model: float, limit: float | None = None) -> Cell:
    """That misses by percent of what is published."""
    return Cell(table, what, at, told, model, 100 * (model / told - 1), limit)


def lasp_cells(inputs: Inputs) -> list[Cell]:
    """LASP-2's advantage, over the nominal links and over the physical ones; and the fit of its own speed."""
    found = []
    for table, ways, limit in (("advantage, %", inputs.nominal, 5.0), ("%, physical links", inputs.physical, None)):
        for method, column in ADVANTAGE.items():
            for tokens, told in column.items():
                model = advantage(method, tokens, ways, inputs)
                found.append(Cell(table, f"over {method}", f"{tokens // K}K tokens", told, model, model - told, limit))
    for tokens, speeds in LASP2_SPEED.items():
        for gpus, fast in speeds.items():
            at = f"{gpus} GPUs, {tokens // K}K tokens"
            found.append(relative("tokens/s, fitted", "LASP-2", at, fast, tokens / lasp2_step(tokens)))
    return found


def zeco_cells(inputs: Inputs) -> list[Cell]:
    """The exchanges over the links fitted to them; the speed by measured compute, and by data parallel's published one."""
    computed, alone = compute("gla", LOCAL, inputs), ZECO_SPEED["data parallel"]
    measured, published = "tokens/s/GPU, measured compute", "tokens/s/GPU, data parallel's as compute"
    found = [relative(measured, "data parallel", f"{n} GPUs", told, LOCAL / computed) for n, told in alone.items()]
    for method, name, kind, ways in (
        ("LASP-2", "all-gather", "all-gather", inputs.gather),
        ("ZeCO", "All-Scan", "pipelined", inputs.relay),
    ):
        took = {gpus: exchange(kind, gpus, ways, inputs)[0] for gpus in ZECO_EXCHANGE[name]}
        for gpus, ms in ZECO_EXCHANGE[name].items():
            found.append(relative("exchange, ms", name, f"{gpus} GPUs", ms, 1000 * took[gpus], 25.0))
        for table, gpus in product((measured, published), alone):
            model = speed(took[gpus], computed if table == measured else LOCAL / alone[gpus], inputs)
            found.append(relative(table, method, f"{gpus} GPUs", ZECO_SPEED[method][gpus], model))
    return found


def scaling(inputs: Inputs) -> list[Row]:
    """Every exchange over the usual links and over those fitted to All-Scan; the speed of a step over the usual ones."""
    computed = compute("gla", LOCAL, inputs)
    # Queries and output gates are projected while the states travel (`lasp.layers.mixer`).
    hidden = 2 * 2 * LOCAL * inputs.model.hidden**2 / inputs.kernels.multiply
    found: dict[str, list[Row]] = {"ms, usual links": [], "ms, All-Scan's links": [], "tokens/s/GPU, usual": []}
    usual, relay, speeds = found
    for gpus in GPUS:
        for table, ways in ((usual, inputs.usual), (relay, inputs.relay)):
            took = {name: exchange(name, gpus, ways, inputs) for name in EXCHANGES}
            times = {name: 1000 * seconds for name, (seconds, _) in took.items()}
            found[table].append(Row(table, gpus, times, took["two-level"][1]))
        of = found[usual][-1]
        fast = {name: speed(ms / 1000, computed, inputs, hidden) for name, ms in of.values.items()}
        found[speeds].append(Row(speeds, gpus, {"none": LOCAL / computed} | fast, of.between))
    return [row for rows in found.values() for row in rows]


def faster(inputs: Inputs) -> dict[str, float]:
    """How many times faster two-level is than All-Scan at 256 GPUs."""
    usual, relay = (exchange("two-level", 256, ways, inputs)[0] for ways in (inputs.usual, inputs.relay))
    charged, _ = exchange("two-level", 256, replace(inputs.relay, kernel=inputs.usual.kernel), inputs)
    chain, _ = exchange("pipelined", 256, inputs.relay, inputs)
    told = ZECO_EXCHANGE["All-Scan"][256] / 1000
    return {
        "both over All-Scan's links": chain / relay,
        "the same, but two-level charged the usual kernel": chain / charged,
        "both over the usual links": exchange("pipelined", 256, inputs.usual, inputs)[0] / usual,
        "over the usual links, All-Scan as published": told / usual,
    }


def findings(inputs: Inputs) -> list[dict[str, Any]]:
    """What the published figures imply, and what that does not fit with."""
    layers, card = inputs.model.layers, inputs.physical.between.bandwidth / 1e9
    memory, tensor = inputs.a100_memory / inputs.h100_memory, inputs.a100_tensor / inputs.h100_tensor
    ring, gather = ADVANTAGE["Ring Attention"], ZECO_EXCHANGE["all-gather"]
    lag = {T: lasp2_step(T) * told / 100 / (2 * layers * (LASP_GPUS - 1)) for T, told in ring.items()}
    rate = 2 * 2 * inputs.model.hidden * (LONG - SHORT) / LASP_GPUS / (lag[LONG] - lag[SHORT])
    left = 2 * LONG**2 * inputs.model.hidden * layers / LASP_GPUS / inputs.a100_tensor
    step, share = lasp2_step(SHORT), compute("linear_attn", SHORT // LASP_GPUS, inputs, tensor, memory)
    published = lasp2_step(LONG) * (1 + ring[LONG] / 100)
    received = 255 * inputs.size.summary / gather[256] / 1e6
    homing, waiting = replace(inputs, ring_tensors=(2, 4)), replace(inputs, lasp1_tensors=(4, 7))
    found = [
        ("LASP-2, 512K: s of compute on an A100", share, f"{step:.2f} s a step, most of it the same at any T"),
        ("GB/s by which Ring Attention's lag grows", rate / 1e9, f"{card:g} of a card, {NODE * card:g} of a node"),
        ("Ring Attention, 2048K: s of (q kᵀ) v forward at the A100's peak", left, f"{published:.2f} s a step"),
        ("GB/s a GPU of ZeCO's all-gather at 256, states of 1 MiB", received, "50 of one 400 Gb/s card of 8"),
    ]
    for method, what, changed in (
        ("Ring Attention", "if dK and dV travel too", homing),
        ("LASP-1", "if all of a pass, 4 and 7 tensors, waits for the state, as in its released code", waiting),
    ):
        for T, told in ADVANTAGE[method].items():
            model = advantage(method, T, inputs.nominal, changed)
            found.append((f"% over {method} at {T // K}K {what}", model, f"{told} published"))
    for n in (8, 256):
        longer = LOCAL / ZECO_SPEED["LASP-2"][n] - LOCAL / ZECO_SPEED["data parallel"][n]
        beside = f"{2 * layers * gather[n] / 1000:.3f} s of {2 * layers} published all-gathers"
        found.append((f"s that ZeCO's step of LASP-2 takes beyond data parallel, {n} GPUs", longer, beside))
    return [dict(zip(("what", "value", "beside"), x, strict=True)) for x in found]


def simulate(inputs: Inputs) -> Figures:
    """Everything."""
    constants = [
        {"name": name, "value": getattr(inputs, name), "unit": unit, "source": source}
        for name, (unit, source) in SOURCES.items()
    ]
    cells = lasp_cells(inputs) + zeco_cells(inputs)
    return Figures(constants, cells, scaling(inputs), faster(inputs), findings(inputs))


# -- the report -------------------------------------------------------------------------------------------------------


def report(figures: Figures) -> str:
    """For people."""
    lines = [f"{x['name']:14} {x['value']} {x['unit']}\n{'':14} {x['source']}" for x in figures.inputs]
    for table in dict.fromkeys(x.table for x in figures.cells):
        lines += ["", f"{table:52} {'published':>10} {'model':>10} {'miss':>7}"]
        for x in (x for x in figures.cells if x.table == table):
            lines.append(f"  {x.what:22} {x.at:27} {x.published:10.7g} {x.model:10.7g} {x.miss:+7.1f}")
    for table in dict.fromkeys(x.table for x in figures.rows):
        here = [x for x in figures.rows if x.table == table]
        lines += ["", f"{table:20} GPUs " + " ".join(f"{name:>10}" for name in here[0].values) + "  between nodes"]
        lines += [f"{x.gpus:25} " + " ".join(f"{v:10.5g}" for v in x.values.values()) + f"  {x.between}" for x in here]
    lines += ["", "two-level is faster than All-Scan at 256 GPUs"]
    lines += [f"{times:7.1f} times, {where}" for where, times in figures.faster.items()]
    lines += ["", *(f"{x['value']:9.4g} {x['what']}\n{'':9} beside {x['beside']}" for x in figures.findings)]
    return "\n".join(lines)


def plot(figures: Figures, path: Path) -> None:
    """The advantages, the fitted exchanges, all exchanges, and the speed; what is published is marked by crosses."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chart, (top, bottom) = plt.subplots(2, 2, figsize=(11, 8))
    alike = (
        ("none", "data parallel"),
        ("all-gather", "LASP-2"),
        ("pipelined", "ZeCO", "All-Scan"),
        ("ring",),
        ("scan",),
    )
    colors = {name: f"C{i}" for i, names in enumerate((*alike, ("two-level",))) for name in names}

    def draw(axis: Any, curves: Mapping[str, Mapping[int, float]], style: str, suffix: str = "") -> None:
        for name, curve in curves.items():
            axis.plot([*curve], [*curve.values()], style, color=colors[name], label=name + suffix)

    def rows(table: str) -> dict[str, dict[int, float]]:
        here = [x for x in figures.rows if x.table == table]
        return {name: {x.gpus: x.values[name] for x in here} for name in here[0].values}

    bars = [x for x in figures.cells if x.table == "advantage, %"]
    for i, name in enumerate(("published", "model")):
        top[0].bar([x + 0.4 * i for x in range(len(bars))], [getattr(x, name) for x in bars], 0.4, label=name)
    top[0].set_xticks([x + 0.2 for x in range(len(bars))], [f"{x.what}\n{x.at}" for x in bars], fontsize=7)
    top[0].set_ylabel("LASP-2's advantage, percent, 64 A100")
    for name, column in ZECO_EXCHANGE.items():
        model = [x.model for x in figures.cells if (x.table, x.what) == ("exchange, ms", name)]
        draw(top[1], {name: dict(zip(column, model, strict=True))}, ".-", ", links fitted to it")
    draw(top[1], ZECO_EXCHANGE, "x", ", published")
    draw(bottom[0], rows("ms, All-Scan's links"), ".-")
    draw(bottom[0], {"All-Scan": ZECO_EXCHANGE["All-Scan"]}, "x", ", published")
    draw(bottom[1], rows("tokens/s/GPU, usual"), ".-")
    draw(bottom[1], ZECO_SPEED, "x--", ", published")
    for axis, title in ((top[1], "ms an exchange"), (bottom[0], "ms an exchange, All-Scan's links")):
        axis.set(yscale="log", xlabel="H100s", ylabel=title)
    bottom[1].set(ylim=(0, 145000), xlabel="H100s, 32K tokens each", ylabel="tokens/s/GPU, usual links")
    for axis in (top[1], *bottom):
        axis.set_xscale("log", base=2)
    for axis in (*top, *bottom):
        axis.legend(fontsize=7, ncols=2)
    chart.tight_layout()
    chart.savefig(path, dpi=120)
    plt.close(chart)


@dataclass(frozen=True)
class Options:
    """What is simulated."""

    #: What `lasp.launch.bench_kernels` measured on one H100.
    kernels: Path = Path(__file__).parent / "results" / "kernels.json"
    #: Where the JSON goes, and with another suffix the plot.
    result: Path = Path("simulate.json")


def main() -> None:
    import tyro

    options = tyro.cli(Options, description=__doc__)
    try:
        kernels = Kernels.read(options.kernels)
    except ValueError as error:
        sys.exit(f"--kernels: {error}")
    figures = simulate(Inputs(kernels))
    record(options.result, command_of("lasp.launch.simulate"), figures)
    plot(figures, options.result.with_suffix(".png"))
    print(report(figures))
    if failures := figures.failures():
        sys.exit("missed:\n" + "\n".join(failures))


if __name__ == "__main__":
    main()
