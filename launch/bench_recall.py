"""What a mixture of memories recalls beside one memory of the same size: multi-query associative recall.

``python -m lasp.launch.bench_recall --jobs 2 --result recall.json`` trains each mixer for each number of pairs, several at
once on one device, and plots the share of the answers that are right. ``torchrun --nproc-per-node 2 -m
lasp.launch.bench_recall --mixers mom`` does the same with every sequence shared by the ranks.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
import tyro

from lasp.launch.record import command_of, record
from lasp.models import MIXTURE
from lasp.parallel.mesh import build_mesh, launched_ranks, processes
from lasp.training import Options, Trainer, errors_in_one_line

#: Over how many steps the last accuracy is a mean.
LAST = 50


@dataclass(frozen=True)
class Recalls:
    """Train on multi-query associative recall."""

    mixers: tuple[str, ...] = ("gated_delta_net", MIXTURE)
    """What is compared; a mixture is one of the first of them."""
    pairs: tuple[int, ...] = (8,)
    """How many pairs a sequence has."""
    jobs: int = 1
    """How many are trained at once."""
    run: Options = field(
        default_factory=lambda: Options(
            task="mqar", pattern="L", layers=2, hidden=64, heads=8, intermediate=128, vocabulary=32, batch_size=16,
            lr=3e-3, warmup=100, steps=1500,
        )
    )  # fmt: skip
    """What is trained; `pairs` says how long its sequences are."""
    interval: int = 50
    """Steps between two lines of a run."""
    result: Path = Path("bench_recall.json")
    """Where the JSON goes, and with another suffix the plot."""

    def runs(self, ranks: int) -> list[Options]:
        """Every run, on that many ranks.

        Raises:
            ValueError: naming the option that does not allow it.
        """
        found = []
        for pairs in self.pairs:
            for mixer in self.mixers:
                inner = self.mixers[0] if mixer == MIXTURE and self.mixers[0] != MIXTURE else self.run.mom_recurrence
                found.append(
                    replace(
                        self.run, mixer=mixer, mom_recurrence=inner, pairs=pairs, seq_len=4 * pairs,
                        sp=self.run.sp if ranks > 1 else "none",
                    )
                )  # fmt: skip
                found[-1].check(ranks)
        return found


@dataclass(frozen=True)
class Curve:
    """One run.

    Attributes:
        mixer: what was trained.
        pairs: how many a sequence has.
        ranks: how many shared each sequence.
        parameters: how many the model has.
        accuracy: of the last `LAST` steps' sequences, none of which was seen before.
        curve: step, loss and accuracy, each the mean since the last.
    """

    mixer: str
    pairs: int
    ranks: int
    parameters: int
    accuracy: float
    curve: list[tuple[int, float, float]]


def train(options: Options, interval: int) -> Curve:
    """One run, on all ranks that there are."""
    with processes(options.device_type()):
        ranks = dist.get_world_size()
        trainer = Trainer(options, build_mesh(options.device_type(), options.ranks_of_a_sequence(ranks)))
        rows: list[torch.Tensor] = []
        curve = []
        while trainer.done < options.steps:
            figures = trainer.step()
            rows.append(torch.stack([figures["loss"], figures["accuracy"]]))
            if trainer.done % interval == 0:
                loss, accuracy = torch.stack(rows[-interval:]).mean(0).tolist()
                curve.append((trainer.done, loss, accuracy))
                if dist.get_rank() == 0:
                    print(
                        f"{options.mixer:16} {options.pairs:3} pairs, step {trainer.done:5}: {accuracy:.1%}", flush=True
                    )
        accuracy = torch.stack(rows[-LAST:])[:, 1].mean().item()
        parameters = sum(p.numel() for p in trainer.model.parameters())
    return Curve(options.mixer or "", options.pairs, ranks, parameters, accuracy, curve)


def measure(recalls: Recalls) -> Iterator[Curve]:
    """Every run's curve, as they end."""
    ranks = launched_ranks()
    runs = recalls.runs(ranks)
    if ranks > 1 or recalls.jobs == 1:
        yield from (train(options, recalls.interval) for options in runs)
        return
    with ProcessPoolExecutor(recalls.jobs, multiprocessing.get_context("spawn"), initializer=_one_thread) as pool:
        # The longest first.
        for done in as_completed([pool.submit(train, options, recalls.interval) for options in reversed(runs)]):
            yield done.result()


def _one_thread() -> None:
    torch.set_num_threads(1)


def plot(curves: list[Curve], path: Path) -> None:
    """Accuracy over steps, a line a run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 3.4))
    for curve in sorted(curves, key=lambda curve: (curve.pairs, curve.mixer)):
        steps, _, accuracies = zip(*curve.curve, strict=True)
        axis.plot(steps, accuracies, label=f"{curve.mixer}, {curve.pairs} pairs, {curve.ranks} ranks")
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("steps")
    axis.set_ylabel("answers that are right")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    speaks = os.environ.get("RANK", "0") == "0"
    with errors_in_one_line("lasp.launch.bench_recall"):
        recalls = tyro.cli(Recalls, description=__doc__, console_outputs=speaks)
        recalls.runs(launched_ranks())
    curves: list[Curve] = []
    for curve in measure(recalls):
        curves.append(curve)
        if speaks:
            print(f"{curve.mixer:16} {curve.pairs:3} pairs: {curve.accuracy:.1%} of the answers are right", flush=True)
            record(recalls.result, command_of("lasp.launch.bench_recall"), curves)
            plot(curves, recalls.result.with_suffix(".png"))


if __name__ == "__main__":
    main()
