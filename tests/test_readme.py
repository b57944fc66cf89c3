"""What the README shows works as it stands there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lasp import SequenceLayout
from lasp.launch.kernel_cases import OPS
from lasp.layers import MIXERS
from lasp.ops import gla
from lasp.training import read_options
from tests.support import relative_error

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_is_one_gpu_s_result(tmp_path: Path) -> None:
    code, *_ = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    # Each rank to a file of its own: what they print may run together.
    (tmp_path / "yours.py").write_text(code + 'torch.save([x.detach(), g, o.detach(), x.grad], f"{sp.rank}.pt")\n')
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "yours.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert run.returncode == 0, run.stderr
    layout = SequenceLayout.zigzag(8192, 4)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(4)]
    x, g, o, dx = (layout.unshard(parts) for parts in zip(*ranks, strict=True))
    x.requires_grad_()
    alone, _ = gla(x, x, x, g)
    (alone.square().sum() / 8192).backward()
    assert x.grad is not None
    assert relative_error(o, alone) < 1e-5
    assert relative_error(dx, x.grad) < 1e-5


def test_the_commands_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = re.findall(r"^torchrun --nproc-per-node (\d+) pretrain.py (.*?)(?: +#.*)?$", README, flags=re.MULTILINE)
    assert len(commands) >= 2
    for ranks, arguments in commands:
        monkeypatch.setenv("WORLD_SIZE", ranks)
        read_options(arguments.split() + (["--batch-size", ranks] if "--sp-size" in arguments else []))


def test_the_figures_are_recorded() -> None:
    parity = json.loads((ROOT / "launch/results/parity.json").read_text())["figures"]["deviations"]
    assert {row["mixer"] for row in parity} == MIXERS.keys()
    loss, norm = (max(row[name] for row in parity) for name in ("loss", "grad_norm"))
    assert f"more than {_short(loss)} and no gradient norm by more than {_short(norm)}" in " ".join(README.split())
    mom = json.loads((ROOT / "launch/results/parity_mom.json").read_text())["figures"]["deviations"]
    assert (
        f"[{_short(max(max(row['loss'], row['grad_norm']) for row in mom))}](launch/results/parity_mom.json)" in README
    )
    nccl = json.loads((ROOT / "launch/results/parity_nccl.json").read_text())["figures"]["deviations"]
    assert f"[{_short(max(row['grad_norm'] for row in nccl))}](launch/results/parity_nccl.json)" in README


def test_the_exchanges_figures_are_recorded() -> None:
    text = " ".join(README.split())
    took = {}
    for rate in ("10mbit", "30mbit", "100mbit", "1gbit"):
        figures = json.loads((ROOT / f"launch/results/exchange_{rate}.json").read_text())["figures"]
        assert figures["state_bytes"] == 2**20
        assert figures["nodes"] == [0, 0, 1, 1, 2, 2, 3, 3]
        took[rate] = {row["exchange"]: round(1000 * row["seconds"]) for row in figures["exchanges"]}
        assert f"(launch/results/exchange_{rate}.json)" in text
    slow, fast = took["100mbit"], took["1gbit"]
    assert f"takes {slow['two-level']} ms over links of 100 Mbit/s and the all-gather {slow['all-gather']} (" in text
    assert f"not the links: {fast['two-level']} and {fast['all-gather']} ms)" in text


def test_the_simulated_figures_are_recorded() -> None:
    figures, text = json.loads((ROOT / "launch/results/simulate.json").read_text())["figures"], " ".join(README.split())
    misses = {
        name: [abs(x["miss"]) for x in figures["cells"] if x["table"] == name]
        for name in ("advantage, %", "exchange, ms")
    }
    assert max(misses["advantage, %"]) <= 5
    assert max(misses["exchange, ms"]) <= 15
    (row,) = (x["values"] for x in figures["rows"] if x["table"] == "ms, All-Scan's links" and x["gpus"] == 256)
    assert (
        f"`two-level` takes {row['two-level']:.2f} ms at 256 GPUs where All-Scan takes {row['pipelined']:.1f}" in text
    )
    both, charged = list(figures["faster"].values())[:2]
    assert f": {both:.0f} times less, or {charged:.1f} times with every kernel" in text


def _kernels(name: str) -> Any:
    return json.loads((ROOT / f"launch/results/{name}.json").read_text())["figures"]


DELTA = ("kernels_delta_rule", "kernels_gated_delta_rule", "kernels_kda", "kernels_kda_long")


def test_the_kernels_figures_are_recorded() -> None:
    text = " ".join(README.split())
    recorded = [_kernels(name) for name in ("kernels", *DELTA)]
    times = [row for figures in recorded for row in figures["times"]]
    long = [row for row in times if row["shape"] == "B=1 T=131072 H=16 D=128"]
    assert [row["op"] for row in long] == list(OPS)
    for row in long:
        ours, peer = row["figures"]["lasp"], row["figures"]["fla"]
        assert (
            f"| `{row['op']}` "
            f"| {ours['forward']:.2f} ms, the peer {peer['forward']:.2f} ({row['floor_forward']:.2f}) "
            f"| {ours['both']:.2f} ms, the peer {peer['both']:.1f} ({row['floor_both']:.2f}) "
            f"| {ours['peak']:.1f} GiB, the peer {peer['peak']:.1f} |"
        ) in README
    faster = {
        (row["op"], row["shape"]): row["figures"]["fla"]["both"] / row["figures"]["lasp"]["both"] for row in times
    }
    few = [x for (op, shape), x in faster.items() if shape == "B=1 T=262144 H=4 D=128" and OPS[op].corrected]
    assert f"train {min(few):.1f} ([`kda`]" in text
    assert f"to {max(few):.1f} times as fast" in text
    slower = {where: x for where, x in faster.items() if x < 1}
    assert slower.keys() == {("gated_delta_rule", "B=8 T=4096 H=16 D=128")}
    assert f"at {next(iter(slower.values())):.2f} of its speed" in text
    # What is rounded to bfloat16 alone differs by less than a thousandth between two that round alike.
    for by in (by for figures in recorded for by in figures["errors"].values()):
        assert all(error <= 1.001 * by["fla"][name] for name, error in by["lasp"].items())
    weak = [by for name, by in recorded[0]["errors"].items() if name.endswith("weak")]
    assert f"at least {int(min(by['fla']['dg'] / by['lasp']['dg'] for by in weak))} times closer" in text
    rows = json.loads((ROOT / "launch/results/fused_layers.json").read_text())["figures"]
    both = {(row["layer"], row["form"]): row["both"] for row in rows}
    conv, norm = (both[layer, "fla"] / both[layer, "lasp"] for layer in ("conv", "norm by head"))
    assert f"{conv:.1f} and {norm:.1f} times as fast" in text
    seconds = json.loads((ROOT / "launch/results/cold_start.json").read_text())["figures"]["seconds"].values()
    assert f"takes {min(seconds):.0f} to {max(seconds):.0f} s" in text


def test_the_cost_of_sharing_is_recorded() -> None:
    text = " ".join(README.split())
    local: dict[str, Any] = {}
    for name in ("kernels", "sp_local_work_delta_rule", "sp_local_work_gated_delta_rule", "sp_local_work_kda"):
        # The first was written before there was a peer beside it.
        local |= {op: ratios.get("lasp", ratios) for op, ratios in _kernels(name)["sp_local_work"].items()}
    assert local.keys() == OPS.keys()
    both = [ratios["both"] for ratios in local.values()]
    assert max(both) <= 1.08
    assert f"computes {min(both):.2f} to {max(both):.2f} times" in text
    assert f"(forward alone up to {max(ratios['forward'] for ratios in local.values()):.2f}," in text
    gated, kda = (
        _kernels(f"sp_local_work_{op}")["sp_local_work"][op]["fla"]["both"] for op in ("gated_delta_rule", "kda")
    )
    assert f"takes {gated:.1f} times for `gated_delta_rule` and {kda:.1f} for `kda`" in text


def test_the_mixture_s_figures_are_recorded() -> None:
    figures, text = _kernels("mom"), " ".join(README.split())
    plain, ours, peer = (figures[who] for who in ("plain", "lasp", "fla"))
    assert f"at {ours['both'] / plain['both']:.1f} times a plain Gated DeltaNet layer's time" in text
    assert f"{peer['both'] / ours['both']:.1f} times as fast as flash-linear-attention's layer" in text
    assert f"in {ours['peak']:.1f} GiB for its {peer['peak']:.1f} (" in text


def test_what_a_mixture_recalls_is_recorded() -> None:
    text = " ".join(README.split())
    runs = {(row["mixer"], row["lr"], row["seed"]): row["accuracy"]["32"] for row in _kernels("recall")}
    rates, seeds = ({run[i] for run in runs} for i in (1, 2))
    best = {
        mixer: max(sum(runs[mixer, lr, seed] for seed in seeds) / len(seeds) for lr in rates)
        for mixer in ("mom", "gated_delta_net")
    }
    assert f"gives the value of {best['mom']:.1%} of the keys" in text
    assert f"one memory of the same size of {best['gated_delta_net']:.1%}, means over three seeds" in text
    ahead = [100 * (runs["mom", lr, seed] - runs["gated_delta_net", lr, seed]) for lr in rates for seed in seeds]
    assert len(ahead) == 6
    assert min(ahead) >= 0
    assert f"is the mixture behind, and up to {max(ahead):.1f} points ahead" in text
    shared: dict[str, list[float]] = {"mom": [], "gated_delta_net": []}
    for row in _kernels("recall_sp2"):
        shared[row["mixer"]].append(row["accuracy"]["32"])
    mixtures, single = (" and ".join(f"{share:.1%}" for share in runs) for runs in shared.values())
    assert f"two seeds give [{mixtures} beside {single}](launch/results/recall_sp2.json)" in text


def test_what_tokens_and_interruptions_cost_is_recorded() -> None:
    text = " ".join(README.split())
    more = {
        row["tokenizer"]: (row["peak"] - row["before"]) / 2**20 for row in _kernels("tokens") if row["size"] == 2**30
    }
    assert f"takes {more['bytes']:.0f} MiB of memory with bytes and {more['bpe']:.0f} MiB with" in text
    figures, same = _kernels("interrupt"), _kernels("interrupt_same")
    assert len(figures["kills"]) == len(same["kills"]) == 10
    writing = sum(kill["writing"] for kill in figures["kills"])
    count = {5: "five", 6: "six", 7: "seven"}[writing]
    assert f"{count} of them in the middle of a checkpoint" in text
    assert {(kill["way"]["sp_size"], kill["way"]["fsdp"]) for kill in figures["kills"]} >= {
        (1, True),
        (2, True),
        (4, False),
    }
    assert f"a run's losses stray by at most {_short(figures['loss'])} from" in text
    assert (same["loss"], same["grad_norm"]) == (0, 0)


def test_what_is_learnt_is_recorded() -> None:
    text = " ".join(README.split())
    short, long, gpu = (_kernels(name) for name in ("pretrain", "pretrain_long", "pretrain_gpu"))
    assert f"the loss falls from {short['first_loss']:.1f}" in text
    assert f"never saw to {short['unseen_bits_per_byte']:.2f} bits a byte" in text
    assert (short["steps"], long["steps"]) == (300, 1500)
    assert f"come to {long['unseen_bits_per_byte']:.2f} bits" in text
    bits = [run["unseen_bits_per_byte"] for run in gpu["runs"]]
    assert f"to {min(bits):.2f} to {max(bits):.2f}, of three seeds" in text
    assert len({run["seed"] for run in gpu["runs"]}) == 3
    twice = [run for run in gpu["runs"] if run["seed"] == 0]
    assert len(twice) == 2
    assert twice[0] == twice[1]


def test_what_memory_costs_is_recorded() -> None:
    one, two, same = (
        _kernels(name)["cases"] for name in ("training_memory", "training_memory_2", "training_memory_same")
    )
    table = README.split("| | a step | memory at most |")[1].split("\n\n")[0]
    told = [tuple(map(float, row)) for row in re.findall(r"\| (\d+) ms \| ([\d.]+) GiB \|", table)]
    assert told == [(round(case["step_ms"]), round(case["peak"], 1)) for case in (*one[:3], *two[:3])]
    assert len({(case["loss"], case["grad_norm"]) for case in same[:3]}) == 1
    assert len({(case["loss"], case["grad_norm"]) for case in two[:3]}) == 1
    slower = [a["step_ms"] / b["step_ms"] for a, b in zip(same, one, strict=True)]
    assert f"takes {slower[0]:.2f} times as long" in " ".join(README.split())
    saving = two[-1]["saving"]
    assert f"holds a run up for {saving['held']:.1f} s" in README
    assert saving["step_ms"] < 1.01 * two[-1]["step_ms"]


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def _short(x: float) -> str:
    return f"{x:.1e}".replace("e-0", "e-")
