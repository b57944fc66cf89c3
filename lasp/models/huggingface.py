"""A model's ``config.json`` and the names of its weights, as Hugging Face has them.

A model of softmax layers alone is a Llama; with a window a Mistral, which is the same but for the window. Any other is a
``linear_llama3``, which has Llama's names for what Llama has and those of `LinearLlama3Config` for the rest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from lasp.layers.rotary import RopeScaling
from lasp.models.config import LinearLlama3Config

#: The file.
CONFIG = "config.json"
#: The architectures by ``model_type``.
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "linear_llama3": "LinearLlama3"}
#: Fields of `LinearLlama3Config` that say how large weights are, and what they are called there.
SIZES = {
    "vocabulary": "vocab_size",
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "intermediate": "intermediate_size",
}
#: Other fields that Llama has, or Mistral, with the value where there is none.
OTHERS = {
    "kv_heads": ("num_key_value_heads", None),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "tied": ("tie_word_embeddings", False),
    "window": ("sliding_window", None),
}
#: Fields that neither has.
OWN = [
    field.name
    for field in fields(LinearLlama3Config)
    if field.name not in {*SIZES, *OTHERS, "rope_theta", "rope_scaling"}
]
#: What another program must not have set, with the value that it has where it is set all the same.
UNSUPPORTED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
#: What each scaling of the rotary positions has.
SCALINGS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
#: Fields that the weights of a directory fix.
FIXED = (*SIZES, "kv_heads", "tied")


def described(config: LinearLlama3Config) -> dict[str, Any]:
    """What of ``config.json`` follows from the configuration, in plain types. Rotary positions stand in it twice, as
    transformers 5 has them and as 4 has."""
    kind = "linear_llama3" if "L" in config.kinds else "llama" if config.window is None else "mistral"
    scaling = None
    if (given := config.rope_scaling) is not None:
        scaling = {"rope_type": given.rope_type} | {name: getattr(given, name) for name in SCALINGS[given.rope_type]}
    found: dict[str, Any] = {"model_type": kind, "architectures": [ARCHITECTURES[kind]]}
    found |= {theirs: getattr(config, ours) for ours, theirs in SIZES.items()}
    found |= {theirs: getattr(config, ours) for ours, (theirs, _) in OTHERS.items()}
    found |= {"num_key_value_heads": config.kv_heads or config.heads, "head_dim": config.hidden // config.heads}
    found |= {"hidden_act": "silu", "rope_theta": config.rope_theta, "rope_scaling": scaling}
    found["rope_parameters"] = {"rope_theta": config.rope_theta} | (scaling or {"rope_type": "default"})
    if kind == "llama":
        del found["sliding_window"]
        found |= {"attention_bias": False, "mlp_bias": False}
    if kind == "linear_llama3":
        found |= {name: getattr(config, name) for name in OWN}
    return found


def configuration(given: Mapping[str, Any], where: Path) -> LinearLlama3Config:
    """The inverse, for what others wrote too.

    Args:
        given: the fields.
        where: where they stand, for errors.

    Raises:
        ValueError: naming the field that is missing, or asks for what `LinearLlama3` is not.
    """
    kind = given.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(f"{where}: model_type={kind!r}: expected {', '.join(ARCHITECTURES)}")
    for name, expected in UNSUPPORTED.items():
        if given.get(name) not in (None, expected):
            raise ValueError(f"{where}: {name}={given[name]!r}: expected {expected!r}, there is nothing else here")
    # Of a Mistral these have other values where they are not given.
    for name in (*SIZES.values(), *(("num_key_value_heads", "sliding_window") if kind == "mistral" else ())):
        if name not in given:
            raise ValueError(f"{where}: {name} is missing")
    for name in (*SIZES.values(), "num_key_value_heads", "sliding_window", "head_dim"):
        value = given.get(name)
        if type(value) is not int and (name in SIZES.values() or value is not None):
            raise ValueError(f"{where}: {name}={value!r}: expected an integer")
    found = {ours: given[theirs] for ours, theirs in SIZES.items()}
    found |= {ours: given.get(theirs, default) for ours, (theirs, default) in OTHERS.items()}
    if found["kv_heads"] == found["heads"]:
        found["kv_heads"] = None
    if kind == "llama":
        found["window"] = None
    found |= {name: given[name] for name in OWN if name in given} if kind == "linear_llama3" else {"pattern": "N"}
    try:
        theta, scaling = _rotation(given)
        config = LinearLlama3Config(rope_theta=theta, rope_scaling=scaling, **found)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
    if given.get("head_dim") not in (None, width := config.hidden // config.heads):
        raise ValueError(
            f"{where}: head_dim={given['head_dim']}: expected hidden_size / num_attention_heads, which is {width}"
        )
    return config


def _rotation(given: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """The base of the rotary positions and their scaling, as transformers 5 has them, or as 4."""
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or given.get("rope_theta") or 10000.0
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        raise ValueError(
            f"partial_rotary_factor={rope['partial_rotary_factor']}: expected 1.0, all of a head is rotated"
        )
    if kind == "default":
        return float(theta), None
    if kind not in SCALINGS:
        raise ValueError(f"rope_type={kind!r}: expected default, {', '.join(SCALINGS)}")
    for name in SCALINGS[kind]:
        if name not in rope:
            raise ValueError(f"{name} is missing, which rope_type={kind!r} needs")
    return float(theta), RopeScaling(kind, **{name: rope[name] for name in SCALINGS[kind]})


def read_fields(directory: Path) -> dict[str, Any]:
    """The ``config.json`` of a directory.

    Raises:
        ValueError: where there is none, or it is not JSON.
    """
    file = directory / CONFIG
    if not file.is_file():
        raise ValueError(f"{directory}: no {CONFIG} there, expected the directory of a model as Hugging Face has them")
    return read_json(file)


def read_json(file: Path) -> dict[str, Any]:
    """The fields of a JSON file.

    Raises:
        ValueError: where it is none.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: expected the fields of a JSON object")
    return found


def read_config(directory: Path, **changes: Any) -> LinearLlama3Config:
    """The configuration of the model in a directory.

    Args:
        directory: of a ``config.json``.
        changes: fields of `LinearLlama3Config` that shall be others; not those by which all its weights have their shapes.

    Raises:
        ValueError: naming the field that cannot be.
    """
    config = configuration(read_fields(directory), directory / CONFIG)
    changed = replace(config, **changes)
    check_sizes(changed, config, directory)
    return changed


def check_sizes(config: LinearLlama3Config, other: LinearLlama3Config, directory: Path) -> None:
    """Raise unless weights of the one can be those of the other, which lie in a directory.

    Raises:
        ValueError: naming the field by which they cannot.
    """
    for name in FIXED:
        now, was = getattr(config, name), getattr(other, name)
        if was != now and not (name == "kv_heads" and (was or other.heads) == (now or other.heads)):
            raise ValueError(f"{name}={now}: the weights in {directory} are of {name}={was}, leave it out")


def published_name(name: str, kinds: str) -> str:
    """What Hugging Face calls a parameter of `LinearLlama3`.

    Args:
        name: its own.
        kinds: the letter of each layer.
    """
    outside = {
        "embedding.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }
    if name in outside:
        return outside[name]
    _, layer, part, rest = name.split(".", 3)
    parts = {
        "mixer_norm": "input_layernorm",
        "mixer": "self_attn" if kinds[int(layer)] == "N" else "linear_attn",
        "mlp_norm": "post_attention_layernorm",
        "mlp": "mlp",
    }
    return f"model.layers.{layer}.{parts[part]}.{rest}"
