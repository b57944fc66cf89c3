"""Associative recall as a task: what it asks has one answer, the same sequences however a step is split."""

from __future__ import annotations

import pytest
import torch

from lasp.data.windows import NO_TARGET
from lasp.training.recall import FILLER, Recall


def test_every_key_is_asked_for_once_and_has_its_value_for_an_answer() -> None:
    source = Recall(64, pairs=(8,), seq_len=50, batch_size=4, seed=0)
    inputs, targets = source.rows(3, 0, 4)
    assert inputs.shape == targets.shape == (4, 50)
    for row, answers in zip(inputs.tolist(), targets.tolist(), strict=True):
        pairs = dict(zip(row[0:16:2], row[1:16:2], strict=True))
        assert len(pairs) == 8
        assert all(0 < key < 32 <= value < 64 for key, value in pairs.items())
        asked = [t for t, answer in enumerate(answers) if answer != NO_TARGET]
        assert sorted(row[t] for t in asked) == sorted(pairs)
        assert all(answers[t] == pairs[row[t]] == row[t + 1] for t in asked)
        others = set(range(16, 50)) - {t + i for t in asked for i in (0, 1)}
        assert all(row[t] == FILLER for t in others)
    assert (targets != NO_TARGET).sum() == source.targets(3) == 32


def test_rows_are_the_same_however_a_step_is_split() -> None:
    source = Recall(64, pairs=(8,), seq_len=50, batch_size=4, seed=1)
    inputs, targets = source.rows(2, 0, 4)
    for row in range(4):
        one = source.rows(2, row, 1)
        assert torch.equal(one[0][0], inputs[row])
        assert torch.equal(one[1][0], targets[row])
    assert not torch.equal(inputs, source.rows(3, 0, 4)[0])
    part = source.take(2, 1, [(10, 60), (99, 100)])
    assert torch.equal(part[1], torch.cat([targets.flatten()[60:110], targets.flatten()[149:150]]))
    assert source.take(2, 1, [])[0].shape == (0,)


@pytest.mark.parametrize(
    ("pairs", "seq_len", "message"),
    [
        (32, 400, "--pairs 32: a vocabulary of 64 has 31 keys"),
        (8, 31, "--seq-len 31: --pairs 8 and as many queries need 32"),
    ],
)
def test_errors(pairs: int, seq_len: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recall(64, (1, pairs), seq_len, 4, 0)


def test_each_step_draws_how_many_pairs() -> None:
    source = Recall(64, pairs=(1, 4, 16), seq_len=64, batch_size=2, seed=0)
    drawn = []
    for step in range(60):
        inputs, targets = source.rows(step, 0, 2)
        pairs = source.targets(step) // 2
        assert (targets != NO_TARGET).sum(1).tolist() == 2 * [pairs]
        assert ((inputs > 0) & (inputs < 32)).sum(1).tolist() == 2 * [2 * pairs]
        drawn.append(pairs)
    assert all(drawn.count(pairs) >= 10 for pairs in source.pairs)
