"""TensorBoard and Weights & Biases: the rows, for those who look at many runs at once. Neither is needed for training."""

from __future__ import annotations

import importlib
import uuid
from pathlib import Path
from typing import Any

from lasp.training.metrics import Row, Watcher


class TensorBoard(Watcher):
    """Writes to a directory what ``tensorboard --logdir`` shows.

    Args:
        directory: gets the events.
        done: steps already done; what was written of later ones is not shown any more.
    """

    def __init__(self, directory: Path, done: int):
        self.writer = needed("torch.utils.tensorboard", "--tensorboard").SummaryWriter(
            str(directory), purge_step=done + 1 if done else None
        )

    def write(self, rows: list[Row]) -> None:
        for row in rows:
            for name, value in numbers(row).items():
                self.writer.add_scalar(name, value, row.step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases(Watcher):
    """Logs to Weights & Biases. A run that goes on in its directory goes on there too: its id is kept in ``wandb.id``.

    Args:
        project: the name of the project.
        directory: the run's, after which it is named.
        done: steps already done; the service leaves out steps that it has, which are the same when they are made again.
        options: what the run was told.
    """

    def __init__(self, project: str, directory: Path, done: int, options: dict[str, Any]):
        wandb = needed("wandb", "--wandb")
        kept = directory / "wandb.id"
        if not (done and kept.is_file()):
            kept.write_text(uuid.uuid4().hex[:8])
        self.run = wandb.init(
            project=project, name=directory.resolve().name, id=kept.read_text(), resume="allow", dir=str(directory),
            config=options,
        )  # fmt: skip

    def write(self, rows: list[Row]) -> None:
        for row in rows:
            self.run.log(numbers(row), step=row.step)

    def close(self) -> None:
        self.run.finish()


def needed(module: str, option: str) -> Any:
    """A module that an option needs.

    Raises:
        ValueError: where its package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[-1]
        raise ValueError(
            f"{option}: needs the package {package}, which is not here ({error}); pip install {package}, or train without it"
        ) from error


def numbers(row: Row) -> dict[str, float]:
    """A row's figures by name, a number each; the step is told apart."""
    told: dict[str, float] = {}
    for name, value in row.told().items():
        if isinstance(value, list):
            told |= {f"{name}/{i}": each for i, each in enumerate(value)}
        elif name != "step":
            told[name] = value
    return told
