"""What a run was, for people: summary.md beside its metrics."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

import torch
from tqdm import tqdm

import lasp
from lasp.models.flops import outline
from lasp.training.metrics import History, Row, Watcher, thousands
from lasp.training.options import Options


class Summary(Watcher):
    """``summary.md``, written where text that is not trained on was measured and at the end.

    Args:
        history: has all rows.
        options: what was trained.
        where: on what, by name.
        generates: whether ``lasp.generate`` reads the checkpoint.
    """

    def __init__(self, history: History, options: Options, where: dict[str, str], generates: bool):
        self.history, self.options, self.where, self.generates = history, options, where, generates
        self.path = history.path.with_name("summary.md")

    def write(self, rows: list[Row]) -> None:
        if any(row.eval_loss is not None for row in rows):
            self.path.write_text(self._text())

    def close(self) -> None:
        if self.history.rows:
            self.path.write_text(self._text())

    def _text(self) -> str:
        rows, options = self.history.rows, self.options
        last = rows[-1]
        state = "" if last.step >= options.steps else f", stands at step {last.step} of {options.steps}"
        parts = [
            f"# {self.history.path.parent.resolve().name}",
            f"{options.preset}, {_count(options)} parameters{state}.",
            _table(_results(self.history)),
        ]
        if (picture := self.history.path.with_name("loss.png")).is_file():
            parts.append(f"![loss, gradient norm and speed]({picture.name})")
        parts += ["## What", _table(_what(options)), "## On what", _table(self.where | {"versions": _versions()})]
        if given := _given(options):
            parts += ["Options that are not the defaults:", _table(given)]
        for what, command in _commands(options, self.generates).items():
            parts += [f"{what}:", f"```\n{command}\n```"]
        return "\n\n".join(parts) + "\n"


def _results(history: History) -> dict[str, str]:
    first, last, seconds = history.rows[0], history.rows[-1], history.seconds
    trained = last.tokens - first.tokens * (first.step - 1) // first.step
    results = {"loss": f"{first.loss:.3f} → {last.loss:.3f}"}
    if measured := [row for row in history.rows if row.eval_loss is not None]:
        results["loss of unseen text"] = f"{measured[-1].eval_loss:.3f}, at step {measured[-1].step}"
        if measured[-1].bits_per_byte is not None:
            results["bits a byte of it"] = f"{measured[-1].bits_per_byte:.3f}"
    if last.accuracy is not None:
        results["right answers"] = f"{last.accuracy:.1%}"
    results |= {"steps": f"{last.step:,}", "tokens": f"{last.tokens:,}"}
    results["time of the steps"] = tqdm.format_interval(seconds)
    results["mean speed"] = f"{thousands(trained / seconds)} tokens/s"
    if (mfu := history.mfu) is not None:
        results["MFU"] = f"{mfu:.1%}"
    if last.exposed_exchange is not None:
        results["waiting for other ranks' states"] = f"{1000 * last.exposed_exchange:.2f} ms a step, at the end"
    return results


def _what(options: Options) -> dict[str, str]:
    model = options.model()
    mixer = f"{model.mixer} of {model.mom_recurrence}" if model.mixer == "mom" else model.mixer
    what = {
        "layers": f"{model.layers} of width {model.hidden}, {model.heads} heads, pattern {model.pattern}",
        "mixer of L": mixer,
        "vocabulary": f"{model.vocabulary:,}",
    }
    if options.task == "text":
        what["data"] = ", ".join(map(str, options.data)) or "Python's standard library"
        what["tokenizer"] = options.tokenizer
    else:
        what["task"] = options.task
    what["a step"] = f"{options.batch_size} sequences of {options.seq_len:,} tokens"
    return what


def _given(options: Options) -> dict[str, str]:
    """The options that differ from their defaults."""
    values = {
        field.name: (getattr(options, field.name), field.default)
        for field in fields(options)
        if field.default is not MISSING
    }
    return {
        f"`--{name.replace('_', '-')}`": f"`{_plain(value)}`"
        for name, (value, usual) in values.items()
        if value != usual
    }


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _count(options: Options) -> str:
    count = sum(p.numel() for p in outline(options.model()).parameters())
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.2f} million"


def _table(rows: Mapping[str, str]) -> str:
    lines = [f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _versions() -> str:
    return f"lasp {lasp.__version__}, torch {torch.__version__}, python {platform.python_version()}"


def _commands(options: Options, generates: bool) -> dict[str, str]:
    """What one may do with the checkpoint, and the command."""
    commands = {f"To go on from the checkpoint in `{options.out}`": _going_on()}
    if generates:
        commands["To see what it writes"] = f"python -m lasp.generate --checkpoint {options.out} --prompt 'def '"
    return commands


def _going_on() -> str:
    """How this process was started, as one types it, to go on where it ends."""
    ranks, local = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    nodes = ["--nnodes", str(ranks // local)] if ranks > local else []
    launcher = ["torchrun", *nodes, "--nproc-per-node", str(local)] if ranks > 1 else ["python"]
    module = sys.modules["__main__"].__spec__
    program = [sys.argv[0]] if module is None else ["-m", module.name]
    given = sys.argv[1:]
    if "--resume" in given:
        place = given.index("--resume")
        given = given[:place] + given[place + 2 :]
    return shlex.join([*launcher, *program, *given, "--resume", "auto"])
