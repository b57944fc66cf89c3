"""The short causal convolution on one device: forward and backward in PyTorch, and how its tokens hang together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from lasp.kernels.segments import Cut


class Pieces:
    """Local tokens, cut into pieces that know nothing of each other, each with the few rows of a halo that precede it.

    Args:
        lengths: how many tokens each piece has; the pieces are the local tokens, one after the other.
        before: how many rows of the halo precede each piece; the halo is these rows, piece after piece.
        reach: how many rows before it a token reads: W − 1. Where a piece has fewer before it, the rest counts as zero.
    """

    def __init__(self, lengths: Sequence[int], before: Sequence[int], reach: int):
        self._hold(lengths, before, reach, sum(lengths), sum(before))

    @classmethod
    def counted(cls, lengths: Tensor, reach: int, tokens: int) -> Pieces:
        """Pieces whose lengths only a device knows: none waits for it. `reach` rows precede each.

        Args:
            lengths: int64 ``[pieces]``; pieces may be empty.
            reach: as above.
            tokens: how many there are.
        """
        pieces = cls.__new__(cls)
        pieces._hold(lengths, torch.full_like(lengths, reach), reach, tokens, len(lengths) * reach)
        return pieces

    def _hold(
        self, lengths: Sequence[int] | Tensor, before: Sequence[int] | Tensor, reach: int, tokens: int, halo: int
    ) -> None:
        self.reach, self.tokens = reach, tokens
        #: How many rows the halo has.
        self.halo = halo
        self._given = lengths, before
        self._blocks: dict[tuple[int, torch.device], Tensor] = {}
        self._rows: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    @cached_property
    def _sizes(self) -> tuple[Tensor, Tensor]:
        """How many tokens each piece has, and how many rows before it: made late, a compiler traces what needs none of them."""
        lengths, before = (x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.long) for x in self._given)
        return lengths, before

    def blocks(self, size: int, device: torch.device) -> Tensor:
        """The pieces in blocks of at most `size` tokens: int32 ``[n, 5]``, made once.

        A row is the block's first token, its piece's start and end, where its piece's rows of the halo end, how many those are.
        Of an empty block, the first three are the number of tokens.
        """
        key = size, device
        if key not in self._blocks:
            lengths, before = self._sizes
            cut = Cut.of(lengths, size, self.tokens)
            ends, piece = lengths.cumsum(0), cut.piece
            start = torch.where(cut.filled, (ends - lengths)[piece], self.tokens)
            own = torch.where(cut.filled, before[piece], 0)
            rows = torch.stack([cut.start, start, ends[piece], before.cumsum(0)[piece], own], dim=1)
            self._blocks[key] = rows.to(torch.int32).to(device)
        return self._blocks[key]

    def rows(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Indices of the tokens with `reach` rows before each piece, made once.

        The source of each row among a row of zeros, the halo and the tokens; and the places of the halo and of the tokens.
        """
        if device not in self._rows:
            lengths, before = self._sizes
            own = lengths.device
            pieces = torch.arange(len(lengths), device=own)
            of_row = torch.repeat_interleave(pieces, before, output_size=self.halo)
            of_token = torch.repeat_interleave(pieces, lengths, output_size=self.tokens)
            # Before a row of the halo stand all tokens of earlier pieces, and zeros where a halo is shorter than the reach.
            row, token = torch.arange(self.halo, device=own), torch.arange(self.tokens, device=own)
            zeros = (self.reach - before).cumsum(0)
            halo = row + (lengths.cumsum(0) - lengths)[of_row] + zeros[of_row]
            tokens = token + (of_token + 1) * self.reach
            source = token.new_zeros(self.tokens + len(pieces) * self.reach)
            source[halo] = 1 + row
            source[tokens] = 1 + self.halo + token
            self._rows[device] = source.to(device), halo.to(device), tokens.to(device)
        return self._rows[device]


def forward(x: Tensor, halo: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, pieces: Pieces) -> Tensor:
    """``y_t = activation(bias + Σ_j weight[:, W−1−j] x_{t−j})`` within pieces, summed in float32 at least.

    Args:
        x: ``[B, T, D]``.
        halo: ``[B, pieces.halo, D]``, in x's dtype.
        weight: ``[D, W]``.
        bias: ``[D]``, or None.
        silu: whether the activation is silu, or none.
        pieces: of the T tokens, with a reach of W − 1.

    Returns:
        ``[B, T, D]`` in x's dtype.
    """
    tokens = pieces.rows(x.device)[2]
    pre = _sum(_preceded(x, halo, pieces), weight, bias).index_select(1, tokens - pieces.reach)
    return (torch.nn.functional.silu(pre) if silu else pre).to(x.dtype)


def backward(
    dy: Tensor, x: Tensor, halo: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, pieces: Pieces
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of x, halo, weight and bias, each in its tensor's dtype."""
    _, halo_at, tokens = pieces.rows(x.device)
    rows = _preceded(x, halo, pieces)
    slope = dy.to(rows.dtype)
    if silu:
        pre = _sum(rows, weight, bias).index_select(1, tokens - pieces.reach)
        share = pre.sigmoid()
        slope = slope * share * (1 + pre * (1 - share))
    # Outputs that no token has, those of the halo's rows and the zeros, have no slope.
    count = max(0, rows.shape[1] - pieces.reach)
    slopes = slope.new_zeros(x.shape[0], count, x.shape[2]).index_copy(1, tokens - pieces.reach, slope)
    drows, dtaps = torch.zeros_like(rows), []
    for j in range(weight.shape[1]):
        drows[:, j : j + count] += slopes * weight[:, j].to(rows.dtype)
        dtaps.append((slopes * rows[:, j : j + count]).sum((0, 1)))
    return (
        drows.index_select(1, tokens).to(x.dtype),
        drows.index_select(1, halo_at).to(halo.dtype),
        torch.stack(dtaps, dim=1).to(weight.dtype),
        None if bias is None else slope.sum((0, 1)).to(bias.dtype),
    )


def _preceded(x: Tensor, halo: Tensor, pieces: Pieces) -> Tensor:
    """The tokens with `reach` rows before each piece, in float32 at least."""
    rows = torch.cat([x.new_zeros(x.shape[0], 1, x.shape[2]), halo, x], dim=1)
    return rows.index_select(1, pieces.rows(x.device)[0]).to(torch.promote_types(x.dtype, torch.float32))


def _sum(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Before the activation: output p is that of the row p + W − 1."""
    count = max(0, rows.shape[1] - (weight.shape[1] - 1))
    # Tap j of every output at once: a slice of the rows.
    sum = torch.zeros_like(rows[:, :count])
    for j in range(weight.shape[1]):
        sum += rows[:, j : j + count] * weight[:, j].to(rows.dtype)
    return sum if bias is None else sum + bias.to(rows.dtype)
