"""Tokens sent to groups and collected again: nothing is lost, the order is kept, and gradients are those of a plain gather."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lasp.kernels import Dispatch
from tests.support import Inputs, assert_close


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
