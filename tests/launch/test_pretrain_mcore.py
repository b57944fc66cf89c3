"""The loop on megatron.core: from the same weights and on the same sequences, the losses of ``pretrain.py``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lasp.layers import RopeScaling
from lasp.models import LinearLlama3Config
from lasp.models.huggingface import described

pytest.importorskip("megatron.core")

ROOT = Path(__file__).parents[2]
COMMON = [
    "--steps",
    "6",
    "--warmup",
    "2",
    "--log-interval",
    "1",
    "--seq-len",
    "64",
    "--batch-size",
    "4",
    "--device",
    "cpu",
    "--no-document-mask",
]


def run(*words: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run([*launcher, *words], cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)


def rows(out: Path) -> list[tuple[float, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(row["loss"], row["grad_norm"]) for row in lines]


def mcore(out: Path, words: str, ranks: int) -> list[tuple[float, float]]:
    ended = run("-m", "lasp.launch.pretrain_mcore", *COMMON, *words.split(), "--out", str(out), ranks=ranks)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return rows(out)


def assert_alike(given: list[tuple[float, float]], want: list[tuple[float, float]]) -> None:
    assert len(given) == len(want)
    for ours, theirs in zip(given, want, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mixer", ["gated_delta_net", pytest.param("lightning", marks=pytest.mark.slow)])
def test_losses_are_those_of_this_project_s_loop(mixer: str, tmp_path: Path) -> None:
    """And a run goes on under another split."""
    gate = ["--gated", "False"] if mixer == "lightning" else []
    ended = run("pretrain.py", *COMMON, *gate, "--mixer", mixer, "--sp", "none", "--out", str(tmp_path / "own"))
    assert ended.returncode == 0, ended.stderr[-3000:]
    want = rows(tmp_path / "own")
    shared = f"--mixer {mixer} --checkpoint-interval 3"
    out = tmp_path / "mcore"
    assert_alike(mcore(out, f"{shared} --tp 2 --micro-batch-size 2", 2), want)
    assert_alike(mcore(tmp_path / "shared", f"{shared} --cp 2 --distributed-optimizer", 2), want)
    half = out / "step_0000003"
    assert_alike(mcore(out, f"{shared} --pp 2 --resume {half}", 2), want)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--tp 2", "--tp 2 --cp 1 --pp 1: do not divide the 1 ranks"),
        ("--layout contiguous", "--layout contiguous: Megatron's loop is given text, in zigzag"),
        ("--document-mask", "--document-mask: this loop reads a plain stream"),
        ("--seq-len 63", "--seq-len 63: must be a multiple of 2, twice --cp"),
        ("--batch-size 3 --micro-batch-size 2", "--batch-size 3: 1 data-parallel ranks with --micro-batch-size 2"),
        ("--resume nowhere", "--resume nowhere: no such checkpoint"),
    ],
)
def test_bad_options_are_one_line(words: str, message: str) -> None:
    words_of = [sys.executable, "-m", "lasp.launch.pretrain_mcore", "--device", "cpu", *words.split()]
    ended = subprocess.run(words_of, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 2
    assert message in ended.stderr.splitlines()[-1]


def test_scaled_positions_are_refused(tmp_path: Path) -> None:
    from lasp.launch.pretrain_mcore import McoreOptions

    config = LinearLlama3Config(pattern="N", hidden=16, heads=2, rope_scaling=RopeScaling())
    (tmp_path / "config.json").write_text(json.dumps(described(config)))
    with pytest.raises(ValueError, match=r"--init-from .*: its rotary positions are scaled \(llama3\)"):
        McoreOptions(init_from=tmp_path, device="cpu").check(1)
