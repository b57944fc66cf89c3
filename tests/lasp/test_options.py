"""The command line: every bad option is one line that names it, on any number of ranks, and nobody hangs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest

from lasp.layers import FEATURE_MAPS, MIXERS
from lasp.models import PRESETS
from lasp.parallel.exchange import EXCHANGES
from lasp.parallel.sequence_parallel import METHODS, SOFTMAX
from lasp.training import Options, read_options
from lasp.training.choices import LAYOUTS

ROOT = Path(__file__).parent.parent.parent
TINY = ["--hidden", "16", "--heads", "2", "--intermediate", "16", "--seq-len", "32", "--data", __file__]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--mixer mamba9", "--mixer mamba9: unknown, expected one of basic, lightning"),
        ("--layout spiral", "--layout spiral: unknown, expected one of contiguous, zigzag, zigzag-per-document"),
        ("--mixer mom --top-k 5", "top_k=5 must be from 1 to num_memories=4"),
        ("--mixer mom --num-memories 0", "top_k=2 must be from 1 to num_memories=0"),
        ("--mixer mom --mom-recurrence lstm", "--mom-recurrence lstm: unknown, expected one of basic"),
        ("--mixer mom --sp ulysses", "--sp ulysses: memories are states that travel, and with it none do"),
        ("--balance -1", "--balance -1.0: must be at least 0"),
        ("--preset huge", "--preset huge: unknown, expected one of tiny, tiny-mom, small, linear-llama3-1b"),
        ("--sp ulysses9", "--sp ulysses9: unknown, expected one of none, lasp2"),
        ("--exchange pigeon", "--exchange pigeon: unknown, expected one of auto, all-gather"),
        ("--softmax-sp pigeon", "--softmax-sp pigeon: unknown, expected one of auto, all-gather, ring"),
        ("--feature-map cube", "--feature-map cube: unknown, expected one of identity"),
        ("--tokenizer words", "--tokenizer words: expected bytes, a tokenizer.json or its directory; there is none"),
        ("--data a b --data-weights 1", "--data-weights .1.0,.: expected one for each of 2 --data"),
        ("--validation 1", "--validation 1.0: must be at least 0 and less than 1"),
        ("--eval-every 0", "--eval-interval 0: must be at least 1"),
        ("--micro-batch-size 3", "--micro-batch-size 3: does not divide the 4 sequences a step"),
        ("--recompute some", "--recompute some: unknown, expected one of none, selective, full"),
        ("--schedule linear", "--schedule linear: unknown, expected one of cosine, wsd"),
        ("--decay 2", "--decay 2.0: must be from 0 to 1"),
        ("--eval-interval 0", "--eval-interval 0: must be at least 1"),
        ("--dtype float8", "--dtype float8: unknown, expected one of float32, bfloat16"),
        ("--device tpu", "--device tpu: unknown, expected one of auto, cpu, cuda"),
        ("--sp-size 3", "--sp-size 3: does not divide the 4 ranks"),
        ("--sp-size 0", "--sp-size 0: does not divide the 4 ranks"),
        ("--sp none --sp-size 2", "--sp-size 2: --sp none shares no sequence, use --sp lasp2"),
        ("--sp-size 2 --batch-size 3", "--batch-size 3: the 2 data-parallel ranks .* do not divide it"),
        ("--sp none --batch-size 6", "--batch-size 6: the 4 data-parallel ranks .* do not divide it"),
        ("--seq-len 3", "--seq-len 3: shorter than --sp-size 4"),
        ("--seq-len 0", "--seq-len 0: must be at least 1"),
        ("--steps 0", "--steps 0: must be at least 1"),
        ("--lr -1", "--lr -1.0: must be at least 0"),
        ("--lr nan", "--lr nan: must be at least 0"),
        ("--clip 0", "--clip 0.0: must be above 0, inf for no clipping"),
        ("--seed 4294967296", "less than 2^31"),
        ("--heads 3", "heads=3 does not divide hidden=128"),
        ("--kv-heads 3", "kv_heads=3 does not divide heads=4"),
        ("--pattern LXN", "pattern='LXN' must be made of the letters"),
        ("--window 0", "window at least 1"),
    ],
)
def test_bad_options_are_named(arguments: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=message.replace("^", r"\^")) as error:
        read_options(arguments.split())
    assert "\n" not in str(error.value)


def test_the_public_options_are_there() -> None:
    public = {
        "preset",
        "mixer",
        "pattern",
        "sp",
        "sp_size",
        "layout",
        "exchange",
        "seq_len",
        "batch_size",
        "steps",
        "lr",
    }
    public |= {"dtype", "seed", "data", "tokenizer", "out", "resume"}
    assert public <= {field.name for field in fields(Options)}
    read_options([])
    for option, values in {
        "--preset": PRESETS,
        "--mixer": MIXERS,
        "--feature-map": FEATURE_MAPS,
        "--layout": LAYOUTS,
        "--sp": METHODS,
        "--exchange": EXCHANGES,
        "--softmax-sp": SOFTMAX,
    }.items():
        for value in values:
            read_options([option, value])


def test_help_explains_every_option_and_value(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        read_options(["--help"])
    assert not end.value.code
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in fields(Options):
        assert "--" + field.name.replace("_", "-") in text
    for known in (PRESETS, MIXERS, FEATURE_MAPS, LAYOUTS, METHODS, EXCHANGES, SOFTMAX):
        for name in known:
            assert name in text, name


def launch(ranks: int, *arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """pretrain.py under torchrun: what it did, and in how many seconds."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    began = time.monotonic()
    run = subprocess.run(
        [*command, "pretrain.py", "--device", "cpu", *TINY, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return run, time.monotonic() - began


@pytest.mark.parametrize("arguments", [["--sp-size", "3"], ["--mixer", "mamba9"], ["--resume", "/nowhere"]])
def test_a_launch_with_a_bad_option_says_one_line_and_ends(arguments: list[str], tmp_path: Path) -> None:
    run, seconds = launch(2, *arguments, "--out", str(tmp_path))
    assert run.returncode != 0
    said = [line for line in run.stderr.splitlines() if line.startswith("pretrain.py: error: ")]
    assert len(said) == 1, run.stderr
    assert f"{arguments[0]} {arguments[1]}: " in said[0]
    assert run.stderr.count("Traceback") == 1, run.stderr  # torchrun's own, after our line
    assert seconds < 60


def test_a_launch_trains(tmp_path: Path) -> None:
    run, _ = launch(2, "--steps", "3", "--layout", "zigzag", "--out", str(tmp_path))
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("loss 5.")
    assert str(tmp_path / "metrics.jsonl") in run.stdout
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert (tmp_path / "checkpoints/step_0000003/checkpoint.json").is_file()


def test_a_run_explains_what_travelled(tmp_path: Path) -> None:
    run, _ = launch(2, "--steps", "2", "--batch-size", "2", "--explain", "--out", str(tmp_path))
    assert run.returncode == 0, run.stderr[-2000:]
    assert "exchange auto" in run.stdout + run.stderr
    assert "nothing has travelled yet" not in run.stdout + run.stderr
