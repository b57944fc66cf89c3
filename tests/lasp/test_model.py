"""Linear-Llama3: its sizes, its patterns, and that no token sees the future through any of its layers."""

from __future__ import annotations

import pytest
import torch

from lasp.layers import MIXERS, GatedLinearAttention, SoftmaxAttention
from lasp.models import PRESETS, LinearLlama3, LinearLlama3Config, preset


def parameters(config: LinearLlama3Config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in LinearLlama3(config).parameters())


def test_presets() -> None:
    assert 0.8e6 < parameters(preset("tiny")) < 1.5e6
    assert 30e6 < parameters(preset("small")) < 50e6
    large = preset("linear-llama3-1b")
    assert (large.layers, large.hidden, large.heads, large.hidden // large.heads) == (16, 2048, 16, 128)
    assert 1.0e9 < parameters(large) < 1.3e9
    assert {"tiny", "tiny-mom", "small", "linear-llama3-1b"} == PRESETS.keys()


def test_the_pattern_repeats_over_the_depth() -> None:
    config = LinearLlama3Config(layers=6, pattern="LLLN", hidden=16, heads=2)
    assert config.kinds == "LLLNLL"
    kinds = [type(block.mixer) for block in LinearLlama3(config).blocks]
    assert kinds == [GatedLinearAttention] * 3 + [SoftmaxAttention] + [GatedLinearAttention] * 2


def test_tied_embeddings_are_one_parameter() -> None:
    untied = LinearLlama3Config(hidden=16, heads=2, layers=1)
    tied = LinearLlama3Config(hidden=16, heads=2, layers=1, tied=True)
    assert parameters(untied) - parameters(tied) == 256 * 16
    model = LinearLlama3(tied)
    assert model.head.weight is model.embedding.weight


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = LinearLlama3(LinearLlama3Config(hidden=128, layers=8))
    block = model.blocks[0]
    assert block.mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.mlp.down_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert block.mixer.o_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)


@pytest.mark.parametrize("mixer", MIXERS)
def test_future_tokens_and_other_documents_do_not_matter(mixer: str) -> None:
    torch.manual_seed(0)
    config = LinearLlama3Config(hidden=16, heads=2, intermediate=24, mixer=mixer, conv_size=3)
    model = LinearLlama3(config).double()
    tokens, bounds = torch.randint(256, (1, 20)), (0, 9, 20)
    before = model(tokens, cu_seqlens=bounds)
    for changed in (4, 9, 15):
        moved = tokens.clone()
        moved[0, changed] = (moved[0, changed] + 1) % 256
        after = model(moved, cu_seqlens=bounds)
        end = next(c for c in bounds if c > changed)
        assert torch.equal(before[:, :changed], after[:, :changed])
        assert torch.equal(before[:, end:], after[:, end:])
        assert not torch.equal(before[:, changed:end], after[:, changed:end])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "heads=3 does not divide hidden=128"),
        ({"heads": 128}, "heads=128 leave hidden=128 an odd head width"),
        ({"kv_heads": 3}, "kv_heads=3 does not divide heads=4"),
        ({"pattern": "LLX"}, r"pattern='LLX' must be made of the letters L \(the linear mixer\), N"),
        ({"pattern": ""}, "pattern='' must be made of the letters"),
        ({"layers": 0}, "layers must be at least 1, given 0"),
        ({"mixer": "hyena"}, "unknown mixer='hyena': expected one of basic"),
        ({"feature_map": "cube"}, "unknown feature_map='cube'"),
        ({"window": 0}, "window at least 1"),
    ],
)
def test_bad_options(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearLlama3Config(**options)
    with pytest.raises(ValueError, match="unknown preset='huge': expected one of tiny"):
        preset("huge")
