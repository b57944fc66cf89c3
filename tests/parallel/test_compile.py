"""Compiled graphs under sequence parallelism: what eager computes, on every rank, with as many collectives."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lasp import SequenceLayout, SequenceParallel
from lasp.ops import softmax_attn
from lasp.ops.linear import gla, linear_attn
from lasp.parallel.sequence_parallel import SOFTMAX
from tests.lasp.test_compile import afresh, check_model, compiled, model, results, step
from tests.parallel.test_linear import OPS, inputs
from tests.support import DOCUMENTS, LAYOUTS, TOKENS, Inputs, assert_close

__all__ = ["afresh"]  # a fixture that all tests here use
pytestmark = pytest.mark.mpi(min_size=4)
Groups = dict[int, dist.ProcessGroup]


def local(op: str, documents: str, initial: bool, sp: SequenceParallel) -> dict[str, Tensor]:
    whole = inputs(op, documents, torch.float64, initial)
    alike = {"initial_state"} | ({"g"} if OPS[op][1] == "H" else set())
    return {name: x if name in alike else sp.layout.shard(x, sp.rank) for name, x in whole.items()}


@pytest.mark.parametrize(
    ("op", "name", "documents", "causal"),
    [
        *[(op, "zigzag", "packed", True) for op in OPS],
        *[(op, "contiguous", "one", True) for op in ("linear_attn", "gla")],
        *[(op, "zigzag", "packed", False) for op in ("linear_attn", "gla")],
    ],
)
def test_ops(groups: Groups, op: str, name: str, documents: str, causal: bool) -> None:
    sp = SequenceParallel(groups[2], LAYOUTS[name](TOKENS, 2, DOCUMENTS[documents]))
    packed = documents == "packed"
    function = partial(OPS[op][0], sp=sp, causal=causal, output_final_state=packed)
    tensors = local(op, documents, packed, sp)
    assert_close(results(compiled(function), tensors), results(function, tensors), 1e-12)


@pytest.mark.parametrize("method", ["ulysses", "ring"])
@pytest.mark.parametrize("op", ["linear_attn", "retention", "simple_gla"])
def test_methods(groups: Groups, op: str, method: str) -> None:
    sp = SequenceParallel(groups[4], LAYOUTS["table"](TOKENS, 4, DOCUMENTS["packed"]), method=method)
    states = method == "ulysses"
    function = partial(OPS[op][0], sp=sp, output_final_state=states)
    tensors = local(op, "packed", states, sp)
    assert_close(results(compiled(function), tensors), results(function, tensors), 1e-12)


def test_a_rank_without_tokens(groups: Groups) -> None:
    sp = SequenceParallel(groups[4], LAYOUTS["table"](TOKENS, 4, DOCUMENTS["packed"]))
    function = partial(gla, sp=sp, output_final_state=True)
    tensors = local("gla", "packed", True, sp)
    assert_close(results(compiled(function), tensors), results(function, tensors), 1e-12)


@pytest.mark.parametrize("softmax", SOFTMAX)
def test_softmax(groups: Groups, softmax: str) -> None:
    sp = SequenceParallel(groups[2], SequenceLayout.zigzag(TOKENS, 2, DOCUMENTS["packed"]), softmax=softmax)
    x = Inputs(sp.rank, torch.float64)
    tensors = {name: x.normal(1, sp.local_tokens, heads, 4) for name, heads in (("q", 4), ("k", 2), ("v", 2))}

    def function(**tensors: Tensor) -> tuple[Tensor, ...]:
        return (softmax_attn(**tensors, window=9, sp=sp),)

    assert_close(results(compiled(function), tensors), results(function, tensors), 1e-12)


def test_models(groups: Groups) -> None:
    """A hybrid with short convolutions, whose positions within documents a graph has as a constant."""
    sp = SequenceParallel(groups[2], SequenceLayout.zigzag(TOKENS, 2, DOCUMENTS["packed"]))
    check_model(model("retention", "LN", conv_size=3), sp, torch.arange(TOKENS).view(1, TOKENS) * 7 % 31, plain=False)


@pytest.mark.parametrize("again", [False, True], ids=["", "checkpointed"])
def test_one_all_gather_each_way(groups: Groups, again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's exchange is neither dropped nor repeated; checkpointing repeats the forward's, as in eager."""
    calls: list[str] = []
    for name in ("all_gather_into_tensor", "all_reduce"):
        original = getattr(dist, name)

        def spy(*args, original=original, name=name, **kwargs):
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(dist, name, spy)
    layers = 2
    sp = SequenceParallel(groups[2], SequenceLayout.zigzag(TOKENS, 2))
    net = model("simple_gla", layers=layers)
    tokens = sp.layout.shard(torch.arange(TOKENS).view(1, TOKENS) % 31, sp.rank)
    graph = compiled(step)
    for _ in range(2):
        loss = graph(net, tokens, tokens, again, sp)
        assert calls == ["all_gather_into_tensor"] * layers
        calls.clear()
        loss.backward()
        assert calls == ["all_gather_into_tensor"] * layers * (2 if again else 1)
        calls.clear()


def test_unmasked_makes_one_sum_each_way(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    sums: list[tuple[int, ...]] = []
    original = dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda x, **options: (sums.append(x.shape), original(x, **options))[1])
    sp = SequenceParallel(groups[2], SequenceLayout.zigzag(TOKENS, 2))
    x = Inputs(0, torch.float64)
    tensors = {name: x.normal(1, sp.local_tokens, 2, 4) for name in "qkv"}
    results(compiled(partial(linear_attn, sp=sp, causal=False)), tensors)
    assert sums == [(1, 1, 2, 4, 4)] * 2
