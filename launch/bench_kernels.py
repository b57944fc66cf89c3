"""The linear ops on one GPU beside their peers: time against the memory's and the tensor cores' floors, memory, accuracy.

``python -m lasp.launch.bench_kernels --result bench.json`` measures, in one run, lasp, flash-linear-attention where it is
installed, and torch's scaled_dot_product_attention. Every op is held to float64 before it is timed. Beside the JSON comes
its plot.
"""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp import SequenceLayout, SequenceParallel
from lasp.launch.kernel_cases import OPS, Op, Shape, errors, inputs, ours, passes, peer_of, peer_split
from lasp.launch.record import command_of, record
from lasp.launch.timing import busy, ceilings, fake_group, milliseconds

#: The shapes that are timed by default.
SHAPES = (
    Shape(1, 8192, 16),
    Shape(1, 32768, 16),
    Shape(1, 131072, 16),
    Shape(8, 4096, 16),
    Shape(1, 262144, 4),
)


@dataclass(frozen=True)
class Options:
    """What is measured."""

    #: Ops, of those in `OPS`.
    ops: tuple[str, ...] = (
        "linear_attn", "lightning_attn", "retention", "simple_gla", "gla", "delta_rule", "gated_delta_rule", "kda",
    )  # fmt: skip
    #: Shapes as B,T,H,D; those of `SHAPES` when empty.
    shapes: tuple[str, ...] = ()
    #: Ranks of the fake group by which sequence parallelism's local work is measured; 0 leaves it out.
    sp_size: int = 8
    #: Timed calls a turn, at least, of which the median counts.
    calls: int = 10
    #: Instead of all else, the seconds to each op's first gradient in a new process with an empty cache.
    cold_start: bool = False
    #: Where the JSON goes, and with another suffix the plot.
    result: Path = Path("bench_kernels.json")


# -- time and memory --------------------------------------------------------------------------------------------------


@dataclass
class Figure:
    """One op at one shape.

    Attributes:
        forward: milliseconds.
        both: forward and backward, milliseconds.
        peak: GiB of both passes above the inputs.
    """

    forward: float = math.nan
    both: float = math.nan
    peak: float = math.nan


#: How often ops are timed by turns. The least counts: what else the machine does only adds.
TURNS = 3


def measure(ops: dict[str, Op], tensors: list[Tensor | None], learnt: bool, calls: int) -> dict[str, Figure]:
    """The figures of ops on the same inputs, timed by turns."""
    leaves = [x for x in tensors[:-1] if x is not None]

    def free() -> None:
        for x in leaves:
            x.grad = None

    figures = {who: Figure(math.inf, math.inf) for who in ops}
    for _ in range(TURNS):
        for who, op in ops.items():
            figure = figures[who]
            forward, both = passes(op, tensors, learnt)
            with torch.no_grad():
                figure.forward = min(figure.forward, milliseconds(forward, calls))
            figure.both = min(figure.both, milliseconds(both, calls))
            free()
    for who, op in ops.items():
        gc.collect()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        passes(op, tensors, learnt)[1]()
        figures[who].peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        free()
    for x in leaves:
        x.requires_grad_(False)
    return figures


def sdpa(q: Tensor, k: Tensor, v: Tensor, *_gates: Tensor | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def sp_overhead(name: str, size: int, calls: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Local work of one rank of `size`, over that of the same tokens without sequence parallelism; of ours, then the peer's.

    `forward` and `both` compare what the device computes, the others the time from call to call, the host's part included.
    """
    tokens = 32768
    tensors, learnt = inputs(name, Shape(1, tokens, 16), 1 / 16), OPS[name].learnt
    with fake_group(size) as group:
        sp = SequenceParallel(group, SequenceLayout.contiguous(tokens * size, size))
        for who, split, whole in (
            ("lasp", ours(name, sp), ours(name)),
            ("fla", peer_split(name, group, tokens * size), peer_of(name)),
        ):
            if split is not None and whole is not None:
                yield who, _ratios(split, whole, tensors, learnt, calls)


def _ratios(op: Op, other: Op, tensors: list[Tensor | None], learnt: bool, calls: int) -> dict[str, float]:
    """Times of an op over those of another."""
    times: dict[str, list[tuple[float, float]]] = {"forward": [], "both": [], "forward_wall": [], "both_wall": []}
    # By turns, so that both see the same clocks.
    for _ in range(3):
        turns = []
        for each in (op, other):
            forward, both = passes(each, tensors, learnt)
            with torch.no_grad():
                turn = {"forward_wall": milliseconds(forward, calls), "forward": busy(forward, calls)}
            turn |= {"both_wall": milliseconds(both, calls), "both": busy(both, calls)}
            turns.append(turn)
        for key, pairs in times.items():
            pairs.append((turns[0][key], turns[1][key]))
    return {key: min(a for a, _ in pairs) / min(b for _, b in pairs) for key, pairs in times.items()}


_FIRST_STEP = """
import time, torch
from lasp.launch.kernel_cases import OPS, Shape, inputs, ours, results
torch.cuda.synchronize()
start = time.perf_counter()
results(ours({name!r}), inputs({name!r}, Shape(1, 8192, 16), 1.0), OPS[{name!r}].learnt)
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""


def cold_starts(names: Sequence[str]) -> dict[str, float]:
    """Seconds from a new process with an empty cache to the first output and gradients of each op, a process each at once."""
    with TemporaryDirectory() as caches:
        processes = {
            name: subprocess.Popen(
                [sys.executable, "-c", _FIRST_STEP.format(name=name)],
                env=os.environ | {"TRITON_CACHE_DIR": f"{caches}/{name}"},
                stdout=subprocess.PIPE,
                text=True,
            )
            for name in names
        }
        seconds = {}
        for name, process in processes.items():
            told, _ = process.communicate()
            if process.returncode:
                sys.exit(f"the first step of {name} failed: see above")
            seconds[name] = float(told.split()[-1])
            print(f"{name:15} first output and gradients after {seconds[name]:.1f} s", flush=True)
    return seconds


# -- the report -------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """What is known of one op at one shape; milliseconds. The floors are the memory's and the tensor cores'."""

    op: str
    shape: str
    floor_forward: float
    floor_both: float
    compute_forward: float = math.nan
    compute_both: float = math.nan
    figures: dict[str, Figure] = field(default_factory=dict)


def run(options: Options, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measure everything, printing and saving as it goes."""
    copied, multiplied = ceilings()
    print(
        f"{torch.cuda.get_device_name()}: copies {copied / 1e12:.2f} TB/s, multiplies {multiplied / 1e12:.0f} TFLOP/s"
    )
    shapes = [Shape(*map(int, text.split(","))) for text in options.shapes] or list(SHAPES)
    accuracy: dict[str, Any] = {}
    rows: list[Row] = []
    overhead: dict[str, Any] = {}
    softmax: dict[str, Figure] = {}
    figures = {
        "copy_bytes_per_second": copied,
        "bf16_flop_per_second": multiplied,
        "errors": accuracy,
        "times": rows,
        "sp_local_work": overhead,
        "softmax": softmax,
    }
    for shape in shapes:
        if shape.T <= 32768:
            softmax |= measure({str(shape): sdpa}, inputs("linear_attn", shape, 1.0), False, options.calls)
            print(f"{'softmax (SDPA)':15} {shape!s:26} {softmax[str(shape)]}", flush=True)
    for name in options.ops:
        case, peer = OPS[name], peer_of(name)
        for kind, strength in (("weak", 1 / 16), ("strong", 8.0)) if case.learnt and case.gate else (("", 1.0),):
            found = errors(name, peer, strength)
            accuracy[f"{name} {kind}".strip()] = found
            for who, of in found.items():
                print(f"{name:15} {kind:6} {who:5} error " + "  ".join(f"{key} {x:.1e}" for key, x in of.items()))
        for shape in shapes:
            tensors = inputs(name, shape, 1 / 16)
            bytes_forward, bytes_both = case.floor_bytes(shape, tensors[3:5])
            row = Row(name, str(shape), bytes_forward / copied * 1000, bytes_both / copied * 1000)
            row.compute_forward, row.compute_both = (x / multiplied * 1000 for x in case.floor_operations(shape))
            sides = {"lasp": ours(name)} if peer is None else {"lasp": ours(name), "fla": peer}
            row.figures = measure(sides, tensors, case.learnt, options.calls)
            rows.append(row)
            print(line(row), flush=True)
            del tensors
            torch.cuda.empty_cache()
        save(figures)
        if options.sp_size:
            overhead[name] = {}
            for who, ratios in sp_overhead(name, options.sp_size, options.calls):
                overhead[name][who] = ratios
                print(f"{name:15} {who:5} one rank of {options.sp_size}, local work: {ratios}", flush=True)
                save(figures)
    return figures


def line(row: Row) -> str:
    """One row of the table."""
    text = f"{row.op:15} {row.shape:26} floor {row.floor_forward:6.3f} {row.floor_both:6.3f}"
    text += f" (compute {row.compute_forward:5.3f} {row.compute_both:5.3f})"
    for who, x in row.figures.items():
        text += f" | {who} {x.forward:7.3f} {x.both:7.3f} ms {x.peak:5.2f} GiB"
    if len(row.figures) == 2:
        a, b = row.figures.values()
        text += f" | faster {b.forward / a.forward:4.2f} {b.both / a.both:4.2f}"
    return text


def plot(rows: list[Row], path: Path) -> None:
    """Times of both passes over the memory's floor, a panel a shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys(row.shape for row in rows))
    figure, axes = plt.subplots(1, len(shapes), figsize=(3.2 * len(shapes), 3.4), squeeze=False, sharey=True)
    for axis, shape in zip(axes[0], shapes, strict=True):
        here = [row for row in rows if row.shape == shape]
        for i, (who, color) in enumerate((("lasp", "tab:blue"), ("fla", "tab:gray"))):
            heights = [row.figures[who].both / row.floor_both if who in row.figures else 0 for row in here]
            axis.bar([x + 0.4 * i for x in range(len(here))], heights, 0.4, label=who, color=color)
        axis.set_xticks([x + 0.2 for x in range(len(here))], [row.op for row in here], rotation=60, ha="right")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_title(shape, fontsize=9)
    axes[0][0].set_ylabel("forward + backward,\ntimes the floor")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    import tyro

    options = tyro.cli(Options, description=__doc__)
    if not torch.cuda.is_available():
        sys.exit("bench_kernels measures a GPU, and torch finds none here")
    unknown = [name for name in options.ops if name not in OPS]
    if unknown:
        sys.exit(f"unknown --ops {', '.join(unknown)}: expected some of {', '.join(OPS)}")
    command = command_of("lasp.launch.bench_kernels")
    if options.cold_start:
        record(options.result, command, {"seconds": cold_starts(options.ops)})
        return
    figures = run(options, lambda figures: record(options.result, command, figures))
    plot(figures["times"], options.result.with_suffix(".png"))
    print(f"written to {options.result} and {options.result.with_suffix('.png')}")


if __name__ == "__main__":
    main()
