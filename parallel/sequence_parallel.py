"""What an op needs to know to work on a sequence that several ranks share."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lasp.parallel.agreement import Agreement
from lasp.parallel.exchange import EXCHANGES, Exchange, build_exchange
from lasp.parallel.exposure import exposed
from lasp.parallel.layout import SequenceLayout
from lasp.parallel.topology import Topology


@dataclass(frozen=True)
class Method:
    """A published method of sequence parallelism, whole: what its linear and its softmax layers do.

    Attributes:
        exchange: how the linear layers' states travel.
        softmax: how softmax layers are shared, of `SOFTMAX`.
        linear: how linear layers are shared: ``"states"``, ``"ulysses"`` (heads) or ``"ring"`` (keys and values travel).
    """

    exchange: str
    softmax: str
    linear: str = "states"


#: The methods by name, as ``--sp`` takes them.
METHODS = {
    "lasp2": Method(exchange="auto", softmax="all-gather"),
    "lasp1": Method(exchange="ring", softmax="ring"),
    "zeco": Method(exchange="pipelined", softmax="all-gather"),
    "ulysses": Method(exchange="auto", softmax="ulysses", linear="ulysses"),
    "ring": Method(exchange="auto", softmax="ring", linear="ring"),
}

#: How softmax layers share keys and values, as ``--softmax-sp`` takes it.
SOFTMAX = ("all-gather", "ring", "ulysses")


#: The first of each name that is alive, and those that shall outlive their last user.
_alive: WeakValueDictionary[str, SequenceParallel] = WeakValueDictionary()
_kept: dict[str, SequenceParallel] = {}


class SequenceParallel:
    """A group of ranks that share sequences, the layout by which they do, and the method.

    Args:
        group: the ranks: a process group or a `DeviceMesh` of one axis. None for a single rank.
        layout: who holds which tokens. Its world size is the group's.
        method: ``"lasp2"``: one all-gather of the states for linear layers, all-gather attention for softmax layers
            (LASP-2H), https://arxiv.org/abs/2502.07563. ``"lasp1"``: both go round a ring, https://arxiv.org/abs/2404.02882
            and https://arxiv.org/abs/2310.01889. ``"zeco"``: states in a pipeline of blocks, https://arxiv.org/abs/2507.01004.
            ``"ulysses"``: all-to-alls give each rank all tokens of some heads, https://arxiv.org/abs/2309.14509.
            ``"ring"``: keys and values go round for linear layers too, which then cost T² (the baseline of LASP-2's paper).
        exchange: how the linear layers' states travel: ``"auto"`` (the method's own; of lasp2 what the cost model holds for the
            fastest, on one node the all-gather), or one of `EXCHANGES`. Of ulysses and ring none does.
        softmax: how the softmax layers' keys and values travel: ``"auto"`` (the method's own), ``"all-gather"``, ``"ring"`` or
            ``"ulysses"``.
        nodes: the node of each rank, by which the exchange ``"two-level"`` goes; by the ranks' host names when None.
        check: whether ops settle among the ranks that their inputs agree before they communicate, so that a mistake is one
            clear error everywhere and no hang. On CPU groups every call does, elsewhere the first call of each kind.

    Raises:
        ValueError: on every rank, where an argument is unknown, the layout is for another number of ranks, or ranks were
            given different layouts.

    The loss is understood as the sum of the ranks' losses. So the gradient of an input that all ranks hold alike (a
    convolution's weight, a constant decay, an initial state) is this rank's share of it, to be summed over the group like
    any parameter's, and the gradients that the ranks give to a final state, which all ranks receive, are summed.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | DeviceMesh | None,
        layout: SequenceLayout,
        method: str = "lasp2",
        exchange: str = "auto",
        softmax: str = "auto",
        check: bool = True,
        nodes: Sequence[int] | None = None,
    ):
        self.group = group.get_group() if isinstance(group, DeviceMesh) else group
        self.layout = layout
        self.world_size = 1 if self.group is None else dist.get_world_size(self.group)
        self.rank = 0 if self.group is None else dist.get_rank(self.group)
        self._agreement: Agreement | None = None
        self._settled: set[Hashable] = set()
        self._settle_always = False
        self._fake = self.group is not None and dist.get_backend(self.group) == "fake"
        if check and self.group is not None and self.world_size > 1 and not self._fake:
            self._agreement = Agreement(self.group)
            self._settle_always = "nccl" not in dist.get_backend(self.group)

        problem = None
        if layout.world_size != self.world_size:
            problem = f"the layout is for {layout.world_size} ranks, the group has {self.world_size}"
        for option, value, known in (
            ("method", method, METHODS),
            ("exchange", exchange, ("auto", *EXCHANGES)),
            ("softmax", softmax, ("auto", *SOFTMAX)),
        ):
            if value not in known:
                problem = f"unknown {option}={value!r}: expected one of {', '.join(known)}"
        if problem is None and exchange != "auto" and METHODS[method].linear != "states":
            problem = f"exchange={exchange!r}: the method {method} sends no states; leave it at 'auto', or choose lasp2"
        content = hashlib.sha1(repr((layout.runs, layout.cu_seqlens)).encode()).hexdigest()
        digest = content[:8]
        self.settle(
            f"SequenceParallel(method={method}, exchange={exchange}, softmax={softmax}) with a layout of "
            f"{layout.total_tokens} tokens in {layout.num_documents} documents over {layout.world_size} ranks (#{digest})",
            problem,
        )
        self.method = method
        self.softmax = METHODS[method].softmax if softmax == "auto" else softmax
        #: How linear layers are shared; a single rank shares nothing.
        self.linear = "states" if self.world_size == 1 else METHODS[method].linear
        travels = METHODS[method].exchange if exchange == "auto" else exchange
        topology = Topology.of(self.group, (0,) * self.world_size if self._fake else nodes)
        self.exchange: Exchange = build_exchange(travels, self.group, topology)
        #: How many tokens this rank holds, and how many documents there are.
        self.local_tokens, self.num_documents = layout.local_tokens(self.rank), layout.num_documents
        #: Two of one name are of the same ranks, layout and method, so that either can stand for the other.
        self.name = "/".join(
            [
                "alone" if self.group is None else f"group {self.group.group_name}",
                f"rank {self.rank} of {self.world_size}",
                travels,
                str(topology.nodes),
                self.softmax,
                self.linear,
                content,
            ]
        )
        self._namesake = self._register()
        self._whole: SequenceParallel | None = None
        if self.world_size > 1 and "ulysses" in (self.linear, self.softmax):
            total, documents = layout.total_tokens, layout.cu_seqlens
            self._whole = layout.cached(
                "whole", lambda: SequenceParallel.single(SequenceLayout.contiguous(total, 1, documents))
            )

    @property
    def whole(self) -> SequenceParallel:
        """The same sequence on one rank that holds all of it: what is computed after heads were dealt out."""
        assert self._whole is not None, "only ulysses deals heads out"
        return self._whole

    @classmethod
    def single(cls, layout: SequenceLayout) -> SequenceParallel:
        """One rank that holds the whole sequence: what an op without ``sp=`` runs on."""
        return layout.cached("single", lambda: cls(None, layout))

    def _register(self) -> SequenceParallel | None:
        """Be found by name; or return the one that is found instead, to be kept alive."""
        first = _alive.get(self.name)
        if first is not None and first.group is self.group:
            return first
        # A group that was destroyed may have left its name to this one.
        _alive[self.name] = self
        if self.name in _kept:
            _kept[self.name] = self
        return None

    @staticmethod
    def named(name: str, keep: bool = False) -> SequenceParallel:
        """The ranks of that name; with `keep` they stay, though nothing else should hold them."""
        found = _kept.get(name)
        if found is None:
            found = _alive[name]
            if keep:
                _kept[name] = found
        return found

    def settle(self, statement: str, problem: str | None = None) -> None:
        """Raise on all ranks unless all are about to do what `statement` says and none has a `problem`.

        Raises:
            ValueError: naming the problem and its rank, or what the ranks disagree on.
        """
        agreement = self._agreement
        if agreement is not None and (self._settle_always or problem or statement not in self._settled):
            # Whoever comes late is waited for here, on the host, and not in what follows.
            exposed(lambda: agreement.settle(statement, problem), torch.device("cpu"))
        elif problem is not None:
            raise ValueError(problem)
        self._settled.add(statement)

    def knows(self, call: Hashable) -> bool:
        """Whether a call was learnt before, and the ranks need not settle on it again."""
        return call in self._settled and not self._settle_always

    def learn(self, call: Hashable) -> None:
        """Remember a call that was looked at and settled."""
        self._settled.add(call)

    @property
    def agrees(self) -> bool:
        """Whether there are others to settle with."""
        return self._agreement is not None

    def explain(self) -> str:
        """Why the linear layers' states travel as they do, for people. Auto chooses in the first layer, by their size."""
        if self.world_size == 1:
            return "one rank holds the whole sequence: nothing travels"
        return self.exchange.explain() if self.linear == "states" else f"method {self.method}: no states travel"

    def __repr__(self) -> str:
        return (
            f"SequenceParallel(rank {self.rank} of {self.world_size}, {self.method}, {self.local_tokens} tokens here)"
        )
