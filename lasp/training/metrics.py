"""What a run tells of its steps: a row each, kept in metrics.jsonl."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

#: By this and its number a memory's share of the choices goes among a step's figures.
LOAD = "memory_load."


@dataclass(frozen=True)
class Row:
    """One step.

    Attributes:
        step: its number, from 1.
        loss: mean cross entropy of its targets, over all ranks.
        grad_norm: global norm of the gradient before clipping.
        tokens: how many tokens the run has trained on, this step included.
        tokens_per_second: over all ranks, since the last reading.
        lr: learning rate.
        mfu: model FLOPs utilisation since the last reading, from 0 to 1 (`lasp.models.flops`); None where the peak of the
            device is not known.
        exposed_exchange: seconds a step, since the last reading, in which the computation waited for states, keys and values of
            other ranks, on the rank that waited longest (`lasp.parallel.exposure`); None where no ranks share a sequence.
        eval_loss: mean cross entropy of tokens that are not trained on, of the steps that measure it.
        bits_per_byte: the same in bits a byte of text, which does not depend on the tokenizer.
        z_loss: mean squared logarithm of the logits' normaliser, where it is trained on.
        accuracy: the share of the answers that are right, of tasks that have some; None for others.
        balance_loss: of the mixtures of memories, `lasp.layers.balance`; None where there are none, as the following.
        router_entropy: of their routers' probabilities, in nats.
        router_z_loss: of their routers' logits.
        memory_load: the share of the choices that each memory has.
        dropped: choices that stand in no memory, of all layers: none, unless something is wrong.
    """

    step: int
    loss: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    lr: float
    mfu: float | None = None
    exposed_exchange: float | None = None
    eval_loss: float | None = None
    bits_per_byte: float | None = None
    z_loss: float | None = None
    accuracy: float | None = None
    balance_loss: float | None = None
    router_entropy: float | None = None
    router_z_loss: float | None = None
    memory_load: list[float] | None = None
    dropped: float | None = None

    @classmethod
    def of(cls, figures: dict[str, float], **others: Any) -> Row:
        """Of what a step gives by name, in which what the memories have is ``LOAD`` and their number, and of the rest."""
        load = [value for name, value in figures.items() if name.startswith(LOAD)]
        others |= {name: value for name, value in figures.items() if not name.startswith(LOAD)}
        row = cls(**others)
        return replace(row, memory_load=load) if load else row

    @property
    def finite(self) -> bool:
        """Whether this step left numbers behind that can be trained on."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    def told(self) -> dict[str, Any]:
        """What there is, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class Watcher:
    """Something that follows a run, on rank 0."""

    def tick(self) -> None:
        """A step was begun; its figures come later."""

    def write(self, rows: list[Row]) -> None:
        """The figures of the steps since the last call, at least one."""

    def close(self) -> None:
        """There is nothing more to come, at the end or because the run breaks off; maybe nothing came."""


class History(Watcher):
    """All rows of a run, in memory and in ``metrics.jsonl``.

    Args:
        directory: gets the file.
        done: steps already done; their rows stay, later ones are dropped: the run has gone back to a checkpoint.
    """

    def __init__(self, directory: Path, done: int):
        self.path = directory / "metrics.jsonl"
        self.rows = [row for row in read_rows(self.path) if row.step <= done] if done else []
        # Whole or not at all: who is killed here loses nothing.
        kept = self.path.with_name(f"{self.path.name}.unfinished")
        kept.write_text("".join(_line(row) for row in self.rows))
        os.replace(kept, self.path)

    def write(self, rows: list[Row]) -> None:
        """Append rows."""
        with self.path.open("a") as file:
            file.writelines(_line(row) for row in rows)
        self.rows += rows

    @property
    def seconds(self) -> float:
        """How long the steps took that it knows of, in all, without what was between them: measurements and checkpoints."""
        return sum(self._seconds)

    @property
    def mfu(self) -> float | None:
        """The model FLOPs utilisation of these steps; None where the peak was not known in any."""
        known = [
            (row.mfu, seconds) for row, seconds in zip(self.rows, self._seconds, strict=True) if row.mfu is not None
        ]
        return sum(mfu * seconds for mfu, seconds in known) / sum(seconds for _, seconds in known) if known else None

    @property
    def _seconds(self) -> list[float]:
        """How long each step took."""
        before = [0, *(row.tokens for row in self.rows)]
        # Where the first rows are missing, the first one here stands for its own step alone.
        if self.rows and self.rows[0].step > 1:
            before[0] = self.rows[0].tokens - self.rows[0].tokens // self.rows[0].step
        pairs = zip(before, self.rows, strict=False)
        return [(row.tokens - tokens) / row.tokens_per_second for tokens, row in pairs]


def read_rows(path: Path) -> list[Row]:
    """The rows of a ``metrics.jsonl``, without a last one that a killed run did not end; none where there is no file."""
    whole = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [Row(**json.loads(line)) for line in whole]


def thousands(x: float) -> str:
    """A speed for people: 950, 12.3k."""
    return f"{x / 1000:.1f}k" if x >= 1000 else f"{x:.0f}"


def _line(row: Row) -> str:
    return json.dumps(row.told()) + "\n"
