"""The halo: the few tokens before each piece of a document, brought from the ranks that hold them.

What a causal convolution of W taps needs: a token reads the W−1 tokens before it in its document, and where a rank's run
starts in the middle of a document, those lie on another rank, or on several where runs are shorter than that.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.parallel.layout import SequenceLayout
from lasp.parallel.sequence_parallel import SequenceParallel


class Halo:
    """Which rows go where, for one rank: made once for a layout.

    Every piece (the tokens of one document in one run) is preceded by `reach` rows: the tokens before it in its document,
    or zeros where the document starts later than that.

    Attributes:
        sent: how many rows go to each rank.
        received: how many rows come from each rank.
        travels: whether any rank sends a row: otherwise none of them communicates.
    """

    def __init__(self, layout: SequenceLayout, rank: int, reach: int):
        owners = _Owners(layout)
        # For each rank, whom it asks for which of their tokens.
        asked = [_asked(layout, owners, asking, reach) for asking in range(layout.world_size)]
        self.travels = any(owner != asking for asking, wanted in enumerate(asked) for owner, _ in wanted)
        sent = [[token for owner, token in wanted if owner == rank] for wanted in asked]
        sent[rank] = []
        came: list[list[tuple[int, int]]] = [
            [(owner, token) for owner, token in asked[rank] if owner == source and source != rank]
            for source in range(layout.world_size)
        ]
        self.sent, self.received = [len(rows) for rows in sent], [len(rows) for rows in came]

        # The preceded rows are picked from: a row of zeros, the local tokens, what was received.
        local = layout.local_tokens(rank)
        arrived = {key: 1 + local + at for at, key in enumerate(key for rows in came for key in rows)}
        source: list[int] = []
        places: list[int] = []
        needed = iter(asked[rank])
        for piece in layout.pieces(rank):
            before = min(reach, piece.offset)
            source += [0] * (reach - before)
            for _ in range(before):
                key = next(needed)
                source.append(1 + key[1] if key[0] == rank else arrived[key])
            places += range(len(source), len(source) + piece.length)
            source += range(1 + piece.start, 1 + piece.start + piece.length)
        self.tables = (_index(source), _index([token for rows in sent for token in rows]), _index(places))
        self._on: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    @classmethod
    def of(cls, layout: SequenceLayout, rank: int, reach: int) -> Halo:
        """The halo of one rank, made once and kept with the layout."""
        halo: Halo = layout.cached(("halo", rank, reach), lambda: cls(layout, rank, reach))
        return halo

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Indices on `device`: the source of each preceded row, the local tokens to send, the places of the local tokens."""
        if device not in self._on:
            source, sent, places = (table.to(device) for table in self.tables)
            self._on[device] = source, sent, places
        return self._on[device]


def precede(x: Tensor, halo: Halo, sp: SequenceParallel) -> Tensor:
    """Put before each piece of this rank the tokens that precede it, by one all-to-all where any of them travels.

    Args:
        x: ``[B, T_local, D]``.
        halo: of this layout and rank.
        sp: the ranks.

    Returns:
        ``[B, T_local + reach · pieces, D]``; ``halo.on(device)[2]`` tells where the local tokens stand in it.
    """
    source, sent, _ = halo.on(x.device)
    parts = [x.new_zeros(x.shape[0], 1, x.shape[2]), x]
    if halo.travels:
        rows = x.index_select(1, sent).transpose(0, 1)
        parts.append(_AllToAll.apply(rows, halo.sent, halo.received, sp.group).transpose(0, 1))
    return torch.cat(parts, dim=1).index_select(1, source)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, drows: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(drows, ctx.received, ctx.sent, ctx.group), None, None, None


def _all_to_all(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    came = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(came, rows.contiguous(), received, sent, group=group)
    return came


class _Owners:
    """Finds the rank and the local place of a token of the packed sequence."""

    def __init__(self, layout: SequenceLayout):
        rows = []
        for rank, runs in enumerate(layout.runs):
            place = 0
            for start, end in runs:
                rows.append((start, rank, place))
                place += end - start
        self.rows = sorted(rows)
        self.starts = [start for start, _, _ in self.rows]

    def __call__(self, token: int) -> tuple[int, int]:
        start, rank, place = self.rows[bisect_right(self.starts, token) - 1]
        return rank, place + token - start


def _asked(layout: SequenceLayout, owners: _Owners, rank: int, reach: int) -> list[tuple[int, int]]:
    """The tokens before each piece of `rank`, as (rank, its local token), in the order in which they are read."""
    asked = []
    for piece in layout.pieces(rank):
        first = layout.cu_seqlens[piece.document] + piece.offset
        asked += [owners(token) for token in range(first - min(reach, piece.offset), first)]
    return asked


def _index(rows: Sequence[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.long)
