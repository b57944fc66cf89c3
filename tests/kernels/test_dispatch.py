"""Tokens sent to groups and collected again: nothing is lost, the order is kept, and gradients are those of a plain gather."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lasp.kernels import Dispatch
from lasp.kernels.dispatch import collect, spread
from tests.support import Inputs, assert_close, poisoned_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@given(st.integers(0, 30), st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_sent_and_collected(tokens: int, choices: int, count: int, seed: int) -> None:
    random = Inputs(seed, torch.float64)
    groups = (random.uniform(tokens, choices) * count).long().clamp(max=count - 1)
    dispatch = Dispatch.of(groups, count)
    assert dispatch.counts.tolist() == [(groups == g).sum().item() for g in range(count)]
    # A group's tokens in their order, group after group.
    along = groups.flatten()[torch.argsort(groups.flatten(), stable=True)]
    wanted = [t for g in range(count) for t in range(tokens) for j in range(choices) if groups[t, j] == g]
    assert dispatch.token.tolist() == wanted
    assert torch.equal(along, groups.flatten()[torch.argsort(dispatch.place.flatten())])
    x, weights = (y.requires_grad_() for y in (random.normal(tokens, 3), random.uniform(tokens, choices)))
    do = random.normal(tokens, 3)
    given_o = dispatch.collect(dispatch.send(x).tanh(), weights)
    wanted_o = (x.unsqueeze(1).expand(-1, choices, -1).tanh() * weights.unsqueeze(-1)).sum(1)
    results = []
    for o in (given_o, wanted_o):
        gradients = torch.autograd.grad(o, [x, weights], do)
        results.append(dict(zip(("o", "x", "weights"), (o, *gradients), strict=True)))
    assert_close(*results, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("choices", "width"), [(1, 3), (3, (2, 700))])
def test_triton(dtype: torch.dtype, choices: int, width: int | tuple[int, int]) -> None:
    """The kernels' sums are those of the functions in float64."""
    from lasp.kernels.triton import dispatch as kernels

    random, tokens = Inputs(0, torch.float64), 20
    place = torch.argsort(random.uniform(tokens * choices)).view(tokens, choices)
    choice = torch.argsort(place.flatten())
    shape = (width,) if isinstance(width, int) else width
    y, do = (random.normal(n, *shape).to(dtype) for n in (tokens * choices, tokens))
    weights = random.uniform(tokens, choices).float()
    with poisoned_memory():
        given = {
            "sums": kernels.collect(y.to(DEVICE), None, place.to(DEVICE)),
            "o": kernels.collect(y.to(DEVICE), weights.to(DEVICE), place.to(DEVICE)),
        }
        given["dy"], given["dweights"] = kernels.spread(*(x.to(DEVICE) for x in (do, y, weights, choice)))
    y, do, weights = y.double(), do.double(), weights.double()
    want = {"sums": collect(y, None, place), "o": collect(y, weights, place)}
    want["dy"], want["dweights"] = spread(do, y, weights, choice)
    assert_close({key: x.cpu() for key, x in given.items()}, want, 1e-6 if dtype == torch.float32 else 1e-2)
