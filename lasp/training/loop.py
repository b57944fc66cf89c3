"""What every run does beside its steps: the bar, the metrics, the checkpoints, whatever makes the steps."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.training.metrics import Metrics, Row
from lasp.training.options import Options
from lasp.training.schedule import learning_rate


class Loop(ABC):
    """Steps to the last one, on all ranks.

    Attributes:
        options: what to train.
        done: how many steps were made.
    """

    options: Options
    done: int

    @abstractmethod
    def step(self) -> dict[str, Tensor]:
        """Train on the next step's sequences. Returns its figures (`Row.of`), on the device, alike on all ranks."""

    @abstractmethod
    def save(self) -> None:
        """Write a checkpoint; called on all ranks."""

    def measured(self) -> dict[str, Tensor]:
        """Figures of what is not trained on, by their names in `Row`; none where there is nothing of the kind."""
        return {}

    @abstractmethod
    def explain(self) -> str:
        """Why states travel as they do."""

    def train(self) -> str | None:
        """Train to the last step. Returns the closing line, on rank 0."""
        options = self.options
        speaks = dist.get_rank() == 0
        if speaks:
            options.out.mkdir(parents=True, exist_ok=True)
        if self.done >= options.steps:
            return (
                f"nothing to train: the checkpoint has done {self.done} of --steps {options.steps}" if speaks else None
            )
        metrics = Metrics(options.out, self.done, options.steps) if speaks else None
        unread: list[dict[str, Tensor]] = []
        first = self.done
        began = time.perf_counter()
        while self.done < options.steps:
            unread.append(self.step())
            if metrics:
                metrics.bar.update()
                if options.explain and self.done == first + 1:
                    metrics.bar.write(self.explain())
            saves, measures = (self._due(every) for every in (options.checkpoint_interval, options.eval_interval))
            if saves or measures or self._due(options.log_interval):
                rows = self._rows(unread, began)
                if measures:
                    seen: dict[str, Any] = {name: figure.item() for name, figure in self.measured().items()}
                    rows[-1] = replace(rows[-1], **seen)
                if metrics:
                    metrics.write(rows)
                unread, began = [], time.perf_counter()
            if saves:
                self.save()
                began = time.perf_counter()
        return metrics.close() if metrics else None

    def _due(self, every: int | None) -> bool:
        """Whether what comes every so many steps, and after the last, comes now."""
        return self.done == self.options.steps or (every is not None and self.done % every == 0)

    def _rows(self, unread: list[dict[str, Tensor]], began: float) -> list[Row]:
        """Read the steps that were not read yet from the device, all at once: the only time that the host waits for it."""
        values = torch.stack([torch.stack(list(figures.values())) for figures in unread]).tolist()
        tokens = self.options.batch_size * self.options.seq_len
        speed = len(values) * tokens / (time.perf_counter() - began)
        first = self.done - len(values)
        return [
            Row.of(
                dict(zip(unread[0], figures, strict=True)),
                step + 1,
                (step + 1) * tokens,
                speed,
                learning_rate(self.options, step),
            )
            for step, figures in enumerate(values, first)
        ]
