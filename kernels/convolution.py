"""The short causal convolution on one device: forward and backward in PyTorch, and how its tokens hang together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


class Pieces:
    """Local tokens, cut into pieces that know nothing of each other, each with the few rows of a halo that precede it.

    Args:
        lengths: how many tokens each piece has; the pieces are the local tokens, one after the other.
        before: how many rows of the halo precede each piece; the halo is these rows, piece after piece.
        reach: how many rows before it a token reads: W − 1. Where a piece has fewer before it, the rest counts as zero.
    """

    def __init__(self, lengths: Sequence[int], before: Sequence[int], reach: int):
        self.lengths, self.before, self.reach = tuple(lengths), tuple(before), reach
        #: How many rows the halo has.
        self.halo = sum(before)
        self._blocks: dict[tuple[int, torch.device], Tensor] = {}
        self._rows: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def blocks(self, size: int, device: torch.device) -> Tensor:
        """The pieces in blocks of at most `size` tokens: int32 ``[n, 5]``, made once.

        A row is the block's first token, its piece's start and end, where its piece's rows of the halo end, how many those are.
        """
        key = size, device
        if key not in self._blocks:
            rows = []
            starts, ends = accumulate(self.lengths, initial=0), accumulate(self.before)
            for start, length, halo_end, before in zip(starts, self.lengths, ends, self.before, strict=False):
                rows += [
                    (first, start, start + length, halo_end, before) for first in range(start, start + length, size)
                ]
            self._blocks[key] = torch.tensor(rows, dtype=torch.int32).reshape(-1, 5).to(device)
        return self._blocks[key]

    def rows(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Indices of the tokens with `reach` rows before each piece, made once.

        The source of each row among a row of zeros, the halo and the tokens; and the places of the halo and of the tokens.
        """
        if device not in self._rows:
            source: list[int] = []
            halo: list[int] = []
            tokens: list[int] = []
            for length, before in zip(self.lengths, self.before, strict=True):
                source += [0] * (self.reach - before)
                source += range(1 + len(halo), 1 + len(halo) + before)
                halo += range(len(source) - before, len(source))
                source += range(1 + self.halo + len(tokens), 1 + self.halo + len(tokens) + length)
                tokens += range(len(source) - length, len(source))
            self._rows[device] = _index(source, device), _index(halo, device), _index(tokens, device)
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


def _index(rows: list[int], device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.long).to(device)
