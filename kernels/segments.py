"""The table of segments that a kernel works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

#: What `Segments.tables` gives.
Tables = tuple[Tensor, Tensor, Tensor]


class Segments:
    """Where a device cuts its tokens: consecutive segments that tile the token axis, none longer than `size`.

    A recurrence treats every segment alone, from the state that enters it and the gradient of the state that leaves it;
    how segments follow one another, where documents start and who holds the next run is not its business.

    Args:
        lengths: the length of each segment, in tokens, at least 1.
        size: the longest length allowed.
    """

    def __init__(self, lengths: Sequence[int], size: int):
        if any(not 1 <= length <= size for length in lengths):
            raise ValueError(f"segments hold between 1 and size={size} tokens, given lengths {list(lengths)}")
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.long)
        self._hold(bounds, size, int(bounds[-1]), all(length == size for length in lengths))

    @classmethod
    def at(cls, bounds: Tensor, size: int, tokens: int) -> Segments:
        """Segments whose bounds only a device knows: none waits for it.

        Args:
            bounds: int64 ``[n + 1]``, from 0 to `tokens`, never falling: segments may be empty.
            size: the longest length allowed.
            tokens: how many there are.
        """
        segments = cls.__new__(cls)
        segments._hold(bounds, size, tokens, False)
        return segments

    def _hold(self, bounds: Tensor, size: int, tokens: int, regular: bool) -> None:
        self.size, self.tokens = size, tokens
        #: Whether all are of the full size.
        self.regular = regular
        self._bounds = {bounds.device: bounds}
        self._given, self._count = bounds, len(bounds) - 1
        self._tables: dict[torch.device, Tables] = {}
        self._chunks: dict[tuple[int, torch.device], tuple[int, Tensor]] = {}

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"Segments({len(self)} of at most {self.size} tokens, {self.tokens} in all)"

    def bounds(self, device: torch.device) -> Tensor:
        """Where the segments lie: int64 ``[n + 1]``, the first token of each and the number of tokens."""
        if device not in self._bounds:
            self._bounds[device] = self._given.to(device)
        return self._bounds[device]

    def chunks(self, size: int, device: torch.device) -> tuple[int, Tensor]:
        """How many chunks of at most `size` tokens the segments have, or at least no fewer, and how many before each of them.

        The latter is int64 ``[n + 1]``.
        """
        if (size, device) not in self._chunks:
            cut = Cut.of(self._given.diff(), size, self.tokens)
            self._chunks[size, device] = cut.count, cut.first.to(device)
        return self._chunks[size, device]

    def gather(self, x: Tensor) -> Tensor:
        """``[B, T, ...]`` to ``[B, n, size, ...]``, the places after the end of a segment filled with zeros."""
        if x.shape[1] != self.tokens:
            raise ValueError(
                f"these segments tile {self.tokens} tokens, given a tensor of {x.shape[1]}: {list(x.shape)}"
            )
        return gather(x, self.size, None if self.regular else self.tables(x.device))

    def scatter(self, x: Tensor) -> Tensor:
        """The inverse of `gather`: ``[B, n, size, ...]`` to ``[B, T, ...]``."""
        return scatter(x, None if self.regular else self.tables(x.device))

    def tables(self, device: torch.device) -> Tables:
        """``(token of each place [n·size], places beyond their segment's end [n, size], place of each token [T])``."""
        if device not in self._tables:
            bounds = self.bounds(device)
            starts, place = bounds[:-1, None], torch.arange(self.size, device=device)
            beyond = place >= bounds.diff()[:, None]
            at = torch.arange(self.tokens, device=device)
            segment = torch.searchsorted(bounds[1:], at, right=True)
            token = (starts + place).masked_fill(beyond, 0).flatten()
            self._tables[device] = token, beyond, segment * self.size + at - bounds[segment]
        return self._tables[device]


@dataclass(frozen=True)
class Cut:
    """Pieces of a row of tokens, cut into blocks of which none lies in two of them.

    On a GPU nothing waits to learn how many blocks there are: there may be more, which are empty and stand after all others.

    Attributes:
        first: how many blocks come before each piece, and how many there are: int64 ``[pieces + 1]``.
        piece: the piece of each block; of empty ones the last ``[blocks]``.
        start: the first token of each block; of empty ones how many tokens there are ``[blocks]``.
    """

    first: Tensor
    piece: Tensor
    start: Tensor

    @classmethod
    def of(cls, lengths: Tensor, size: int, tokens: int) -> Cut:
        """Cut.

        Args:
            lengths: how many tokens each piece has, which may be none: int64 ``[pieces]``.
            size: how many tokens a block has at most.
            tokens: how many there are in all.
        """
        device, pieces = lengths.device, len(lengths)
        first = torch.cat([lengths.new_zeros(1), ((lengths + (size - 1)) // size).cumsum(0)])
        count = int(first[-1]) if _may_be_read(lengths) else (tokens + pieces * (size - 1)) // size if tokens else 0
        block = torch.arange(count, device=device)
        piece = torch.searchsorted(first[1:], block, right=True).clamp(max=max(pieces - 1, 0))
        start = (lengths.cumsum(0) - lengths)[piece] + (block - first[piece]) * size
        return cls(first, piece, start.clamp(max=tokens))

    @property
    def count(self) -> int:
        """How many blocks there are, empty ones included."""
        return len(self.piece)

    @property
    def filled(self) -> Tensor:
        """Which blocks are not empty, ``[blocks]``."""
        return torch.arange(self.count, device=self.first.device) < self.first[-1]


def _may_be_read(x: Tensor) -> bool:
    """Whether the host learns numbers without waiting for a device."""
    return not x.is_cuda


def gather(x: Tensor, size: int, tables: Tables | None) -> Tensor:
    """`Segments.gather` by the segments' tables; None where all segments are of the full size."""
    if tables is None:
        return x.reshape(x.shape[0], -1 if x.shape[1] else 0, size, *x.shape[2:])
    token, beyond, _ = tables
    rest = x.shape[2:]
    padded = x.index_select(1, token).view(x.shape[0], *beyond.shape, *rest)
    return padded.masked_fill(beyond.view(1, *beyond.shape, *([1] * len(rest))), 0)


def scatter(x: Tensor, tables: Tables | None) -> Tensor:
    """`Segments.scatter` likewise."""
    flat = x.flatten(1, 2)
    return flat if tables is None else flat.index_select(1, tables[2])
