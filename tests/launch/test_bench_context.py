"""The bytes that were counted are those that were computed, and README has them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

from lasp.launch.bench_context import dealt_bytes, state_bytes

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
LENGTHS = (4096, 16384, 65536, 262144, 1048576)


def in_readme(name: str, bytes_of: list[float], unit: float = 2**20, digits: int = 0) -> None:
    assert f"| {name} | {' | '.join(f'{x / unit:.{digits}f}' for x in bytes_of)} |" in README


def test_what_is_sent_is_what_is_computed() -> None:
    rows = json.loads((ROOT / "launch/results/context.json").read_text())["figures"]
    of = {layer: [row for row in rows if row["layer"] == layer] for layer in ("lasp", "megatron")}
    for layer, own in of.items():
        assert tuple(row["tokens"] for row in own) == LENGTHS
        assert {row["ranks"] for row in own} == {4}
        for row in own:
            states, dealt = state_bytes(4, 16, 128), dealt_bytes(row["tokens"], 4, 2048, 2048, 16)
            assert row["both_bytes"] == {"lasp": states, "megatron": dealt}[layer]
    ours, theirs = of.values()
    in_readme("`lasp2`: MiB that a rank sends", [row["both_bytes"] for row in ours])
    in_readme("Megatron-Core 0.19.2: MiB", [row["both_bytes"] for row in theirs])
    in_readme("`lasp2`: ms", [row["both_ms"] for row in ours], 1, 1)
    in_readme("Megatron-Core 0.19.2: ms", [row["both_ms"] for row in theirs], 1, 1)
    in_readme("16 ranks, computed: `lasp2`, MiB", [state_bytes(16, 16, 128)] * 5)
    in_readme("16 ranks, computed: Megatron-Core, MiB", [dealt_bytes(tokens, 16, 2048, 2048, 16) for tokens in LENGTHS])
    in_readme("64 ranks, computed: `lasp2`, MiB", [state_bytes(64, 16, 128)] * 5)
    even = next(k for k in range(1, 2048) if dealt_bytes(1024 * k, 16, 2048, 2048, 16) > state_bytes(16, 16, 128))
    assert f"below {even - 1}K tokens on 16 ranks" in " ".join(README.split())


def test_both_loops_figures_are_in_readme() -> None:
    text = " ".join(README.split())
    plain, mixtures = (
        {name: loop["step_ms"] for name, loop in json.loads(path.read_text())["figures"].items()}
        for path in (ROOT / "launch/results/mcore.json", ROOT / "launch/results/mcore_mom.json")
    )
    assert f"at {plain['lasp'] / plain['megatron']:.2f} times the speed of `pretrain.py`" in text
    assert f": {plain['megatron']:.0f} ms a step for {plain['lasp']:.0f}, in bfloat16" in text
    assert f"[{mixtures['lasp'] / mixtures['megatron']:.2f}](launch/results/mcore_mom.json) times" in text
