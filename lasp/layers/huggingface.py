"""Weights published in Hugging Face's format, as layers of this library. Needs the tensors alone, and no transformers.

``gated_delta_net(weights, config, prefix="model.layers.0.linear_attn.")`` takes a whole model's state dict, or the layer's own
where there is no prefix. Its parameters are copies, of the dtypes and on the devices of the weights. Each layer stands beside
a function of the weights alone, which only rearranges rows: so gradients of the one are those of the other, rearranged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lasp.layers.delta import GatedDeltaNet
from lasp.layers.mamba import Mamba2
from lasp.layers.mixer import LinearMixer

Weights = nn.Module | Mapping[str, Tensor]
_Mixer = TypeVar("_Mixer", bound=LinearMixer)


def gated_delta_net(weights: Weights, config: Any, prefix: str = "") -> GatedDeltaNet:
    """Qwen3-Next's linear layer, ``Qwen3NextGatedDeltaNet``, as `lasp.layers.GatedDeltaNet`.

    Args:
        weights: the layer, or a state dict.
        config: what has the sizes, by the names of ``Qwen3NextConfig``.
        prefix: what the names of the layer's weights begin with; other weights are not looked at.

    Raises:
        ValueError: where weights are missing, unknown or of other shapes than the configuration's, or where the configuration
            asks for what the layer is not.
    """
    layer = _on_no_device(
        GatedDeltaNet,
        config.hidden_size,
        config.linear_num_value_heads,
        key_heads=config.linear_num_key_heads,
        key_width=config.linear_key_head_dim,
        value_width=config.linear_value_head_dim,
        conv_size=config.linear_conv_kernel_dim,
        norm_eps=config.rms_norm_eps,
    )
    return _filled(layer, gated_delta_net_weights(weights, config, prefix))


def gated_delta_net_weights(weights: Weights, config: Any, prefix: str = "") -> dict[str, Tensor]:
    """The weights, or their gradients, by the names that they have in `GatedDeltaNet`; arguments as `gated_delta_net`'s.

    ``in_proj_qkvz`` and ``in_proj_ba`` hold, one head of the keys after the other, the rows of its query, key, values, gates,
    and those of its betas, decays.
    """
    what = "Qwen3NextGatedDeltaNet"
    _expect_silu(what, config)
    key_heads, heads = config.linear_num_key_heads, config.linear_num_value_heads
    K, V, hidden = config.linear_key_head_dim, config.linear_value_head_dim, config.hidden_size
    keys, values, group = key_heads * K, heads * V, heads // key_heads
    shapes = {
        "in_proj_qkvz.weight": (2 * keys + 2 * values, hidden),
        "in_proj_ba.weight": (2 * heads, hidden),
        "conv1d.weight": (2 * keys + values, 1, config.linear_conv_kernel_dim),
        "A_log": (heads,),
        "dt_bias": (heads,),
        "norm.weight": (V,),
        "out_proj.weight": (hidden, values),
    }
    given = _of_shapes(what, weights, prefix, shapes)

    def by_key_head(name: str, *rows: int) -> list[Tensor]:
        parts = given[name].unflatten(0, (key_heads, -1)).split(rows, dim=1)
        return [part.flatten(0, 1) for part in parts]

    q, k, v, gate = by_key_head("in_proj_qkvz.weight", K, K, group * V, group * V)
    beta, decay = by_key_head("in_proj_ba.weight", group, group)
    q_conv, k_conv, v_conv = given["conv1d.weight"].squeeze(1).split((keys, keys, values))
    return {
        "q_proj.weight": q,
        "k_proj.weight": k,
        "v_proj.weight": v,
        "gate_proj.weight": gate,
        "beta_proj.weight": beta,
        "decay_proj.weight": decay,
        "q_conv.weight": q_conv,
        "k_conv.weight": k_conv,
        "v_conv.weight": v_conv,
        "A_log": given["A_log"],
        "dt_bias": given["dt_bias"],
        "norm.weight": given["norm.weight"],
        "o_proj.weight": given["out_proj.weight"],
    }


def mamba2(weights: Weights, config: Any, prefix: str = "") -> Mamba2:
    """Mamba-2's mixer, ``Mamba2Mixer``, as `lasp.layers.Mamba2`.

    Args:
        weights: the layer, or a state dict.
        config: what has the sizes, by the names of ``Mamba2Config``.
        prefix: what the names of the layer's weights begin with; other weights are not looked at.

    Raises:
        ValueError: where weights are missing, unknown or of other shapes than the configuration's, or where the configuration
            asks for what the layer is not: biases of its projections, or limits of the time steps.
    """
    layer = _on_no_device(
        Mamba2,
        config.hidden_size,
        config.num_heads,
        key_heads=config.n_groups,
        key_width=config.state_size,
        value_width=config.head_dim,
        conv_size=config.conv_kernel,
        norm_eps=config.layer_norm_epsilon,
    )
    return _filled(layer, mamba2_weights(weights, config, prefix))


def mamba2_weights(weights: Weights, config: Any, prefix: str = "") -> dict[str, Tensor]:
    """The weights, or their gradients, by the names that they have in `Mamba2`; arguments as `mamba2`'s.

    ``in_proj`` holds the rows of gate, values, keys, queries and time steps, and ``conv1d`` the channels of values, keys and
    queries.
    """
    what = "Mamba2Mixer"
    _expect_silu(what, config)
    if config.use_bias:
        raise ValueError(
            f"{what}: its projections have biases (use_bias=True), which those of lasp.layers.Mamba2 have not"
        )
    if tuple(config.time_step_limit) != (0.0, float("inf")):
        raise ValueError(f"{what}: time_step_limit={config.time_step_limit} bounds the time steps; expected (0, inf)")
    heads, hidden = config.num_heads, config.hidden_size
    keys, values = config.n_groups * config.state_size, heads * config.head_dim
    channels = values + 2 * keys
    shapes = {
        "in_proj.weight": (values + channels + heads, hidden),
        "conv1d.weight": (channels, 1, config.conv_kernel),
        "conv1d.bias": (channels,),
        "A_log": (heads,),
        "D": (heads,),
        "dt_bias": (heads,),
        "norm.weight": (values,),
        "out_proj.weight": (hidden, values),
    }
    given = _of_shapes(what, weights, prefix, shapes)
    rows = (values, values, keys, keys, heads)
    gate, v, k, q, dt = given["in_proj.weight"].split(rows)
    found = {
        "gate_proj.weight": gate,
        "v_proj.weight": v,
        "k_proj.weight": k,
        "q_proj.weight": q,
        "dt_proj.weight": dt,
        "A_log": given["A_log"],
        "D": given["D"],
        "dt_bias": given["dt_bias"],
        "norm.weight": given["norm.weight"],
        "o_proj.weight": given["out_proj.weight"],
    }
    for name, taps in (("weight", given["conv1d.weight"].squeeze(1)), ("bias", given["conv1d.bias"])):
        found |= {f"{x}_conv.{name}": part for x, part in zip("vkq", taps.split((values, keys, keys)), strict=True)}
    return found


def _on_no_device(kind: type[_Mixer], *sizes: int, **options: Any) -> _Mixer:
    """The layer with parameters that are only shapes."""
    with torch.device("meta"):
        return kind(*sizes, **options)


def _filled(layer: _Mixer, weights: dict[str, Tensor]) -> _Mixer:
    copies = {name: x.detach().clone(memory_format=torch.contiguous_format) for name, x in weights.items()}
    layer.load_state_dict(copies, assign=True)
    return layer


def _expect_silu(what: str, config: Any) -> None:
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"{what}: hidden_act={config.hidden_act!r}: expected silu")


def _of_shapes(what: str, weights: Weights, prefix: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The weights that begin with `prefix`, by the rest of their names, if they are those of `shapes`."""
    named = weights.state_dict() if isinstance(weights, nn.Module) else weights
    given = {name.removeprefix(prefix): x for name, x in named.items() if name.startswith(prefix)}
    missing, unexpected = sorted(shapes.keys() - given.keys()), sorted(given.keys() - shapes.keys())
    if missing or unexpected:
        at = f" of prefix {prefix!r}" if prefix else ""
        raise ValueError(
            f"{what}: the weights{at} are not a layer's: missing {', '.join(missing) or 'none'}; "
            f"unexpected {', '.join(unexpected) or 'none'}"
        )
    for name, shape in shapes.items():
        if tuple(given[name].shape) != shape:
            raise ValueError(
                f"{what}: {prefix}{name} must be {list(shape)} by the configuration, given {list(given[name].shape)}"
            )
    return given
