"""Megatron's own loop with this project's layers: what it refuses, and on GPUs the same losses however sequences are shared."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
MODEL = [
    "--transformer-impl", "local", "--no-persist-layer-norm", "--normalization", "RMSNorm", "--disable-bias-linear",
    "--swiglu", "--position-embedding-type", "rope", "--no-rope-fusion", "--no-masked-softmax-fusion",
    "--no-gradient-accumulation-fusion", "--no-bias-swiglu-fusion", "--no-bias-dropout-fusion",
    "--attention-dropout", "0", "--hidden-dropout", "0", "--num-layers", "4", "--hidden-size", "512",
    "--num-attention-heads", "4", "--untie-embeddings-and-output-weights", "--tokenizer-type", "NullTokenizer",
    "--vocab-size", "255", "--seq-length", "2048", "--max-position-embeddings", "2048", "--micro-batch-size", "1",
    "--global-batch-size", "4", "--train-iters", "4", "--lr", "1e-3", "--lr-decay-style", "constant", "--mock-data",
    "--log-interval", "1", "--eval-iters", "1", "--eval-interval", "100",
]  # fmt: skip


def run(*words: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    program = [*launcher, "-m", "lasp.launch.pretrain_megatron", *words]
    return subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)


def has_loop() -> bool:
    return find_spec("megatron") is not None and find_spec("megatron.training") is not None


@pytest.mark.skipif(has_loop(), reason="megatron.training is there")
def test_without_megatron_s_loop_one_line_says_where_to_get_it() -> None:
    words = [sys.executable, "-m", "lasp.launch.pretrain_megatron", "--sp", "lasp2"]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 2
    assert "no megatron.training: install megatron-core 0.19 or newer" in ended.stderr.splitlines()[-1]


@pytest.mark.skipif(not has_loop() or torch.cuda.is_available(), reason="no megatron.training, or a GPU")
def test_without_a_gpu_one_line_names_the_loop_that_needs_none() -> None:
    words = [sys.executable, "-m", "lasp.launch.pretrain_megatron"]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 2
    assert "lasp.launch.pretrain_mcore trains on CPUs too" in ended.stderr.splitlines()[-1]
    helped = subprocess.run([*words, "--help"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert helped.returncode == 0
    assert "--softmax-sp" in helped.stdout


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.skipif(not has_loop(), reason="no megatron.training")
@pytest.mark.parametrize("mixer", ["gated_delta_net", "mom"])
def test_losses_are_alike_however_sequences_are_shared(mixer: str) -> None:
    found = {}
    for ranks in range(1, min(4, torch.cuda.device_count()) + 1):
        if ranks == 3:
            continue
        ended = run(*MODEL, "--mixer", mixer, "--context-parallel-size", str(ranks), ranks=ranks)
        assert ended.returncode == 0, ended.stderr[-3000:]
        found[ranks] = [float(loss) for loss in re.findall(r"lm loss: (\S+)", ended.stdout)]
        assert len(found[ranks]) == 4
        assert found[ranks] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not has_loop(), reason="no megatron.training")
def test_what_does_not_go_together_is_one_line() -> None:
    masked = run(*MODEL, "--context-parallel-size", "2", "--dataloader-inter-document-masking", ranks=2)
    assert masked.returncode
    assert "--dataloader-inter-document-masking, --context-parallel-size 2: Megatron deals out" in masked.stderr
    alone = run(*MODEL, "--context-parallel-size", "2", "--sp", "none", ranks=2)
    assert "--sp none, --context-parallel-size 2: each rank would take its part" in alone.stderr
