"""Layouts tile the sequence exactly, or say what is wrong."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lasp import SequenceLayout
from tests.support import DOCUMENTS, LAYOUTS, TOKENS


@st.composite
def tables(draw: st.DrawFn, world: int | None = None) -> SequenceLayout:
    """Any tiling of any sequence by any number of ranks, in any order, with documents."""
    total = draw(st.integers(1, 60))
    world = world or draw(st.integers(1, 6))
    cuts = sorted(draw(st.sets(st.integers(0, total), max_size=10)) | {0, total})
    ranges: list[list[tuple[int, int]]] = [[] for _ in range(world)]
    for tile in draw(st.permutations(list(pairwise(cuts)))):
        ranges[draw(st.integers(0, world - 1))].append(tile)
    documents = sorted(draw(st.sets(st.integers(1, total), max_size=8)) | {0, total})
    return SequenceLayout.from_ranges(ranges, total, documents)


@given(tables())
@settings(max_examples=200, deadline=None)
def test_any_table(layout: SequenceLayout) -> None:
    x = torch.arange(layout.total_tokens).view(1, -1, 1) * torch.ones(2, 1, 3, dtype=torch.long)
    shards = [layout.shard(x, rank) for rank in range(layout.world_size)]
    assert torch.equal(layout.unshard(shards), x)
    for rank, shard in enumerate(shards):
        positions = layout.positions(rank)
        assert torch.equal(shard[0, :, 0], positions)
        assert layout.local_tokens(rank) == len(positions)
        bounds = torch.tensor(layout.cu_seqlens)
        documents = torch.searchsorted(bounds, positions, right=True) - 1
        assert torch.equal(layout.documents(rank), documents)
        assert torch.equal(layout.document_positions(rank), positions - bounds[documents])
        pieces = layout.pieces(rank)
        assert sum(p.length for p in pieces) == len(positions)
        for p in pieces:
            here = positions[p.start : p.start + p.length]
            assert torch.equal(here, here[0] + torch.arange(p.length))
            assert p.opens == (int(here[0]) == layout.cu_seqlens[p.document])
            assert p.closes == (int(here[-1]) + 1 == layout.cu_seqlens[p.document + 1])
    order = layout.order()
    starts = [layout.runs[rank][run][0] for rank, run in order]
    assert starts == sorted(starts)
    assert len(order) == sum(len(runs) for runs in layout.runs)


@given(st.integers(1, 8), st.integers(0, 300), st.data())
@settings(max_examples=100, deadline=None)
def test_built_layouts_balance(world: int, more: int, data: st.DataObject) -> None:
    total = world + more
    documents = sorted(data.draw(st.sets(st.integers(1, total), max_size=20)) | {0, total})
    for name in ("contiguous", "zigzag", "zigzag_per_document"):
        layout = getattr(SequenceLayout, name)(total, world, documents)
        held = [layout.local_tokens(rank) for rank in range(world)]
        assert sum(held) == total
        # A token more or less for each stretch that a rank holds, which rotates from document to document.
        assert max(held) - min(held) <= (1 if name == "contiguous" else 2)


def test_zigzag_pairs_the_ends() -> None:
    layout = SequenceLayout.zigzag(16, 2)
    assert layout.runs == (((0, 4), (12, 16)), ((4, 12),))
    assert SequenceLayout.zigzag(8, 1).runs == (((0, 8),),)
    per_document = SequenceLayout.zigzag_per_document(12, 2, (0, 4, 12))
    assert per_document.runs == (((0, 1), (3, 6), (10, 12)), ((1, 3), (6, 10)))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_the_layouts_that_all_is_tested_on(name: str, world: int, documents: str) -> None:
    layout = LAYOUTS[name](TOKENS, world, DOCUMENTS[documents])
    assert layout.world_size == world
    assert layout.num_documents == (1 if documents == "one" else 4)
    if documents == "packed" and world > 1:
        crossing = [c for c in layout.cu_seqlens if any(s < c < e for runs in layout.runs for s, e in runs)]
        assert crossing or name == "zigzag per document"


def test_other_axes() -> None:
    layout = SequenceLayout.from_ranges([[(3, 5)], [(0, 3)], []], cu_seqlens=torch.tensor([0, 4, 5]))
    x = torch.arange(20).view(4, 5)
    shards = [layout.shard(x, rank, dim=-1) for rank in range(3)]
    assert [s.shape[-1] for s in shards] == [2, 3, 0]
    assert torch.equal(layout.unshard(shards, dim=-1), x)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SequenceLayout.from_ranges([[(0, 4)], [(6, 9)]]), "ranges leave a gap: no rank holds tokens 4 to 6"),
        (lambda: SequenceLayout.from_ranges([[(1, 4)]]), "ranges leave a gap: no rank holds tokens 0 to 1"),
        (lambda: SequenceLayout.from_ranges([[(0, 4)]], 6), "ranges leave a gap: no rank holds tokens 4 to 6"),
        (lambda: SequenceLayout.from_ranges([[(0, 4)], [(3, 9)]]), r"ranges overlap: ranges\[1\] holds \(3, 9\)"),
        (lambda: SequenceLayout.from_ranges([[(0, 9)]], 6), "ranges overrun the sequence"),
        (lambda: SequenceLayout.from_ranges([[(4, 2)]]), r"ranges\[0\] holds \(4, 2\)"),
        (lambda: SequenceLayout.from_ranges([]), "ranges holds no rank"),
        (lambda: SequenceLayout.contiguous(3, 4), "shorter than the ranks: total_tokens=3, world_size=4"),
        (lambda: SequenceLayout.zigzag(3, 4), "shorter than the ranks"),
        (lambda: SequenceLayout.zigzag_per_document(3, 4), "shorter than the ranks"),
        (lambda: SequenceLayout.zigzag(3, 0), "world_size must be at least 1"),
        (lambda: SequenceLayout.contiguous(8, 2, (1, 8)), "cu_seqlens must start at 0"),
        (lambda: SequenceLayout.contiguous(8, 2, (0,)), "cu_seqlens must start at 0 and hold at least one document"),
        (lambda: SequenceLayout.contiguous(8, 2, (0, 7)), "cu_seqlens must end at the number of tokens, 8, given 7"),
        (lambda: SequenceLayout.contiguous(8, 2, (0, 5, 5, 8)), "cu_seqlens must rise: entry 2 is 5 after 5"),
        (lambda: SequenceLayout.contiguous(8, 2).shard(torch.zeros(1, 9), 0), "axis 1 has 9 tokens, the layout 8"),
        (lambda: SequenceLayout.contiguous(8, 2).positions(2), "ranks 0 to 1, given rank 2"),
        (
            lambda: SequenceLayout.contiguous(8, 2).unshard([torch.zeros(1, 3), torch.zeros(1, 5)]),
            r"have \[3, 5\] tokens along axis 1, the layout gives them \[4, 4\]",
        ),
    ],
)
def test_errors_name_what_is_wrong(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
