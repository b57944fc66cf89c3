"""The laboratory of hosts, where this machine can have one: what crosses the links, and that nothing of it stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lasp.launch import netlab

WHY_NOT = netlab.problem()
needs_a_laboratory = pytest.mark.skipif(WHY_NOT is not None, reason=f"no laboratory here: {WHY_NOT}")
ROOT = Path(__file__).parents[2]


def command(hosts: int, rate: str, *arguments: str) -> list[str]:
    lab = ["-m", "lasp.launch.netlab", "--hosts", str(hosts), "--ranks", "1", "--rates", rate]
    return [sys.executable, *lab, "--", "-m", "lasp.launch.bench_exchange", *arguments]


def left(process: int) -> list[str]:
    """The namespaces and interfaces of a laboratory."""
    places = [place for place in ("/run/netns", "/sys/class/net") if os.path.isdir(place)]
    return [name for place in places for name in os.listdir(place) if f"lasp{process}" in name.replace("-", "")]


@needs_a_laboratory
def test_bytes_off_the_interfaces(tmp_path: Path) -> None:
    result = tmp_path / "exchange_{rate}.json"
    arguments = ("--interface", "eth0", "--calls", "3", "--result", str(result))
    run = subprocess.run(
        command(2, "1gbit", *arguments), capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "2 hosts of 1 ranks, links of 1gbit" in run.stdout
    recorded = json.loads((tmp_path / "exchange_1gbit.json").read_text())
    assert recorded["command"].startswith("python -m lasp.launch.netlab --hosts 2 --ranks 1 --rates 1gbit -- -m lasp")
    rows = {row["exchange"]: row for row in recorded["figures"]["exchanges"]}
    for row in rows.values():
        assert row["counted"] == pytest.approx(row["between"], rel=0.05), row
    assert rows["all-gather"]["between"] == pytest.approx(2 * 2**20, rel=0.001)
    assert rows["ring"]["between"] == 2**20
    assert recorded["figures"]["links"]["between"]["bandwidth"] < 1.4e8


@needs_a_laboratory
@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGINT])
def test_nothing_stays(tmp_path: Path, told: signal.Signals) -> None:
    arguments = ("--calls", "100000", "--result", str(tmp_path / "never.json"))
    # Where the tests run in the background an interrupt is ignored, and children would ignore it too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    lab = subprocess.Popen(
        command(2, "1gbit", *arguments), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    signal.signal(signal.SIGINT, before)
    until = time.monotonic() + 60
    while len(left(lab.pid)) < 5 and time.monotonic() < until:
        time.sleep(0.1)
    assert len(left(lab.pid)) >= 5, "two namespaces, two ports and a bridge"
    time.sleep(3)
    lab.send_signal(told)
    assert lab.wait(timeout=60) != 0
    assert left(lab.pid) == []


@needs_a_laboratory
def test_what_a_killed_laboratory_left_is_taken_away() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    subprocess.run(["ip", "netns", "add", f"lasp-{gone.pid}-0"], check=True)
    subprocess.run(["ip", "link", "add", f"lasp{gone.pid}", "type", "bridge"], check=True)
    assert len(left(gone.pid)) == 2
    with netlab.laboratory(1, "1gbit"):
        assert left(gone.pid) == []
    assert left(os.getpid()) == []


def test_without_root_or_tools_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netlab.shutil, "which", lambda tool: None if tool == "tc" else f"/bin/{tool}")
    assert netlab.problem() == "tc not found: install the packages iproute2 and util-linux"
    monkeypatch.setattr(netlab.shutil, "which", lambda tool: f"/bin/{tool}")
    monkeypatch.setattr(netlab.os, "geteuid", lambda: 1000)
    assert "need root" in (netlab.problem() or "")


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--rates", "fast", "--"], "--rates fast: expected"), ([], "what to run after --")]
)
def test_bad_options(monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    monkeypatch.setattr(sys, "argv", ["netlab", *arguments])
    with pytest.raises(SystemExit, match=message):
        netlab.main()
