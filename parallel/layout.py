"""Who holds which tokens: a table of token ranges, checked once on the host.

Contiguous, zigzag and per-document zigzag are rows of the same table; any other exact tiling works as well.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

Range = tuple[int, int]


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one document within one run of a rank: what documents and layout leave undivided.

    Attributes:
        start: its first token among the rank's local tokens.
        length: how many tokens.
        run: which of the rank's runs it belongs to.
        document: which document.
        offset: its first token's position within the document.
        opens: whether the document starts here.
        closes: whether the document ends here.
    """

    start: int
    length: int
    run: int
    document: int
    offset: int
    opens: bool
    closes: bool


@dataclass(frozen=True)
class SequenceLayout:
    """A packed sequence of `total_tokens` tokens, cut into documents and dealt out to ranks. Build it by a class method.

    A *run* is one range of consecutive tokens on one rank. A rank's local tokens are its runs, one after the other, in the
    order of the table; adjacent ranges are one run and empty ranges are none.

    Attributes:
        runs: for each rank its runs ``(start, end)``.
        total_tokens: length of the sequence, all documents together.
        cu_seqlens: document boundaries ``0 = c_0 < c_1 < ... < c_N = total_tokens``.
        num_documents: N. A field, for a graph of ``torch.compile`` looks at fields alone.
    """

    runs: tuple[tuple[Range, ...], ...]
    total_tokens: int
    cu_seqlens: tuple[int, ...]
    num_documents: int = field(init=False, repr=False, compare=False)
    # What is derived from the table, computed once: see `cached`.
    _cache: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_documents", len(self.cu_seqlens) - 1)

    # -- construction ---------------------------------------------------------------------------------------------

    @classmethod
    def from_ranges(
        cls,
        ranges: Sequence[Sequence[Range]],
        total_tokens: int | None = None,
        cu_seqlens: Sequence[int] | Tensor | None = None,
    ) -> SequenceLayout:
        """Any table: ``ranges[rank]`` lists the token ranges ``(start, end)`` of a rank, in its local order.

        Raises:
            ValueError: where the ranges leave a gap, overlap or fall outside the sequence, or `cu_seqlens` is malformed.
        """
        table = [[(int(start), int(end)) for start, end in rows] for rows in ranges]
        if not table:
            raise ValueError("ranges holds no rank: expected one list of (start, end) for each rank")
        for rank, rows in enumerate(table):
            for start, end in rows:
                if not 0 <= start <= end:
                    raise ValueError(f"ranges[{rank}] holds ({start}, {end}): expected 0 <= start <= end")
        tiles = sorted((start, end, rank) for rank, rows in enumerate(table) for start, end in rows if end > start)
        reached = 0
        for start, end, rank in tiles:
            if start > reached:
                raise ValueError(f"ranges leave a gap: no rank holds tokens {reached} to {start}")
            if start < reached:
                raise ValueError(
                    f"ranges overlap: ranges[{rank}] holds ({start}, {end}), tokens to {reached} are taken"
                )
            reached = end
        total = reached if total_tokens is None else int(total_tokens)
        if reached != total:
            kind = "leave a gap: no rank holds" if reached < total else "overrun the sequence: total_tokens excludes"
            raise ValueError(f"ranges {kind} tokens {min(reached, total)} to {max(reached, total)}")
        return cls(tuple(_merge(rows) for rows in table), total, check_cu_seqlens(cu_seqlens, total))

    @classmethod
    def contiguous(
        cls, total_tokens: int, world_size: int, cu_seqlens: Sequence[int] | Tensor | None = None
    ) -> SequenceLayout:
        """Rank r holds the r-th of `world_size` equal stretches (equal to within a token)."""
        _check_sizes(total_tokens, world_size)
        cuts = [total_tokens * r // world_size for r in range(world_size + 1)]
        return cls.from_ranges([[cut] for cut in pairwise(cuts)], total_tokens, cu_seqlens)

    @classmethod
    def zigzag(
        cls, total_tokens: int, world_size: int, cu_seqlens: Sequence[int] | Tensor | None = None
    ) -> SequenceLayout:
        """Rank r holds the r-th and the (2W−1−r)-th of 2W equal stretches: causal attention then costs all ranks alike."""
        _check_sizes(total_tokens, world_size)
        table = _zigzag(0, total_tokens, world_size, first_long=0)
        return cls.from_ranges(table, total_tokens, cu_seqlens)

    @classmethod
    def zigzag_per_document(
        cls, total_tokens: int, world_size: int, cu_seqlens: Sequence[int] | Tensor | None = None
    ) -> SequenceLayout:
        """Every document is dealt out in zigzag by itself: causal attention within documents costs all ranks alike.

        Where a document's length is not a multiple of 2W, some of its stretches are a token longer than others; which ones
        rotates from document to document, so that many short documents spread evenly too.
        """
        _check_sizes(total_tokens, world_size)
        table: list[list[Range]] = [[] for _ in range(world_size)]
        first_long = 0
        for start, end in pairwise(check_cu_seqlens(cu_seqlens, total_tokens)):
            for rank, rows in enumerate(_zigzag(start, end, world_size, first_long)):
                table[rank] += rows
            first_long += (end - start) % (2 * world_size)
        return cls.from_ranges(table, total_tokens, cu_seqlens)

    # -- moving tensors -------------------------------------------------------------------------------------------

    def shard(self, x: Tensor, rank: int, dim: int = 1) -> Tensor:
        """The local tokens of `rank`, from a tensor whose axis `dim` is the whole sequence."""
        if x.shape[dim] != self.total_tokens:
            raise ValueError(f"axis {dim} has {x.shape[dim]} tokens, the layout {self.total_tokens}: {list(x.shape)}")
        runs = self.runs_of(rank) or ((0, 0),)
        return torch.cat([x.narrow(dim, start, end - start) for start, end in runs], dim=dim)

    def unshard(self, shards: Sequence[Tensor], dim: int = 1) -> Tensor:
        """The whole sequence, from the local tensors of ranks 0 to W−1: the inverse of `shard`."""
        held = [self.local_tokens(rank) for rank in range(self.world_size)]
        given = [x.shape[dim] for x in shards]
        if given != held:
            raise ValueError(f"the ranks' tensors have {given} tokens along axis {dim}, the layout gives them {held}")
        order = torch.cat([self.positions(rank) for rank in range(self.world_size)]).argsort()
        whole = torch.cat(list(shards), dim=dim)
        return whole.index_select(dim, order.to(whole.device))

    def positions(self, rank: int) -> Tensor:
        """Which token of the packed sequence each local token of `rank` is: int64 ``[T_local]``, on the CPU."""
        return _concatenate(torch.arange(start, end) for start, end in self.runs_of(rank))

    def document_positions(self, rank: int) -> Tensor:
        """The position of each local token of `rank` within its document: int64 ``[T_local]``, on the CPU. For RoPE."""
        return _concatenate(torch.arange(p.offset, p.offset + p.length) for p in self.pieces(rank))

    def documents(self, rank: int) -> Tensor:
        """Which document each local token of `rank` belongs to: int64 ``[T_local]``, on the CPU."""
        return _concatenate(torch.full((p.length,), p.document) for p in self.pieces(rank))

    # -- the table ------------------------------------------------------------------------------------------------

    @property
    def world_size(self) -> int:
        """How many ranks share the sequence."""
        return len(self.runs)

    def runs_of(self, rank: int) -> tuple[Range, ...]:
        """The runs of one rank, ``(start, end)`` in the packed sequence."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"the layout has ranks 0 to {self.world_size - 1}, given rank {rank}")
        return self.runs[rank]

    def local_tokens(self, rank: int) -> int:
        """How many tokens `rank` holds."""
        return sum(end - start for start, end in self.runs_of(rank))

    def order(self) -> tuple[tuple[int, int], ...]:
        """All runs along the sequence, as ``(rank, index among the rank's runs)``."""
        return self.cached(
            "order",
            lambda: tuple(
                (rank, i)
                for _, rank, i in sorted(
                    (start, rank, i) for rank, runs in enumerate(self.runs) for i, (start, _) in enumerate(runs)
                )
            ),
        )

    def pieces(self, rank: int) -> tuple[Piece, ...]:
        """The rank's runs cut at document boundaries, in local order."""
        return self.cached(("pieces", rank), lambda: tuple(self._cut(rank)))

    def _cut(self, rank: int) -> list[Piece]:
        pieces: list[Piece] = []
        place = 0
        for run, (start, end) in enumerate(self.runs_of(rank)):
            document = bisect_right(self.cu_seqlens, start) - 1
            while start < end:
                first, last = self.cu_seqlens[document], self.cu_seqlens[document + 1]
                stop = min(end, last)
                pieces.append(
                    Piece(place, stop - start, run, document, start - first, opens=start == first, closes=stop == last)
                )
                place += stop - start
                start = stop
                document += 1
        return pieces

    def cached(self, key: Any, build: Any) -> Any:
        """What `build` returns, built once for this layout: plans are made on the host once, not in every layer."""
        if key not in self._cache:
            self._cache[key] = build()
        return self._cache[key]


def check_cu_seqlens(cu_seqlens: Sequence[int] | Tensor | None, total_tokens: int) -> tuple[int, ...]:
    """Document boundaries as integers; one document when None.

    Raises:
        ValueError: unless they start at 0, rise and end at `total_tokens`.
    """
    if cu_seqlens is None:
        return (0, total_tokens)
    bounds = tuple(int(c) for c in (cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens))
    if len(bounds) < 2 or bounds[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0 and hold at least one document, given {_brief(bounds)}")
    for n, (start, end) in enumerate(pairwise(bounds)):
        if end <= start:
            raise ValueError(f"cu_seqlens must rise: entry {n + 1} is {end} after {start}")
    if bounds[-1] != total_tokens:
        raise ValueError(f"cu_seqlens must end at the number of tokens, {total_tokens}, given {bounds[-1]}")
    return bounds


def _check_sizes(total_tokens: int, world_size: int) -> None:
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, given {world_size}")
    if total_tokens < world_size:
        raise ValueError(
            f"the sequence is shorter than the ranks: total_tokens={total_tokens}, world_size={world_size}; "
            "use a longer sequence, fewer ranks, or SequenceLayout.from_ranges with empty ranks"
        )


def _zigzag(start: int, end: int, world_size: int, first_long: int) -> list[list[Range]]:
    """``(r, 2W−1−r)`` of 2W stretches of tokens start..end; those from number `first_long` on take the odd tokens."""
    stretches = 2 * world_size
    short, odd = divmod(end - start, stretches)
    cuts = [start]
    for i in range(stretches):
        cuts.append(cuts[-1] + short + ((i - first_long) % stretches < odd))
    return [
        [(cuts[i], cuts[i + 1]) for i in (rank, stretches - 1 - rank) if cuts[i + 1] > cuts[i]]
        for rank in range(world_size)
    ]


def _merge(rows: Sequence[Range]) -> tuple[Range, ...]:
    runs: list[Range] = []
    for start, end in rows:
        if end == start:
            continue
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((start, end))
    return tuple(runs)


def _concatenate(parts: Any) -> Tensor:
    parts = list(parts)
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)


def _brief(bounds: tuple[int, ...]) -> str:
    return str(list(bounds)) if len(bounds) <= 8 else f"[{bounds[0]}, {bounds[1]}, ..., {bounds[-1]}]"
