"""The algebra of summaries: for all families, dense included, composition is the map of the joined run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lasp.kernels import Chain, Summary
from lasp.kernels.summary import act
from tests.support import Inputs, relative_error

B, H, K, V = 2, 3, 4, 5
FAMILIES = {"identity": 0, "scalar": 3, "diagonal": 4, "dense": 5}


def random_summary(family: str, count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Summary:
    x = Inputs(seed, dtype)
    shape = {
        "identity": (1, count, 1),
        "scalar": (B, count, H),
        "diagonal": (B, count, H, K),
        "dense": (B, count, H, K, K),
    }[family]
    A = torch.ones(shape, dtype=dtype) if family == "identity" else x.uniform(*shape)
    return Summary(A if family != "dense" else A / K, x.normal(B, count, H, K, V))


def one(runs: Summary, i: int) -> Summary:
    return runs.select(torch.tensor([i]))


@pytest.mark.parametrize("family", FAMILIES)
def test_compose_is_one_run_after_the_other(family: str) -> None:
    a, b, c = (random_summary(family, 2, seed) for seed in (0, 1, 2))
    state = Inputs(3, torch.float64).normal(B, 2, H, K, V)
    assert relative_error(a.compose(b).apply(state), b.apply(a.apply(state))) < 1e-14
    left, right = a.compose(b).compose(c), a.compose(b.compose(c))
    assert relative_error(left.A, right.A) < 1e-14
    assert relative_error(left.B, right.B) < 1e-14


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reverse", [False, True])
@given(lengths=st.lists(st.integers(0, 9), min_size=0, max_size=6))
@settings(max_examples=40, deadline=None)
def test_scan_composes_every_chain_by_itself(family: str, reverse: bool, lengths: list[int]) -> None:
    runs = random_summary(family, sum(lengths))
    scanned = Chain(lengths).scan(runs, reverse)
    start = 0
    for length in lengths:
        indices = list(range(start, start + length))
        total: Summary | None = None
        for i in reversed(indices) if reverse else indices:
            total = one(runs, i) if total is None else total.compose(one(runs, i))
            assert relative_error(one(scanned, i).A, total.A) < 1e-13
            assert relative_error(one(scanned, i).B, total.B) < 1e-13
        start += length


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_unpack_inverts_pack(family: str, count: int) -> None:
    runs = random_summary(family, count)
    rows = runs.pack()
    assert rows.shape[0] == count
    # The pattern gives shapes alone: a rank without a run reads the others' rows.
    again = random_summary(family, 0).unpack(rows)
    assert torch.equal(again.A, runs.A)
    assert torch.equal(again.B, runs.B)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_in_which_a_document_starts_forgets(family: str) -> None:
    runs = random_summary(family, 3)
    state = Inputs(1, torch.float64).normal(B, 3, H, K, V)
    opens = torch.tensor([False, True, False])
    after = runs.reset(opens).apply(state)
    assert torch.equal(after[:, 1], runs.B[:, 1])
    assert torch.equal(after[:, ::2], runs.apply(state)[:, ::2])
    assert not runs.void(opens).apply(state)[:, 1].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_long_chain_in_float32(family: str) -> None:
    """256 summaries composed lose no more than 1e-5."""
    exact = random_summary(family, 256)
    if family == "dense":
        # Products of random matrices vanish; rotations, shrunk a little, keep the chain's memory long.
        rotations, _ = torch.linalg.qr(Inputs(5, torch.float64).normal(B, 256, H, K, K))
        exact = Summary(0.999 * rotations, exact.B)
    rounded = Chain([256]).scan(Summary(exact.A.float(), exact.B.float()))
    assert relative_error(rounded.B, Chain([256]).scan(exact).B) < 1e-5


def test_shapes_are_checked() -> None:
    state: Tensor = torch.zeros(1, 1, 1, 2, 2)
    with pytest.raises(ValueError, match=r"given A: \[1, 1\]"):
        Summary(torch.zeros(1, 1), state)
    assert act(torch.full((1, 1, 1), 2.0), torch.ones(1, 3, 4, 2, 2)).shape == (1, 3, 4, 2, 2)
