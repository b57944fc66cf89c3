"""The causal convolution: every layout, documents, taps that reach past whole ranks, 1, 2 and 4 ranks, on every rank."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lasp import SequenceLayout, SequenceParallel
from lasp.ops import causal_conv1d
from tests.parallel.test_layout import tables
from tests.references import causal_convolution
from tests.support import (
    DOCUMENTS,
    LAYOUTS,
    TOKENS,
    Inputs,
    assert_close,
    dealt,
    poisoned_memory,
    relative_error,
    sum_over_ranks,
)

CHANNELS = 5
#: Taps: none but the token's own, the usual, and one that reaches over two whole ranks.
TAPS = [1, 4, 26]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
WORLDS = [1, 2, 4]
Groups = dict[int, dist.ProcessGroup]

pytestmark = pytest.mark.mpi(min_size=4)


def inputs(documents: str, dtype: torch.dtype, taps: int) -> dict[str, Tensor]:
    x, B = Inputs(taps, dtype), 2 if documents == "one" else 1
    return {"x": x.normal(B, TOKENS, CHANNELS), "weight": x.normal(CHANNELS, taps), "bias": x.normal(CHANNELS)}


def cotangent(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return Inputs(99, dtype).normal(*shape)


@cache
def expected(documents: str, dtype: torch.dtype, taps: int, activation: str | None) -> dict[str, Tensor]:
    leaves = {name: x.double().requires_grad_() for name, x in inputs(documents, dtype, taps).items()}
    y = causal_convolution(**leaves, activation=activation, cu_seqlens=DOCUMENTS[documents])
    y.backward(cotangent(y.shape, dtype).double())
    return {"y": y.detach(), **{f"d{name}": x.grad for name, x in leaves.items() if x.grad is not None}}


def run(
    sp: SequenceParallel, documents: str, dtype: torch.dtype, taps: int, activation: str | None, device: str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """This rank's results by name, and what they should be."""
    whole = inputs(documents, dtype, taps)
    local = {
        name: (sp.layout.shard(x, sp.rank) if name == "x" else x.clone()).to(device).requires_grad_()
        for name, x in whole.items()
    }
    y = causal_conv1d(**local, activation=activation, sp=sp)
    want = expected(documents, dtype, taps, activation)
    y.backward(sp.layout.shard(cotangent(want["y"].shape, dtype), sp.rank).to(device))
    given = {"y": y}
    for name, x in local.items():
        assert x.grad is not None
        given[f"d{name}"] = x.grad if name == "x" else sum_over_ranks(x.grad, sp.group)
    return given, {name: sp.layout.shard(x, sp.rank) if name in ("y", "dx") else x for name, x in want.items()}


@pytest.mark.parametrize("taps", TAPS)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_the_definition_on_every_rank(
    groups: Groups, taps: int, name: str, documents: str, dtype: torch.dtype
) -> None:
    for world in WORLDS:
        sp = SequenceParallel(groups[world], LAYOUTS[name](TOKENS, world, DOCUMENTS[documents]))
        for activation in dealt((None, "silu"), world):
            with poisoned_memory():
                given, wanted = run(sp, documents, dtype, taps, activation)
            assert_close(given, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("taps", "name", "documents"),
    [*((4, name, documents) for name in LAYOUTS for documents in DOCUMENTS), (26, "table", "packed")],
)
def test_triton(groups: Groups, monkeypatch: pytest.MonkeyPatch, taps: int, name: str, documents: str) -> None:
    """Triton's kernels, in the interpreter, on every rank."""
    pytest.importorskip("triton")
    monkeypatch.setattr("lasp.kernels.triton.serves", lambda x: x.dtype != torch.float64)
    sp = SequenceParallel(groups[4], LAYOUTS[name](TOKENS, 4, DOCUMENTS[documents]))
    with poisoned_memory():
        given, wanted = run(sp, documents, torch.float32, taps, "silu")
    assert_close(given, wanted, 2e-6)


def test_a_compiled_graph_exchanges_the_halo(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    sp = SequenceParallel(groups[4], LAYOUTS["table"](TOKENS, 4, DOCUMENTS["packed"]))
    compiled = torch.compile(causal_conv1d, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr("tests.parallel.test_convolution.causal_conv1d", compiled)
    given, wanted = run(sp, "packed", torch.float64, 4, "silu")
    assert_close(given, wanted, TOLERANCE[torch.float64])


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_a_changed_future_token_moves_nothing_earlier(groups: Groups, name: str, documents: str) -> None:
    for world in WORLDS:
        sp = SequenceParallel(groups[world], LAYOUTS[name](TOKENS, world, DOCUMENTS[documents]))
        layout, positions = sp.layout, sp.layout.positions(sp.rank)
        whole = inputs(documents, torch.float64, 4)
        x, rest = whole.pop("x"), whole
        before = causal_conv1d(layout.shard(x, sp.rank), **rest, sp=sp)
        for changed in dealt((10, 16, 30), world):
            moved = x.clone()
            moved[:, changed] += 1
            after = causal_conv1d(layout.shard(moved, sp.rank), **rest, sp=sp)
            end = min(changed + 4, next(c for c in layout.cu_seqlens if c > changed))
            reached = (positions >= changed) & (positions < end)
            assert torch.equal(before[:, ~reached], after[:, ~reached])
            assert not torch.any(before[:, reached] == after[:, reached])


@given(layout=tables(world=4), taps=st.integers(1, 9))
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_any_table_on_four_ranks(groups: Groups, layout: SequenceLayout, taps: int) -> None:
    sp = SequenceParallel(groups[4], layout)
    x = Inputs(taps, torch.float64)
    whole, weight = x.normal(1, layout.total_tokens, 2).requires_grad_(), x.normal(2, taps)
    want = causal_convolution(whole, weight, cu_seqlens=layout.cu_seqlens)
    dy = x.normal(*want.shape)
    want.backward(dy)
    assert whole.grad is not None
    here = layout.shard(whole.detach(), sp.rank).requires_grad_()
    y = causal_conv1d(here, weight, sp=sp)
    y.backward(layout.shard(dy, sp.rank))
    assert here.grad is not None
    errors = [
        relative_error(y, layout.shard(want, sp.rank)),
        relative_error(here.grad, layout.shard(whole.grad, sp.rank)),
    ]
    # All ranks fail together, so that hypothesis goes on to the same next example on all of them.
    worst = torch.tensor(max(errors))
    dist.all_reduce(worst, dist.ReduceOp.MAX, group=sp.group)
    assert worst.item() < 1e-10, errors
