"""A layer of Mixture of Memories on one GPU beside the plain layer of the same recurrence and flash-linear-attention's.

``python -m lasp.launch.bench_mom --result mom.json``
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lasp.launch.record import command_of, record
from lasp.launch.timing import busy, milliseconds
from lasp.layers import MixtureOfMemories
from lasp.layers.linear import mixer_type


@dataclass(frozen=True)
class Options:
    """What is measured, in bfloat16."""

    #: Tokens of one sequence.
    tokens: int = 32768
    #: Width of the model; heads are 128 wide.
    hidden: int = 2048
    #: What each memory is. flash-linear-attention has Gated DeltaNet only.
    recurrence: str = "gated_delta_net"
    #: Memories, without the shared one.
    num_memories: int = 4
    #: How many of them a token chooses.
    top_k: int = 2
    #: Timed calls, at least, of which the median counts.
    calls: int = 10
    #: How often the layers are timed by turns. The least counts.
    turns: int = 3
    #: Where the JSON goes.
    result: Path = Path("bench_mom.json")


@dataclass
class Figure:
    """One layer.

    Attributes:
        forward: milliseconds.
        both: forward and backward, with the gradients of the parameters, milliseconds.
        busy: what of both the device computes, milliseconds.
        peak: GiB of both passes above the input and the parameters.
    """

    forward: float
    both: float
    busy: float
    peak: float = 0.0


def layers(options: Options) -> dict[str, nn.Module]:
    """The plain layer, the mixture, and the peer's where it is installed."""
    hidden, heads = options.hidden, options.hidden // 128
    found: dict[str, nn.Module] = {
        "plain": mixer_type(options.recurrence)(hidden, heads),
        "lasp": MixtureOfMemories(
            hidden, heads, recurrence=options.recurrence, num_memories=options.num_memories, top_k=options.top_k
        ),
    }
    try:
        import fla.ops.common.chunk_o
        from fla.layers.mom import MomAttention
    except ImportError as missing:
        print(f"flash-linear-attention's layer is left out: {missing}")
    else:
        # Before Triton 3.7.1 it refuses its gated backward on Hopper. At K = 128, which is measured here, it is right.
        fla.ops.common.chunk_o.TRITON_ABOVE_3_7_1 = True
        if options.recurrence == "gated_delta_net":
            found["fla"] = MomAttention(
                hidden, head_dim=128, num_heads=heads, expand_v=1, num_memories=options.num_memories, topk=options.top_k,
                shared_mem=True, layer_idx=0,
            ).train()  # fmt: skip
    return {name: layer.to("cuda", torch.bfloat16) for name, layer in found.items()}


def passes(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[Callable[[], Tensor], Callable[[], None]]:
    """The forward, and forward and backward."""

    def forward() -> Tensor:
        y = layer(x)
        return y[0] if isinstance(y, tuple) else y

    def both() -> None:
        for leaf in (x, *layer.parameters()):
            leaf.grad = None
        forward().backward(dy)

    return forward, both


def run(options: Options) -> dict[str, Figure]:
    """Measure every layer, printing as it goes."""
    torch.manual_seed(0)
    measured = layers(options)
    x = torch.randn(1, options.tokens, options.hidden, device="cuda", dtype=torch.bfloat16).requires_grad_()
    dy = torch.randn_like(x)
    figures: dict[str, Figure] = {}
    for _ in range(options.turns):
        for name, layer in measured.items():
            forward, both = passes(layer, x, dy)
            with torch.no_grad():
                seen = [milliseconds(forward, options.calls)]
            seen += [milliseconds(both, options.calls), busy(both, options.calls)]
            before = figures.get(name)
            if before is not None:
                seen = [min(pair) for pair in zip(seen, (before.forward, before.both, before.busy), strict=True)]
            figures[name] = Figure(*seen)
    for name, layer in measured.items():
        for leaf in (x, *layer.parameters()):
            leaf.grad = None
        gc.collect()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        passes(layer, x, dy)[1]()
        figures[name].peak = (torch.cuda.max_memory_allocated() - held) / 2**30
        for leaf in (x, *layer.parameters()):
            leaf.grad = None
        print(f"{name:6} {figures[name]}", flush=True)
    mixture = figures["lasp"]
    print(f"times the plain layer: {mixture.both / figures['plain'].both:.2f}")
    if "fla" in figures:
        print(f"times as fast as flash-linear-attention: {figures['fla'].both / mixture.both:.2f}")
    return figures


def main() -> None:
    import tyro

    options = tyro.cli(Options, description=__doc__)
    if not torch.cuda.is_available():
        sys.exit("bench_mom measures a GPU, and torch finds none here")
    record(options.result, command_of("lasp.launch.bench_mom"), run(options))


if __name__ == "__main__":
    main()
