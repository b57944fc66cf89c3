"""The model meets what was published, by constants that belong to no cell, and sees wrong ones."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lasp.launch.simulate import (
    ADVANTAGE,
    LASP2_SPEED,
    ZECO_EXCHANGE,
    ZECO_SPEED,
    Figures,
    Inputs,
    Kernels,
    advantage,
    exchange,
    main,
    over,
    report,
    simulate,
)
from lasp.parallel.exchange.cost import Link, Links, links

RESULTS = Path(__file__).parent.parent.parent / "launch" / "results"
INPUTS = Inputs(Kernels.read(RESULTS / "kernels.json"))


@pytest.fixture(scope="module")
def figures() -> Figures:
    return simulate(INPUTS)


def flat(latency: float, bandwidth: float) -> Links:
    return Links(Link(latency, bandwidth), Link(latency, bandwidth), 8, Link(0.0, 1e15))


def test_what_was_published_is_met(figures: Figures) -> None:
    assert figures.failures() == []
    for method, column in ADVANTAGE.items():
        for tokens, told in column.items():
            assert abs(advantage(method, tokens, INPUTS.nominal, INPUTS) - told) <= 5
    for name, kind, ways in (("all-gather", "all-gather", INPUTS.gather), ("All-Scan", "pipelined", INPUTS.relay)):
        for gpus, told in ZECO_EXCHANGE[name].items():
            assert 1000 * exchange(kind, gpus, ways, INPUTS)[0] == pytest.approx(told, rel=0.25)


def test_two_level_is_five_times_faster_than_all_scan_at_256(figures: Figures) -> None:
    assert min(figures.faster.values()) >= 5
    for ways in (INPUTS.usual, INPUTS.relay):
        two_level, chain = (exchange(name, 256, ways, INPUTS)[0] for name in ("two-level", "pipelined"))
        assert chain >= 5 * two_level
        assert ZECO_EXCHANGE["All-Scan"][256] >= 5 * 1000 * two_level
    # And there is none faster, at any size.
    for row in figures.rows:
        if row.table.startswith("ms"):
            assert min(row.values, key=lambda name: row.values[name]) == "two-level", row


def test_more_gpus_take_longer_and_longer_sequences_gain_more(figures: Figures) -> None:
    for table in {row.table for row in figures.rows}:
        rows = [row for row in figures.rows if row.table == table]
        assert [row.gpus for row in rows] == [8, 16, 32, 64, 128, 256, 512, 1024]
        for before, after in pairwise(rows):
            for name, value in before.values.items():
                if name == "none":
                    assert after.values[name] == value
                elif table.startswith("ms"):
                    assert after.values[name] > value, (table, name, after.gpus)
                else:
                    assert after.values[name] < value < before.values["none"], (table, name, after.gpus)
    for method, (short, long) in ADVANTAGE.items():
        for ways in (INPUTS.nominal, INPUTS.physical):
            assert 0 < advantage(method, short, ways, INPUTS) < advantage(method, long, ways, INPUTS)


@pytest.mark.parametrize(
    ("wrong", "seen"),
    [
        ({"nominal": INPUTS.physical}, "over Ring Attention, 512K"),
        ({"ring_tensors": (2, 4)}, "over Ring Attention, 2048K"),
        ({"lasp1_tensors": (4, 7)}, "over LASP-1, 2048K"),
        ({"a100_memory": INPUTS.a100_memory / 2}, "over LASP-1, 512K"),
        ({"model": replace(INPUTS.model, layers=32)}, "over LASP-1, 512K"),
        ({"gather": flat(52e-6, 58e9)}, "all-gather, 256 GPUs"),
        ({"gather": flat(104e-6, 29e9)}, "all-gather, 8 GPUs"),
        ({"relay": flat(10.6e-6, 13e9)}, "All-Scan, 256 GPUs"),
        ({"relay": flat(5.3e-6, 6.5e9)}, "All-Scan, 8 GPUs"),
        ({"usual": replace(INPUTS.usual, kernel=Link(1e-4, 1e12))}, "two-level, "),
    ],
)
def test_a_wrong_constant_is_seen(wrong: dict[str, Any], seen: str) -> None:
    assert any(seen in failure for failure in simulate(replace(INPUTS, **wrong)).failures())


@pytest.mark.parametrize(
    ("name", "kind", "ways"), [("all-gather", "all-gather", INPUTS.gather), ("All-Scan", "pipelined", INPUTS.relay)]
)
def test_links_are_those_of_the_least_worst_miss(name: str, kind: str, ways: Links) -> None:
    def worst(latency: float, bandwidth: float) -> float:
        changed = flat(latency, bandwidth)
        return max(
            abs(1000 * exchange(kind, gpus, changed, INPUTS)[0] / told - 1)
            for gpus, told in ZECO_EXCHANGE[name].items()
        )

    latency, bandwidth = ways.between.latency, ways.between.bandwidth
    assert ways == flat(latency, bandwidth)
    least = worst(latency, bandwidth)
    for factor in (0.9, 1.1):
        assert worst(latency * factor, bandwidth) > least
        assert worst(latency, bandwidth * factor) > least


def test_every_constant_has_a_source_and_every_published_value_a_miss(figures: Figures) -> None:
    assert [x["name"] for x in figures.inputs] == [x.name for x in fields(Inputs)]
    assert all(x["source"] for x in figures.inputs)
    tables = (*ADVANTAGE.values(), *LASP2_SPEED.values(), *ZECO_EXCHANGE.values(), *ZECO_SPEED.values())
    published = sorted(value for column in tables for value in column.values())
    assert sorted({*published}) == sorted({cell.published for cell in figures.cells})
    text = report(figures)
    for cell in figures.cells:
        assert f"{cell.published:.7g}" in text
        assert f"{cell.miss:+.1f}" in text


def test_the_recorded_figures_are_those_of_now(figures: Figures) -> None:
    recorded = json.loads((RESULTS / "simulate.json").read_text())["figures"]
    same(recorded, json.loads(json.dumps(asdict(figures))), "run python -m lasp.launch.simulate again: figures")
    assert (RESULTS / "simulate.png").stat().st_size > 10000


def same(recorded: Any, now: Any, where: str) -> None:
    """But for last digits."""
    if isinstance(now, dict):
        assert list(recorded) == list(now), where
        for key, value in now.items():
            same(recorded[key], value, f"{where}.{key}")
    elif isinstance(now, list):
        assert len(recorded) == len(now), where
        for i, value in enumerate(now):
            same(recorded[i], value, f"{where}[{i}]")
    elif isinstance(now, float):
        assert recorded == pytest.approx(now, rel=1e-9), where
    else:
        assert recorded == now, where


def test_the_command_writes_and_says_what_it_misses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["simulate", "--result", str(tmp_path / "x.json")])
    main()
    assert json.loads((tmp_path / "x.json").read_text())["command"].startswith(
        "python -m lasp.launch.simulate --result"
    )
    assert (tmp_path / "x.png").exists()
    assert "two-level" in capsys.readouterr().out
    # As if the memory were ten times as slow.
    slower = json.loads((RESULTS / "kernels.json").read_text())
    slower["figures"]["copy_bytes_per_second"] /= 10
    (tmp_path / "kernels.json").write_text(json.dumps(slower))
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--kernels", str(tmp_path / "kernels.json")])
    with pytest.raises(SystemExit, match="over LASP-1, 512K tokens: misses by"):
        main()
    (tmp_path / "kernels.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"--kernels: .* lacks kernels' times"):
        main()


def test_the_cost_model_s_links_are_given_back() -> None:
    before = links()
    with over(INPUTS.relay):
        assert links() == INPUTS.relay
    assert links() == before
    with pytest.raises(ValueError, match="unknown"), over(INPUTS.relay):
        raise ValueError("unknown")
    assert links() == before
