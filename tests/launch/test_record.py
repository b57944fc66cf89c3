"""Recorded figures say how they were measured; a deviation is judged by the larger of its two figures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from lasp.launch.parity import ALONE, Deviation, Split, splits
from lasp.launch.record import record
from lasp.training import Options


def test_a_figure_stands_beside_its_command_hardware_and_versions(tmp_path: Path) -> None:
    path = tmp_path / "results" / "x.json"
    record(path, "make x", {"rows": [Deviation("gla", "DP 1 × SP 2", 1e-7, 2e-7)]})
    result = json.loads(path.read_text())
    assert result["command"] == "make x"
    assert result["hardware"]["cores"] >= 1
    assert result["versions"]["torch"] == torch.__version__
    assert result["figures"]["rows"] == [
        {"mixer": "gla", "split": "DP 1 × SP 2", "loss": 1e-7, "grad_norm": 2e-7},
    ]
    with pytest.raises(TypeError, match="must be what JSON holds or a dataclass, given Tensor"):
        record(path, "make x", torch.zeros(1))


def test_recorded_results_name_no_place_on_a_machine() -> None:
    results = Path(__file__).parent.parent.parent / "launch" / "results"
    for file in results.glob("*.json"):
        found = json.loads(file.read_text())
        assert {"command", "hardware", "versions", "figures"} <= found.keys(), file
        assert not any(word.startswith(("/", "~")) for word in found["command"].split()), file


def test_deviations() -> None:
    expected = torch.tensor([[2.0, 4.0], [1.0, 5.0]])
    found = Deviation.between(expected * torch.tensor([[1.0, 1.5], [0.75, 1.0]]), expected, "gla", Split(2, 2))
    assert (found.loss, found.grad_norm) == (0.25, 0.5)
    assert found.within(0.5)
    assert not found.within(0.4)
    assert not Deviation("gla", "", math.nan, 0.0).within(1.0)
    assert not Deviation("gla", "", 0.0, math.nan).within(1.0)


def test_every_way_to_split_the_ranks_is_compared() -> None:
    shapes = {(s.dp, s.sp) for s in splits(8)}
    assert shapes == {(1, 2), (1, 4), (1, 8), (8, 1), (4, 2), (2, 4)}
    assert ALONE not in set(splits(8))
    assert {(s.layout, s.softmax_sp) for s in splits(8) if s.sp == 4} == {
        ("contiguous", "all-gather"),
        ("zigzag", "ring"),
    }


def test_runs_that_cannot_be_split_are_named() -> None:
    run = Options(batch_size=3)
    assert Split(1, 4, "zigzag").of(run).layout == "zigzag"
    with pytest.raises(ValueError, match="--batch-size 3: the 2 data-parallel ranks"):
        Split(2, 2).of(run)
    with pytest.raises(ValueError, match="--mixer mamba9: unknown"):
        Split(1, 2).of(Options(mixer="mamba9"))
