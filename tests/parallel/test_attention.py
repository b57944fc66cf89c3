"""Softmax attention by all-gather and by ring: every layout, documents, windows, 1, 2 and 4 ranks, on every rank."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lasp import SequenceLayout, SequenceParallel
from lasp.ops import softmax_attn
from lasp.parallel.attention import all_gather
from lasp.parallel.sequence_parallel import SOFTMAX
from tests.parallel.test_layout import tables
from tests.references import softmax_attention
from tests.support import DOCUMENTS, LAYOUTS, TOKENS, Inputs, assert_close, dealt, poisoned_memory, relative_error

H, KV, D = 4, 2, 6
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
#: What a token sees, by name.
SEEN = {
    "causal": {"causal": True},
    "window": {"causal": True, "window": 9},
    "unmasked": {"causal": False},
    "unmasked window": {"causal": False, "window": 4},
}
WORLDS = [1, 2, 4]
Groups = dict[int, dist.ProcessGroup]

pytestmark = pytest.mark.mpi(min_size=4)


@pytest.fixture(autouse=True)
def short_documents_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents of a few tokens are looked at together, and longer ones by themselves."""
    monkeypatch.setattr("lasp.parallel.attention.mask.TOGETHER", 5)


def inputs(documents: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The whole sequence, alike on every rank; two rows where nothing is packed."""
    x, B = Inputs(3, dtype), 2 if documents == "one" else 1
    return {"q": x.normal(B, TOKENS, H, D), "k": x.normal(B, TOKENS, KV, D), "v": x.normal(B, TOKENS, KV, D)}


def cotangent(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return Inputs(99, dtype).normal(*shape)


@cache
def expected(documents: str, dtype: torch.dtype, seen: str) -> dict[str, Tensor]:
    leaves = {name: x.double().requires_grad_() for name, x in inputs(documents, dtype).items()}
    o = softmax_attention(**leaves, **SEEN[seen], cu_seqlens=DOCUMENTS[documents])
    o.backward(cotangent(o.shape, dtype).double())
    return {"o": o.detach(), **{f"d{name}": x.grad for name, x in leaves.items() if x.grad is not None}}


def run(
    sp: SequenceParallel, documents: str, dtype: torch.dtype, seen: str, device: str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """This rank's results by name, and what they should be."""
    local = {
        name: sp.layout.shard(x, sp.rank).to(device).requires_grad_() for name, x in inputs(documents, dtype).items()
    }
    o = softmax_attn(**local, **SEEN[seen], sp=sp)
    want = expected(documents, dtype, seen)
    o.backward(sp.layout.shard(cotangent(want["o"].shape, dtype), sp.rank).to(device))
    given = {"o": o, **{f"d{name}": x.grad for name, x in local.items() if x.grad is not None}}
    return given, {name: sp.layout.shard(x, sp.rank) for name, x in want.items()}


@pytest.mark.parametrize("softmax", SOFTMAX)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_the_definition_on_every_rank(
    groups: Groups, softmax: str, name: str, documents: str, dtype: torch.dtype
) -> None:
    for world in WORLDS:
        sp = SequenceParallel(groups[world], LAYOUTS[name](TOKENS, world, DOCUMENTS[documents]), softmax=softmax)
        for seen in dealt(SEEN, world):
            with poisoned_memory():
                given, wanted = run(sp, documents, dtype, seen)
            assert_close(given, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("softmax", SOFTMAX)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_a_changed_future_token_moves_nothing_earlier(groups: Groups, softmax: str, name: str, documents: str) -> None:
    for world in WORLDS:
        sp = SequenceParallel(groups[world], LAYOUTS[name](TOKENS, world, DOCUMENTS[documents]), softmax=softmax)
        layout, positions = sp.layout, sp.layout.positions(sp.rank)
        whole = inputs(documents, torch.float64)
        before = softmax_attn(**{name: layout.shard(x, sp.rank) for name, x in whole.items()}, sp=sp)
        for changed in dealt((10, 16, 30), world):
            moved = {name: x.clone() for name, x in whole.items()}
            for x in moved.values():
                x[:, changed] = x[:, changed] * 2 - 1
            after = softmax_attn(**{name: layout.shard(x, sp.rank) for name, x in moved.items()}, sp=sp)
            itself, end = positions == changed, next(c for c in layout.cu_seqlens if c > changed)
            untouched = (positions < changed) | (positions >= end)
            assert torch.equal(before[:, untouched], after[:, untouched])
            assert not itself.any() or not torch.equal(before[:, itself], after[:, itself])


@pytest.mark.parametrize("softmax", SOFTMAX)
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_grouped_queries(groups: Groups, softmax: str, kv_heads: int) -> None:
    """One head of keys for all queries, and one for each."""
    x = Inputs(5, torch.float64)
    whole = [x.normal(1, TOKENS, heads, D) for heads in (H, kv_heads, kv_heads)]
    there = [y.clone().requires_grad_() for y in whole]
    want = softmax_attention(*there, scale=0.7)
    do = x.normal(*want.shape)
    want.backward(do)
    for world in WORLDS:
        sp = SequenceParallel(groups[world], LAYOUTS["table"](TOKENS, world, None), softmax=softmax)
        here = [sp.layout.shard(y, sp.rank).requires_grad_() for y in whole]
        o = softmax_attn(here[0], here[1], here[2], scale=0.7, sp=sp)
        o.backward(sp.layout.shard(do, sp.rank))
        assert relative_error(o, sp.layout.shard(want, sp.rank)) < 1e-10
        for mine, all_of_it in zip(here, there, strict=True):
            assert mine.grad is not None
            assert all_of_it.grad is not None
            assert relative_error(mine.grad, sp.layout.shard(all_of_it.grad, sp.rank)) < 1e-10


@pytest.mark.parametrize("softmax", SOFTMAX)
def test_large_scores(groups: Groups, softmax: str) -> None:
    """Scores of a thousand neither overflow nor lose the weights of the parts."""
    x = Inputs(6, torch.float64)
    whole = [x.normal(1, TOKENS, H, D) for _ in range(3)]
    want = softmax_attention(*whole, scale=300.0)
    sp = SequenceParallel(groups[4], SequenceLayout.zigzag(TOKENS, 4), softmax=softmax)
    q, k, v = (sp.layout.shard(y, sp.rank) for y in whole)
    assert relative_error(softmax_attn(q, k, v, scale=300.0, sp=sp), sp.layout.shard(want, sp.rank)) < 1e-10


@given(
    layout=tables(world=4), softmax=st.sampled_from(SOFTMAX), window=st.sampled_from([None, 1, 3]), causal=st.booleans()
)
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_any_table_on_four_ranks(
    groups: Groups, layout: SequenceLayout, softmax: str, window: int | None, causal: bool
) -> None:
    sp = SequenceParallel(groups[4], layout, softmax=softmax)
    x, T = Inputs(0, torch.float64), layout.total_tokens
    whole = [x.normal(1, T, heads, 3) for heads in (4, 2, 2)]
    there = [y.clone().requires_grad_() for y in whole]
    want = softmax_attention(*there, causal=causal, window=window, cu_seqlens=layout.cu_seqlens)
    do = x.normal(*want.shape)
    want.backward(do)
    here = [layout.shard(y, sp.rank).requires_grad_() for y in whole]
    o = softmax_attn(here[0], here[1], here[2], causal=causal, window=window, sp=sp)
    o.backward(layout.shard(do, sp.rank))
    errors = [relative_error(o, layout.shard(want, sp.rank))]
    for mine, all_of_it in zip(here, there, strict=True):
        assert mine.grad is not None
        assert all_of_it.grad is not None
        # Where a query sees one key, its gradient is zero: then against the size of what it is made of.
        size = torch.maximum(all_of_it.grad.norm(), do.norm())
        error = (mine.grad - layout.shard(all_of_it.grad, sp.rank)).norm() / size
        errors.append(error.item())
    # All ranks fail together, so that hypothesis goes on to the same next example on all of them.
    worst = torch.tensor(max(errors))
    dist.all_reduce(worst, dist.ReduceOp.MAX, group=sp.group)
    assert worst.item() < 1e-10, errors


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("most", [2, 3, 4])
def test_head_groups_travel_while_others_compute(
    groups: Groups, monkeypatch: pytest.MonkeyPatch, name: str, most: int
) -> None:
    monkeypatch.setattr(all_gather, "MOST_GROUPS", most)
    monkeypatch.setattr(all_gather, "LEAST_BYTES", 1)
    told: list[str] = []
    for function in ("all_gather_rows", "attend", "attend_backward", "reduce_scatter_rows"):
        original = getattr(all_gather, function)

        def spy(*args, original=original, function=function):
            told.append(function)
            return original(*args)

        monkeypatch.setattr(all_gather, function, spy)
    x = Inputs(5, torch.float64)
    whole = [x.normal(1, TOKENS, heads, D) for heads in (2 * H, H, H)]
    there = [y.clone().requires_grad_() for y in whole]
    want = softmax_attention(*there)
    want.sum().backward()
    sp = SequenceParallel(groups[4], LAYOUTS[name](TOKENS, 4, None), softmax="all-gather")
    here = [sp.layout.shard(y, sp.rank).requires_grad_() for y in whole]
    o = softmax_attn(*here, sp=sp)
    assert told == ["all_gather_rows", *["all_gather_rows", "attend"] * (most - 1), "attend"]
    told.clear()
    o.sum().backward()
    each = ["all_gather_rows", "attend_backward", "reduce_scatter_rows"]
    assert told == ["all_gather_rows", *each * (most - 1), "attend_backward", "reduce_scatter_rows"]
    assert relative_error(o, sp.layout.shard(want, sp.rank)) < 1e-12
    for mine, all_of_it in zip(here, there, strict=True):
        assert mine.grad is not None
        assert all_of_it.grad is not None
        assert relative_error(mine.grad, sp.layout.shard(all_of_it.grad, sp.rank)) < 1e-10
