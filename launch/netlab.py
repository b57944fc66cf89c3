"""A laboratory of several hosts on one machine: network namespaces joined by a bridge, each link at a given rate.

``python -m lasp.launch.netlab --hosts 4 --ranks 2 --rates 100mbit 1gbit -- -m lasp.launch.bench_exchange --interface eth0
--result exchange_{rate}.json`` starts torchrun on every host, with gloo over the links, and says how many bytes crossed each.
It needs root, and ip and tc, which the package iproute2 has. Rates are limited with tc's token bucket, latency is added with
its netem, where the kernel has that.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from tempfile import TemporaryFile

from lasp.launch.record import LAUNCHER

INTERFACE = "eth0"


@dataclass(frozen=True)
class Options:
    """The hosts and their links."""

    #: How many hosts.
    hosts: int = 4
    #: Ranks a host.
    ranks: int = 2
    #: Of each host's link, each way, as tc takes it: one laboratory after the other.
    rates: tuple[str, ...] = ("1gbit",)
    #: Added to each link, each way, as tc takes it: 1ms, 50us. Nothing when empty.
    delay: str = ""


def problem() -> str | None:
    """Why there can be no laboratory here, if so."""
    missing = [tool for tool in ("ip", "tc", "unshare") if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not found: install the packages iproute2 and util-linux"
    if os.geteuid() != 0:
        return "network namespaces need root: run it as root, or in a container that is privileged"
    try:
        with laboratory(1, "1gbit") as (host,):
            _do(f"ip netns exec {host} unshare --uts hostname {host}")
    except RuntimeError as error:
        return f"this kernel makes no hosts here ({error}): run it where it may"
    return None


@contextmanager
def laboratory(hosts: int, rate: str, delay: str = "") -> Iterator[list[str]]:
    """The hosts' namespaces, for as long as the block runs. Their addresses are 10.77.0.1, .2, and so on.

    Everything is named after this process, so that laboratories do not meet; what one that was killed has left is taken away.
    """
    _take_away_what_is_left()
    with ExitStack() as undo:
        bridge = f"lasp{os.getpid()}"
        _make(undo, f"ip link add {bridge} type bridge", f"ip link del {bridge}")
        _do(f"ip link set {bridge} up")
        # A burst of two of the largest packets that the kernel hands over: less of them would be lost.
        bucket = f"tbf rate {rate} burst {2**17} latency 200ms"
        names = []
        for i in range(hosts):
            host, outside = f"lasp-{os.getpid()}-{i}", f"lasp{os.getpid()}p{i}"
            _make(undo, f"ip netns add {host}", f"ip netns del {host}")
            _make(undo, f"ip link add {outside} type veth peer name {INTERFACE} netns {host}", f"ip link del {outside}")
            _do(f"ip link set {outside} master {bridge} up")
            _do(f"ip -n {host} addr add 10.77.0.{i + 1}/24 dev {INTERFACE}")
            _do(f"ip -n {host} link set {INTERFACE} up")
            _do(f"ip -n {host} link set lo up")
            for link in (f"tc -n {host} qdisc add dev {INTERFACE}", f"tc qdisc add dev {outside}"):
                _do(f"{link} root handle 1: {bucket}")
                if delay:
                    _do(f"{link} parent 1:1 netem delay {delay}")
            names.append(host)
        yield names


def launch(hosts: list[str], options: Options, rate: str, arguments: list[str]) -> int:
    """Run torchrun on all hosts; what the first says is seen, what others say if they fail. Returns the worst exit status."""
    with ExitStack() as undo:
        return _launch(hosts, options, rate, arguments, undo)


def _launch(hosts: list[str], options: Options, rate: str, arguments: list[str], undo: ExitStack) -> int:
    delay = f" --delay {options.delay}" if options.delay else ""
    launcher = f"python -m lasp.launch.netlab --hosts {options.hosts} --ranks {options.ranks} --rates {rate}{delay} --"
    environment = os.environ | {"GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1", LAUNCHER: launcher}
    running = []
    for i, host in enumerate(hosts):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(hosts)), "--node-rank", str(i)]
        torchrun += [
            "--nproc-per-node",
            str(options.ranks),
            "--master-addr",
            "10.77.0.1",
            "--master-port",
            "29511",
            *arguments,
        ]
        # Ranks know their node by its name.
        named = ["ip", "netns", "exec", host, "unshare", "--uts", "sh", "-c", f'hostname {host}; exec "$@"', "sh"]
        output = undo.enter_context(TemporaryFile("w+")) if i else None  # noqa: SIM115 (it is entered)
        process = subprocess.Popen(named + torchrun, env=environment, stdout=output, stderr=output)
        # Where this process is told to end, its hosts end first: a namespace lives as long as anything in it.
        undo.callback(process.wait)
        undo.callback(process.terminate)
        running.append((process, output))
    worst = 0
    for i, (process, output) in enumerate(running):
        status = process.wait()
        worst = max(worst, abs(status))
        if status and output is not None:
            output.seek(0)
            print(f"---- host {i} ----\n{output.read()}", file=sys.stderr)
    return worst


def sent_bytes(host: str) -> int:
    """What a host has sent over its link."""
    path = f"/sys/class/net/{INTERFACE}/statistics/tx_bytes"
    return int(subprocess.run(["ip", "netns", "exec", host, "cat", path], capture_output=True, check=True).stdout)


def _take_away_what_is_left() -> None:
    names = [name for place in ("/run/netns", "/sys/class/net") if os.path.isdir(place) for name in os.listdir(place)]
    for name in names:
        found = re.fullmatch(r"lasp-(\d+)-\w+|lasp(\d+)", name)
        if found is not None and not os.path.exists(f"/proc/{found[1] or found[2]}"):
            _do(f"ip netns del {name}" if found[1] else f"ip link del {name}")


def _make(undo: ExitStack, command: str, undoing: str) -> None:
    _do(command)
    undo.callback(_do, undoing)


def _do(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    if done.returncode and "netem" in command and "kind is unknown" in done.stderr:
        raise RuntimeError("this kernel has no netem to add latency with: leave --delay out")
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stderr.strip()}")


def main() -> None:
    import tyro

    if "--" not in sys.argv:
        sys.exit(
            "say what to run after --, as torchrun takes it: ... -- -m lasp.launch.bench_exchange --interface eth0"
        )
    cut = sys.argv.index("--")
    options = tyro.cli(Options, args=sys.argv[1:cut], description=__doc__)
    for rate in options.rates:
        if not re.fullmatch(r"\d+(\.\d+)?[gmk]bit", rate):
            sys.exit(f"--rates {rate}: expected a number of gbit, mbit or kbit")
    why_not = problem()
    if why_not is not None:
        sys.exit(f"no laboratory here: {why_not}")
    for told in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(told, lambda *_: sys.exit("told to end: the hosts were taken down"))
    try:
        sys.exit(_run(options, sys.argv[cut + 1 :]))
    except RuntimeError as error:
        sys.exit(f"no laboratory here: {error}")


def _run(options: Options, arguments: list[str]) -> int:
    """In one laboratory after the other; the worst exit status."""
    worst = 0
    for rate in options.rates:
        print(f"{options.hosts} hosts of {options.ranks} ranks, links of {rate}", flush=True)
        with laboratory(options.hosts, rate, options.delay) as hosts:
            worst = max(worst, launch(hosts, options, rate, [x.replace("{rate}", rate) for x in arguments]))
            print("crossed the links: " + ", ".join(f"{host} {sent_bytes(host) / 2**20:.1f} MiB" for host in hosts))
    return worst


if __name__ == "__main__":
    main()
