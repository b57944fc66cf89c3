"""Megatron-Core with this project's layers beside this project's own loop: the same model, weights and sequences.

``python -m lasp.launch.bench_mcore --result mcore.json`` trains a hybrid of 1.1 billion parameters on 16384 tokens a step by
turns, in bfloat16, and tells how long a step takes: two minutes on one H200.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
import tyro

from lasp.launch.megatron_cpu import megatron_on_cpu
from lasp.launch.pretrain_mcore import McoreOptions, McoreTrainer
from lasp.launch.record import command_of, record
from lasp.parallel.mesh import build_mesh, launched_ranks, processes
from lasp.training import Trainer, errors_in_one_line
from lasp.training.loop import Loop


@dataclass(frozen=True)
class Compared:
    """What is trained, and for how long."""

    run: McoreOptions = field(
        default_factory=lambda: McoreOptions(
            preset="linear-llama3-1b", mixer="gated_delta_net", seq_len=16384, batch_size=1, dtype="bfloat16", lr=3e-4,
        )
    )  # fmt: skip
    """The model and its sequences."""
    turns: int = 6
    """How often each loop has its turn; the first is not timed."""
    steps: int = 5
    """Steps of a turn."""
    result: Path = Path("bench_mcore.json")
    """Where the JSON goes."""


@dataclass
class Figures:
    """Of one loop.

    Attributes:
        step_ms: how long a step takes, milliseconds; the median of the turns.
        tokens_per_second: so many.
        peak: GiB that the loop has on the device at most, its parameters and its optimizer's state included.
        turns_ms: a step of each turn.
        losses: of each step.
        grad_norms: likewise, before clipping.
    """

    step_ms: float
    tokens_per_second: float
    peak: float
    turns_ms: list[float]
    losses: list[float]
    grad_norms: list[float]


class Taken:
    """A loop, and what its turns took."""

    def __init__(self, make: Callable[[], Loop], compared: Compared):
        self.compared = compared
        self.device = compared.run.device_type()
        before = self._memory()
        self.loop = make()
        self.rows: list[dict[str, torch.Tensor]] = []
        self.seconds: list[float] = []
        self.turn()
        self.peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if self.device == "cuda" else 0.0
        # Kernels were compiled.
        self.seconds = []

    def turn(self) -> None:
        """Some steps."""
        self._wait()
        began = time.perf_counter()
        self.rows += [self.loop.step() for _ in range(self.compared.steps)]
        self._wait()
        self.seconds.append((time.perf_counter() - began) / self.compared.steps)

    def figures(self) -> Figures:
        """What it took."""
        second, options = median(self.seconds), self.compared.run
        return Figures(
            step_ms=second * 1000,
            tokens_per_second=options.batch_size * options.seq_len / second,
            peak=self.peak,
            turns_ms=[1000 * turn for turn in self.seconds],
            losses=torch.stack([row["loss"] for row in self.rows]).tolist(),
            grad_norms=torch.stack([row["grad_norm"] for row in self.rows]).tolist(),
        )

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _memory(self) -> int:
        if self.device != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()


def compare(compared: Compared) -> dict[str, Figures]:
    """Both loops by turns, on one rank whose process group there is."""
    options = compared.run
    taken = {
        "lasp": Taken(lambda: Trainer(options, build_mesh(options.device_type(), 1)), compared),
        "megatron": Taken(lambda: McoreTrainer(options), compared),
    }
    for _ in range(compared.turns - 1):
        for loop in taken.values():
            loop.turn()
    return {name: loop.figures() for name, loop in taken.items()}


def main() -> None:
    program = "lasp.launch.bench_mcore"
    with errors_in_one_line(program):
        compared = tyro.cli(Compared, description=__doc__)
        compared.run.check(launched_ranks())
        if launched_ranks() > 1 or compared.turns < 2:
            raise ValueError("it compares on one rank, and needs --turns 2 at least")
    with processes(compared.run.device_type()), megatron_on_cpu():
        figures = compare(compared)
    for name, loop in figures.items():
        print(
            f"{name:9} {loop.step_ms:8.1f} ms a step, {loop.tokens_per_second:9.0f} tokens/s, {loop.peak:5.1f} GiB, "
            f"loss {loop.losses[0]:.4f} to {loop.losses[-1]:.4f}"
        )
    print(f"Megatron-Core's speed, of this project's loop: {figures['lasp'].step_ms / figures['megatron'].step_ms:.3f}")
    record(compared.result, command_of(program), figures)


if __name__ == "__main__":
    main()
