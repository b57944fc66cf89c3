"""Checkpoints: whole or not at all, and every way in which one cannot be read or written is one clear error."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lasp.models.huggingface import read_config
from lasp.parallel.mesh import build_mesh, processes
from lasp.training import Options, Trainer, checkpoint

ROOT = Path(__file__).parents[2]
SMALL = {
    "hidden": 16,
    "heads": 2,
    "intermediate": 24,
    "seq_len": 32,
    "warmup": 2,
    "batch_size": 2,
    "mixer": "simple_gla",
}


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """This process as the only rank."""
    with processes("cpu"):
        yield


def options(out: Path, **given) -> Options:
    data = {"data": (Path(__file__),), "data_cache": ROOT / "runs/tokens", "validation": 0.0}
    return Options(**(SMALL | data | {"out": out, "steps": 6, "checkpoint_interval": 2} | given))


def trainer(given: Options) -> Trainer:
    return Trainer(given, build_mesh("cpu", 1))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of four steps with the checkpoints of two."""
    trainer(options(tmp_path, steps=4)).train()
    return tmp_path


def names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / checkpoint.FOLDER).iterdir())


def test_what_is_saved_is_the_state_then(tmp_path: Path) -> None:
    """It is written while the next steps change the same tensors in place."""
    going = trainer(options(tmp_path))
    going.step()
    then = {group: {name: x.clone() for name, x in tensors.items()} for group, tensors in going._state().items()}
    going.save()
    for _ in range(3):
        going.step()
    going.checkpoints.wait()
    again = trainer(options(tmp_path, resume="auto"))
    assert again.done == 1
    for group, tensors in again._state().items():
        assert tensors.keys() == then[group].keys()
        assert all(torch.equal(x, then[group][name]) for name, x in tensors.items())
    assert not torch.equal(next(going.model.parameters()), next(again.model.parameters()))


def test_a_run_knows_whether_a_checkpoint_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    going, finish, may = trainer(options(tmp_path)), checkpoint._Writer.finish, threading.Event()

    def held(*given, **named) -> None:
        assert may.wait(30)
        finish(*given, **named)

    monkeypatch.setattr(checkpoint._Writer, "finish", held)
    assert not going.checkpoints.writing
    going.step()
    going.save()
    assert going.checkpoints.writing
    assert checkpoint.latest(tmp_path / checkpoint.FOLDER) is None
    may.set()
    while going.checkpoints.writing:
        time.sleep(0.001)
    assert names(tmp_path) == ["step_0000001"]
    assert checkpoint.latest(tmp_path / checkpoint.FOLDER) is not None
    going.wait()
    assert not going.checkpoints.writing


def test_the_last_ones_stay(tmp_path: Path) -> None:
    trainer(options(tmp_path, keep_checkpoints=2)).train()
    assert names(tmp_path) == ["step_0000004", "step_0000006"]
    assert trainer(options(tmp_path, resume=str(tmp_path / "checkpoints/step_0000004"))).done == 4


def test_steps_that_were_given_up_are_not_gone_on_from(run: Path) -> None:
    """A run that goes back to step 2, and ends at 3, goes on from 3 and not from the 4 that it had before."""
    trainer(options(run, steps=3, checkpoint_interval=3, resume=str(run / "checkpoints/step_0000002"))).train()
    assert names(run) == ["step_0000002", "step_0000003"]
    assert trainer(options(run, resume="auto")).done == 3


def test_what_has_no_marker_is_no_checkpoint(run: Path) -> None:
    """As a killed run leaves it: the one before is taken, and the half of one is written anew."""
    last = checkpoint.latest(run / checkpoint.FOLDER)
    assert last is not None
    assert last.name == "step_0000004"
    (last / checkpoint.MARKER).unlink()
    (last / "left.behind").touch()
    going = trainer(options(run, steps=4, resume="auto"))
    assert going.done == 2
    going.train()
    assert (last / checkpoint.MARKER).is_file()
    assert not (last / "left.behind").exists()


def flip(file: Path, where: int) -> None:
    content = bytearray(file.read_bytes())
    content[where] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda last: flip(last / "__0_0.distcp", 5000), "__0_0.distcp is not what was written"),
        (lambda last: flip(last / ".metadata", 100), ".metadata is not what was written"),
        (lambda last: (last / "__0_0.distcp").write_bytes(b"short"), r"__0_0.distcp has 5 bytes of \d+"),
        (lambda last: (last / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
        (lambda last: (last / checkpoint.MARKER).write_text("{"), "checkpoint.json: Expecting"),
        (lambda last: (last / checkpoint.MARKER).write_text("[]"), "checkpoint.json: "),
    ],
    ids=["a bit", "a bit of the index", "cut", "gone", "marker cut", "marker of something else"],
)
def test_a_damaged_one_is_told_and_which_to_take(run: Path, harm, message: str) -> None:
    harm(run / "checkpoints/step_0000004")
    with pytest.raises(
        ValueError, match=rf"step_0000004: the checkpoint is damaged: {message}.*--resume .*step_0000002"
    ):
        trainer(options(run, resume="auto"))
    assert trainer(options(run, resume=str(run / "checkpoints/step_0000002"))).done == 2


def test_one_of_another_model_is_told(run: Path) -> None:
    with pytest.raises(ValueError, match=r"another model than the options describe: layers=4 \(here 2\)"):
        trainer(options(run, resume="auto", layers=2))
    # A marker that tells of this model, with the tensors of another.
    marker = run / "checkpoints/step_0000004/checkpoint.json"
    told = json.loads(marker.read_text())
    told["model"]["layers"] = 5
    marker.write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"step_0000004 holds another model: .*blocks.4"):
        trainer(options(run, resume="auto", layers=5))


def test_a_full_disk_is_one_line_and_what_was_there_stays(run: Path) -> None:
    """A limit on the size of files, which that of the tensors exceeds."""
    given = ["--out", str(run), "--resume", "auto", "--steps", "8", "--checkpoint-interval", "2", "--sp", "none"]
    given += ["--data", __file__, "--data-cache", str(ROOT / "runs/tokens"), "--validation", "0"]
    small = [text for name, value in SMALL.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    code = (
        "import resource, signal, sys; from lasp.pretrain import main; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)); main()"
    )
    (run / "checkpoints/step_0000006").mkdir()
    ended = subprocess.run(
        [sys.executable, "-c", code, *small, *given], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert ended.returncode == 2, ended.stderr
    line = ended.stderr.strip().splitlines()[-1]
    assert "step_0000006: the checkpoint cannot be written: File too large, on rank 0; the last whole one is" in line
    assert line.endswith("step_0000004")
    assert checkpoint.latest(run / checkpoint.FOLDER) == run / "checkpoints/step_0000004"
    assert trainer(options(run, resume="auto")).done == 4


def test_a_place_that_cannot_be_written_is_told(run: Path) -> None:
    going = trainer(options(run, resume="auto"))
    going.checkpoints.folder = run / "metrics.jsonl"
    with pytest.raises(
        ValueError, match=r"metrics\.jsonl/step_0000004: the checkpoint cannot be written: Not a directory"
    ):
        going.save()


def test_another_tokenizer_is_told(run: Path) -> None:
    marker = run / "checkpoints/step_0000004/checkpoint.json"
    told = json.loads(marker.read_text())
    marker.write_text(json.dumps(told | {"tokenizer": "other/tokenizer.json", "tokenizer_digest": "0"}))
    with pytest.raises(
        ValueError, match=r"--resume .*: trained with --tokenizer other/tokenizer.json, which bytes is not"
    ):
        trainer(options(run, resume="auto"))


def test_the_model_of_a_run(run: Path) -> None:
    model, tokenizer = checkpoint.read_model(run)
    going = trainer(options(run, resume="auto"))
    assert tokenizer == "bytes"
    assert model.config == going.model.config
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), going.model.parameters(), strict=True))
    assert read_config(run / "checkpoints/step_0000004") == model.config
    with pytest.raises(ValueError, match="/nowhere: no checkpoint there"):
        checkpoint.read_model(Path("/nowhere"))


def test_a_tied_model_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Options.model
    monkeypatch.setattr(Options, "model", lambda self: replace(config(self), tied=True))
    trainer(options(tmp_path, steps=2)).train()
    again = trainer(options(tmp_path, resume="auto", steps=4))
    assert again.model.head.weight is again.model.embedding.weight
    again.train()
    through = trainer(options(tmp_path / "through", steps=4))
    figures = [through.step() for _ in range(4)]
    assert len(figures) == 4
    assert all(torch.equal(x, y) for x, y in zip(again.model.parameters(), through.model.parameters(), strict=True))
