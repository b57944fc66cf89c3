"""Whether a run that is killed goes on as if it had not been: ``python -m lasp.launch.interrupt``.

A run on four ranks is killed (SIGKILL, all ranks) at random moments, every other one while a checkpoint is being written, and
goes on each time from the last whole checkpoint, with sequences shared by as many ranks as chance says, with and without FSDP.
Every step's loss and gradient norm are then compared with those of a run that nobody interrupted.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tyro

from lasp.launch.record import command_of, record
from lasp.training import Row, errors_in_one_line, read_rows
from lasp.training.checkpoint import FOLDER, MARKER, latest

#: What is trained: a hybrid that takes tens of milliseconds a step.
RUN = {
    "hidden": 64, "heads": 4, "intermediate": 96, "seq-len": 256, "pattern": "LLLN", "layout": "zigzag", "validation": 0,
    "steps": 60, "log-interval": 1, "checkpoint-interval": 3,
}  # fmt: skip
#: Seconds after which something is wrong with a run.
PATIENCE = 300.0


@dataclass(frozen=True)
class Way:
    """How a run, or what is left of it, is split.

    Attributes:
        sp_size: how many of the ranks share a sequence.
        fsdp: whether they share weights.
    """

    sp_size: int
    fsdp: bool

    def options(self) -> list[str]:
        """As ``pretrain.py`` takes it."""
        return ["--sp-size", str(self.sp_size), *(["--fsdp"] if self.fsdp else [])]


@dataclass(frozen=True)
class Interruption:
    """One.

    Attributes:
        way: how the run was split that was killed.
        writing: whether a checkpoint was being written.
        after: the last step that had been told.
        whole: the step of the last whole checkpoint, with which the next run began; 0 where there was none.
    """

    way: Way
    writing: bool
    after: int
    whole: int


@dataclass(frozen=True)
class Interrupt:
    """Kill a run again and again, let it go on, and compare it with one that nobody interrupted."""

    kills: int = 10
    """How often."""
    ranks: int = 4
    """Ranks of the run; those that share a sequence divide it."""
    mixer: str = "gated_delta_net"
    """Of the linear layers."""
    same: bool = False
    """Whether all of it is split alike: the figures must then be the same to the last bit."""
    seed: int = 0
    """Of the moments and the splits."""
    folder: Path = Path("runs/interrupt")
    """Where the runs go."""
    result: Path = Path("launch/results/interrupt.json")
    """Where the figures go."""
    tolerance: float = 1e-5
    """The largest relative deviation of a loss."""


def main() -> None:
    """Interrupt, compare, tell and record."""
    with errors_in_one_line("lasp.launch.interrupt"):
        given = tyro.cli(Interrupt, prog="lasp.launch.interrupt")
        found, loss, norm = interrupted(given)
    worst = 0.0 if given.same else given.tolerance
    figures = {"kills": found, "run": RUN, "mixer": given.mixer, "loss": loss, "grad_norm": norm, "tolerance": worst}
    record(given.result, command_of("lasp.launch.interrupt"), figures)
    print(f"largest deviation of a loss {loss:.1e}, of a gradient norm {norm:.1e}; recorded in {given.result}")
    if not loss <= worst:
        raise SystemExit(1)


def interrupted(given: Interrupt) -> tuple[list[Interruption], float, float]:
    """The interruptions, and the largest relative deviation of losses and of gradient norms.

    Raises:
        ValueError: where a run fails by itself, or is done before it was killed often enough.
    """
    chance = random.Random(given.seed)
    shutil.rmtree(given.folder, ignore_errors=True)
    through, killed = given.folder / "through", given.folder / "killed"
    for out in (through, killed):
        out.mkdir(parents=True)
    ways = [Way(size, fsdp) for size in (1, 2, 4) if given.ranks % size == 0 for fsdp in (False, True)]
    first = ways[-1] if given.same else Way(1, False)
    run = [text for name, value in (RUN | {"mixer": given.mixer}).items() for text in (f"--{name}", str(value))]
    with _ranks(given.ranks, [*run, *first.options(), "--out", str(through)]):
        pass
    kills: list[Interruption] = []
    while True:
        way = first if given.same else chance.choice(ways)
        with _ranks(given.ranks, [*run, *way.options(), "--out", str(killed), "--resume", "auto"]) as running:
            if len(kills) == given.kills:
                break
            began = time.time()
            _wait(running, killed, at_writing=len(kills) % 2 == 1, chance=chance)
            _kill(running)
        rows = read_rows(killed / "metrics.jsonl")
        after, newest = (rows[-1].step if rows else 0), latest(killed / FOLDER)
        kills.append(Interruption(way, _writing(killed, began), after, int(newest.name[5:]) if newest else 0))
        print(f"killed: {kills[-1]}", flush=True)
    return kills, *_deviations(read_rows(through / "metrics.jsonl"), read_rows(killed / "metrics.jsonl"))


def _deviations(expected: Sequence[Row], given: Sequence[Row]) -> tuple[float, float]:
    if [row.step for row in given] != [row.step for row in expected]:
        raise ValueError(f"the steps told are {[row.step for row in given]}, not 1 to {len(expected)}")
    pairs = list(zip(given, expected, strict=True))
    return (
        max(abs(a.loss - b.loss) / abs(b.loss) for a, b in pairs),
        max(abs(a.grad_norm - b.grad_norm) / abs(b.grad_norm) for a, b in pairs),
    )


@contextmanager
def _ranks(number: int, arguments: Sequence[str]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The ranks of a run; none is left behind."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = os.environ | {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lasp.pretrain", *arguments]
    with tempfile.TemporaryFile() as errors:
        found = [
            subprocess.Popen(command, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=errors)
            for rank in range(number)
        ]
        try:
            yield found
            if any(process.wait() > 0 for process in found):
                errors.seek(0)
                raise ValueError(f"a rank failed: {errors.read().decode(errors='replace')[-1000:]}")
        finally:
            _kill(found)


def _wait(running: Sequence[subprocess.Popen[bytes]], out: Path, at_writing: bool, chance: random.Random) -> None:
    """Until the moment to kill: after some time from the first new step, or as soon as a checkpoint is being written."""
    before, last, began = _told(out), latest(out / FOLDER), time.time()
    while _told(out) == before:
        _alive(running, began)
    if at_writing:
        # The second from here on, so that the run gets on.
        while latest(out / FOLDER) == last or not _writing(out, began):
            _alive(running, began)
    else:
        time.sleep(chance.uniform(0.0, 1.5))


def _alive(running: Sequence[subprocess.Popen[bytes]], began: float) -> None:
    time.sleep(0.0005)
    if any(process.poll() is not None for process in running):
        raise ValueError("--kills: a run ended, or failed, before it was killed so often")
    if time.time() - began > PATIENCE:
        raise ValueError(f"the run told nothing for {PATIENCE:.0f} s")


def _told(out: Path) -> float:
    """Changes with every step that is told."""
    file = out / "metrics.jsonl"
    return file.stat().st_mtime_ns if file.is_file() and file.stat().st_size else 0


def _writing(out: Path, since: float) -> bool:
    """Whether there is a checkpoint, begun since then, that is not whole."""
    begun = [path for path in (out / FOLDER).glob("step_*") if not (path / MARKER).is_file()]
    return any(path.is_dir() and path.stat().st_mtime >= since for path in begun)


def _kill(running: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in running:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
    for process in running:
        process.wait()


if __name__ == "__main__":
    main()
