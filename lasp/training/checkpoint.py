"""Checkpoints by torch.distributed.checkpoint: written behind the training, whole or not at all, read by any number of ranks.

A run keeps them in ``<out>/checkpoints/step_<number>``. All tensors are stored once, each rank writing its part; last of all
comes `MARKER`, with the step, the place in the data, the options and a checksum of every file. What has none is no checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from lasp.data import BYTES
from lasp.models import LinearLlama3, LinearLlama3Config, load_pretrained
from lasp.models.huggingface import CONFIG
from lasp.models.pretrained import pretrained_tokenizer

#: Where a run's checkpoints lie in its directory, and how each is called.
FOLDER, NAME = "checkpoints", "step_{:07}"
#: The file that makes one whole.
MARKER = "checkpoint.json"
#: What each rank leaves for the marker: the checksum of a file that it wrote.
CHECKSUM = ".crc32"
#: Tensors by name, in groups: "model", "optimizer".
State = dict[str, dict[str, Tensor]]


class Checkpoints:
    """Those of one run.

    Args:
        out: the run's directory.
        keep: how many stay; older ones are removed when a newer is whole.
    """

    def __init__(self, out: Path, keep: int):
        self.folder, self.keep = out / FOLDER, keep
        self._group: dist.ProcessGroup | None = None
        self._pending: tuple[Path, Future[Any]] | None = None

    def save(self, step: int, state: State, told: Mapping[str, Any], beside: Callable[[Path], None]) -> None:
        """Copy the state to the host and return; the copy is written while the run goes on. Called on all ranks.

        Args:
            step: how many steps were made.
            state: on each rank; what is no `DTensor` is the same on all.
            told: more for the marker, in plain types.
            beside: writes what else shall lie there, given its directory; on rank 0.

        Raises:
            ValueError: on all ranks, where the last one could not be written.
        """
        self.wait()
        if self._group is None:
            # Beside those of the training: what is agreed on while it goes on must not get among what it sends.
            self._group = dist.new_group(backend="gloo")
        path = self.folder / NAME.format(step)
        self._on_rank_0(path, lambda: _prepare(path, beside))
        writer = _Writer(path, {"step": step, **told}, self.keep)
        stager = DefaultStager(StagingOptions(False, False, False, False))
        # The stager copies at once, so what it returns is the future of the writing alone.
        found = dcp.async_save(_own(state), storage_writer=writer, process_group=self._group, async_stager=stager)
        self._pending = path, cast("Future[Any]", found)

    @property
    def writing(self) -> bool:
        """Whether the last one is still being written, as this rank knows: it may be done before others are, or after."""
        return self._pending is not None and not self._pending[1].done()

    def wait(self) -> None:
        """Return when the last one is on the disk.

        Raises:
            ValueError: on all ranks, where it is not, with what was in the way.
        """
        if self._pending is None:
            return
        (path, writing), self._pending = self._pending, None
        try:
            writing.result()
        except CheckpointException as error:
            rank, (cause, _) = min(error.failures.items())
            raise ValueError(self._failure(path, f"{_reason(cause)}, on rank {rank}")) from None
        except OSError as error:
            raise ValueError(self._failure(path, _reason(error))) from None

    def _on_rank_0(self, path: Path, prepare: Callable[[], None]) -> None:
        """Let rank 0 do something, and all ranks know whether it could."""
        problem: list[str | None] = [None]
        if dist.get_rank() == 0:
            try:
                prepare()
            except OSError as error:
                problem = [_reason(error)]
        dist.broadcast_object_list(problem, 0, group=self._group)
        if problem[0] is not None:
            raise ValueError(self._failure(path, problem[0]))

    def _failure(self, path: Path, reason: str) -> str:
        last = latest(self.folder)
        return f"{path}: the checkpoint cannot be written: {reason}; " + (
            f"the last whole one is {last}" if last else "there is no earlier one"
        )


class _Writer(dcp.FileSystemWriter):
    """Writes a checkpoint's files, then its marker, then removes what is too old."""

    def __init__(self, path: Path, told: dict[str, Any], keep: int):
        super().__init__(path)
        self._folder, self._told, self._keep = path, told, keep

    def write_data(self, plan: Any, planner: Any) -> Any:
        """This rank's files, with a checksum beside each."""
        written = super().write_data(plan, planner)
        for name in {result.storage_data.relative_path for result in written.wait()}:
            file = self._folder / name
            _write(file.with_name(name + CHECKSUM), json.dumps(_facts(file)))
        return written

    def finish(self, metadata: Any, results: Any) -> None:
        """On rank 0, after all ranks have written."""
        super().finish(metadata, results)
        files = {".metadata": _facts(self._folder / ".metadata")}
        for file in sorted(self._folder.glob("*" + CHECKSUM)):
            files[file.name.removesuffix(CHECKSUM)] = json.loads(file.read_text())
            file.unlink()
        _write(self._folder / MARKER, json.dumps({**self._told, "files": files}, indent=1))
        whole = _all(self._folder.parent)
        # Later ones are of steps that were given up: the run has gone back to one before them.
        later = [path for path in whole if path > self._folder]
        for old in [*later, *whole[: len(whole) - len(later)][: -self._keep]]:
            (old / MARKER).unlink()  # first: what is half removed is none
            shutil.rmtree(old)


def find(path: Path) -> Path:
    """The checkpoint of a path: itself, or the last one of a run's directory.

    Raises:
        ValueError: where there is none.
    """
    if (path / MARKER).is_file():
        return path
    found = latest(path / FOLDER)
    if found is None:
        raise ValueError(f"{path}: no checkpoint there")
    return found


def latest(folder: Path) -> Path | None:
    """The last whole checkpoint of those in a folder."""
    return max(_all(folder), default=None)


def read_marker(path: Path) -> dict[str, Any]:
    """What is told of a checkpoint.

    Raises:
        ValueError: where it is damaged.
    """
    try:
        told: dict[str, Any] = json.loads((path / MARKER).read_text())
        if not isinstance(told["step"], int) or not isinstance(told["files"], dict):
            raise ValueError("no step, or no files")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(_damaged(path, f"{MARKER}: {error}")) from None
    return told


def load(path: Path, state: State, told: Mapping[str, Any]) -> None:
    """Read a checkpoint into tensors, whatever ranks hold of them. Called on all ranks.

    Args:
        path: of the checkpoint.
        state: what to fill in; its names and shapes say what is expected.
        told: what `read_marker` gave.

    Raises:
        ValueError: on all ranks, where files are damaged, or hold other tensors.
    """
    alone = not dist.is_initialized()
    rank, ranks = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
    problems = [_damage(path / name, *facts) for name, facts in sorted(told["files"].items())[rank::ranks]]
    _together(next((_damaged(path, problem) for problem in problems if problem), None))
    try:
        with warnings.catch_warnings():
            # One process alone is what was meant.
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            dcp.load(cast("dict[str, Any]", state), storage_reader=dcp.FileSystemReader(path), no_dist=alone)
    except (CheckpointException, RuntimeError, ValueError, KeyError) as error:
        cause: BaseException = error
        if isinstance(error, CheckpointException) and error.failures:
            cause = min(error.failures.items())[1][0]
        raise ValueError(f"{path} holds another model: {str(cause).splitlines()[0]}") from None


def read_model(path: Path) -> tuple[LinearLlama3, str]:
    """The model of a checkpoint, on the CPU.

    Args:
        path: of the checkpoint, or of the run, whose last one is taken; or of a model as Hugging Face has them.

    Returns:
        It, and its tokenizer, as ``--tokenizer`` takes it.

    Raises:
        ValueError: where there is none, or it is damaged.
    """
    if (path / CONFIG).is_file() and not (path / MARKER).is_file():
        return load_pretrained(path).model, pretrained_tokenizer(path)
    path = find(path)
    told = read_marker(path)
    model = LinearLlama3(LinearLlama3Config.of(told["model"]))
    with torch.no_grad():
        load(path, {"model": dict(model.named_parameters())}, told)
    return model, told["tokenizer"] or BYTES


def checksum(file: Path) -> int:
    """CRC-32 of a file's content."""
    value = 0
    with file.open("rb") as content:
        while piece := content.read(2**20):
            value = zlib.crc32(piece, value)
    return value


def _together(problem: str | None) -> None:
    """Raise on all ranks what is a problem on any."""
    problems = [problem]
    if dist.is_initialized():
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
    for found in problems:
        if found is not None:
            raise ValueError(found)


def _all(folder: Path) -> list[Path]:
    """The whole checkpoints, oldest first."""
    return sorted(marker.parent for marker in folder.glob(f"{NAME.split('{')[0]}*/{MARKER}"))


def _prepare(path: Path, beside: Callable[[Path], None]) -> None:
    """An empty directory: what lies there was not finished, or is written once more."""
    (path / MARKER).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    beside(path)


def _own(state: State) -> dict[str, dict[str, Tensor]]:
    """Of tensors that all ranks hold alike, those that this rank writes: about as much as any other."""
    load = [0] * dist.get_world_size()
    mine: dict[str, dict[str, Tensor]] = {}
    for group, tensors in state.items():
        for name, x in tensors.items():
            writer = load.index(min(load))
            if not isinstance(x, DTensor):
                load[writer] += x.numel()
            if isinstance(x, DTensor) or writer == dist.get_rank():
                mine.setdefault(group, {})[name] = x
    return mine


def _facts(file: Path) -> list[int]:
    return [file.stat().st_size, checksum(file)]


def _damage(file: Path, size: int, crc: int) -> str | None:
    """What is wrong with a file; None where nothing is."""
    if not file.is_file():
        return f"{file.name} is missing"
    if file.stat().st_size != size:
        return f"{file.name} has {file.stat().st_size} bytes of {size}"
    return None if checksum(file) == crc else f"{file.name} is not what was written"


def _damaged(path: Path, problem: str) -> str:
    before = [found for found in _all(path.parent) if found < path]
    rest = f"go on from the one before it, --resume {before[-1]}" if before else "there is no earlier one"
    return f"{path}: the checkpoint is damaged: {problem}; {rest}"


def _reason(error: BaseException) -> str:
    """The cause behind an error, in a line."""
    while error.__cause__ is not None and not isinstance(error, OSError):
        error = error.__cause__
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    return text.splitlines()[0]


def _write(file: Path, text: str) -> None:
    """Whole or not at all."""
    unfinished = file.with_name(file.name + ".unfinished")
    with unfinished.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(unfinished, file)
