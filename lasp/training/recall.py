"""Multi-query associative recall: a task that a model solves as far as its memory reaches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lasp.data.windows import NO_TARGET

#: What stands where there is neither a pair nor a query.
FILLER = 0
#: How much likelier near queries are than far ones: of Zoology's power law, the exponent less 1.
NEARNESS = 0.01


class Recall:
    """Sequences of pairs of keys and values, and then each key again, somewhere: its value is the only thing to predict.

    MQAR: Zoology, https://arxiv.org/abs/2312.04927, section 3.2 and appendix C. Keys are the lower half of the vocabulary but
    its first token, values the upper half; a value is drawn for each key anew in every sequence. All sequences of a step have
    as many pairs. A model that meets few as well as many learns from the few how to recall.

    Args:
        vocabulary: how many tokens there are.
        pairs: how many pairs D, and queries, a sequence has; where there are several numbers, each step draws one.
        seq_len: T, of which pairs take 2 D and each query, with its answer, 2.
        batch_size: how many sequences a step has, over all ranks.
        seed: what they are drawn from, with the step.

    Raises:
        ValueError: where there are fewer keys than pairs, or the sequence is too short for them.
    """

    def __init__(self, vocabulary: int, pairs: Sequence[int], seq_len: int, batch_size: int, seed: int):
        self.keys = vocabulary // 2
        if not pairs:
            raise ValueError("--pairs: expected how many pairs a sequence has, given nothing")
        for count in pairs:
            if not 1 <= count < self.keys:
                raise ValueError(
                    f"--pairs {count}: a vocabulary of {vocabulary} has {self.keys - 1} keys, so from 1 to that many"
                )
            if seq_len < 4 * count:
                raise ValueError(f"--seq-len {seq_len}: --pairs {count} and as many queries need {4 * count}")
        self.vocabulary, self.pairs, self.seq_len = vocabulary, tuple(pairs), seq_len
        self.batch_size, self.seed = batch_size, seed

    def targets(self, step: int) -> int:
        """How many answers all sequences of the step want."""
        return self.batch_size * self._pairs(step)

    def rows(self, step: int, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Sequences `first` to ``first + count`` of the step: inputs and targets, int64 ``[count, T]`` each."""
        pairs = self._pairs(step)
        rows = [self._row(np.random.default_rng((self.seed, step, row)), pairs) for row in range(first, first + count)]
        inputs, targets = (torch.from_numpy(np.stack(x)) for x in zip(*rows, strict=True))
        return inputs, targets

    def take(self, step: int, first: int, ranges: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Some of their tokens, int64 ``[N]`` each: see `lasp.data.Windows.take`."""
        count = -(-max((end for _, end in ranges), default=0) // self.seq_len)
        whole = (torch.empty(0, dtype=torch.int64),) * 2 if not count else self.rows(step, first, count)
        inputs, targets = (torch.cat([x.flatten()[start:end] for start, end in ((0, 0), *ranges)]) for x in whole)
        return inputs, targets

    def documents(self, step: int, first: int, count: int) -> None:
        """None: a sequence is by itself."""

    def _pairs(self, step: int) -> int:
        """How many a sequence of the step has."""
        return self.pairs[int(np.random.default_rng((self.seed, step, self.batch_size)).integers(len(self.pairs)))]

    def _row(self, random: np.random.Generator, pairs: int) -> tuple[np.ndarray, np.ndarray]:
        keys = 1 + random.permutation(self.keys - 1)[:pairs]
        values = random.integers(self.keys, self.vocabulary, pairs)
        inputs = np.full(self.seq_len, FILLER, dtype=np.int64)
        targets = np.full(self.seq_len, NO_TARGET, dtype=np.int64)
        inputs[0 : 2 * pairs : 2], inputs[1 : 2 * pairs : 2] = keys, values
        # Where the queries stand, drawn one after another: the first of clocks that ring the sooner, the likelier they are.
        slots = np.arange(1, (self.seq_len - 2 * pairs) // 2 + 1, dtype=np.float64)
        rings = random.exponential(size=len(slots)) * slots ** (1 - NEARNESS)
        at = 2 * pairs + 2 * np.argsort(rings)[:pairs]
        inputs[at], inputs[at + 1], targets[at] = keys, values, values
        return inputs, targets
