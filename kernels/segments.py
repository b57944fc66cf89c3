"""The table of segments that a kernel works on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


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
        self._tables: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}
        self._bounds: dict[torch.device, Tensor] = {}

    def __len__(self) -> int:
        return len(self.lengths)

    def __repr__(self) -> str:
        return f"Segments({len(self)} of at most {self.size} tokens, {self.tokens} in all)"

    def bounds(self, device: torch.device) -> Tensor:
        """Where the segments lie: int64 ``[n + 1]``, the first token of each and the number of tokens."""
        if device not in self._bounds:
            self._bounds[device] = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.long).to(device)
        return self._bounds[device]

    def gather(self, x: Tensor) -> Tensor:
        """``[B, T, ...]`` to ``[B, n, size, ...]``, the places after the end of a segment filled with zeros."""
        batch, tokens, *rest = x.shape
        if tokens != self.tokens:
            raise ValueError(f"these segments tile {self.tokens} tokens, given a tensor of {tokens}: {list(x.shape)}")
        if self.regular:
            return x.reshape(batch, len(self), self.size, *rest)
        table, beyond, _ = self.tables(x.device)
        padded = x.index_select(1, table).view(batch, len(self), self.size, *rest)
        return padded.masked_fill(beyond.view(1, len(self), self.size, *([1] * len(rest))), 0)

    def scatter(self, x: Tensor) -> Tensor:
        """The inverse of `gather`: ``[B, n, size, ...]`` to ``[B, T, ...]``."""
        flat = x.flatten(1, 2)
        return flat if self.regular else flat.index_select(1, self.tables(x.device)[2])

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
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
