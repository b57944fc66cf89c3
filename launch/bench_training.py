"""What ``--fsdp``, ``--recompute`` and ``--micro-batch-size`` cost in time, and what memory they save, in training.

``python -m lasp.launch.bench_training --result one.json`` trains a hybrid of 1.1 billion parameters on one GPU, keeping more or
less for the backward; ``torchrun --nproc-per-node 2 -m lasp.launch.bench_training --result two.json`` shares a longer sequence,
and then the sequences, among ranks that each hold all weights, or a part of them, and writes a checkpoint behind the last run.
Documents are not told apart, so that a softmax layer is one kernel. Loss and gradient norm tell that the runs are the same: to
the last digit with ``--deterministic``, without which softmax layers on one GPU add gradients up in any order, and what that
changes grows from step to step.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import tyro
from tqdm import tqdm

from lasp.launch.record import command_of, record
from lasp.parallel.mesh import build_mesh, launched_ranks, processes
from lasp.training import Options, Trainer, errors_in_one_line

#: Steps of a run, which none reaches: after its last, a run waits for its checkpoint.
STEPS = 10**6


@dataclass(frozen=True)
class Bench:
    """What is trained, and for how long."""

    preset: str = "linear-llama3-1b"
    """Size of the model, as pretrain.py takes it."""
    mixer: str = "gla"
    """Of the linear layers."""
    pattern: str = "LLLN"
    """A letter a layer, repeated over the depth: L linear, N softmax."""
    tokens: int = 16384
    """Of a sequence, for each of the ranks that share it."""
    dtype: str = "bfloat16"
    """What the matrix products are computed in: float32 or bfloat16."""
    device: str = "auto"
    """Where to measure: cpu (no memory is told), cuda, or auto for cuda where there is one."""
    deterministic: bool = False
    """Whether two runs are the same to the last bit, as pretrain.py takes it."""
    data: tuple[Path, ...] = ()
    """Text, as pretrain.py takes it. The sources of Python's standard library if not given."""
    data_cache: Path = Options.data_cache
    """Directory of the tokens, which are made once of text."""
    warmup: int = 4
    """Steps before those that are timed."""
    steps: int = 10
    """Timed steps, of which the median counts."""
    result: Path = Path("bench_training.json")
    """Where the JSON goes."""

    def cases(self, ranks: int) -> list[Case]:
        """Every case on that many ranks.

        Raises:
            ValueError: naming the option that does not allow it.
        """
        for name, least in (("tokens", 1), ("warmup", 0), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least {least}")
        found = [Case(changed) for changed in (_on_one(self.tokens) if ranks == 1 else _on_more(self.tokens, ranks))]
        if ranks > 1:
            found[-1] = replace(found[-1], saves=True)
        for case in found:
            self.run(case).check(ranks)
        return found

    def run(self, case: Case, out: Path = Options.out) -> Options:
        """What is trained in a case, with its checkpoints in a directory."""
        return Options(
            preset=self.preset, mixer=self.mixer, pattern=self.pattern, dtype=self.dtype, device=self.device, data=self.data,
            data_cache=self.data_cache, document_mask=False, validation=0.0, lr=3e-4, steps=STEPS, out=out,
            deterministic=self.deterministic, **case.changed,
        )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One of the runs.

    Attributes:
        changed: the options that make it, by their names in `Options`.
        saves: whether a checkpoint is written behind it.
    """

    changed: dict[str, Any]
    saves: bool = False

    def __str__(self) -> str:
        """As pretrain.py is told."""
        told = {f"--{name.replace('_', '-')}": value for name, value in self.changed.items()}
        return " ".join(name if value is True else f"{name} {value}" for name, value in told.items())


@dataclass(frozen=True)
class Saving:
    """A checkpoint that is written behind a run.

    Attributes:
        held: seconds for which the run stood still.
        whole: seconds from when it began to the end of the step after which it was on the disk.
        steps: how many the run made in between.
        step_ms: how long one took, milliseconds; None where there was none.
    """

    held: float
    whole: float
    steps: int
    step_ms: float | None


@dataclass(frozen=True)
class Row:
    """The figures of a case.

    Attributes:
        options: what makes it, as pretrain.py is told.
        ranks: how many trained.
        step_ms: how long a step takes, milliseconds; of the slowest rank.
        tokens_per_second: of all ranks together.
        peak: GiB that a rank has on its device at most in a step, all included; of the rank that has most. None on CPUs.
        loss: of the last timed step.
        grad_norm: likewise, before clipping.
        saving: the checkpoint behind it, where one was written.
    """

    options: str
    ranks: int
    step_ms: float
    tokens_per_second: float
    peak: float | None
    loss: float
    grad_norm: float
    saving: Saving | None


def _on_one(tokens: int) -> list[dict[str, Any]]:
    """A sequence of so many tokens, and four, one after another."""
    kept = [{"seq_len": tokens, "batch_size": 1, "recompute": recompute} for recompute in ("none", "selective", "full")]
    return [*kept, {"seq_len": tokens, "batch_size": 4, "micro_batch_size": 1}]


def _on_more(tokens: int, ranks: int) -> list[dict[str, Any]]:
    """A sequence that all ranks share, and a sequence a rank."""
    shared = {"seq_len": tokens * ranks, "batch_size": 1, "layout": "zigzag"}
    apart = {"seq_len": tokens, "batch_size": ranks, "sp_size": 1}
    return [
        shared, shared | {"fsdp": True}, shared | {"fsdp": True, "recompute": "full"}, apart, apart | {"fsdp": True},
    ]  # fmt: skip


def measure(bench: Bench, speaks: bool) -> Iterator[Row]:
    """Every case on all ranks, as they end; on the rank that speaks a bar of their steps."""
    cases = bench.cases(dist.get_world_size())
    total = len(cases) * (bench.warmup + bench.steps)
    with _folder() as folder, tqdm(total=total, unit="step", disable=not speaks) as bar:
        for case in cases:
            bar.set_description(str(case))
            yield _measured(bench, case, folder, bar)
            # What the last one held is not the next one's.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _measured(bench: Bench, case: Case, folder: Path, bar: tqdm) -> Row:
    options, ranks = bench.run(case, folder), dist.get_world_size()
    trainer = Trainer(options, build_mesh(options.device_type(), options.ranks_of_a_sequence(ranks)))
    cuda = trainer.device.type == "cuda"
    times = []
    for step in range(bench.warmup + bench.steps):
        if cuda and step == bench.warmup:
            torch.cuda.reset_peak_memory_stats()
        took, figures = _step(trainer)
        times.append(took)
        bar.update()
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    step_ms, peak = _largest([median(times[bench.warmup :]), peak], trainer.device)
    return Row(
        options=str(case),
        ranks=ranks,
        step_ms=step_ms,
        tokens_per_second=1000 * options.batch_size * options.seq_len / step_ms,
        peak=peak if cuda else None,
        loss=figures["loss"].item(),
        grad_norm=figures["grad_norm"].item(),
        saving=_saving(trainer) if case.saves else None,
    )


def _saving(trainer: Trainer) -> Saving:
    """Write a checkpoint, and train until it is on the disk."""
    began = time.perf_counter()
    trainer.save()
    held = time.perf_counter() - began
    times = []
    # Every rank makes as many steps as the others, though one may have written its part before them.
    while _largest([float(trainer.checkpoints.writing)], trainer.device)[0]:
        times.append(_step(trainer)[0])
    trainer.wait()
    whole = time.perf_counter() - began
    held, whole, step_ms = _largest([held, whole, median(times) if times else 0.0], trainer.device)
    return Saving(held, whole, len(times), step_ms if times else None)


def _step(trainer: Trainer) -> tuple[float, dict[str, torch.Tensor]]:
    """A step: how many milliseconds it took, until the device had done it, and its figures."""
    began = time.perf_counter()
    figures = trainer.step()
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began), figures


def _largest(figures: list[float], device: torch.device) -> list[float]:
    """Of all ranks, each."""
    found = torch.tensor(figures, dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


@contextmanager
def _folder() -> Iterator[Path]:
    """A directory that all ranks know, until the end of the block."""
    with TemporaryDirectory() if dist.get_rank() == 0 else nullcontext("") as made:
        names = [made]
        dist.broadcast_object_list(names, 0)
        yield Path(names[0])


def table(rows: list[Row]) -> str:
    """The figures of all cases, a line each."""
    width = max(len(row.options) for row in rows)
    lines = [f"{'':{width}} {'ms a step':>10} {'tokens/s':>10} {'peak GiB':>10} {'loss':>10} {'norm':>10}"]
    for row in rows:
        peak = "" if row.peak is None else f"{row.peak:.1f}"
        lines.append(
            f"{row.options:{width}} {row.step_ms:10.1f} {row.tokens_per_second:10.0f} {peak:>10} "
            f"{row.loss:10.5f} {row.grad_norm:10.4f}"
        )
        if (saving := row.saving) is not None:
            behind = "none made" if saving.step_ms is None else f"of {saving.step_ms:.1f} ms"
            lines.append(
                f"  a checkpoint held it up for {saving.held:.2f} s and was whole after {saving.whole:.1f} s; "
                f"{saving.steps} steps in between, {behind}"
            )
    return "\n".join(lines)


def main() -> None:
    program = "lasp.launch.bench_training"
    speaks, ranks = os.environ.get("RANK", "0") == "0", launched_ranks()
    rows: list[Row] = []
    with errors_in_one_line(program):
        bench = tyro.cli(Bench, description=__doc__, console_outputs=speaks)
        first = bench.run(bench.cases(ranks)[0])
        of_all = {
            "preset": bench.preset, "mixer": bench.mixer, "pattern": bench.pattern, "dtype": bench.dtype,
            "deterministic": bench.deterministic, "document_mask": False, "warmup": bench.warmup, "steps": bench.steps,
        }  # fmt: skip
        with processes(first.device_type()):
            for row in measure(bench, speaks):
                rows.append(row)
                if speaks:
                    record(bench.result, command_of(program), of_all | {"cases": rows})
    if speaks:
        print(table(rows))


if __name__ == "__main__":
    main()
