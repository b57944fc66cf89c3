"""The order in which corpora are read: every window of one once an epoch, shuffled, from three integers alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lasp.data.tokens import Tokens

#: What a token that is not to be predicted has for a target.
NO_TARGET = -100
#: Windows of several corpora in which each has its share.
ROUND = 4096
#: Rounds of the network that shuffles.
NETWORK = 6


@dataclass(frozen=True)
class Part:
    """A stretch of a corpus, in windows.

    Attributes:
        tokens: the corpus.
        start: the token with which the stretch begins.
        count: how many windows it has.
    """

    tokens: Tokens
    start: int
    count: int

    @classmethod
    def of(cls, tokens: Tokens, seq_len: int, share: tuple[float, float] = (0.0, 1.0)) -> Part:
        """From one share of the tokens to another, in windows of `seq_len` tokens and the target after them.

        Raises:
            ValueError: where there is not one.
        """
        start, end = (round(x * len(tokens)) for x in share)
        if end - start < seq_len + 1:
            raise ValueError(
                f"{tokens.name} holds {end - start} tokens{'' if share == (0.0, 1.0) else ' for this'}: a window of "
                f"--seq-len {seq_len} and its last target need {seq_len + 1}"
            )
        return cls(tokens, start, (end - start - 1) // seq_len)


class Windows:
    """Windows of one corpus or of several, `batch_size` of them a step: all of an epoch, each once, before any of the next.

    The windows are `seq_len` tokens apart, and each has one more token, the last target. What a step reads follows from the
    seed, the round and the place in it, and not from how the step is split over ranks. A round of one corpus is an epoch. Of
    several, which have epochs of their own, a round is `ROUND` windows, of which each corpus has its share.

    Args:
        parts: what is read.
        seq_len: T, how many tokens a window trains on.
        batch_size: how many windows a step has, over all ranks.
        seed: of the order.
        weights: how much of each corpus is read, in proportion; as many windows as each has when None.
        masked: whether a document's last token has no target: the next document's first is none of its own.

    Raises:
        ValueError: unless there is a weight above 0 for each.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        seq_len: int,
        batch_size: int,
        seed: int,
        weights: Sequence[float] | None = None,
        masked: bool = False,
    ):
        self.parts, self.seq_len, self.batch_size, self.seed, self.masked = parts, seq_len, batch_size, seed, masked
        given = [float(part.count) for part in parts] if weights is None else list(weights)
        if len(given) != len(parts) or not all(weight > 0 for weight in given):
            raise ValueError(f"--data-weights {given}: expected one above 0 for each of {len(parts)} --data")
        self.round = parts[0].count if len(parts) == 1 else ROUND
        #: Whose turn it is at each place of a round, and how often it was before.
        self.turns = _turns(given, self.round) if len(parts) > 1 else None
        self.shares = [self.round] if self.turns is None else np.bincount(self.turns[0], minlength=len(parts)).tolist()
        if min(self.shares) == 0:
            raise ValueError(f"--data-weights {given}: the least is less than one window in {ROUND}")
        #: Windows that were read before step 0: a run that goes on counts from where another ended.
        self.before = 0

    @property
    def digest(self) -> str:
        """Of all that is read, and how it is dealt out: of two with the same one, a place in one is the same in the other."""
        told = [(part.tokens.digest, part.start, part.count) for part in self.parts]
        return hashlib.sha256(repr((told, self.seq_len, self.shares)).encode()).hexdigest()

    @property
    def tokens_per_byte(self) -> float:
        """Tokens a byte of text, as much of each corpus as is read."""
        size = sum(share / part.tokens.per_byte for share, part in zip(self.shares, self.parts, strict=True))
        return self.round / size

    def position(self, step: int) -> tuple[int, int, int]:
        """Where step `step` begins: the seed, the round and how many of its windows are read."""
        return self.seed, *divmod(self.before + step * self.batch_size, self.round)

    def go_on(self, position: tuple[int, int, int], step: int) -> None:
        """Let step `step` begin at a position."""
        self.seed = position[0]
        self.before = position[1] * self.round + position[2] - step * self.batch_size

    def targets(self, step: int) -> int:
        """How many tokens all windows of the step have to predict."""
        if not self.masked:
            return self.batch_size * self.seq_len
        windows = (self._window(step, row) for row in range(self.batch_size))
        return sum(self.seq_len - len(_inner(tokens, at + 1, at + self.seq_len + 1)) for tokens, at in windows)

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
                tokens, at = self._window(step, first + row)
                at += place
                read = tokens.tokens[at : at + stop - start + 1].astype(np.int64)
                inputs.append(read[:-1])
                targets.append(read[1:])
                if self.masked:
                    targets[-1] = targets[-1].copy()
                    targets[-1][_inner(tokens, at + 1, at + stop - start + 1) - at - 1] = NO_TARGET
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
            (tokens, at), place = self._window(step, first + row), row * self.seq_len
            bounds += [place, *(place + _inner(tokens, at + 1, at + self.seq_len) - at).tolist()]
        return (*bounds, count * self.seq_len)

    def _window(self, step: int, row: int) -> tuple[Tokens, int]:
        """The corpus of a step's window, and the token with which it begins."""
        turn, place = divmod(self.before + step * self.batch_size + row, self.round)
        i, nth = (0, place) if self.turns is None else (int(x[place]) for x in self.turns)
        part = self.parts[i]
        epoch, nth = divmod(turn * self.shares[i] + nth, part.count)
        return part.tokens, part.start + self.seq_len * shuffled(nth, part.count, (self.seed, epoch))


def _turns(weights: Sequence[float], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Turns by weight, spread evenly: whose each is, the one's that is furthest behind, and how many it had before."""
    shares = np.asarray(weights) / sum(weights)
    had = np.zeros(len(weights), dtype=np.int64)
    whose, before = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
    for place in range(count):
        i = int(np.argmax((place + 1) * shares - had))
        whose[place], before[place] = i, had[i]
        had[i] += 1
    return whose, before


def _inner(tokens: Tokens, start: int, end: int) -> np.ndarray:
    """The tokens from `start` to before `end` with which documents begin."""
    documents = tokens.documents
    return documents[np.searchsorted(documents, start) : np.searchsorted(documents, end)]


@lru_cache(2**14)  # a step asks thrice for the same
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
        for i in range(NETWORK):
            left, right = right, left ^ (_mixed(key, i, right) & ((1 << half) - 1))
        place = left << half | right
        if place < count:
            return place


def _mixed(key: tuple[int, int], turn: int, value: int) -> int:
    """Bits that follow from all of them."""
    packed = b"".join(x.to_bytes(8, "little") for x in (*key, turn, value))
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")
