"""A laboratory of several hosts on one machine: network namespaces joined by a bridge, each link at a given rate.

``python -m lasp.launch.netlab --hosts 4 --ranks 2 --rate 1gbit -- -m lasp.launch.bench_exchange --interface eth0`` starts
torchrun on every host, with gloo over the links, and says how many bytes crossed each. It needs root, and ip and tc, which
the package iproute2 has. Rates are limited with tc's token bucket; latency is the kernel's own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from tempfile import TemporaryFile

INTERFACE = "eth0"


@dataclass(frozen=True)
class Options:
    """The hosts and their links."""

    #: How many hosts.
    hosts: int = 4
    #: Ranks a host.
    ranks: int = 2
    #: Of each host's link, each way, as tc takes it.
    rate: str = "1gbit"


def problem() -> str | None:
    """Why there can be no laboratory here, if so."""
    missing = [tool for tool in ("ip", "tc", "unshare") if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not found: install the packages iproute2 and util-linux"
    if os.geteuid() != 0:
        return "network namespaces need root: run it as root, or in a container that is privileged"
    tried = subprocess.run(["ip", "netns", "add", "lasp-try"], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"this kernel makes no network namespaces here ({tried.stderr.strip()}): run it where it may"
    _do("ip netns del lasp-try")
    return None


@contextmanager
def laboratory(options: Options) -> Iterator[list[str]]:
    """The hosts' namespaces. Their addresses are 10.77.0.1, .2, and so on."""
    with ExitStack() as undo:
        _do("ip link add lasp-bridge type bridge")
        undo.callback(_do, "ip link del lasp-bridge")
        _do("ip link set lasp-bridge up")
        # Bursts of a few milliseconds: a finer clock the kernel does not keep.
        bucket = f"tbf rate {options.rate} burst {max(2**17, _bytes_a_second(options.rate) // 250)} latency 200ms"
        hosts = []
        for i in range(options.hosts):
            host, outside = f"lasp-{i}", f"lasp-port-{i}"
            _do(f"ip netns add {host}")
            undo.callback(_do, f"ip netns del {host}")
            _do(f"ip link add {outside} type veth peer name {INTERFACE} netns {host}")
            _do(f"ip link set {outside} master lasp-bridge up")
            _do(f"ip -n {host} addr add 10.77.0.{i + 1}/24 dev {INTERFACE}")
            _do(f"ip -n {host} link set {INTERFACE} up")
            _do(f"ip -n {host} link set lo up")
            _do(f"tc -n {host} qdisc add dev {INTERFACE} root {bucket}")
            _do(f"tc qdisc add dev {outside} root {bucket}")
            hosts.append(host)
        yield hosts


def launch(hosts: list[str], ranks: int, arguments: list[str]) -> int:
    """Run torchrun on all hosts; what the first says is seen, what others say if they fail. Returns the worst exit status."""
    environment = os.environ | {"GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1"}
    running = []
    for i, host in enumerate(hosts):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(hosts)), "--node-rank", str(i)]
        torchrun += ["--nproc-per-node", str(ranks), "--master-addr", "10.77.0.1", "--master-port", "29511", *arguments]
        # Ranks know their node by its name.
        named = ["ip", "netns", "exec", host, "unshare", "--uts", "sh", "-c", f'hostname {host}; exec "$@"', "sh"]
        output = TemporaryFile("w+") if i else None  # noqa: SIM115 (open until the hosts are done)
        running.append((subprocess.Popen(named + torchrun, env=environment, stdout=output, stderr=output), output))
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


def _do(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stderr.strip()}")


def _bytes_a_second(rate: str) -> int:
    for unit, factor in (("gbit", 10**9), ("mbit", 10**6), ("kbit", 10**3)):
        if rate.endswith(unit):
            return int(float(rate.removesuffix(unit)) * factor / 8)
    raise ValueError(f"--rate {rate}: expected a number of gbit, mbit or kbit")


def main() -> None:
    import tyro

    if "--" not in sys.argv:
        sys.exit(
            "say what to run after --, as torchrun takes it: ... -- -m lasp.launch.bench_exchange --interface eth0"
        )
    cut = sys.argv.index("--")
    options = tyro.cli(Options, args=sys.argv[1:cut], description=__doc__)
    why_not = problem()
    if why_not is not None:
        sys.exit(f"no laboratory here: {why_not}")
    with laboratory(options) as hosts:
        status = launch(hosts, options.ranks, sys.argv[cut + 1 :])
        print("crossed the links: " + ", ".join(f"{host} {sent_bytes(host) / 2**20:.1f} MiB" for host in hosts))
    sys.exit(status)


if __name__ == "__main__":
    main()
