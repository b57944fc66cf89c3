"""The layers of a Megatron model, by their pattern."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from lasp.integrations.megatron.attention import LinearCore, SoftmaxCore, Unrotated
from lasp.integrations.megatron.mixer import LaspMixer
from lasp.integrations.megatron.norm import Norm
from lasp.integrations.megatron.options import CORES, LaspOptions
from lasp.models.config import PATTERN


def lasp_layer_specs(
    config: TransformerConfig,
    pattern: str | None = None,
    mixer: str | None = None,
    *,
    options: LaspOptions | None = None,
    use_transformer_engine: bool = False,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
) -> TransformerBlockSubmodules:
    """The layers of a pipeline stage, for `GPTModel`'s ``transformer_layer_spec``.

    Args:
        config: Megatron's.
        pattern: a letter a layer, repeated over the depth: L is the linear mixer, N softmax attention. When None, what
            ``config.linear_attention_freq`` says: every n-th layer is softmax, or a list with 1 for linear; else LLLN.
        mixer: the linear mixer, a name in `lasp.layers.MIXERS` or "mom"; that of the options when None.
        options: all else.
        use_transformer_engine: whether Megatron's own parts come from Transformer Engine.
        vp_stage: which virtual pipeline stage.
        pp_rank: which pipeline stage; this rank's when None.

    Raises:
        ValueError: where a name is unknown, or Megatron's configuration does not go with it.
    """
    options = options or LaspOptions()
    if mixer is not None:
        options = replace(options, mixer=mixer)
    kinds = _kinds(config, pattern)
    options.check(config, "L" in kinds)
    specs = {kind: _layer(config, kind, kinds.count(kind), options, use_transformer_engine) for kind in set(kinds)}
    layers = [specs[kind] for kind in kinds]
    if config.pipeline_model_parallel_layout is not None:
        from megatron.core.transformer.enums import LayerType

        own = config.pipeline_model_parallel_layout.get_layer_id_list(
            layer_type=LayerType.decoder, vp_stage=vp_stage, pp_rank=pp_rank
        )
        layers = [layers[layer] for layer in own]
    else:
        first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
        layers = layers[first : first + get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=_norm(config, use_transformer_engine))


def _kinds(config: TransformerConfig, pattern: str | None) -> str:
    """The letter of each layer."""
    every = config.linear_attention_freq
    if pattern is None and every is not None:
        if isinstance(every, int):
            pattern = "L" * (every - 1) + "N"
        else:
            pattern = "".join("L" if linear else "N" for linear in every)
            if len(pattern) != config.num_layers:
                raise ValueError(f"--linear-attention-freq: {len(pattern)} layers, --num-layers {config.num_layers}")
    pattern = pattern or "LLLN"
    if set(pattern) - PATTERN.keys():
        known = ", ".join(f"{letter} ({meaning})" for letter, meaning in PATTERN.items())
        raise ValueError(f"--pattern {pattern}: must be made of the letters {known}")
    return (pattern * config.num_layers)[: config.num_layers]


def _layer(config: TransformerConfig, kind: str, count: int, options: LaspOptions, engine: bool) -> ModuleSpec:
    """Megatron's layer, with another attention; there are `count` of the kind."""
    given: dict[str, Any] = {
        "num_experts": config.num_moe_experts,
        "moe_grouped_gemm": config.moe_grouped_gemm,
        "qk_layernorm": config.qk_layernorm and kind == "N",
    }
    if engine:
        spec = get_gpt_layer_with_transformer_engine_spec(**given)
    else:
        spec = get_gpt_layer_local_spec(**given, normalization=config.normalization)
    params, norm = {"options": options}, _norm(config, engine)
    layer = copy(spec.submodules)
    if not engine:
        layer.input_layernorm = layer.pre_mlp_layernorm = norm
    if kind == "L" and options.mixer not in CORES:
        layer.self_attention = ModuleSpec(module=LaspMixer, params={**params, "linear_layers": count})
        # In Transformer Engine's layer the projection of queries, keys and values has the norm within.
        layer.input_layernorm = norm
    else:
        attention = copy(layer.self_attention)
        core = ModuleSpec(module=SoftmaxCore if kind == "N" else LinearCore, params=params)
        attention.submodules = replace(attention.submodules, core_attention=core)
        if kind == "L":
            attention.module = Unrotated
        layer.self_attention = attention
    return ModuleSpec(module=spec.module, params=spec.params, submodules=layer)


def _norm(config: TransformerConfig, engine: bool) -> Any:
    """The norm of a model's layers."""
    if engine:
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    if config.normalization == "RMSNorm" and not config.layernorm_zero_centered_gamma:
        return Norm
    return get_gpt_layer_local_spec(normalization=config.normalization).submodules.input_layernorm
