"""What a layer sends: a linear one an all-gather each way, of a size that the sequence's length does not change."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from lasp import SequenceLayout, SequenceParallel
from lasp.ops import causal_conv1d, delta_rule, gla, kda, linear_attn, simple_gla, softmax_attn
from tests.support import Inputs

pytestmark = pytest.mark.mpi(min_size=4)
H, K, V = 2, 8, 4


@dataclass
class Traffic(TorchDispatchMode):
    """Records every collective that reaches the process group, and the bytes that this rank puts into it."""

    calls: list[tuple[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name.startswith("c10d::"):
            sent = args[0] if name in ("c10d::allreduce_", "c10d::send", "c10d::recv_") else args[1]
            tensors = [sent] if isinstance(sent, torch.Tensor) else torch.utils._pytree.tree_leaves(sent)
            self.calls.append((name, sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor))))
        return func(*args, **(kwargs or {}))


def measure(op, sp: SequenceParallel, length: int, **options) -> tuple[Traffic, Traffic]:
    x = Inputs(0, torch.float32)
    local = sp.local_tokens
    assert local * sp.world_size == length
    q, k = x.normal(1, local, H, K).requires_grad_(), x.normal(1, local, H, K).requires_grad_()
    v = x.normal(1, local, H, V).requires_grad_()
    decay = {"gla": (1, local, H, K), "kda": (1, local, H, K), "simple_gla": (1, local, H)}.get(op.__name__)
    gates = [] if decay is None else [-x.uniform(*decay)]
    gates += [x.uniform(1, local, H)] if op in (delta_rule, kda) else []
    with Traffic() as forward:
        o, _ = op(q, k, v, *gates, sp=sp, **options)
    with Traffic() as backward:
        o.sum().backward()
    return forward, backward


@pytest.mark.parametrize(
    ("op", "transition"),
    [(linear_attn, 1), (simple_gla, H), (gla, H * K), (delta_rule, H * K * K), (kda, H * K * K)],
    ids=["identity", "scalar", "diagonal", "dense", "dense, decayed"],
)
def test_one_all_gather_each_way_whatever_the_length(groups: dict[int, dist.ProcessGroup], op, transition: int) -> None:
    state = H * K * V
    for length in (64, 512):
        for layout, runs in ((SequenceLayout.contiguous(length, 4), 1), (SequenceLayout.zigzag(length, 4), 2)):
            forward, backward = measure(op, SequenceParallel(groups[4], layout), length)
            expected = [("c10d::_allgather_base_", 4 * runs * (transition + state))]
            assert forward.calls == expected
            assert backward.calls == expected


def test_the_mask_makes_the_all_gather_a_sum(groups: dict[int, dist.ProcessGroup]) -> None:
    """Unmasked linear attention moves one state each way."""
    layout = SequenceLayout.zigzag(64, 4)
    forward, backward = measure(linear_attn, SequenceParallel(groups[4], layout), 64, causal=False)
    assert forward.calls == backward.calls == [("c10d::allreduce_", 4 * H * K * V)]


def test_one_rank_sends_nothing(groups: dict[int, dist.ProcessGroup]) -> None:
    forward, backward = measure(gla, SequenceParallel(groups[1], SequenceLayout.contiguous(64, 1)), 64)
    assert forward.calls == backward.calls == []


def measure_softmax(sp: SequenceParallel) -> tuple[Traffic, Traffic]:
    x, n = Inputs(0, torch.float32), sp.local_tokens
    q, k, v = (x.normal(1, n, heads, K).requires_grad_() for heads in (4, 2, 2))
    with Traffic() as forward:
        o = softmax_attn(q, k, v, sp=sp)
    with Traffic() as backward:
        o.sum().backward()
    return forward, backward


def test_all_gather_attention(groups: dict[int, dist.ProcessGroup]) -> None:
    """One gather of keys and values together; backward the same again and one reduce-scatter of all ranks' rows."""
    layout = SequenceLayout.zigzag(64, 4)
    forward, backward = measure_softmax(SequenceParallel(groups[4], layout, softmax="all-gather"))
    mine = 4 * 16 * 2 * (K + K)
    assert forward.calls == [("c10d::_allgather_base_", mine)]
    assert backward.calls == [("c10d::_allgather_base_", mine), ("c10d::_reduce_scatter_base_", 4 * mine)]


def test_ring_attention(groups: dict[int, dist.ProcessGroup]) -> None:
    """Three hops of keys and values; backward three again, and four of their gradients, the last of them home."""
    layout = SequenceLayout.zigzag(64, 4)
    forward, backward = measure_softmax(SequenceParallel(groups[4], layout, softmax="ring"))
    mine = 4 * 16 * 2 * (K + K)
    assert [call for call in forward.calls if call[0] == "c10d::send"] == [("c10d::send", mine)] * 3
    assert [call for call in backward.calls if call[0] == "c10d::send"] == [("c10d::send", mine)] * 7


def test_the_ring_sends_the_next_block_before_it_computes(
    groups: dict[int, dist.ProcessGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lasp.parallel.attention import ring

    events: list[str] = []
    for owner, name in ((ring, "attend"), (ring._Hop, "__init__"), (ring._Hop, "wait")):
        original = getattr(owner, name)

        def spy(*args, original=original, name=name, **kwargs):
            events.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, spy)
    sp = SequenceParallel(groups[4], SequenceLayout.zigzag(64, 4), softmax="ring")
    q, k, v = (torch.zeros(1, sp.local_tokens, 2, K) for _ in range(3))
    softmax_attn(q, k, v, sp=sp)
    assert events == ["__init__", "attend", "wait"] * 3 + ["attend"]


def test_the_halo(groups: dict[int, dist.ProcessGroup]) -> None:
    """The tokens that the taps reach before a run, each way; none where runs begin with documents, or on one rank."""

    def measure_convolution(layout: SequenceLayout, world: int) -> tuple[Traffic, Traffic]:
        sp = SequenceParallel(groups[world], layout)
        x = torch.ones(1, sp.local_tokens, 5, requires_grad=True)
        with Traffic() as forward:
            y = causal_conv1d(x, torch.ones(5, 4), sp=sp)
        with Traffic() as backward:
            y.sum().backward()
        return forward, backward

    rank = dist.get_rank(groups[4])
    forward, backward = measure_convolution(SequenceLayout.contiguous(64, 4), 4)
    sent, received = (4 * 3 * 5 * n for n in (rank < 3, rank > 0))
    assert [name for name, _ in forward.calls + backward.calls] == ["c10d::alltoall_base_"] * 2
    assert [sent_bytes for _, sent_bytes in forward.calls + backward.calls] == [sent, received]
    assert measure_convolution(SequenceLayout.contiguous(64, 4, [0, 16, 32, 48, 64]), 4)[0].calls == []
    assert measure_convolution(SequenceLayout.from_ranges([[(32, 64), (0, 32)]]), 1)[0].calls == []


def test_the_backward_s_exchange_is_under_way_while_dq_is_computed(
    groups: dict[int, dist.ProcessGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lasp.kernels import ChunkedDecay
    from lasp.parallel.exchange import AllGather
    from lasp.parallel.exchange.all_gather import _Gathered

    events: list[str] = []
    for owner, name in (
        (AllGather, "start"),
        (_Gathered, "wait"),
        (ChunkedDecay, "output"),
        (ChunkedDecay, "query_gradient"),
        (ChunkedDecay, "token_gradients"),
    ):
        original = getattr(owner, name)

        def spy(*args, original=original, name=name, **kwargs):
            events.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, spy)
    measure(linear_attn, SequenceParallel(groups[4], SequenceLayout.contiguous(64, 4)), 64)
    assert events == ["start", "wait", "output", "start", "query_gradient", "wait", "token_gradients"]
