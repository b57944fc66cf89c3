"""Runs that start from models on disk, and checkpoints that become such."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lasp.export import main as export
from lasp.models import load_pretrained, save_pretrained
from lasp.parallel.mesh import build_mesh, processes
from lasp.training import Options, Trainer
from lasp.training.checkpoint import read_model
from tests.lasp.test_pretrained import LLAMA3, assert_same, llama, random, tiny
from tests.support import relative_error


@pytest.fixture
def alone() -> Iterator[None]:
    """This process as the only rank."""
    with processes("cpu"):
        yield


def options(tmp_path: Path, **given: Any) -> Options:
    small: dict[str, Any] = {"seq_len": 33, "data": (Path(__file__),), "data_cache": tmp_path / "tokens", "steps": 2}
    return Options(**(small | {"out": tmp_path / "run", "validation": 0.0, "device": "cpu", "warmup": 1} | given))


@pytest.mark.usefixtures("alone")
def test_a_run_starts_from_a_llama_and_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama(tmp_path / "llama", vocab_size=256, rope=LLAMA3)
    given = options(tmp_path, init_from=tmp_path / "llama", pattern="LN", mixer="simple_gla")
    given.check(1)
    run = Trainer(given, build_mesh("cpu", 1))
    torch.manual_seed(given.seed)
    assert_same(run.model, load_pretrained(tmp_path / "llama", pattern="LN", mixer="simple_gla").model)
    run.train()
    # The checkpoint needs the Llama no more.
    (tmp_path / "llama").rename(tmp_path / "away")
    export(["--checkpoint", str(given.out), "--out", str(tmp_path / "exported"), "--max-positions", "33"])
    assert f"M parameters, tokenizer bytes: {tmp_path / 'exported'}" in capsys.readouterr().out
    assert json.loads((tmp_path / "exported/config.json").read_text())["max_position_embeddings"] == 33
    model, tokenizer = read_model(tmp_path / "exported")
    assert tokenizer == "bytes"
    assert model.config == run.model.config
    assert_same(model, run.model)
    again = Trainer(replace(given, init_from=tmp_path / "exported", pattern=None, mixer=None), build_mesh("cpu", 1))
    assert_same(again.model, run.model)


@pytest.mark.mpi(min_size=4)
def test_ranks_that_share_sequences_start_from_the_same_weights(world: int, tmp_path: Path) -> None:
    shared_by_all = [tmp_path]
    dist.broadcast_object_list(shared_by_all)
    tmp_path = shared_by_all[0]
    llama(tmp_path / "llama", vocab_size=256, rope=LLAMA3)  # transformers writes on rank 0
    dist.barrier()
    given = options(
        tmp_path, init_from=tmp_path / "llama", pattern="LN", mixer="retention", seq_len=64, layout="zigzag"
    )
    shared = Trainer(given, build_mesh("cpu", world))
    for parameter in shared.model.parameters():
        everyone = [torch.empty_like(parameter) for _ in range(world)]
        dist.all_gather(everyone, parameter.detach())
        assert all(torch.equal(other, parameter) for other in everyone)
    alone = Trainer(replace(given, sp="none", layout="contiguous"), build_mesh("cpu", 1))
    for _ in range(2):
        assert relative_error(shared.step()["loss"], alone.step()["loss"]) < 1e-6


def test_the_tokenizer_goes_with_the_model(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    for given in (file, tmp_path):
        save_pretrained(random(tiny()), tmp_path / "saved", tokenizer=str(given))
        assert read_model(tmp_path / "saved")[1] == str(tmp_path / "saved/tokenizer.json")
        assert (tmp_path / "saved/tokenizer.json").read_text() == "{}"
    with pytest.raises(
        ValueError, match=r"--tokenizer bytes: the model of --init-from has another, use --tokenizer .*saved"
    ):
        options(tmp_path, init_from=tmp_path / "saved").check(1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preset": "small"}, "--preset small: the model is that of --init-from .*, leave one out"),
        ({}, "--tokenizer bytes: its 256 tokens exceed the vocabulary of 64 of --init-from"),
        ({"hidden": 64}, "hidden=64: the weights in .* are of hidden=32, leave it out"),
        ({"init_from": Path("/nowhere")}, "/nowhere: no config.json there"),
    ],
)
def test_bad_starts_are_named(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    llama(tmp_path / "llama")
    with pytest.raises(ValueError, match=message):
        options(tmp_path, **({"init_from": tmp_path / "llama"} | given)).check(1)


def test_a_bad_export_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        export(["--checkpoint", str(tmp_path), "--out", str(tmp_path / "out")])
    assert end.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert said == [f"lasp.export: error: {tmp_path}: no checkpoint there"]
