"""What ranks wait for each other is measured, wherever they do, in graphs too, and only while a meter runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lasp import SequenceLayout, SequenceParallel
from lasp.layers import MixtureOfMemories
from lasp.ops import causal_conv1d, softmax_attn
from lasp.ops.linear import gla, linear_attn, simple_gla
from lasp.parallel import exposure
from lasp.parallel.exchange import EXCHANGES
from lasp.parallel.exposure import Meter
from lasp.parallel.sequence_parallel import SOFTMAX
from tests.lasp.test_compile import afresh, compiled
from tests.support import Inputs

__all__ = ["afresh"]
pytestmark = pytest.mark.mpi(min_size=4)
Groups = dict[int, dist.ProcessGroup]
TOKENS = 32
#: By how many seconds the others are late, and the share of it that is seen at least: clocks start a little after the barrier.
LATE, SEEN = 0.1, 0.7


def shared(group: dist.ProcessGroup, layout: SequenceLayout, **options: Any) -> SequenceParallel:
    """Ranks that do not settle before they communicate: they wait where what is exchanged is read."""
    return SequenceParallel(group, layout, check=False, **options)


def waited(sp: SequenceParallel, call: Callable[[], Tensor], late: bool) -> float:
    """What a meter reads on this rank of a call that ranks other than the first of `sp` begin later, if `late`."""
    call()  # whatever is done once
    dist.barrier()
    with Meter() as meter:
        if late and sp.rank > 0:
            time.sleep(LATE)
        call()
    assert exposure._meter is None
    seconds = meter.read()
    assert meter.read() == 0
    return seconds


def check(sp: SequenceParallel, call: Callable[[], Tensor]) -> None:
    seconds = waited(sp, call, late=True)
    if sp.rank == 0:
        assert SEEN * LATE < seconds < 30 * LATE


def qkv(sp: SequenceParallel, heads: int = 4) -> list[Tensor]:
    x = Inputs(sp.rank, torch.float32)
    return [x.normal(1, sp.local_tokens, heads, 4) for _ in range(3)]


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_states(groups: Groups, exchange: str) -> None:
    """In zigzag the first rank holds the last run too, for which it needs the others."""
    sp = shared(groups[4], SequenceLayout.zigzag(TOKENS, 4), exchange=exchange)
    check(sp, lambda: linear_attn(*qkv(sp), sp=sp)[0])


def test_ranks_that_settle_wait_there(groups: Groups) -> None:
    sp = SequenceParallel(groups[4], SequenceLayout.zigzag(TOKENS, 4))
    check(sp, lambda: linear_attn(*qkv(sp), sp=sp)[0])


@pytest.mark.parametrize("softmax", SOFTMAX)
def test_keys_and_values(groups: Groups, softmax: str) -> None:
    sp = shared(groups[4], SequenceLayout.zigzag(TOKENS, 4), softmax=softmax)
    check(sp, lambda: softmax_attn(*qkv(sp), sp=sp))


@pytest.mark.parametrize("method", ["ulysses", "ring"])
def test_other_methods(groups: Groups, method: str) -> None:
    sp = shared(groups[4], SequenceLayout.zigzag(TOKENS, 4), method=method)
    decay = torch.full((1, sp.local_tokens, 4), -0.1)
    check(sp, lambda: simple_gla(*qkv(sp), decay, sp=sp)[0])


def test_final_states_convolutions_and_memories(groups: Groups) -> None:
    sp = shared(groups[4], SequenceLayout.zigzag(TOKENS, 4))
    unmasked = partial(linear_attn, causal=False, sp=sp)
    check(sp, lambda: unmasked(*qkv(sp))[0])
    x = Inputs(sp.rank, torch.float32).normal(1, sp.local_tokens, 8)
    check(sp, lambda: causal_conv1d(x, torch.ones(8, 4), sp=sp))
    torch.manual_seed(0)
    layer = MixtureOfMemories(8, 2)
    check(sp, lambda: layer(x, sp=sp))


def test_backward(groups: Groups) -> None:
    sp = shared(groups[4], SequenceLayout.contiguous(TOKENS, 4))
    q, k, v = (x.requires_grad_() for x in qkv(sp))
    o = softmax_attn(q, k, v, sp=sp) + linear_attn(q, k, v, sp=sp)[0]
    check(sp, lambda: torch.autograd.grad(o.sum(), q, retain_graph=True)[0])


def test_in_a_graph(groups: Groups) -> None:
    """The same graph with a meter and without."""
    sp = shared(groups[2], SequenceLayout.zigzag(TOKENS, 2))
    g = torch.full((1, sp.local_tokens, 4, 4), -0.1)
    q, k, v = qkv(sp)
    want = gla(q, k, v, g, sp=sp)[0]
    graph = compiled(lambda q, k, v: gla(q, k, v, g, sp=sp)[0])
    seconds = waited(sp, lambda: graph(q, k, v), late=True)
    assert torch.allclose(graph(q, k, v), want, atol=1e-5)
    if sp.rank == 0:
        assert SEEN * LATE < seconds < 30 * LATE


def test_together_nobody_waits_long(groups: Groups) -> None:
    sp = shared(groups[4], SequenceLayout.zigzag(TOKENS, 4))
    assert min(waited(sp, lambda: linear_attn(*qkv(sp), sp=sp)[0], late=False) for _ in range(3)) < SEEN * LATE
    alone = shared(groups[1], SequenceLayout.contiguous(TOKENS, 1))
    assert waited(alone, lambda: linear_attn(*qkv(alone), sp=alone)[0], late=False) == 0
