"""What a mixture of memories recalls beside one memory of the same size: multi-query associative recall.

``python -m lasp.launch.bench_recall --jobs 12 --result recall.json`` trains each mixer with each seed and learning rate,
several at once on one device, asks each for pairs that it never saw, and plots the share of the answers that are right over
the number of pairs: ten minutes on an H200. ``torchrun --nproc-per-node 2 -m lasp.launch.bench_recall`` does the same with
every sequence shared by the ranks, one run after another.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean

import torch
import torch.distributed as dist
import tyro

from lasp.launch.record import command_of, record
from lasp.models import MIXTURE
from lasp.parallel.mesh import build_mesh, launched_ranks, processes
from lasp.training import Options, Trainer, errors_in_one_line
from lasp.training.recall import Recall

#: The first of the steps whose sequences no run trains on.
UNSEEN = 2**31


@dataclass(frozen=True)
class Recalls:
    """Train on multi-query associative recall, then ask."""

    mixers: tuple[str, ...] = ("gated_delta_net", MIXTURE)
    """What is compared; a mixture is one of the first of them."""
    rates: tuple[float, ...] = (2e-3, 5e-3)
    """Peak learning rates; of each mixer the one that recalls most counts."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of weights and data."""
    asked: int = 16
    """Batches of each number of pairs that a trained model is asked for."""
    jobs: int = 1
    """How many are trained at once."""
    run: Options = field(
        default_factory=lambda: Options(
            task="mqar", pattern="L", layers=2, hidden=64, heads=4, intermediate=128, vocabulary=128, batch_size=64,
            pairs=(2, 4, 8, 16, 32), seq_len=128, warmup=100, steps=6000,
        )
    )  # fmt: skip
    """What is trained."""
    interval: int = 100
    """Steps between two lines of a run."""
    result: Path = Path("bench_recall.json")
    """Where the JSON goes, and with another suffix the plot."""

    def runs(self, ranks: int) -> list[Options]:
        """Every run, on that many ranks.

        Raises:
            ValueError: naming the option that does not allow it.
        """
        found = []
        for seed in self.seeds:
            for lr in self.rates:
                for mixer in self.mixers:
                    inner = (
                        self.mixers[0] if mixer == MIXTURE and self.mixers[0] != MIXTURE else self.run.mom_recurrence
                    )
                    found.append(
                        replace(
                            self.run, mixer=mixer, mom_recurrence=inner, seed=seed, lr=lr,
                            sp=self.run.sp if ranks > 1 else "none",
                        )
                    )  # fmt: skip
                    found[-1].check(ranks)
        return found


@dataclass(frozen=True)
class Recalled:
    """One run.

    Attributes:
        mixer: what was trained.
        lr: its peak learning rate.
        seed: of weights and data.
        ranks: how many shared each sequence.
        parameters: how many the model has.
        accuracy: the share of right answers to sequences that were never trained on, by their number of pairs.
        curve: step, loss and accuracy of the sequences trained on, each the mean since the last.
    """

    mixer: str
    lr: float
    seed: int
    ranks: int
    parameters: int
    accuracy: dict[int, float]
    curve: list[tuple[int, float, float]]

    def __str__(self) -> str:
        answers = ", ".join(f"{pairs} pairs {share:.1%}" for pairs, share in self.accuracy.items())
        return f"{self.mixer}, learning rate {self.lr:g}, seed {self.seed}, {self.ranks} ranks: right of {answers}"


def train(options: Options, recalls: Recalls) -> Recalled:
    """One run, on all ranks that there are."""
    ranks = dist.get_world_size()
    trainer = Trainer(options, build_mesh(options.device_type(), options.ranks_of_a_sequence(ranks)))
    rows: list[torch.Tensor] = []
    curve = []
    while trainer.done < options.steps:
        figures = trainer.step()
        rows.append(torch.stack([figures["loss"], figures["accuracy"]]))
        if trainer.done % recalls.interval == 0:
            loss, accuracy = torch.stack(rows).mean(0).tolist()
            curve.append((trainer.done, loss, accuracy))
            rows = []
            if dist.get_rank() == 0:
                print(
                    f"{options.mixer:16} {options.lr:g} {options.seed} step {trainer.done:5}: {accuracy:.1%}",
                    flush=True,
                )
    accuracies = {pairs: asked(trainer, pairs, recalls.asked) for pairs in options.pairs}
    parameters = sum(p.numel() for p in trainer.model.parameters())
    return Recalled(options.mixer or "", options.lr, options.seed, ranks, parameters, accuracies, curve)


def asked(trainer: Trainer, pairs: int, batches: int) -> float:
    """The share of right answers to sequences of as many pairs."""
    options = trainer.options
    source = Recall(options.model().vocabulary, (pairs,), options.seq_len, options.batch_size, options.seed)
    return trainer.evaluate(source, range(UNSEEN, UNSEEN + batches))["accuracy"].item()


def measure(recalls: Recalls) -> Iterator[Recalled]:
    """Every run, as they end."""
    ranks = launched_ranks()
    runs = recalls.runs(ranks)
    if ranks > 1 or recalls.jobs == 1:
        with processes(recalls.run.device_type()):
            yield from (train(options, recalls) for options in runs)
        return
    with ProcessPoolExecutor(recalls.jobs, multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(_train_alone, options, recalls) for options in runs]):
            yield done.result()


def _train_alone(options: Options, recalls: Recalls) -> Recalled:
    torch.set_num_threads(1)
    with processes(options.device_type()):
        return train(options, recalls)


def best(runs: list[Recalled]) -> dict[str, list[Recalled]]:
    """Of each mixer the runs, one a seed, of the learning rate that recalls most over all numbers of pairs and seeds."""
    found = {}
    for mixer in sorted({run.mixer for run in runs}):
        own = [run for run in runs if run.mixer == mixer]
        by_rate = [[run for run in own if run.lr == lr] for lr in sorted({run.lr for run in own})]
        found[mixer] = max(by_rate, key=lambda same: mean(mean(run.accuracy.values()) for run in same))
    return found


def plot(runs: list[Recalled], path: Path) -> None:
    """Right answers over pairs: the mean over seeds as a line a mixer, each seed as a point."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 3.4))
    for mixer, same in best(runs).items():
        pairs = list(same[0].accuracy)
        (line,) = axis.plot(
            pairs,
            [mean(run.accuracy[count] for run in same) for count in pairs],
            label=f"{mixer}, {same[0].ranks} ranks, learning rate {same[0].lr:g}",
        )
        for run in same:
            axis.plot(pairs, list(run.accuracy.values()), "o", color=line.get_color(), markersize=3, alpha=0.6)
    axis.set_xscale("log", base=2)
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("pairs to remember")
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
    runs: list[Recalled] = []
    for run in measure(recalls):
        runs.append(run)
        if speaks:
            print(run, flush=True)
            record(recalls.result, command_of("lasp.launch.bench_recall"), runs)
            plot(runs, recalls.result.with_suffix(".png"))


if __name__ == "__main__":
    main()
