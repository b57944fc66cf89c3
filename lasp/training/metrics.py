"""What a run tells: a row a step in metrics.jsonl, a progress bar, a closing line and a plot of the loss. By rank 0."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

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
    def of(cls, figures: dict[str, float], step: int, tokens: int, tokens_per_second: float, lr: float) -> Row:
        """Of what a step gives by name; what the memories have is ``LOAD`` and their number."""
        load = [value for name, value in figures.items() if name.startswith(LOAD)]
        others: dict[str, Any] = {name: value for name, value in figures.items() if not name.startswith(LOAD)}
        row = cls(step=step, tokens=tokens, tokens_per_second=tokens_per_second, lr=lr, **others)
        return replace(row, memory_load=load) if load else row


class Metrics:
    """Where the rows go.

    Args:
        directory: gets ``metrics.jsonl``.
        done: steps already done; their rows stay, later ones are dropped: the run has gone back to a checkpoint.
        steps: how many steps the run has.
    """

    def __init__(self, directory: Path, done: int, steps: int):
        self.path = directory / "metrics.jsonl"
        kept = [row for row in read_rows(self.path) if row.step <= done] if done else []
        self.path.write_text("".join(_line(row) for row in kept))
        self.rows = kept
        self.bar = tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True)
        self.began = time.perf_counter()

    def write(self, rows: list[Row]) -> None:
        """Append rows and show the last."""
        with self.path.open("a") as file:
            file.writelines(_line(row) for row in rows)
        self.rows += rows
        last = rows[-1]
        right = "" if last.accuracy is None else f", {last.accuracy:.0%} right"
        self.bar.set_postfix_str(f"loss {last.loss:.3f}{right}, {_thousands(last.tokens_per_second)} tokens/s")

    def close(self) -> str:
        """End the bar, draw the plot where matplotlib is installed, and return the closing line."""
        self.bar.close()
        seconds = time.perf_counter() - self.began
        first, last = self.rows[0], self.rows[-1]
        plot = _plot(self.rows, self.path.with_name("loss.png"))
        unseen = "" if last.bits_per_byte is None else f" (unseen text: {last.bits_per_byte:.2f} bits a byte)"
        return (
            f"loss {first.loss:.2f} → {last.loss:.2f}{unseen} in {seconds:.0f} s, {last.tokens:,} tokens, "
            f"{_thousands(last.tokens_per_second)} tokens/s; metrics in {self.path}"
            + (f", plot in {plot}" if plot else "")
        )


def read_rows(path: Path) -> list[Row]:
    """The rows of a ``metrics.jsonl``; none where there is no file."""
    return [Row(**json.loads(line)) for line in path.read_text().splitlines()] if path.is_file() else []


def _line(row: Row) -> str:
    return json.dumps({name: value for name, value in asdict(row).items() if value is not None}) + "\n"


def _thousands(x: float) -> str:
    return f"{x / 1000:.1f}k" if x >= 1000 else f"{x:.0f}"


def _plot(rows: list[Row], path: Path) -> Path | None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="tokens", ylabel="loss (nats a token)")
    axes.plot([row.tokens for row in rows], [row.loss for row in rows], linewidth=1, label="trained on")
    if unseen := [(row.tokens, row.eval_loss) for row in rows if row.eval_loss is not None]:
        axes.plot(*zip(*unseen, strict=True), "o-", markersize=3, label="unseen")
        axes.legend()
    axes.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(str(path))
    return path
