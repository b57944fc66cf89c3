"""Weights of this project's model as those of a Megatron model, and back.

Both are of the whole model, by name: Megatron's as one rank of one pipeline stage has them, from which its tensor-parallel and
pipeline ranks take their parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from lasp.integrations.megatron.options import CORES
from lasp.models import LinearLlama3Config

#: Of a projection in Megatron, what of it is the gate's, a key's, ... in this project; what stands in one tensor.
QKV, FC1 = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
#: What Megatron's names of layers' parameters begin with.
LAYER = "decoder.layers."


def to_megatron(
    weights: Mapping[str, Tensor], config: LinearLlama3Config, *, vocabulary: int | None = None, engine: bool = False
) -> dict[str, Tensor]:
    """The weights of a `GPTModel` with `lasp_layer_specs` that computes what the model computes.

    Args:
        weights: `LinearLlama3.state_dict()`.
        config: the model's.
        vocabulary: to how many tokens Megatron pads; as many as there are when None.
        engine: whether Megatron's parts are Transformer Engine's.

    Raises:
        ValueError: where a mixer's output is gated and there it is not: see `LaspOptions`.
    """
    _check(config)
    found = {}
    for theirs, ours in _names(config, engine):
        parts = [weights[name] for name in ours]
        if theirs.endswith("linear_qkv.weight"):
            found[theirs] = _interleaved(parts, _groups(config, theirs))
        else:
            found[theirs] = torch.cat(parts) if len(parts) > 1 else parts[0]
    if vocabulary is not None:
        for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            if name in found:
                padding = found[name].new_zeros(vocabulary - config.vocabulary, config.hidden)
                found[name] = torch.cat([found[name], padding])
    return found


def from_megatron(
    weights: Mapping[str, Tensor], config: LinearLlama3Config, *, engine: bool = False
) -> dict[str, Tensor]:
    """The inverse: what `LinearLlama3.load_state_dict` takes; rows that pad the vocabulary are left out."""
    _check(config)
    found: dict[str, Tensor] = {}
    for theirs, ours in _names(config, engine):
        whole = weights[theirs]
        if theirs.endswith("linear_qkv.weight"):
            parts = _apart(whole, config.heads, _groups(config, theirs))
        else:
            parts = whole.chunk(len(ours)) if len(ours) > 1 else (whole,)
        found |= dict(zip(ours, parts, strict=True))
    for name in ("embedding.weight", "head.weight"):
        found[name] = found[name][: config.vocabulary] if name in found else found["embedding.weight"]
    return found


def load_whole(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a `GPTModel`, or a pipeline stage's part of one, this rank's part of the whole model's weights.

    Args:
        model: on any rank.
        weights: what `to_megatron` gives.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    with torch.no_grad():
        for name, parameter in named_in_whole(model):
            value = weights[name]
            if group.size() > 1 and getattr(parameter, "tensor_model_parallel", False):
                axis = parameter.partition_dim  # type: ignore[attr-defined]
                # Gates and values of an MLP stand one after the other, on each rank too.
                parts = value.chunk(2, axis) if name.endswith("linear_fc1.weight") else (value,)
                value = torch.cat([part.chunk(group.size(), axis)[group.rank()] for part in parts], axis)
            parameter.copy_(value)


def named_in_whole(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by what they are called in the whole model, of which a pipeline stage counts its layers from 0."""
    for name, parameter in model.named_parameters():
        if name.startswith(LAYER):
            index, _, rest = name.removeprefix(LAYER).partition(".")
            number = model.get_submodule(LAYER + index).layer_number
            name = f"{LAYER}{int(number) - 1}.{rest}"  # type: ignore[arg-type]
        yield name, parameter


def _check(config: LinearLlama3Config) -> None:
    if "L" in config.kinds and config.mixer in CORES and config.mixer != "basic" and config.gated is not False:
        raise ValueError(
            f"mixer {config.mixer}: Megatron's self-attention projects no output gate; convert a model with gated=False"
        )


def _names(config: LinearLlama3Config, engine: bool) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each tensor of Megatron's and those of this project's that it is made of."""
    yield "embedding.word_embeddings.weight", ("embedding.weight",)
    mixer = _mixer_names(config)
    for layer, kind in enumerate(config.kinds):
        there, here = f"decoder.layers.{layer}", f"blocks.{layer}"
        whole = kind == "L" and config.mixer not in CORES
        norm = "self_attention.linear_qkv.layer_norm_weight" if engine and not whole else "input_layernorm.weight"
        yield f"{there}.{norm}", (f"{here}.mixer_norm.weight",)
        if whole:
            yield from ((f"{there}.self_attention.mixer.{name}", (f"{here}.mixer.{name}",)) for name in mixer)
        else:
            qkv = tuple(f"{here}.mixer.{name}.weight" for name in QKV)
            yield f"{there}.self_attention.linear_qkv.weight", qkv
            yield f"{there}.self_attention.linear_proj.weight", (f"{here}.mixer.o_proj.weight",)
            if kind == "L":
                yield f"{there}.self_attention.core_attention.mixer.norm.weight", (f"{here}.mixer.norm.weight",)
        norm = "mlp.linear_fc1.layer_norm_weight" if engine else "pre_mlp_layernorm.weight"
        yield f"{there}.{norm}", (f"{here}.mlp_norm.weight",)
        yield f"{there}.mlp.linear_fc1.weight", tuple(f"{here}.mlp.{name}.weight" for name in FC1)
        yield f"{there}.mlp.linear_fc2.weight", (f"{here}.mlp.down_proj.weight",)
    yield "decoder.final_layernorm.weight", ("norm.weight",)
    if not config.tied:
        yield "output_layer.weight", ("head.weight",)


def _mixer_names(config: LinearLlama3Config) -> list[str]:
    """The parameters of a linear layer's mixer: those of this project's."""
    from lasp.models.linear_llama3 import Block

    if "L" not in config.kinds:
        return []
    with torch.device("meta"):
        return [name for name, _ in Block(config, config.kinds.index("L")).mixer.named_parameters()]


def _groups(config: LinearLlama3Config, theirs: str) -> int:
    """How many heads of keys and values the layer has: in Megatron, linear layers as many as softmax layers."""
    kind = config.kinds[int(theirs.split(".")[2])]
    groups = config.kv_heads or config.heads
    if kind == "L" and groups != config.heads:
        raise ValueError(
            f"mixer {config.mixer}: under Megatron's self-attention its keys have as many heads as the softmax layers' "
            f"(kv_heads={groups}), here as the queries ({config.heads})"
        )
    return groups


def _interleaved(qkv: Sequence[Tensor], groups: int) -> Tensor:
    """Megatron's order: of each group its queries, its key, its value."""
    return torch.cat([x.unflatten(0, (groups, -1)) for x in qkv], dim=1).flatten(0, 1)


def _apart(qkv: Tensor, heads: int, groups: int) -> tuple[Tensor, ...]:
    """The inverse."""
    by_group = qkv.unflatten(0, (groups, heads // groups + 2, -1))
    parts = by_group.split([heads // groups, 1, 1], dim=1)
    return tuple(part.flatten(0, 2) for part in parts)
