"""The order in which a corpus is read: every window of it once an epoch, shuffled, from three integers alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lasp.data.tokens import Tokens

#: What a token that is not to be predicted has for a target.
NO_TARGET = -100
#: Rounds of the shuffle.
ROUNDS = 6


class Windows:
    """Windows of a corpus, `batch_size` of them a step: all of an epoch, each once, before any of the next.

    The windows are `seq_len` tokens apart, and each has one more token, the last target. What a step reads follows from the
    seed, the epoch and the place in it, and not from how the step is split over ranks.

    Args:
        tokens: the corpus.
        part: from which token to which, as shares of the corpus: what else there is may validate.
        seq_len: T, how many tokens a window trains on.
        batch_size: how many windows a step has, over all ranks.
        seed: of the order.
        masked: whether a document's last token has no target: the next document's first is none of its own.

    Raises:
        ValueError: where the corpus is shorter than a window.
    """

    def __init__(
        self,
        tokens: Tokens,
        seq_len: int,
        batch_size: int,
        seed: int,
        part: tuple[float, float] = (0.0, 1.0),
        masked: bool = False,
    ):
        self.tokens, self.seq_len, self.batch_size, self.seed, self.masked = tokens, seq_len, batch_size, seed, masked
        self.start, end = (round(share * len(tokens)) for share in part)
        self.count = (end - self.start - 1) // seq_len
        if self.count < 1:
            raise ValueError(
                f"{tokens.name} holds {end - self.start} tokens{'' if part == (0.0, 1.0) else ' for this'}: a window of "
                f"--seq-len {seq_len} and its last target need {seq_len + 1}"
            )
        #: Windows that were read before step 0: a run that goes on counts from where another ended.
        self.before = 0

    def position(self, step: int) -> tuple[int, int, int]:
        """Where step `step` begins: the seed, the epoch and how many of its windows are read."""
        return self.seed, *divmod(self.before + step * self.batch_size, self.count)

    def go_on(self, position: tuple[int, int, int], step: int) -> None:
        """Let step `step` begin at a position."""
        self.seed = position[0]
        self.before = position[1] * self.count + position[2] - step * self.batch_size

    def targets(self, step: int) -> int:
        """How many tokens all windows of the step have to predict."""
        if not self.masked:
            return self.batch_size * self.seq_len
        starts = (self._window(step, row) for row in range(self.batch_size))
        return sum(self.seq_len - len(self._inner(at + 1, at + self.seq_len + 1)) for at in starts)

    def rows(self, step: int, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Windows `first` to ``first + count`` of the step: inputs and targets, int64 ``[count, T]`` each."""
        inputs, targets = self.take(step, first, [(0, count * self.seq_len)])
        return inputs.view(count, -1), targets.view(count, -1)

    def take(self, step: int, first: int, ranges: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Some of their tokens, and no others are read from the disk: inputs and targets, int64 ``[N]`` each.

        Args:
            step: which step.
            first: the window from which ranges count.
            ranges: from which token to before which, of the windows laid one after another.
        """
        inputs, targets = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for start, end in ranges:
            while start < end:
                row, place = divmod(start, self.seq_len)
                stop = min(end, (row + 1) * self.seq_len)
                at = self._window(step, first + row) + place
                read = self.tokens.tokens[at : at + stop - start + 1].astype(np.int64)
                inputs.append(read[:-1])
                targets.append(read[1:])
                if self.masked:
                    targets[-1] = targets[-1].copy()
                    targets[-1][self._inner(at + 1, at + stop - start + 1) - at - 1] = NO_TARGET
                start = stop
        return torch.from_numpy(np.concatenate(inputs)), torch.from_numpy(np.concatenate(targets))

    def documents(self, step: int, first: int, count: int) -> tuple[int, ...] | None:
        """Where documents begin in the rows of the same arguments, laid one after another, and where the last ends.

        A window's beginning begins one. None where documents are not told apart.
        """
        if not self.masked:
            return None
        bounds = []
        for row in range(count):
            at, place = self._window(step, first + row), row * self.seq_len
            bounds += [place, *(place + self._inner(at + 1, at + self.seq_len) - at).tolist()]
        return (*bounds, count * self.seq_len)

    def _inner(self, start: int, end: int) -> np.ndarray:
        """The tokens from `start` to before `end` with which documents begin."""
        documents = self.tokens.documents
        return documents[np.searchsorted(documents, start) : np.searchsorted(documents, end)]

    def _window(self, step: int, row: int) -> int:
        """The token with which a step's window begins."""
        epoch, place = divmod(self.before + step * self.batch_size + row, self.count)
        return self.start + self.seq_len * shuffled(place, self.count, (self.seed, epoch))


def shuffled(place: int, count: int, key: tuple[int, int]) -> int:
    """What stands at a place of the numbers below `count`, shuffled: one of `count` factorial orders, told from the key alone.

    A Feistel network over the next power of four, walked until it lands below `count` (cycle walking: Black and Rogaway,
    "Ciphers with arbitrary finite domains", 2002): nothing is stored, however many there are.

    Args:
        place: from 0 to ``count - 1``.
        count: how many.
        key: the seed and the epoch.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    while True:
        left, right = place >> half, place & ((1 << half) - 1)
        for i in range(ROUNDS):
            left, right = right, left ^ (_mixed(key, i, right) & ((1 << half) - 1))
        place = left << half | right
        if place < count:
            return place


def _mixed(key: tuple[int, int], turn: int, value: int) -> int:
    """Bits that follow from all of them."""
    packed = b"".join(x.to_bytes(8, "little") for x in (*key, turn, value))
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")
