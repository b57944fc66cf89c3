"""What every run does beside its steps: the metrics and all who watch, the checkpoints, whatever makes the steps."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.data import Windows
from lasp.models.flops import outline, peak_flops, training_flops
from lasp.parallel.exposure import Meter
from lasp.training.dashboards import TensorBoard, WeightsAndBiases
from lasp.training.metrics import History, Row, Watcher, thousands
from lasp.training.options import Options
from lasp.training.plot import Plot
from lasp.training.progress import progress, say
from lasp.training.recall import Recall
from lasp.training.schedule import learning_rate
from lasp.training.summary import Summary
from lasp.training.trace import Trace


class Loop(ABC):
    """Steps to the last one, on all ranks.

    Attributes:
        options: what to train.
        source: what its steps read.
        done: how many steps were made.
        generates: whether ``lasp.generate`` reads the checkpoints.
        tokens_before: how many more tokens than steps of this size have: those of a run that goes on with another.
    """

    options: Options
    source: Windows | Recall
    done: int
    generates = True
    tokens_before = 0

    @abstractmethod
    def step(self) -> dict[str, Tensor]:
        """Train on the next step's sequences. Returns its figures (`Row.of`), on the device, alike on all ranks."""

    @abstractmethod
    def save(self) -> None:
        """Write a checkpoint; called on all ranks."""

    @abstractmethod
    def wait(self) -> None:
        """Return when all checkpoints are on the disk; called on all ranks, where the run breaks off."""

    def measured(self) -> dict[str, Tensor]:
        """Figures of what is not trained on, by their names in `Row`; none where there is nothing of the kind."""
        return {}

    @abstractmethod
    def explain(self) -> str:
        """Why states travel as they do."""

    def split(self) -> str:
        """How the ranks share a step."""
        ranks = dist.get_world_size()
        shared = self.options.ranks_of_a_sequence(ranks)
        return f"DP {ranks // shared} × SP {shared}"

    def train(self) -> str | None:
        """Train to the last step. Returns the closing line, on rank 0.

        Raises:
            ValueError: on all ranks, naming the first step whose loss or gradient is not finite. Its row is written, and no
                checkpoint of it or of a later step. On rank 0, where what the run tells cannot be written.
        """
        try:
            return self._followed()
        except OSError as error:
            where = error.filename or self.options.out
            raise ValueError(
                f"{where}: {error.strerror or error}; whole checkpoints stay, --resume auto goes on from the last"
            ) from error

    def _followed(self) -> str | None:
        """All steps, with all who watch."""
        options = self.options
        speaks = dist.get_rank() == 0
        if speaks:
            options.out.mkdir(parents=True, exist_ok=True)
        if self.done >= options.steps:
            return (
                f"nothing to train: the checkpoint has done {self.done} of --steps {options.steps}" if speaks else None
            )
        began = time.perf_counter()
        history = History(options.out, self.done) if speaks else None
        watchers = self._watchers(history) if history else []
        try:
            self._train(watchers)
        finally:
            for watcher in watchers:
                watcher.close()
        return _closing(history, time.perf_counter() - began) if history else None

    def _train(self, watchers: list[Watcher]) -> None:
        options, first = self.options, self.done
        meter = Meter() if options.ranks_of_a_sequence(dist.get_world_size()) > 1 else None
        trace = Trace.of(options.profile, options.out, torch.device(options.device_type()))
        work = self._work()
        unread: list[dict[str, Tensor]] = []
        began = time.perf_counter()
        while self.done < options.steps:
            try:
                with meter or nullcontext(), trace.step(self.done + 1) if trace else nullcontext():
                    unread.append(self.step())
            except ValueError as error:
                # An op that looks at what it is given may be the first to see what the last steps made.
                if unread:
                    self._tell(watchers, self._rows(unread, began, work, None))
                raise ValueError(f"step {self.done + 1}: {error}") from error
            for watcher in watchers:
                watcher.tick()
            if watchers and options.explain and self.done == first + 1:
                say(self.explain())
            if watchers and trace and self.done == trace.last:
                say(trace.told())
            saves, measures = (self._due(every) for every in (options.checkpoint_interval, options.eval_interval))
            if saves or measures or self._due(options.log_interval):
                self._tell(watchers, self._rows(unread, began, work, meter), measures)
                unread, began = [], time.perf_counter()
            if saves:
                self.save()
                began = time.perf_counter()

    def _tell(self, watchers: list[Watcher], rows: list[Row], measures: bool = False) -> None:
        """Give all who watch the rows, the last with what is not trained on if it `measures`, and go on if all are finite."""
        broken = next((row for row in rows if not row.finite), None)
        if measures and broken is None:
            seen: dict[str, Any] = {name: figure.item() for name, figure in self.measured().items()}
            rows[-1] = replace(rows[-1], **seen)
        for watcher in watchers:
            watcher.write(rows)
        if broken is not None:
            self.wait()
            raise ValueError(
                f"step {broken.step}: the loss is {broken.loss} and the gradient's norm {broken.grad_norm}: nothing is learnt "
                "from here on; go on from a checkpoint before it (--resume) with a lower --lr or --clip"
            )

    def _watchers(self, history: History) -> list[Watcher]:
        """All who follow the run; the history first, which others read."""
        options, done = self.options, self.done
        watchers: list[Watcher] = [history, progress(done, options.steps)]
        if options.tensorboard:
            watchers.append(TensorBoard(options.out / "tensorboard", done))
        if options.wandb is not None:
            watchers.append(WeightsAndBiases(options.wandb, options.out, done, options.saved()))
        where = {"ranks": f"{dist.get_world_size()}, {self.split()}", "device of each": _device(options)}
        return [*watchers, Plot(history), Summary(history, options, where, self.generates)]

    def _due(self, every: int | None) -> bool:
        """Whether what comes every so many steps, and after the last, comes now."""
        return self.done == self.options.steps or (every is not None and self.done % every == 0)

    def _work(self) -> Callable[[range], float] | None:
        """How many seconds some steps would take all devices at their peak; None where that is not known."""
        options = self.options
        peak = peak_flops(_device(options), options.dtype)
        if options.peak_tflops is not None:
            peak = 1e12 * options.peak_tflops
        if peak is None:
            return None
        model, peaks = outline(options.model()), peak * dist.get_world_size()

        def seconds(steps: range) -> float:
            return training_flops(model, [length for step in steps for length in self._lengths(step)]) / peaks

        return seconds

    def _lengths(self, step: int) -> list[int]:
        """Of all documents of a step, in tokens; of its sequences, where documents are not told apart."""
        bounds = self.source.documents(step, 0, self.options.batch_size)
        if bounds is None:
            return [self.options.seq_len] * self.options.batch_size
        return [end - start for start, end in pairwise(bounds)]

    def _rows(
        self,
        unread: list[dict[str, Tensor]],
        began: float,
        work: Callable[[range], float] | None,
        meter: Meter | None,
    ) -> list[Row]:
        """Read the steps that were not read yet from the device, all at once: the only time that the host waits for it."""
        figures = torch.stack([torch.stack(list(figures.values())) for figures in unread])
        values = figures.tolist()
        tokens = self.options.batch_size * self.options.seq_len
        seconds = time.perf_counter() - began
        waited = None
        if meter is not None:
            # Of the rank that waited longest: the others are what it waited for.
            longest = torch.tensor(meter.read(), device=figures.device)
            dist.all_reduce(longest, op=dist.ReduceOp.MAX)
            waited = longest.item() / len(values)
        first = self.done - len(values)
        mfu = None if work is None else work(range(first, self.done)) / seconds
        return [
            Row.of(
                dict(zip(unread[0], each, strict=True)),
                step=step + 1,
                tokens=self.tokens_before + (step + 1) * tokens,
                tokens_per_second=len(values) * tokens / seconds,
                lr=learning_rate(self.options, step),
                mfu=mfu,
                exposed_exchange=waited,
            )
            for step, each in enumerate(values, first)
        ]


def _device(options: Options) -> str:
    """What this rank computes on, by name."""
    if options.device_type() == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def _closing(history: History, seconds: float) -> str:
    """The run in a line."""
    first, last = history.rows[0], history.rows[-1]
    unseen = "" if last.bits_per_byte is None else f" (unseen text: {last.bits_per_byte:.2f} bits a byte)"
    return (
        f"loss {first.loss:.2f} → {last.loss:.2f}{unseen} in {seconds:.0f} s, {last.tokens:,} tokens, "
        f"{thousands(last.tokens_per_second)} tokens/s; metrics in {history.path}, plot and summary beside them"
    )
