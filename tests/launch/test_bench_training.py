"""What is measured of training is the same training: every case's loss and gradient norm tell so."""

from __future__ import annotations

import json
import sys
import weakref
from pathlib import Path

import pytest
import torch.distributed as dist

from lasp.launch import bench_training
from lasp.launch.bench_training import Bench, Row, measure, table
from lasp.training import Trainer

TINY = {"preset": "tiny", "tokens": 48, "dtype": "float32", "device": "cpu", "steps": 2, "warmup": 1}
ALONE = "--seq-len 48 --batch-size 1 --recompute"
SHARED, APART = "--seq-len 192 --batch-size 1 --layout zigzag", "--seq-len 48 --batch-size 4 --sp-size 1"


def same(figures: list[tuple[float, float]]) -> None:
    """Losses and gradient norms."""
    for given in figures[1:]:
        assert given == pytest.approx(figures[0], rel=1e-5, abs=0)


def test_one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    made: list[weakref.ref[Trainer]] = []

    def alone(*given) -> Trainer:
        assert all(before() is None for before in made), "a case still holds what it had"
        trainer = Trainer(*given)
        made.append(weakref.ref(trainer))
        return trainer

    monkeypatch.setattr(bench_training, "Trainer", alone)
    result = tmp_path / "training.json"
    given = TINY | {"data": Path(__file__), "data-cache": tmp_path, "result": result}
    words = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["bench_training", *words])
    bench_training.main()

    figures = json.loads(result.read_text())["figures"]
    assert figures["document_mask"] is False
    assert (figures["preset"], figures["warmup"], figures["steps"]) == ("tiny", 1, 2)
    rows = {row["options"]: row for row in figures["cases"]}
    kept = [f"{ALONE} {recompute}" for recompute in ("none", "selective", "full")]
    added = "--seq-len 48 --batch-size 4 --micro-batch-size 1"
    assert list(rows) == [*kept, added]
    assert len(made) == 4
    for row in rows.values():
        assert (row["ranks"], row["peak"], row["saving"]) == (1, None, None)
        tokens = 192 if row["options"] == added else 48
        assert row["tokens_per_second"] == pytest.approx(tokens * 1000 / row["step_ms"])
    same([(rows[name]["loss"], rows[name]["grad_norm"]) for name in kept])
    assert rows[added]["loss"] != pytest.approx(rows[kept[0]]["loss"], rel=1e-5, abs=0)
    told = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in told[1:]] == list(rows)


def test_what_cannot_be_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--steps", "0"], ["--mixer", "mamba9"]):
        monkeypatch.setattr(sys, "argv", ["bench_training", "--device", "cpu", *words])
        with pytest.raises(SystemExit, match="2"):
            bench_training.main()
        assert capsys.readouterr().err.startswith(f"lasp.launch.bench_training: error: {' '.join(words)}: ")


@pytest.mark.mpi(min_size=4)
def test_four_ranks(world: int) -> None:
    assert world == 4
    rows = list(measure(Bench(**TINY, data=(Path(__file__),)), speaks=False))
    found = [(row.loss, row.grad_norm) for row in rows]
    assert [row.options for row in rows] == [
        SHARED, f"{SHARED} --fsdp", f"{SHARED} --fsdp --recompute full", APART, f"{APART} --fsdp",
    ]  # fmt: skip
    same(found[:3])
    same(found[3:])
    assert {row.ranks for row in rows} == {4}
    assert [row.saving is not None for row in rows] == [False] * 4 + [True]
    saving = rows[-1].saving
    assert saving is not None
    assert 0 < saving.held <= saving.whole
    assert (saving.step_ms is None) == (saving.steps == 0)
    assert f"{saving.steps} steps in between" in table(rows)
    # All ranks made the same steps and tell the same.
    told: list[list[Row]] = [[]] * world
    dist.all_gather_object(told, rows)
    assert all(
        [(row.step_ms, row.saving) for row in each] == [(row.step_ms, row.saving) for row in rows] for each in told
    )
