"""A model read with other mixers in its layers: each parameter is the old one or a new one, and the report says which."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from lasp.models import LinearLlama3, load_pretrained, save_pretrained
from tests.lasp.test_pretrained import HEADS, HIDDEN, KV, TOKENS, WIDTH, llama, random, tiny

#: Of softmax attention's projections, those that each mixer takes.
TAKEN = {
    "basic": "qkvo", "lightning": "qkvo", "retention": "qkvo", "simple_gla": "qkvo", "gla": "qkvo", "hgrn2": "qvo",
    "delta_net": "qkvo", "gated_delta_net": "qkvo", "kda": "qkvo", "mamba2": "", "mom": "qkvo",
}  # fmt: skip


@pytest.mark.parametrize("mixer", TAKEN)
def test_a_llama_made_linear(mixer: str, tmp_path: Path) -> None:
    """Each parameter is the Llama's or a new model's, and the report says which."""
    llama(tmp_path)
    theirs = safetensors.torch.load_file(tmp_path / "model.safetensors")
    torch.manual_seed(3)
    model, imported, initialised = load_pretrained(tmp_path, pattern="LLLN", mixer=mixer, conv_size=3)
    assert model.config.kinds == "LLLN"
    torch.manual_seed(3)
    fresh = dict(LinearLlama3(model.config).named_parameters())
    want: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        layer = f"model.layers.{name.split('.')[1]}"
        inside = re.fullmatch(r"blocks\.[012]\.mixer\.(?:mixer\.)?([qkvo])_proj\.weight", name)
        if inside and inside[1] in TAKEN[mixer]:
            weight = theirs[f"{layer}.self_attn.{inside[1]}_proj.weight"]
            if inside[1] in "kv":
                # Query h reads the keys of group h // (heads / groups).
                heads = weight.view(KV, WIDTH, HIDDEN)
                weight = torch.cat([heads[head // (HEADS // KV)] for head in range(HEADS)])
            want[name] = weight.expand_as(parameter)
        elif re.match(r"blocks\.[012]\.mixer\.", name):
            assert torch.equal(parameter, fresh[name]), name
        else:
            name_there = name.replace("blocks.", "model.layers.").replace(".mixer.", ".self_attn.")
            for ours, its in (
                ("mixer_norm", "input_layernorm"),
                ("mlp_norm", "post_attention_layernorm"),
                ("embedding", "model.embed_tokens"),
                ("head.", "lm_head."),
            ):
                name_there = name_there.replace(ours, its)
            want[name] = theirs["model.norm.weight" if name == "norm.weight" else name_there]
    assert set(imported) == want.keys()
    assert set(initialised) == fresh.keys() - want.keys()
    assert len(imported) + len(initialised) == len(fresh)
    parameters = dict(model.named_parameters())
    for name, weight in want.items():
        assert torch.equal(parameters[name], weight), name
    assert torch.isfinite(model(TOKENS)).all()


def test_features_of_another_width_take_no_queries_and_keys(tmp_path: Path) -> None:
    """Nor where there are as many rows by accident: 4 heads of 16 have those of 8 heads of 8."""
    llama(tmp_path, num_key_value_heads=8, num_attention_heads=8, hidden_size=64)
    imported = load_pretrained(tmp_path, pattern="L", feature_map="taylor").imported
    assert [name for name in imported if "blocks.0.mixer." in name] == [f"blocks.0.mixer.{x}_proj.weight" for x in "vo"]


def linear_names(names: tuple[str, ...]) -> set[str]:
    return {name.removeprefix("blocks.0.mixer.") for name in names if name.startswith("blocks.0.mixer.")}


def test_mixers_begin_as_other_mixers(tmp_path: Path) -> None:
    """Of the same kind all that fits is taken, of another the projections."""
    was = random(tiny(mixer="gated_delta_net", pattern="LN"))
    save_pretrained(was, tmp_path / "saved")
    before = dict(was.named_parameters())
    projections = {f"{x}_proj.weight" for x in "qkvo"}
    whole = {name for name, _ in was.blocks[0].mixer.named_parameters()}

    wider = load_pretrained(tmp_path / "saved", conv_size=2)
    convolutions = {f"{x}_conv.weight" for x in "qkv"}
    assert linear_names(wider.initialised) == convolutions
    assert linear_names(wider.imported) == whole - convolutions

    other = load_pretrained(tmp_path / "saved", mixer="kda")
    assert linear_names(other.imported) == projections

    memories = load_pretrained(tmp_path / "saved", mixer="mom")
    assert linear_names(memories.initialised) == {"router.proj.weight"}
    for name, parameter in memories.model.blocks[0].mixer.mixer.named_parameters():
        one = before[f"blocks.0.mixer.{name}"]
        assert torch.equal(parameter, one.expand_as(parameter)), name
    save_pretrained(memories.model, tmp_path / "memories")

    more = load_pretrained(tmp_path / "memories", num_memories=6)
    own = {f"mixer.{name}_proj.weight" for name in ("k", "v", "beta", "decay")}
    assert linear_names(more.initialised) == {"router.proj.weight"} | own
    single = load_pretrained(tmp_path / "memories", mixer="simple_gla")
    assert linear_names(single.imported) == {"q_proj.weight", "o_proj.weight"}
    of_kda = load_pretrained(tmp_path / "memories", mom_recurrence="kda")
    assert linear_names(of_kda.imported) == {f"mixer.{name}" for name in projections}

    softmax = load_pretrained(tmp_path / "saved", pattern="N")
    assert not softmax.initialised
    assert torch.equal(softmax.model.blocks[0].mixer.k_proj.weight, before["blocks.0.mixer.k_proj.weight"])
