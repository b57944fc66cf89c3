"""Multi-query associative recall: a task that a model solves as far as its memory reaches."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

#: What stands where there is neither a pair nor a query.
FILLER = 0
#: What a token without an answer has for a target: `torch.nn.functional.cross_entropy` leaves it out.
NO_TARGET = -100
#: How much likelier near queries are than far ones: of Zoology's power law, the exponent less 1.
NEARNESS = 0.01


class Recall:
    """Sequences of pairs of keys and values, and then each key again, somewhere: its value is the only thing to predict.

    MQAR: Zoology, https://arxiv.org/abs/2312.04927, section 3.2 and appendix C. Keys are the lower half of the vocabulary but
    its first token, values the upper half; a value is drawn for each key anew in every sequence.

    Args:
        vocabulary: how many tokens there are.
        pairs: D, how many pairs, and queries, a sequence has.
        seq_len: T, of which pairs take 2 D and each query, with its answer, 2.
        batch_size: how many sequences a step has, over all ranks.
        seed: what they are drawn from, with the step.

    Raises:
        ValueError: where there are fewer keys than pairs, or the sequence is too short for them.
    """

    def __init__(self, vocabulary: int, pairs: int, seq_len: int, batch_size: int, seed: int):
        self.keys = vocabulary // 2
        if not 1 <= pairs < self.keys:
            raise ValueError(
                f"--pairs {pairs}: a vocabulary of {vocabulary} has {self.keys - 1} keys, so from 1 to that many"
            )
        if seq_len < 4 * pairs:
            raise ValueError(f"--seq-len {seq_len}: --pairs {pairs} and as many queries need {4 * pairs}")
        self.vocabulary, self.pairs, self.seq_len = vocabulary, pairs, seq_len
        self.batch_size, self.seed = batch_size, seed
        slots = np.arange(1, (seq_len - 2 * pairs) // 2 + 1, dtype=np.float64)
        self._likely = NEARNESS * slots ** (NEARNESS - 1)
        self._likely /= self._likely.sum()

    @property
    def targets(self) -> int:
        """How many a sequence has."""
        return self.pairs

    def rows(self, step: int, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Sequences `first` to ``first + count`` of the step: inputs and targets, int64 ``[count, T]`` each."""
        rows = [self._row(np.random.default_rng((self.seed, step, row))) for row in range(first, first + count)]
        inputs, targets = (torch.from_numpy(np.stack(x)) for x in zip(*rows, strict=True))
        return inputs, targets

    def _row(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        keys = 1 + random.choice(self.keys - 1, self.pairs, replace=False)
        values = random.integers(self.keys, self.vocabulary, self.pairs)
        inputs = np.full(self.seq_len, FILLER, dtype=np.int64)
        targets = np.full(self.seq_len, NO_TARGET, dtype=np.int64)
        inputs[0 : 2 * self.pairs : 2], inputs[1 : 2 * self.pairs : 2] = keys, values
        at = 2 * self.pairs + 2 * random.choice(len(self._likely), self.pairs, replace=False, p=self._likely)
        inputs[at], inputs[at + 1], targets[at] = keys, values, values
        return inputs, targets
