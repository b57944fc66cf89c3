"""The table of segments that a kernel works on."""

from __future__ import annotations

from collections.abc import Sequence
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
        self.lengths = tuple(lengths)
        self.size = size
        self.tokens = sum(self.lengths)
        self.regular = all(length == size for length in self.lengths)
        self._tables: dict[torch.device, Tables] = {}
        self._bounds: dict[torch.device, Tensor] = {}
        self._chunks: dict[tuple[int, torch.device], tuple[int, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.lengths)

    def __repr__(self) -> str:
        return f"Segments({len(self)} of at most {self.size} tokens, {self.tokens} in all)"

    def bounds(self, device: torch.device) -> Tensor:
        """Where the segments lie: int64 ``[n + 1]``, the first token of each and the number of tokens."""
        if device not in self._bounds:
            self._bounds[device] = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.long).to(device)
        return self._bounds[device]

    def chunks(self, size: int, device: torch.device) -> tuple[int, Tensor]:
        """How many chunks of at most `size` tokens the segments have, and how many before each of them: int64 ``[n + 1]``."""
        if (size, device) not in self._chunks:
            counts = [0, *accumulate(-(-length // size) for length in self.lengths)]
            self._chunks[size, device] = counts[-1], torch.tensor(counts, dtype=torch.long).to(device)
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
            lengths = torch.tensor(self.lengths, dtype=torch.long)
            starts = lengths.cumsum(0) - lengths
            place = torch.arange(self.size)
            beyond = place >= lengths[:, None]
            token = (starts[:, None] + place).masked_fill(beyond, 0).flatten()
            self._tables[device] = tuple(  # type: ignore[assignment]
                t.to(device) for t in (token, beyond, (~beyond).flatten().nonzero().flatten())
            )
        return self._tables[device]


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
