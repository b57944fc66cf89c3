"""How a run shows where it is: a bar on a terminal, and lines in a file, as a cluster keeps them."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from lasp.training.metrics import Row, Watcher, thousands


class Bar(Watcher):
    """A bar of the steps, with how long the rest will take, and the last row's figures."""

    def __init__(self, done: int, steps: int):
        self.bar = tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True)

    def tick(self) -> None:
        self.bar.update()

    def write(self, rows: list[Row]) -> None:
        self.bar.set_postfix_str(figures(rows[-1]))

    def close(self) -> None:
        self.bar.close()


class Lines(Watcher):
    """A line on stderr of each reading."""

    def __init__(self, done: int, steps: int):
        self.done, self.steps, self.began = done, steps, time.perf_counter()

    def write(self, rows: list[Row]) -> None:
        last = rows[-1]
        left = (self.steps - last.step) * (time.perf_counter() - self.began) / max(1, last.step - self.done)
        # The gradient's norm is for those who read a log from its end.
        told = f"{figures(last)}, gradient {last.grad_norm:.3g}, {tqdm.format_interval(left)} left"
        print(f"step {last.step}/{self.steps}: {told}", file=sys.stderr, flush=True)


def progress(done: int, steps: int) -> Watcher:
    """The one that stderr is fit for."""
    return Bar(done, steps) if sys.stderr.isatty() else Lines(done, steps)


def say(line: str) -> None:
    """Print to stdout, past a bar."""
    tqdm.write(line)


def figures(row: Row) -> str:
    """What matters of a row while one waits."""
    told = [f"loss {row.loss:.3f}"]
    if row.eval_loss is not None:
        told.append(f"unseen {row.eval_loss:.3f}")
    if row.accuracy is not None:
        told.append(f"{row.accuracy:.0%} right")
    told.append(f"{thousands(row.tokens_per_second)} tokens/s")
    if row.mfu is not None:
        told.append(f"{row.mfu:.0%} MFU")
    if row.exposed_exchange is not None:
        told.append(f"{1000 * row.exposed_exchange:.1f} ms waiting")
    return ", ".join(told)
