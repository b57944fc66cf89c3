"""Models on disk as Hugging Face has them: transformers computes the same, and what is read is what was written."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from lasp.layers import RopeScaling
from lasp.models import (
    LinearLlama3,
    LinearLlama3Config,
    import_pretrained,
    load_pretrained,
    pretrained,
    save_pretrained,
)
from lasp.models.huggingface import configuration, described
from tests.support import relative_error

HIDDEN, HEADS, KV, VOCABULARY, WIDTH = 32, 4, 2, 64, 8
#: A scaling of which each of three parts changes some of the four frequencies, within the tokens that are looked at.
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 128}
TOKENS = torch.randint(VOCABULARY, (2, 48), generator=torch.Generator().manual_seed(1))


def llama(directory: Path, shard: str = "1GB", **given: Any) -> nn.Module:
    """A random model of transformers, and what it writes."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 40, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": HEADS, "num_key_value_heads": KV, "initializer_range": 0.2}
    rope = {"rope_theta": 100.0} | given.pop("rope", {"rope_type": "default"})
    kinds: Any = (MistralConfig, MistralForCausalLM) if "sliding_window" in given else (LlamaConfig, LlamaForCausalLM)
    torch.manual_seed(0)
    model = kinds[1](kinds[0](**(sizes | {"rope_parameters": rope} | given)))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(directory, max_shard_size=shard)
    return model


def random(config: LinearLlama3Config) -> LinearLlama3:
    torch.manual_seed(0)
    model = LinearLlama3(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2) if parameter.dim() > 1 else nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def tiny(**given: Any) -> LinearLlama3Config:
    sizes: dict[str, Any] = {"vocabulary": VOCABULARY, "hidden": HIDDEN, "heads": HEADS, "intermediate": 40}
    return LinearLlama3Config(**(sizes | {"layers": 4, "rope_theta": 100.0} | given))


def edit(file: Path, **changes: Any) -> None:
    """Other fields in a JSON file; those that are ... are left out."""
    fields = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))


def assert_same(model: LinearLlama3, other: LinearLlama3) -> None:
    ours, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert parameter.dtype == theirs[name].dtype, name
        assert torch.equal(parameter, theirs[name]), name


# -- beside transformers ----------------------------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "as many keys as queries, in shards": {"num_key_value_heads": HEADS, "shard": "20KB"},
    "tied, in shards": {"tie_word_embeddings": True, "shard": "20KB", "rms_norm_eps": 0.1},
    "Llama 3.1's positions": {"rope": LLAMA3},
    "positions by a factor": {"rope": {"rope_type": "linear", "factor": 3.0}},
    "a window": {"sliding_window": 5},
    "a window of nothing": {"sliding_window": None},
}


@pytest.mark.parametrize("case", CASES)
def test_a_llama_of_transformers_gives_its_logits(case: str, tmp_path: Path) -> None:
    theirs = llama(tmp_path, **CASES[case])
    assert (tmp_path / pretrained.INDEX).exists() == ("shards" in case)
    loaded = load_pretrained(tmp_path)
    assert loaded.model.config.kinds == "NNNN"
    assert not loaded.initialised
    assert list(loaded.imported) == [name for name, _ in loaded.model.named_parameters()]
    assert relative_error(loaded.model(TOKENS), theirs(TOKENS).logits) < 1e-5


@pytest.mark.parametrize("scaling", [None, LLAMA3])
def test_what_transformers_4_wrote(scaling: dict[str, Any] | None, tmp_path: Path) -> None:
    """The base and the scaling stood apart, the scaling's name was "type", and frequencies were among the weights."""
    theirs = llama(tmp_path, rope=scaling or {"rope_type": "default"})
    old = None if scaling is None else {"type": "llama3"} | {k: v for k, v in scaling.items() if k != "rope_type"}
    edit(tmp_path / "config.json", rope_parameters=..., rope_theta=100.0, rope_scaling=old, head_dim=..., dtype=...)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    assert relative_error(load_pretrained(tmp_path).model(TOKENS), theirs(TOKENS).logits) < 1e-5


def test_a_tied_head_may_stand_there_again(tmp_path: Path) -> None:
    theirs = llama(tmp_path, tie_word_embeddings=True)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    assert relative_error(load_pretrained(tmp_path).model(TOKENS), theirs(TOKENS).logits) < 1e-5
    weights["lm_head.weight"][0, 0] += 1
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="tie_word_embeddings=True, but lm_head"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("shard", [10**9, 20_000])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"kv_heads": KV, "tied": True, "norm_eps": 0.1},
        {"window": 5, "kv_heads": KV},
        {"rope_scaling": RopeScaling(**LLAMA3)},
        {"rope_scaling": RopeScaling("linear", 3.0), "window": 9},
    ],
)
def test_transformers_reads_softmax_models(given: dict[str, Any], shard: int, tmp_path: Path) -> None:
    model = random(tiny(pattern="N", **given))
    save_pretrained(model, tmp_path / "saved", max_shard_bytes=shard, max_positions=77)
    assert (tmp_path / "saved" / pretrained.INDEX).exists() == (shard < 10**9)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report.values()), report
    assert isinstance(theirs, MistralForCausalLM if "window" in given else LlamaForCausalLM)
    assert theirs.config.max_position_embeddings == 77
    assert relative_error(theirs(TOKENS).logits, model(TOKENS)) < 1e-5


# -- there and back ---------------------------------------------------------------------------------------------------

HYBRIDS: dict[str, dict[str, Any]] = {
    "gla": {"mixer": "gla", "pattern": "LLLN", "kv_heads": KV, "window": 7},
    "retention": {"mixer": "retention", "pattern": "L", "rope_scaling": RopeScaling(**LLAMA3)},
    "lightning": {"mixer": "lightning", "pattern": "LN", "gated": False},
    "mamba2": {"mixer": "mamba2", "pattern": "LN"},
    "kda": {"mixer": "kda", "pattern": "LN", "conv_size": 3, "tied": True},
    "mom": {"mixer": "mom", "pattern": "LLN", "num_memories": 3, "top_k": 1, "shared_memory": False, "tied": True},
    "mom of gla": {"mixer": "mom", "mom_recurrence": "gla", "pattern": "L", "feature_map": "elu"},
}


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids_there_and_back(name: str, tmp_path: Path) -> None:
    model = random(tiny(**HYBRIDS[name]))
    save_pretrained(model, tmp_path / "saved", max_shard_bytes=20_000)
    loaded = load_pretrained(tmp_path / "saved")
    assert loaded.model.config == model.config
    assert not loaded.initialised
    assert_same(loaded.model, model)
    assert torch.equal(loaded.model(TOKENS), model(TOKENS))
    index = json.loads((tmp_path / "saved" / pretrained.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    sizes = [file.stat().st_size for file in (tmp_path / "saved").glob("*.safetensors")]
    assert len(sizes) == len(set(index["weight_map"].values())) > 1


def test_every_field_of_the_configuration_is_written(tmp_path: Path) -> None:
    given = LinearLlama3Config(
        vocabulary=63, hidden=12, layers=3, heads=6, kv_heads=3, intermediate=9, pattern="LN", mixer="mom",
        mom_recurrence="kda", num_memories=5, top_k=3, shared_memory=False, feature_map="elu", conv_size=2, gated=False,
        window=8, rope_theta=77.5, rope_scaling=RopeScaling("llama3", 2.5, 0.5, 3.0, 99), norm_eps=0.25, tied=True,
    )  # fmt: skip
    default = asdict(LinearLlama3Config())
    assert all(value != default[name] for name, value in asdict(given).items())
    assert configuration(json.loads(json.dumps(described(given))), tmp_path) == given


@pytest.mark.parametrize(("dtype", "read"), [("bfloat16", "float32"), ("float64", "float64")])
def test_dtypes(dtype: str, read: str, tmp_path: Path) -> None:
    model = random(tiny(mixer="kda")).to(getattr(torch, dtype))
    save_pretrained(model, tmp_path / "saved")
    assert (
        safetensors.torch.load_file(tmp_path / "saved/model.safetensors")["lm_head.weight"].dtype
        == model.head.weight.dtype
    )
    assert_same(load_pretrained(tmp_path / "saved").model, model.to(getattr(torch, read)))


# -- what cannot be read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "model_type='qwen2': expected llama, mistral, linear_llama3"),
        ({"attention_bias": True}, "attention_bias=True: expected False"),
        ({"mlp_bias": True}, "mlp_bias=True: expected False"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu': expected 'silu'"),
        ({"head_dim": 16}, "head_dim=16: expected hidden_size / num_attention_heads, which is 8"),
        ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}: expected None"),
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"hidden_size": "wide"}, "hidden_size='wide': expected an integer"),
        ({"model_type": "mistral"}, "sliding_window is missing"),
        ({"num_key_value_heads": 3}, "kv_heads=3 does not divide heads=4"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn': expected default, linear, llama3"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing, which rope_type='llama3'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5: expected 1.0"),
        ({"num_key_value_heads": 4}, r"k_proj.weight must be \[32, 32\] by config.json, given \[16, 32\]"),
        ({"num_hidden_layers": 5}, r"model.layers.4.input_layernorm.weight, .* and 6 others missing"),
        ({"num_hidden_layers": 3}, r"model.layers.3.input_layernorm.weight, .* and 6 others unknown"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True, but lm_head.weight is not model.embed_tokens.weight"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    llama(tmp_path)
    edit(tmp_path / "config.json", **changes)
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocabulary": 128}, "vocabulary=128: the weights in .* are of vocabulary=64, leave it out"),
        ({"heads": 8}, "heads=8: the weights in .* are of heads=4"),
        ({"kv_heads": 4}, "kv_heads=4: the weights in .* are of kv_heads=2"),
        ({"tied": True}, "tied=True: the weights in .* are of tied=False"),
        ({"mixer": "hyena"}, "unknown mixer='hyena'"),
    ],
)
def test_sizes_are_the_weights(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    llama(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path, **changes)
    with pytest.raises(ValueError, match=r"intermediate=8: the weights in .* are of intermediate=40"):
        import_pretrained(LinearLlama3(tiny(kv_heads=KV, intermediate=8)), tmp_path)
    same = {"heads": 4, "kv_heads": 2, "vocabulary": 64}
    assert not load_pretrained(tmp_path, **same).initialised


def test_broken_directories_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(directory: Path, message: str) -> None:
        with pytest.raises(ValueError, match=message) as error:
            load_pretrained(directory)
        assert "\n" not in str(error.value)

    whole, shards = tmp_path / "whole", tmp_path / "shards"
    llama(whole)
    llama(shards, shard="20KB")
    refuses(tmp_path / "nowhere", "nowhere: no config.json there, expected the directory of a model")

    weights = (whole / "model.safetensors").read_bytes()
    for length in (0, 5, 500, len(weights) - 1):
        (whole / "model.safetensors").write_bytes(weights[:length])
        refuses(whole, "model.safetensors: not whole, or no safetensors: ")
    (whole / "model.safetensors").unlink()
    refuses(whole, "whole: neither model.safetensors nor model.safetensors.index.json is there")
    lacking = safetensors.torch.load(weights)
    del lacking["model.layers.1.mlp.up_proj.weight"]
    safetensors.torch.save_file(lacking, whole / "model.safetensors")
    refuses(whole, "whole: the weights are not those of config.json: model.layers.1.mlp.up_proj.weight missing")
    integers = safetensors.torch.load(weights) | {"model.norm.weight": torch.zeros(HIDDEN, dtype=torch.int8)}
    safetensors.torch.save_file(integers, whole / "model.safetensors")
    refuses(whole, "whole: model.norm.weight is of dtype I8, expected one of F64, F32, F16, BF16")

    index, shard = shards / pretrained.INDEX, sorted(shards.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    refuses(shards, f"{shard.name}: not whole")
    shard.unlink()
    refuses(shards, f"{shard.name}: no such file")
    shard.write_bytes(content)
    where = json.loads(index.read_text())["weight_map"]
    elsewhere = where | {"lm_head.weight": shard.name}
    edit(index, weight_map=elsewhere)
    refuses(shards, "config.json: lm_head.weight missing")
    edit(index, weight_map=...)
    refuses(shards, "model.safetensors.index.json: weight_map is missing")
    index.write_text("{")
    refuses(shards, "model.safetensors.index.json: not JSON: ")
    (shards / "config.json").write_text("[]")
    refuses(shards, "config.json: expected the fields of a JSON object")

    llama(whole)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    refuses(whole, "need the package safetensors, install it")


# -- writing ----------------------------------------------------------------------------------------------------------


def test_an_interrupted_write_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, old, new = tmp_path / "saved", random(tiny(pattern="N")), random(tiny(mixer="kda"))
    save_pretrained(old, out, max_shard_bytes=20_000)
    files = {file.name for file in out.iterdir()}
    with monkeypatch.context() as patch:
        calls: list[Path] = []

        def struck(_: Any, file: Path, **__: Any) -> None:
            calls.append(file)
            if len(calls) == 2:
                raise KeyboardInterrupt
            file.write_bytes(b"half")

        patch.setattr(safetensors.torch, "save_file", struck)
        with pytest.raises(KeyboardInterrupt):
            save_pretrained(new, out, max_shard_bytes=20_000)
    assert {file.name for file in out.iterdir()} == files
    assert_same(load_pretrained(out).model, old)
    # The next has nothing of either left.
    save_pretrained(new, out)
    assert_same(load_pretrained(out).model, new)
    assert {file.name for file in out.iterdir()} == {"config.json", "model.safetensors"}
    assert [file.name for file in tmp_path.iterdir()] == ["saved"]


def test_nothing_of_others_is_written_over(tmp_path: Path) -> None:
    model = random(tiny())
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt, which is no model's: give a directory of its own"):
        save_pretrained(model, tmp_path)
    with pytest.raises(ValueError, match=r"notes\.txt: expected a directory, there is a file"):
        save_pretrained(model, tmp_path / "notes.txt")
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match=r"tokenizer=nowhere: expected bytes, a tokenizer.json or its directory"):
        save_pretrained(model, tmp_path / "saved", tokenizer="nowhere")
