"""The run as a picture: loss, gradient norm and speed over the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lasp.training.metrics import History, Row, Watcher

#: How many points a curve has at most: of more steps, each point is the median of some, within a band of their extremes.
POINTS = 1000


class Plot(Watcher):
    """``loss.png`` beside the metrics, drawn where text that is not trained on was measured and at the end, by matplotlib.

    Args:
        history: has all rows.
    """

    def __init__(self, history: History):
        self.history = history
        self.path = history.path.with_name("loss.png")

    def write(self, rows: list[Row]) -> None:
        if any(row.eval_loss is not None for row in rows):
            draw(self.history.rows, self.path)

    def close(self) -> None:
        draw(self.history.rows, self.path)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Three panels as a PNG; nothing where there are no rows or no matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter, LogLocator
    except ImportError:
        return
    if not rows:
        return
    figure = Figure(figsize=(7, 7.5), layout="constrained")
    loss, norm, speed = figure.subplots(3, 1, sharex=True, height_ratios=(2, 1, 1))
    tokens = np.array([row.tokens for row in rows])
    _curve(loss, tokens, [row.loss for row in rows], "C0", "trained on")
    if unseen := [(row.tokens, row.eval_loss) for row in rows if row.eval_loss is not None]:
        loss.plot(*zip(*unseen, strict=True), "o-", color="C3", markersize=3, linewidth=1.2, label="unseen")
        loss.legend(frameon=False)
    loss.set_ylabel("loss (nats a token)")
    _curve(norm, tokens, [row.grad_norm for row in rows], "C2")
    norm.set(ylabel="gradient norm", yscale="log")
    norm.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    norm.yaxis.set_major_formatter("{x:g}")
    norm.yaxis.set_minor_formatter("{x:g}")
    _curve(speed, tokens, [row.tokens_per_second for row in rows], "C1")
    speed.set(ylabel="tokens a second", xlabel="tokens")
    speed.set_ylim(bottom=0)
    for axes in (speed.xaxis, speed.yaxis):
        axes.set_major_formatter(EngFormatter(sep=""))
    for axes in (loss, norm, speed):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    FigureCanvasAgg(figure).print_png(str(path))


def _curve(axes: Any, tokens: np.ndarray, values: Sequence[float], color: str, label: str | None = None) -> None:
    """A line of the values; of many, of their medians."""
    x, y = tokens, np.array(values)
    if len(x) > 2 * POINTS:
        some = np.linspace(0, len(x), POINTS + 1).astype(int)[:-1]
        ends = np.append(some[1:], len(x)) - 1
        axes.fill_between(
            x[ends], np.minimum.reduceat(y, some), np.maximum.reduceat(y, some), color=color, alpha=0.2, linewidth=0
        )
        x, y = x[ends], np.array([np.median(part) for part in np.split(y, some[1:])])
    axes.plot(x, y, color=color, linewidth=1.2, label=label)
