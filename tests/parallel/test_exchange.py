"""Every exchange against the maps applied one after the other: families × layouts × nodes × 1, 2, 3, 4 and 8 ranks."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from lasp import SequenceLayout, SequenceParallel
from lasp.kernels import ChunkedDecay, Summary
from lasp.ops import gla, linear_attn
from lasp.parallel.exchange import (
    EXCHANGES,
    FLAT,
    Exchange,
    Pipelined,
    Ring,
    Route,
    Scan,
    TwoLevel,
    build_exchange,
)
from lasp.parallel.exchange.base import Size
from lasp.parallel.exchange.cost import Link, Links
from lasp.parallel.exchange.lane import Peers
from lasp.parallel.topology import Topology
from tests.kernels.test_summary import FAMILIES
from tests.parallel.test_linear import run
from tests.support import DOCUMENTS, LAYOUTS, TOKENS, Inputs, assert_close, poisoned_memory, relative_error

B, H, K, V = 2, 3, 4, 5
Groups = dict[int, dist.ProcessGroup]
#: The nodes of the ranks, by their number: in order, by turns, and each on its own.
NODES = {
    1: [(0,)],
    2: [(0, 0), (0, 1)],
    3: [(0, 0, 0), (0, 1, 2)],
    4: [(0, 0, 0, 0), (0, 0, 1, 1), (0, 1, 1, 0), (0, 1, 2, 3)],
    8: [(0, 0, 0, 0, 1, 1, 1, 1), (0, 0, 1, 1, 2, 2, 3, 3), (0, 1, 0, 1, 0, 1, 0, 1)],
}


class InBlocks(Pipelined):
    """As many blocks as there are columns, but for the first, which has two."""

    def blocks(self, route: Route, size: Size) -> int:
        return max(1, size.columns - 1)


def two_level(group: dist.ProcessGroup | None, nodes: tuple[int, ...], outer: type[Exchange]) -> TwoLevel:
    return TwoLevel(group, Topology(nodes), lambda topology, sharers: outer(None, topology, sharers))


def exchanges(group: dist.ProcessGroup | None, world: int) -> Iterator[tuple[str, Exchange]]:
    for name in ("auto", *FLAT):
        yield name, build_exchange(name, group, Topology((0,) * world))
    yield "blocks", InBlocks(group, Topology((0,) * world))
    for nodes in NODES[world]:
        yield f"auto, {nodes}", build_exchange("auto", group, Topology(nodes))
        for outer in (*FLAT.values(), InBlocks):
            yield f"two-level over {outer.name}, {nodes}", two_level(group, nodes, outer)


def table(world: int) -> SequenceLayout:
    """One rank has most runs, one has none, and they are out of order."""
    if world < 3:
        return LAYOUTS["table"](TOKENS, world, None)
    ranges: list[list[tuple[int, int]]] = [[] for _ in range(world)]
    for i, start in enumerate(range(0, TOKENS, 4)):
        ranges[0 if i % 3 == 0 else 2 + i * 5 % (world - 2)].append((start, min(start + 4, TOKENS)))
    return SequenceLayout.from_ranges(ranges, TOKENS)


def layouts(world: int) -> Iterator[tuple[str, SequenceLayout]]:
    for name in ("contiguous", "zigzag"):
        yield name, LAYOUTS[name](TOKENS, world, None)
    yield "zigzag per document", SequenceLayout.zigzag_per_document(TOKENS, world, DOCUMENTS["packed"])
    yield "table", table(world)


def maps(family: str, count: int) -> Summary:
    x = Inputs(3, torch.float64)
    shape = {"identity": (1, count, 1), "scalar": (B, count, H), "diagonal": (B, count, H, K)}.get(family)
    A = x.normal(B, count, H, K, K) * 0.5 if shape is None else x.uniform(*shape)
    if family == "identity":
        A = torch.ones_like(A)
    elif count > 2:
        # A document starts in it.
        A[:, 2] = 0
    return Summary(A, x.normal(B, count, H, K, V))


def check(world: int, group: dist.ProcessGroup | None, rank: int) -> None:
    """All exchanges, in both directions, on this rank."""
    built = list(exchanges(group, world))
    for layout_name, layout in layouts(world):
        for route in (Route.forward(layout, rank), Route.backward(layout, rank)):
            if len(route.order) < 2:
                continue
            for family in FAMILIES:
                whole = maps(family, len(route.order))
                want: dict[tuple[int, int], Tensor] = {}
                state = torch.zeros(B, 1, H, K, V, dtype=torch.float64)
                for position, key in enumerate(route.order):
                    want[key] = state
                    state = whole.select(torch.tensor([position])).apply(state)
                mine = torch.tensor([route.order.index((rank, i)) for i in range(route.runs_per_rank[rank])]).long()
                for name, exchange in built:
                    with poisoned_memory():
                        given = exchange.start(whole.select(mine), route).wait()
                    for i in range(len(mine)):
                        error = relative_error(given[:, i : i + 1], want[rank, i])
                        assert error < 1e-12, f"{name}, {family}, {layout_name}, run {i}: {error}"


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_exchange_moves_the_same_states(groups: Groups, ranks: int) -> None:
    check(ranks, groups[ranks], dist.get_rank(groups[ranks]))


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("name", [name for name in EXCHANGES if name != "all-gather"])
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_layers_are_the_same_over_any_exchange(groups: Groups, name: str, documents: str) -> None:
    for world in (2, 4):
        for layout in LAYOUTS.values():
            sp = SequenceParallel(
                groups[world], layout(TOKENS, world, DOCUMENTS[documents]), exchange=name, nodes=NODES[world][1]
            )
            for op in ("linear_attn", "simple_gla", "gla"):
                assert_close(*run(op, sp, documents, torch.float64, initial=True, causal=True), 1e-10)


# -- what travels ----------------------------------------------------------------------------------------------------


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What this rank puts on its way to others: a step each, in bytes."""
    steps: list[int] = []
    transfer = Peers.transfer

    def spy(peers, out, into):
        steps.append(sum(x.nbytes for _, x in out))
        transfer(peers, out, into)

    monkeypatch.setattr(Peers, "transfer", spy)
    return steps


def traffic(group: dist.ProcessGroup, sent: list[int], exchange: Exchange) -> list[int]:
    """One exchange of one run a rank: 8 heads of 16 × 16 in float32, a decay each."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    route = Route.forward(SequenceLayout.contiguous(64, world), rank)
    sent.clear()
    exchange.start(Summary(torch.ones(1, 1, 8), torch.ones(1, 1, 8, 16, 16)), route).wait()
    return list(sent)


@pytest.mark.mpi(min_size=4)
def test_bytes_are_those_of_the_design(groups: Groups, sent: list[int]) -> None:
    group, state, decays = groups[4], 4 * 8 * 16 * 16, 4 * 8
    rank, alone = dist.get_rank(group), Topology((0,) * 4)
    # The state goes on once, from all but the last.
    assert traffic(group, sent, Ring(group, alone)) == [state if step == rank else 0 for step in range(3)]
    # In four blocks, W − 2 + K steps.
    blocks = type("InFour", (Pipelined,), {"blocks": lambda *_: 4})(group, alone)
    assert traffic(group, sent, blocks) == [state // 4 if rank < 3 and 0 <= s - rank < 4 else 0 for s in range(6)]
    # By doubling, log2 W steps of a summary.
    summary = state + decays
    assert traffic(group, sent, FLAT["scan"](group, alone)) == [summary if rank + reach < 4 else 0 for reach in (1, 2)]
    # Two nodes of two: half a summary to the other, a half between the nodes, half a state back.
    two = two_level(group, (0, 0, 1, 1), Scan)
    assert traffic(group, sent, two) == [
        summary // 2,
        summary // 2 if rank < 2 else 0,
        state // 2,
    ]


@pytest.mark.parametrize(("ranks", "state"), [(2, 2**20), (8, 2**20), (64, 2**20), (64, 2**30)])
@pytest.mark.parametrize("sharers", [1, 4])
def test_the_blocks_of_a_pipeline(ranks: int, state: int, sharers: int) -> None:
    """As many as take least by the model, and no more than there are columns."""
    route, size = Route.forward(SequenceLayout.contiguous(ranks, ranks), 0), Size(state, 0, 16, 128)

    class Fixed(Pipelined):
        count = 1

        def blocks(self, route: Route, size: Size) -> int:
            return self.count

    nodes = Topology(tuple(range(ranks)))
    chosen, fixed = Pipelined(None, nodes, sharers), Fixed(None, nodes, sharers)
    travel = {}
    for fixed.count in (*range(1, 16), *range(16, 129, 8), chosen.blocks(route, size)):
        travel[fixed.count] = fixed.seconds(route, size)
    assert travel[chosen.blocks(route, size)] <= 1.01 * min(travel.values())


def test_what_the_model_prefers() -> None:
    """On one node the collective; between many nodes parts of a state, by a scan; over slow links in blocks."""
    size = Size(2**20, 64, 16, 128)

    def best(nodes: tuple[int, ...], ways: Links) -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lasp.parallel.exchange.cost._in_use", [ways])
            chosen: Exchange = build_exchange("auto", None, Topology(nodes))
            route = Route.forward(SequenceLayout.contiguous(len(nodes), len(nodes)), 0)
            return chosen.describe(route, size)

    by_eight = tuple(rank // 8 for rank in range(1024))
    assert best((0,) * 4, Links()) == "all-gather"
    assert best(by_eight, Links()) == "two-level over scan"
    slow = Links(between=Link(50e-6, 1e8), cards=1)
    assert best((0, 0, 1, 1, 2, 2, 3, 3), slow) == "two-level over pipelined"


@pytest.mark.mpi(min_size=4)
def test_auto_explains_itself(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lasp.parallel.exchange.cost._in_use", [Links(between=Link(50e-6, 1e6), cards=1)])
    sp = SequenceParallel(groups[4], SequenceLayout.contiguous(64, 4), nodes=(0, 0, 1, 1))
    assert "nothing has travelled yet" in sp.explain()
    q, g = torch.ones(1, 16, 4, 32), -torch.ones(1, 16, 4, 32)
    gla(q, q, q, g, sp=sp)
    told = sp.explain().splitlines()
    assert told[0] == "exchange auto: 4 ranks on 2 nodes, 4 runs, each with 0.0156 MiB of states and 0.5 KiB of decays"
    assert len(told) == 1 + len(EXCHANGES) + 1
    assert [line.endswith("chosen") for line in told] == [False, True, *[False] * len(EXCHANGES)]
    milliseconds = [float(line.split(" ms")[0].split()[-1]) for line in told[1:-1]]
    assert milliseconds == sorted(milliseconds)
    assert told[-1].startswith("by measured: inside nodes 8 µs + 150 GB/s, between nodes 50 µs + 0.001 GB/s")
    named = SequenceParallel(groups[4], SequenceLayout.contiguous(64, 4), exchange="ring")
    assert named.explain() == "exchange ring: as it was asked for"


def test_steps_are_what_travels() -> None:
    """The model's steps have the bytes of the design's table."""
    size, W = Size(2**20, 2**10, 16, 128), 64
    nodes = tuple(rank // 8 for rank in range(W))
    for backward in (False, True):
        layout = SequenceLayout.contiguous(W, W)
        route = Route.backward(layout, 5) if backward else Route.forward(layout, 5)

        def volume(exchange: Exchange, route: Route = route) -> int:
            sent: Counter[int] = Counter()
            for step in exchange.steps(route, size):
                for source, _, some in step:
                    sent[source] += some
            return max(sent.values())

        whole = size.summary
        assert volume(FLAT["all-gather"](None, Topology(nodes))) == pytest.approx((W - 1) * whole, rel=0.01)
        assert volume(FLAT["ring"](None, Topology(nodes))) == size.state
        assert volume(InBlocks(None, Topology(nodes))) == pytest.approx(size.state, rel=0.02)
        assert volume(FLAT["scan"](None, Topology(nodes))) == 6 * whole
        assert volume(two_level(None, nodes, Scan)) == pytest.approx((2 * 7 + 3) * whole / 8, rel=0.01)


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("kind", [Ring, FLAT["scan"], TwoLevel])
def test_an_exchange_is_under_way_while_dq_is_computed(
    groups: Groups, monkeypatch: pytest.MonkeyPatch, kind: type[Exchange]
) -> None:
    """No exchange goes on before the computation that it hides behind has begun, and none is finished before that ends."""
    begun = threading.Event()
    states, query_gradient = kind.states, ChunkedDecay.query_gradient

    def late(self, *args):
        assert begun.wait(60), "what should hide the exchange waits for it"
        return states(self, *args)

    def early(self, *args):
        begun.set()
        return query_gradient(self, *args)

    sp = SequenceParallel(groups[4], SequenceLayout.zigzag(64, 4), exchange=kind.name, nodes=(0, 0, 1, 1))
    q, k, v = (torch.ones(1, 16, 2, 4, requires_grad=True) for _ in range(3))
    o = linear_attn(q, k, v, sp=sp)[0]
    monkeypatch.setattr(kind, "states", late)
    monkeypatch.setattr(ChunkedDecay, "query_gradient", early)
    o.sum().backward()


@pytest.mark.mpi(min_size=4)
def test_uneven_nodes(groups: Groups) -> None:
    layout = SequenceLayout.contiguous(64, 4)
    with pytest.raises(ValueError, match=r"as many ranks on every node, given \[3, 1\]: choose exchange='scan'"):
        SequenceParallel(groups[4], layout, exchange="two-level", nodes=(0, 0, 0, 1))
    with pytest.raises(ValueError, match="names the nodes of 2 ranks, the group has 4"):
        SequenceParallel(groups[4], layout, exchange="two-level", nodes=(0, 1))


# -- other numbers of ranks -------------------------------------------------------------------------------------------


def _port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _rank(rank: int, world: int, port: int, job: Callable[[int, int], None]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    job(world, rank)
    dist.destroy_process_group()


def _check(world: int, rank: int) -> None:
    check(world, dist.group.WORLD, rank)


@pytest.mark.parametrize("ranks", [3, 8])
def test_other_numbers_of_ranks(ranks: int) -> None:
    mp.spawn(_rank, (ranks, _port(), _check), nprocs=ranks)


TIMEOUT = timedelta(seconds=5)


def _killed(world: int, rank: int, name: str) -> None:
    """Rank 1 dies in the middle of an exchange; the others say so, within the group's timeout."""
    group = dist.new_group(timeout=TIMEOUT)
    sp = SequenceParallel(group, SequenceLayout.contiguous(8 * world, world), exchange=name, nodes=NODES[4][1])
    q, k, v, g = (torch.ones(1, 8, 4, 4) for _ in range(4))
    gla(q, k, v, -g, sp=sp)
    if rank == 1:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Peers, "transfer", lambda *_: os._exit(0))
            patch.setattr("lasp.parallel.exchange.all_gather.all_gather_rows", lambda *_: os._exit(0))
            gla(q, k, v, -g, sp=sp)
    began = time.monotonic()

    def go_on() -> None:
        # The first rank of a chain waits for nobody: it finds out in the next call.
        for _ in range(2):
            gla(q, k, v, -g, sp=sp)

    with pytest.raises(RuntimeError, match=BROKEN):
        go_on()
    assert time.monotonic() - began < 2 * TIMEOUT.total_seconds()
    store = dist.distributed_c10d._get_default_store()
    store.add("found out", 1)
    # Rank 0 keeps the store that the others are still told by.
    while rank == 0 and store.add("found out", 0) < world - 1:
        time.sleep(0.1)
    os._exit(0)


BROKEN = (
    r"exchange of states broke off: a rank has ended|rank 0 of the job, .* has ended"
    r"|of 4 sequence-parallel ranks came to: gla|all-gather of states broke off"
)


@pytest.mark.parametrize("name", EXCHANGES)
def test_a_killed_rank_ends_the_others(name: str) -> None:
    mp.spawn(_killed_by, (4, _port(), name), nprocs=4)


def _killed_by(rank: int, world: int, port: int, name: str) -> None:
    _rank(rank, world, port, partial(_killed, name=name))
