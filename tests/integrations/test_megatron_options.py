"""The plug-in's options: what they are called, what they refuse, and that weights are told apart by their shapes."""

from __future__ import annotations

import warnings
from argparse import ArgumentParser
from dataclasses import fields
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.transformer import TransformerConfig

    from lasp.integrations.megatron import LaspOptions, add_lasp_args, from_megatron, options_of, to_megatron
    from lasp.integrations.megatron.specs import _kinds
    from lasp.models import LinearLlama3, LinearLlama3Config

pytestmark = pytest.mark.filterwarnings("ignore")


def parsed(*words: str) -> LaspOptions:
    parser = add_lasp_args(ArgumentParser())
    parser.add_argument("--rotary-base", type=int, default=10000)
    return options_of(parser.parse_args(words))


def test_the_command_line_is_the_options() -> None:
    assert parsed() == LaspOptions()
    given = parsed(
        *[
            "--mixer",
            "mom",
            "--mom-recurrence",
            "gla",
            "--num-memories",
            "6",
            "--top-k",
            "3",
            "--no-shared-memory",
            "--balance",
            "0.1",
        ],
        *["--sp", "lasp1", "--exchange", "ring", "--softmax-sp", "ring", "--conv-size", "0", "--rotary-base", "500000"],
    )
    assert given == LaspOptions(
        mixer="mom", mom_recurrence="gla", num_memories=6, top_k=3, shared_memory=False, balance=0.1, sp="lasp1",
        exchange="ring", softmax_sp="ring", conv_size=0, rope_theta=500000,
    )  # fmt: skip


def test_every_option_says_what_it_is() -> None:
    text = " ".join(add_lasp_args(ArgumentParser()).format_help().split())
    for field in fields(LaspOptions):
        if field.name != "rope_theta":
            assert "--" + field.name.replace("_", "-") in text
    assert "how states travel, likewise" in text
    assert "the mixer's own when None" in text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mixer": "rwkv"}, "--mixer rwkv: unknown, expected one of basic"),
        ({"sp": "lasp3"}, "--sp lasp3: unknown, expected one of none, lasp2"),
        ({"exchange": "pigeon"}, "--exchange pigeon: unknown, expected one of auto"),
        ({"top_k": 5}, "--top-k 5, --num-memories 4: expected 1 <= top-k <= num-memories"),
        ({"balance": -1.0}, "--balance -1.0: must be at least 0"),
        ({"mixer": "mom", "sp": "ulysses"}, "--sp ulysses: a mixture's memories are states"),
    ],
)
def test_options_that_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LaspOptions(**given)


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (
            {"context_parallel_size": 2},
            {"sp": "none"},
            "--sp none, --context-parallel-size 2: each rank would take its part of a sequence for all of it",
        ),
        (
            {"tensor_model_parallel_size": 4, "num_attention_heads": 4},
            {"key_heads": 2},
            "--tensor-model-parallel-size 4 does not divide the linear layers' heads: --num-attention-heads 4, key_heads=2",
        ),
        ({"attention_dropout": 0.1}, {}, "--attention-dropout 0.1: this attention has none, set it to 0"),
        ({"tensor_model_parallel_size": 2}, {"mixer": "mamba2"}, "mixer mamba2: its norm is of all heads of a group"),
    ],
)
def test_what_does_not_go_with_megatron_s(config: dict[str, Any], given: dict[str, Any], message: str) -> None:
    whole = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "attention_dropout": 0.0} | config
    with pytest.raises(ValueError, match=message):
        LaspOptions(**given).check(TransformerConfig(**whole), linear=True)


def test_the_pattern_is_ours_or_megatron_s() -> None:
    def kinds(pattern: str | None, every: Any) -> str:
        config = TransformerConfig(num_layers=6, hidden_size=32, num_attention_heads=4)
        config.linear_attention_freq = every
        return _kinds(config, pattern)

    assert kinds(None, None) == "LLLNLL"
    assert kinds("LN", 3) == "LNLNLN"
    assert kinds(None, 3) == "LLNLLN"
    assert kinds(None, [1, 0, 1, 1, 0, 0]) == "LNLLNN"
    with pytest.raises(ValueError, match="--pattern LX: must be made of the letters L"):
        kinds("LX", None)
    with pytest.raises(ValueError, match="--linear-attention-freq: 2 layers, --num-layers 6"):
        kinds(None, [1, 0])


@pytest.mark.parametrize("engine", [False, True])
def test_weights_with_grouped_heads_and_a_padded_vocabulary(engine: bool) -> None:
    config = LinearLlama3Config(vocabulary=50, hidden=32, heads=4, kv_heads=2, layers=4, intermediate=48, tied=True)
    weights = LinearLlama3(config).state_dict()
    there = to_megatron(weights, config, vocabulary=64, engine=engine)
    assert there["embedding.word_embeddings.weight"].shape == (64, 32)
    assert "output_layer.weight" not in there
    # Of each of two groups: two heads of queries, one of keys, one of values, eight wide.
    qkv = there["decoder.layers.3.self_attention.linear_qkv.weight"].view(2, 4, 8, 32)
    assert torch.equal(qkv[1, 2], weights["blocks.3.mixer.k_proj.weight"][8:])
    back = from_megatron(there, config, engine=engine)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], value) for name, value in weights.items())


def test_a_gated_mixer_is_none_of_megatron_s_attention() -> None:
    config = LinearLlama3Config(mixer="lightning")
    with pytest.raises(ValueError, match="mixer lightning: Megatron's self-attention projects no output gate"):
        to_megatron(LinearLlama3(config).state_dict(), config)
