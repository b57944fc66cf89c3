"""The short convolution and the gated norm on one GPU: the fused kernels beside PyTorch's and flash-linear-attention's.

``python -m lasp.launch.bench_fused --result fused_layers.json``
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from lasp.kernels import triton as forms
from lasp.launch.record import command_of, record
from lasp.launch.timing import ceilings, milliseconds
from lasp.ops import causal_conv1d
from lasp.ops.norm import rms_norm


@dataclass(frozen=True)
class Options:
    """What is measured, in bfloat16."""

    #: Tokens.
    tokens: int = 32768
    #: Channels.
    width: int = 2048
    #: Channels that are normed by themselves, where that is by head.
    head: int = 128
    #: Timed calls, of which the median counts.
    calls: int = 50
    #: Where the JSON goes.
    result: Path = Path("fused_layers.json")


@dataclass(frozen=True)
class Row:
    """One layer in one form, milliseconds; how far its results are from the fused form's."""

    layer: str
    form: str
    forward: float
    both: float
    floor_both: float
    relative_difference: float


@dataclass(frozen=True)
class Case:
    """A layer of ours and of flash-linear-attention's, its inputs, and how often a tensor of all tokens must be moved."""

    ours: Callable[[], Tensor]
    peer: Callable[[], Tensor] | None
    leaves: Sequence[Tensor]
    moves: int


def cases(options: Options) -> dict[str, Case]:
    """The layers: a convolution of four taps with bias and silu, and the gated norm over a head and over all channels."""
    try:
        from fla.modules.causal_conv1d import causal_conv1d as fla_conv
        from fla.modules.norm.fused_norm_gate import rms_norm_gated as fla_norm
    except ImportError:
        fla_conv = fla_norm = None
    T, D, head = options.tokens, options.width, options.head

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()

    x, g = leaf(1, T, D), leaf(1, T, D)
    taps, bias, wide, narrow = leaf(D, 4), leaf(D), leaf(D), leaf(head)
    return {
        "conv": Case(
            lambda: causal_conv1d(x, taps, bias, "silu"),
            fla_conv and (lambda: fla_conv(x, taps, bias, activation="silu")[0]),
            (x, taps, bias),
            2 + 3,
        ),
        "norm by head": Case(
            lambda: rms_norm(x, g, narrow, 1e-5, D // head),
            fla_norm and (lambda: fla_norm(x.view(-1, head), g.view(-1, head), narrow, None, eps=1e-5).view_as(x)),
            (x, g, narrow),
            3 + 5,
        ),
        "norm": Case(
            lambda: rms_norm(x, g, wide, 1e-5),
            fla_norm and (lambda: fla_norm(x, g, wide, None, eps=1e-5)),
            (x, g, wide),
            3 + 5,
        ),
    }


def run(options: Options) -> list[Row]:
    """Measure every layer in every form, printing as it goes."""
    copied, _ = ceilings()
    dy = torch.randn(1, options.tokens, options.width, device="cuda", dtype=torch.bfloat16)
    rows: list[Row] = []
    for layer, case in cases(options).items():
        reference: tuple[Tensor, ...] = ()
        for form, op in (("lasp", case.ours), ("PyTorch", case.ours), ("fla", case.peer)):
            if op is None:
                continue

            def both(op: Callable[[], Tensor] = op, case: Case = case) -> tuple[Tensor, ...]:
                y = op()
                return y, *torch.autograd.grad(y, case.leaves, dy)

            with patch.object(forms, "serves", (lambda _: False) if form == "PyTorch" else forms.serves):
                found = both()
                times = milliseconds(op, options.calls), milliseconds(both, options.calls)
            reference = reference or found
            apart = max(
                ((a.float() - b.float()).norm() / b.float().norm()).item()
                for a, b in zip(found, reference, strict=True)
            )
            floor = case.moves * dy.nbytes / copied * 1000
            rows.append(Row(layer, form, *times, floor, apart))
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    import tyro

    options = tyro.cli(Options, description=__doc__)
    if not torch.cuda.is_available():
        sys.exit("bench_fused measures a GPU, and torch finds none here")
    record(options.result, command_of("lasp.launch.bench_fused"), run(options))


if __name__ == "__main__":
    main()
