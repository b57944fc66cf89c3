"""What a linear layer sends: one all-gather each way, of a size that the sequence's length does not change."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from lasp import SequenceLayout, SequenceParallel
from lasp.ops.linear import gla, linear_attn, simple_gla
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
            sent = args[1] if "allgather" in name else args[0]
            tensors = [sent] if isinstance(sent, torch.Tensor) else torch.utils._pytree.tree_leaves(sent)
            self.calls.append((name, sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor))))
        return func(*args, **(kwargs or {}))


def measure(op, sp: SequenceParallel, length: int, **options) -> tuple[Traffic, Traffic]:
    x = Inputs(0, torch.float32)
    local = sp.local_tokens
    assert local * sp.world_size == length
    q, k = x.normal(1, local, H, K).requires_grad_(), x.normal(1, local, H, K).requires_grad_()
    v = x.normal(1, local, H, V).requires_grad_()
    gates = {"gla": (1, local, H, K), "simple_gla": (1, local, H)}.get(op.__name__)
    with Traffic() as forward:
        o, _ = op(q, k, v, *([] if gates is None else [-x.uniform(*gates)]), sp=sp, **options)
    with Traffic() as backward:
        o.sum().backward()
    return forward, backward


@pytest.mark.parametrize(
    ("op", "transition"), [(linear_attn, 1), (simple_gla, H), (gla, H * K)], ids=["identity", "scalar", "diagonal"]
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
