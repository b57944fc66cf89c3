"""Scaled rotary positions: in every layer that rotates, in graphs, on ranks and in decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lasp import SequenceLayout, SequenceParallel
from lasp.layers import RopeScaling, rotate
from tests.lasp.test_pretrained import HIDDEN, LLAMA3, WIDTH, random, tiny
from tests.support import decoded, relative_error


def test_scalings_do_not_mix() -> None:
    """Each layer has its own, of one layout, by the layout's positions and by given ones."""
    sp = SequenceParallel(None, SequenceLayout.contiguous(48, 1))
    x = torch.randn(1, 48, 1, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(48, dtype=torch.float64)
    plain = 100.0 ** (-torch.arange(0, WIDTH, 2, dtype=torch.float64) / WIDTH)
    # Of 128 tokens the first turns 20 times, the second 6, the third 2, the last 0.6.
    turns = 128 * plain / (2 * torch.pi)
    middle = (turns[2] - 1) / 3
    want = torch.stack([plain[0], plain[1], plain[2] * (middle + (1 - middle) / 4), plain[3] / 4])
    scalings = {None: plain, RopeScaling(**LLAMA3): want, RopeScaling("linear", 4.0): plain / 4}
    for scaling, frequencies in scalings.items():
        turned = torch.polar(torch.ones(48, WIDTH // 2, dtype=torch.float64), positions[:, None] * frequencies)
        pairs = torch.complex(*x[0, :, 0].chunk(2, -1)) * turned
        expected = torch.cat([pairs.real, pairs.imag], -1)[None, :, None]
        for given in (None, positions.long()):
            assert relative_error(rotate(x, sp, 100.0, given, scaling), expected) < 1e-12


def test_a_graph_has_the_scaling() -> None:
    layer = random(tiny(pattern="N", layers=1, rope_scaling=RopeScaling(**LLAMA3))).blocks[0].mixer
    x = torch.randn(1, 48, HIDDEN, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(x), layer(x)) < 1e-6
    layer.rope_scaling = None
    torch._dynamo.reset()
    assert relative_error(compiled(x), layer(x)) < 1e-6


@pytest.mark.parametrize("recurrence", ["retention", "mom"])
def test_mixers_that_rotate_do_so_by_the_scaling(recurrence: str) -> None:
    """In a whole sequence and in decoding."""
    x = torch.randn(1, 48, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = []
    for scaling in (None, RopeScaling(**LLAMA3)):
        config = tiny(mixer=recurrence, mom_recurrence="retention", pattern="L", layers=1, rope_scaling=scaling)
        mixer = random(config).double().blocks[0].mixer
        found.append(mixer(x))
        assert relative_error(decoded(mixer, x, (20, 28))[0], found[-1]) < 1e-12
    assert relative_error(*found) > 1e-3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rope_type": "yarn"}, "rope_type='yarn': expected llama3 or linear"),
        ({"factor": 0.5}, "factor=0.5 of the rotary positions' scaling must be at least 1"),
        ({"low_freq_factor": 4.0}, "low_freq_factor=4.0 must be above 0 and below high_freq_factor=4.0"),
        ({"original_max_position_embeddings": 0}, "original_max_position_embeddings=0 must be at least 1"),
    ],
)
def test_bad_scalings(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeScaling(**given)
