"""The algebra of summaries: for all families, dense included, composition is the map of the joined run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lasp.kernels import Chain, Course, Summary
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


@st.composite
def courses(draw: st.DrawFn) -> tuple[list[Chain], int, list[int] | None]:
    """Any chains over maps in any order, some from a seed of their own, and the states wanted."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    members = draw(st.permutations(range(sum(lengths))))
    seeds = draw(st.lists(st.none() | st.integers(0, 2), min_size=len(lengths), max_size=len(lengths)))
    runs, run = [], -1
    for i in range(len(lengths)):
        # A chain without a seed starts a run; one with a seed may go on with the run before it.
        run += 1 if i == 0 or seeds[i] is None or draw(st.booleans()) else 0
        runs.append(run)
    chains, start = [], 0
    for length, seed, run in zip(lengths, seeds, runs, strict=True):
        chains.append(Chain(tuple(members[start : start + length]), run, seed))
        start += length
    wanted = draw(st.none() | st.lists(st.sampled_from(members), unique=True, min_size=1))
    return chains, runs[-1] + 1, wanted


def expected_course(
    chains: list[Chain], wanted: list[int], maps: Summary, seeds: Tensor, entering: Tensor
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """The state before each map and after each run, one map after the other."""
    before, after = {}, {}
    for chain in chains:
        state = entering[:, chain.run : chain.run + 1]
        if chain.seed is not None:
            state = seeds[:, chain.seed : chain.seed + 1]
        for member in chain.members:
            before[member] = state
            state = one(maps, member).apply(state)
        after[chain.run] = state
    return {m: before[m] for m in wanted}, after


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seeded", [True, False])
@given(course=courses())
@settings(max_examples=40, deadline=None)
def test_a_course_is_one_map_after_the_other(
    family: str, seeded: bool, course: tuple[list[Chain], int, list[int] | None]
) -> None:
    chains, runs, wanted = course
    maps = random_summary(family, sum(len(chain.members) for chain in chains))
    x = Inputs(1, torch.float64)
    seeds, entering = x.normal(B, 3, H, K, V), x.normal(B, runs, H, K, V)
    if not seeded:
        seeds = torch.zeros_like(seeds)
    built = Course(chains, runs, wanted)
    given_seeds = seeds if seeded else None
    slots = list(range(maps.count)) if wanted is None else wanted
    states, after = expected_course(chains, slots, maps, seeds, entering)
    whole = built.leaving(maps, given_seeds)
    given_states, given_after = built.states(maps, given_seeds, entering), whole.apply(entering)
    for slot, member in enumerate(slots):
        assert relative_error(given_states[:, slot : slot + 1], states[member]) < 1e-13
    for run in range(runs):
        assert relative_error(given_after[:, run : run + 1], after[run]) < 1e-13
    nothing = built.states(maps, given_seeds, torch.zeros_like(entering))
    assert torch.equal(built.states(maps, given_seeds, None), nothing)
    assert torch.equal(whole.pack(), Summary(whole.A, whole.B).pack())


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
def test_a_long_chain_in_float32(family: str) -> None:
    """256 summaries composed lose no more than 1e-5."""
    exact = random_summary(family, 256)
    if family == "dense":
        # Products of random matrices vanish; rotations, shrunk a little, keep the chain's memory long.
        rotations, _ = torch.linalg.qr(Inputs(5, torch.float64).normal(B, 256, H, K, K))
        exact = Summary(0.999 * rotations, exact.B)
    course = Course([Chain(tuple(range(256)))], 1)
    rounded = course.states(Summary(exact.A.float(), exact.B.float()), None, None)
    assert relative_error(rounded, course.states(exact, None, None)) < 1e-5


def test_shapes_are_checked() -> None:
    state: Tensor = torch.zeros(1, 1, 1, 2, 2)
    with pytest.raises(ValueError, match=r"given A: \[1, 1\]"):
        Summary(torch.zeros(1, 1), state)
    assert act(torch.full((1, 1, 1), 2.0), torch.ones(1, 3, 4, 2, 2)).shape == (1, 3, 4, 2, 2)
