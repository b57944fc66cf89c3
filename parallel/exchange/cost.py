"""What an exchange takes, by the usual model: each step costs a latency and its bytes over the bandwidth, each kernel too.

`lasp.launch.calibrate` measures the two for the machine at hand; the environment variable ``LASP_LINKS`` names its JSON.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lasp.parallel.topology import Topology

#: From one rank to another, in bytes.
Transfer = tuple[int, int, int]
#: What goes on at once.
Step = Sequence[Transfer]


@dataclass(frozen=True)
class Link:
    """What takes a time however little it moves, and a time for each byte: a way between two ranks, or a kernel.

    Attributes:
        latency: seconds a step.
        bandwidth: bytes a second; of a way between ranks each way.
    """

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Links:
    """The ways of a cluster.

    Attributes:
        inside: between two ranks of a node.
        between: between ranks of two nodes, through one network card.
        cards: network cards a node; 0 for one a rank.
        kernel: composes a state with what was received; bytes of states.
    """

    inside: Link = Link(8e-6, 150e9)
    between: Link = Link(12e-6, 45e9)
    cards: int = 0
    kernel: Link = Link(20e-6, 1e12)

    @classmethod
    def read(cls, path: Path) -> Links:
        """What `write` wrote.

        Raises:
            ValueError: where the file is not such a one.
        """
        try:
            found = json.loads(path.read_text())
            found = found.get("figures", found)
            inside, between, kernel = (Link(**found[name]) for name in ("inside", "between", "kernel"))
            return cls(inside, between, found["cards"], kernel)
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} does not say what links take ({error!r}): make it by lasp.launch.calibrate"
            ) from error

    def as_dict(self) -> dict[str, object]:
        """For a JSON file that `read` takes."""
        return asdict(self)

    def seconds(self, steps: Iterable[Step], topology: Topology, sharers: int = 1) -> float:
        """How long steps take that follow one another.

        Args:
            steps: what travels in each.
            topology: the ranks' nodes.
            sharers: so many ranks of each node do the like at once, and share its cards.
        """
        return sum(self._step(step, topology, sharers) for step in steps)

    def explain(self) -> str:
        """Its figures, for people."""
        ways = [("inside nodes", self.inside), ("between nodes", self.between), ("a kernel", self.kernel)]
        told = ", ".join(f"{name} {1e6 * x.latency:.3g} µs + {x.bandwidth / 1e9:.4g} GB/s" for name, x in ways)
        known = "the defaults" if self == Links() else "measured"
        return f"by {known}: {told}, {self.cards or 'as many'} network cards a node{'' if self.cards else ' as ranks'}"

    def composing(self, times: int, size: int) -> float:
        """How long a rank composes states of `size` bytes in all, so often."""
        return times * self.kernel.latency + size / self.kernel.bandwidth

    def _step(self, step: Step, topology: Topology, sharers: int) -> float:
        inside: Counter[tuple[str, int]] = Counter()
        between: Counter[tuple[str, int]] = Counter()
        outside: Counter[tuple[str, int]] = Counter()
        for source, target, size in step:
            here, there = topology.nodes[source], topology.nodes[target]
            if here == there:
                inside["out", source] += size
                inside["in", target] += size
            else:
                between["out", source] += size
                between["in", target] += size
                outside["out", here] += size
                outside["in", there] += size
        took = 0.0
        if inside:
            took = self.inside.latency + max(inside.values()) / self.inside.bandwidth
        if between:
            cards = self.cards or max(topology.nodes.count(node) for node in set(topology.nodes)) * sharers
            # A rank has a card to itself, as far as there are as many; a node has all of its own.
            longest = max(max(between.values()), max(outside.values()) * sharers / cards)
            took = max(took, self.between.latency + longest / self.between.bandwidth)
        return took


_in_use: list[Links] = []


def links() -> Links:
    """Those of the machine at hand, if they were measured: what `use_links` was given, or what ``LASP_LINKS`` names."""
    if not _in_use:
        path = os.environ.get("LASP_LINKS")
        _in_use.append(Links.read(Path(path)) if path else Links())
    return _in_use[0]


def use_links(found: Links) -> None:
    """Go by these from now on. All ranks must be given the same."""
    _in_use[:] = [found]
