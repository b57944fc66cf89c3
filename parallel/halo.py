"""The halo: the few tokens before each piece of a document, brought from the ranks that hold them.

What a causal convolution of W taps needs: a token reads the W−1 tokens before it in its document, and where a rank's run
starts in the middle of a document, those lie on another rank, or on several where runs are shorter than that.
"""

from __future__ import annotations

from bisect import bisect_right

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.kernels.convolution import Pieces
from lasp.parallel.exposure import exposed
from lasp.parallel.layout import SequenceLayout


class Halo:
    """Which rows go where, for one rank: made once for a layout.

    Every piece (the tokens of one document in one run) is preceded by up to `reach` rows: the tokens before it in its
    document, as many as there are. These rows of all pieces, one piece after the other, are the rank's halo. Some are copied
    from the rank's own tokens, some come from other ranks.

    Attributes:
        pieces: the rank's pieces and how many rows of the halo each has.
        near: how many rows of the halo are tokens of the rank itself.
        sent: how many rows go to each rank.
        received: how many rows come from each rank.
        travels: whether any rank sends a row: otherwise none of them communicates.
    """

    def __init__(self, layout: SequenceLayout, rank: int, reach: int):
        pieces = layout.pieces(rank)
        self.pieces = Pieces([p.length for p in pieces], [min(reach, p.offset) for p in pieces], reach)
        owners = _Owners(layout)
        # For each rank, whom it asks for which of their tokens.
        asked = [_asked(layout, owners, asking, reach) for asking in range(layout.world_size)]
        self.travels = any(owner != asking for asking, wanted in enumerate(asked) for owner, _ in wanted)
        near = [token for owner, token in asked[rank] if owner == rank]
        sent = [[token for owner, token in wanted if owner == rank] for wanted in asked]
        sent[rank] = []
        self.near, self.sent = len(near), [len(rows) for rows in sent]
        # Rows come sorted by rank, the rank's own first.
        came = sorted(range(len(asked[rank])), key=lambda row: (asked[rank][row][0] != rank, asked[rank][row][0]))
        self.received = [0] * layout.world_size
        for owner, _ in asked[rank]:
            self.received[owner] += owner != rank
        order = sorted(range(len(came)), key=came.__getitem__)
        self.tables = near + [token for rows in sent for token in rows], order, came
        self._on: dict[torch.device, tuple[Tensor, ...]] = {}

    @classmethod
    def of(cls, layout: SequenceLayout, rank: int, reach: int) -> Halo:
        """The halo of one rank, made once and kept with the layout."""
        halo: Halo = layout.cached(("halo", rank, reach), lambda: cls(layout, rank, reach))
        return halo

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        """Indices on `device`: the local tokens to copy and those to send; where each row of the halo is among those that
        came, its own first; and the reverse."""
        if device not in self._on:
            self._on[device] = tuple(torch.tensor(rows, dtype=torch.long).to(device) for rows in self.tables)
        return self._on[device]


def bring(x: Tensor, halo: Halo, group: dist.ProcessGroup | None) -> Tensor:
    """The halo's rows, by one all-to-all where any of them travels.

    Args:
        x: ``[B, T_local, D]``.
        halo: of this layout and rank.
        group: the ranks.

    Returns:
        ``[B, halo.pieces.halo, D]``.
    """
    picked, order, _ = halo.on(x.device)
    if not halo.travels:
        return x.index_select(1, picked)
    rows = x.index_select(1, picked).transpose(0, 1)
    came = _all_to_all(rows[halo.near :], halo.sent, halo.received, group)
    return torch.cat([rows[: halo.near], came]).index_select(0, order).transpose(0, 1)


def take_back(dhalo: Tensor, dx: Tensor, halo: Halo, group: dist.ProcessGroup | None) -> None:
    """Add the gradients of the halo's rows to those of the tokens that they are, on whichever ranks: `bring` in reverse.

    Args:
        dhalo: ``[B, halo.pieces.halo, D]``.
        dx: ``[B, T_local, D]``, which they are added to.
        halo: of this layout and rank.
        group: the ranks.
    """
    picked, _, came = halo.on(dx.device)
    if halo.travels:
        rows = dhalo.index_select(1, came).transpose(0, 1)
        back = _all_to_all(rows[halo.near :], halo.received, halo.sent, group)
        dhalo = torch.cat([rows[: halo.near], back]).transpose(0, 1)
    if len(picked):
        dx.index_add_(1, picked, dhalo)


def _all_to_all(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup | None) -> Tensor:
    came = rows.new_empty(sum(received), *rows.shape[1:])
    exposed(lambda: dist.all_to_all_single(came, rows.contiguous(), received, sent, group=group), rows.device)
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
