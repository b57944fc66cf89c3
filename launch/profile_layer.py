"""One linear layer under torch's profiler: what its exchanges run behind, and how long it waits for them.

``torchrun --nproc-per-node 4 -m lasp.launch.profile_layer`` prints the spans of one pass forward and back on the rank
in the middle, writes them as JSON and as a plot, and beside them the trace for https://ui.perfetto.dev. Spans are the host's:
on a GPU, where the host runs ahead, the trace tells.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from lasp import SequenceLayout, SequenceParallel
from lasp.kernels import Recurrence
from lasp.launch.record import command_of, record
from lasp.layers.linear import MIXERS, mixer_type
from lasp.layers.mixer import LinearMixer
from lasp.parallel.exchange import EXCHANGES
from lasp.parallel.exchange.lane import SPAN
from lasp.parallel.mesh import processes

#: The spans, as they are drawn, from the top.
LANES = ("summary", "queries", "gate", "output", "dq", "dk, dv, dg", SPAN, "waiting")


@dataclass(frozen=True)
class Options:
    """The layer, and how its states travel."""

    #: The linear mixer.
    mixer: str = "gla"
    #: Width of the model and heads.
    hidden: int = 1024
    heads: int = 8
    #: Tokens of each rank.
    tokens: int = 2048
    #: An exchange of several steps: torch's own collective, which all-gather is, has a span of its own in the trace alone.
    exchange: str = "scan"
    #: cpu (gloo), cuda (NCCL), or auto: cuda where there is a GPU.
    device: str = "auto"
    #: Where the JSON goes, and with other suffixes the plot and the trace.
    result: Path = Path("profile_layer.json")


@dataclass(frozen=True)
class Span:
    """What went on, in milliseconds from the start of the pass."""

    what: str
    start: float
    end: float


@contextmanager
def named(layer: LinearMixer, sp: SequenceParallel) -> Iterator[None]:
    """Give the parts of a pass their names in the profile."""
    undo: list[tuple[Any, str, Any]] = []

    def put(owner: Any, method: str, new: Any) -> None:
        undo.append((owner, method, vars(owner).get(method)))
        setattr(owner, method, new)

    def name(owner: Any, method: str, what: str) -> None:
        original = getattr(owner, method)

        def told(*args: Any, **options: Any) -> Any:
            with record_function(what):
                return original(*args, **options)

        put(owner, method, told)

    name(layer, "queries", "queries")
    if layer.gate_proj is not None:
        name(layer.gate_proj, "forward", "gate")
    start = sp.exchange.start

    def started(*args: Any) -> Any:
        running = start(*args)
        name(running, "wait", "waiting")
        return running

    put(sp.exchange, "start", started)
    parts = {"summary": "summary", "adjoint_summary": "summary", "output": "output"}
    parts |= {"query_gradient": "dq", "token_gradients": "dk, dv, dg"}
    for kind in _all_kinds(Recurrence):
        for method, what in parts.items():
            if method in vars(kind) and not getattr(vars(kind)[method], "__isabstractmethod__", False):
                name(kind, method, what)
    try:
        yield
    finally:
        for owner, method, original in reversed(undo):
            if original is None:
                delattr(owner, method)
            else:
                setattr(owner, method, original)


def _all_kinds(kind: type[Any]) -> Iterator[type[Any]]:
    for below in kind.__subclasses__():
        yield below
        yield from _all_kinds(below)


def run(options: Options, device: torch.device) -> tuple[dict[str, list[Span]], Any]:
    """The spans of the passes forward and backward on this rank, and torch's profile."""
    world = dist.get_world_size()
    layout = SequenceLayout.contiguous(options.tokens * world, world)
    sp = SequenceParallel(dist.group.WORLD, layout, exchange=options.exchange)
    torch.manual_seed(0)
    layer = mixer_type(options.mixer)(options.hidden, options.heads).to(device)
    x = torch.randn(1, sp.local_tokens, options.hidden, device=device, requires_grad=True)
    config = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    for _ in range(2):
        layer(x, sp=sp).sum().backward()
    with named(layer, sp), profile(activities=kinds, experimental_config=config) as profiled:
        dist.barrier()
        with record_function("forward"):
            y = layer(x, sp=sp)
        dist.barrier()
        with record_function("backward"):
            y.sum().backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
    events = [event for event in profiled.events() if event.device_type.name == "CPU"]
    spans = {}
    for way in ("forward", "backward"):
        whole = next(event.time_range for event in events if event.name == way)
        spans[way] = [
            Span(event.name, (event.time_range.start - whole.start) / 1000, (event.time_range.end - whole.start) / 1000)
            for event in sorted(events, key=lambda event: event.time_range.start)
            if event.name in LANES and whole.start <= event.time_range.start <= whole.end
        ]
    return spans, profiled


def hidden(spans: list[Span]) -> tuple[float, float]:
    """Milliseconds of the exchange, and of those in which the layer only waited."""
    took = sum(span.end - span.start for span in spans if span.what == SPAN)
    return took, sum(span.end - span.start for span in spans if span.what == "waiting")


def plot(spans: dict[str, list[Span]], path: Path) -> None:
    """Both passes, a row for each part."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chart, axes = plt.subplots(1, 2, figsize=(11, 3.2), sharey=True)
    for axis, (way, here) in zip(axes, spans.items(), strict=True):
        for span in here:
            color = {SPAN: "C1", "waiting": "C3"}.get(span.what, "C0")
            axis.barh(LANES.index(span.what), span.end - span.start, left=span.start, color=color)
        axis.set(title=way, xlabel="milliseconds", yticks=range(len(LANES)), yticklabels=LANES)
        axis.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    chart.tight_layout()
    chart.savefig(path, dpi=120)
    plt.close(chart)


def main() -> None:
    import tyro

    options = tyro.cli(Options, description=__doc__)
    for flag, value, known in (("mixer", options.mixer, MIXERS), ("exchange", options.exchange, EXCHANGES)):
        if value not in known:
            sys.exit(f"unknown --{flag} {value}: expected one of {', '.join(known)}")
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    with processes(kind) as device:
        spans, profiled = run(options, device)
        if dist.get_rank() == dist.get_world_size() // 2:
            record(options.result, command_of("lasp.launch.profile_layer"), spans)
            plot(spans, options.result.with_suffix(".png"))
            profiled.export_chrome_trace(str(options.result.with_suffix(".trace.json")))
            for way, here in spans.items():
                print(way)
                for span in here:
                    print(f"  {span.what:14} {span.start:9.2f} to {span.end:9.2f} ms")
                took, waited = hidden(here)
                print(f"  the exchange took {took:.2f} ms, of which the layer waited {waited:.2f} ms")


if __name__ == "__main__":
    main()
