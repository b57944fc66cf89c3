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

from lasp.layers.delta import GatedDeltaNet, KimiDeltaAttention
from lasp.layers.mamba import Mamba2
from lasp.layers.mixer import LinearMixer

Weights = nn.Module | Mapping[str, Tensor]
_Mixer = TypeVar("_Mixer", bound=LinearMixer)


def gated_delta_net(weights: Weights, config: Any, prefix: str = "") -> GatedDeltaNet:
    """The linear layers of Qwen3-Next and Qwen3.5, ``Qwen3NextGatedDeltaNet`` and ``Qwen3_5GatedDeltaNet``.

    Args:
        weights: the layer, or a state dict.
        config: what has the sizes, by the names of ``Qwen3NextConfig`` and ``Qwen3_5TextConfig``.
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

    Qwen3-Next's ``in_proj_qkvz`` and ``in_proj_ba`` hold, one head of the keys after the other, the rows of its query, key,
    values, gates, and those of its betas, decays. Qwen3.5 has them apart, but for query, key and values.
    """
    what = "Gated DeltaNet"
    _expect_silu(what, config)
    key_heads, heads = config.linear_num_key_heads, config.linear_num_value_heads
    K, V, hidden = config.linear_key_head_dim, config.linear_value_head_dim, config.hidden_size
    group, widths = heads // key_heads, (key_heads * K, key_heads * K, heads * V)
    channels, values = sum(widths), heads * V
    named = _named(weights, prefix)
    apart = "in_proj_qkv.weight" in named
    shapes = {
        "conv1d.weight": (channels, 1, config.linear_conv_kernel_dim),
        "A_log": (heads,),
        "dt_bias": (heads,),
        "norm.weight": (V,),
        "out_proj.weight": (hidden, values),
    }
    if apart:
        shapes |= {"in_proj_qkv.weight": (channels, hidden), "in_proj_z.weight": (values, hidden)}
        shapes |= {"in_proj_b.weight": (heads, hidden), "in_proj_a.weight": (heads, hidden)}
    else:
        shapes |= {"in_proj_qkvz.weight": (channels + values, hidden), "in_proj_ba.weight": (2 * heads, hidden)}
    given = _of_shapes(what, named, prefix, shapes)

    def by_key_head(name: str, *rows: int) -> list[Tensor]:
        parts = given[name].unflatten(0, (key_heads, -1)).split(rows, dim=1)
        return [part.flatten(0, 1) for part in parts]

    if apart:
        q, k, v = given["in_proj_qkv.weight"].split(widths)
        gate, beta, decay = (given[f"in_proj_{name}.weight"] for name in "zba")
    else:
        q, k, v, gate = by_key_head("in_proj_qkvz.weight", K, K, group * V, group * V)
        beta, decay = by_key_head("in_proj_ba.weight", group, group)
    return _convolutions(given["conv1d.weight"].squeeze(1), "weight", "qkv", widths) | {
        "q_proj.weight": q,
        "k_proj.weight": k,
        "v_proj.weight": v,
        "gate_proj.weight": gate,
        "beta_proj.weight": beta,
        "decay_proj.weight": decay,
        "A_log": given["A_log"],
        "dt_bias": given["dt_bias"],
        "norm.weight": given["norm.weight"],
        "o_proj.weight": given["out_proj.weight"],
    }


def kda(weights: Weights, config: Any, prefix: str = "") -> KimiDeltaAttention:
    """The linear layers of Kimi Linear, ``KimiLinearDeltaAttention``, named as transformers holds them.

    Args:
        weights: the layer, or a state dict.
        config: what has the sizes, by the names of ``KimiLinearConfig``.
        prefix: what the names of the layer's weights begin with; other weights are not looked at.

    Raises:
        ValueError: where weights are missing, unknown or of other shapes than the configuration's, or where the configuration
            asks for what the layer is not.
    """
    width = config.linear_head_dim
    layer = _on_no_device(
        KimiDeltaAttention,
        config.hidden_size,
        config.linear_num_heads,
        key_width=width,
        value_width=width,
        conv_size=config.linear_conv_kernel_dim,
        norm_eps=config.rms_norm_eps,
    )
    return _filled(layer, kda_weights(weights, config, prefix))


def kda_weights(weights: Weights, config: Any, prefix: str = "") -> dict[str, Tensor]:
    """The weights, or their gradients, by the names that they have in `KimiDeltaAttention`; arguments as `kda`'s."""
    what = "Kimi Delta Attention"
    _expect_silu(what, config)
    heads, width, hidden = config.linear_num_heads, config.linear_head_dim, config.hidden_size
    channels = heads * width
    into, up = (width, hidden), (channels, width)
    shapes = {
        "q_proj.weight": (channels, hidden),
        "k_proj.weight": (channels, hidden),
        "v_proj.weight": (channels, hidden),
        "conv1d.weight": (3 * channels, 1, config.linear_conv_kernel_dim),
        "forget_gate.f_a_proj.weight": into,
        "forget_gate.f_b_proj.weight": up,
        "forget_gate.A_log": (1, 1, heads, 1),
        "forget_gate.dt_bias": (channels,),
        "b_proj.weight": (heads, hidden),
        "g_a_proj.weight": into,
        "g_b_proj.weight": up,
        "o_norm.weight": (width,),
        "o_proj.weight": (hidden, channels),
    }
    given = _of_shapes(what, _named(weights, prefix), prefix, shapes)
    return _convolutions(given["conv1d.weight"].squeeze(1), "weight", "qkv", (channels,) * 3) | {
        "q_proj.weight": given["q_proj.weight"],
        "k_proj.weight": given["k_proj.weight"],
        "v_proj.weight": given["v_proj.weight"],
        "gate_proj.0.weight": given["g_a_proj.weight"],
        "gate_proj.1.weight": given["g_b_proj.weight"],
        "beta_proj.weight": given["b_proj.weight"],
        "decay_proj.0.weight": given["forget_gate.f_a_proj.weight"],
        "decay_proj.1.weight": given["forget_gate.f_b_proj.weight"],
        "A_log": given["forget_gate.A_log"].flatten(),
        "dt_bias": given["forget_gate.dt_bias"],
        "norm.weight": given["o_norm.weight"],
        "o_proj.weight": given["o_proj.weight"],
    }


def mamba2(weights: Weights, config: Any, prefix: str = "") -> Mamba2:
    """Mamba-2's mixer, ``Mamba2Mixer``.

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
    what = "Mamba-2"
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
    given = _of_shapes(what, _named(weights, prefix), prefix, shapes)
    gate, v, k, q, dt = given["in_proj.weight"].split((values, values, keys, keys, heads))
    widths = (values, keys, keys)
    taps = _convolutions(given["conv1d.weight"].squeeze(1), "weight", "vkq", widths)
    return (
        taps
        | _convolutions(given["conv1d.bias"], "bias", "vkq", widths)
        | {
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
    )


def _convolutions(channels: Tensor, name: str, order: str, widths: tuple[int, ...]) -> dict[str, Tensor]:
    """The parts of one convolution's parameter that are those of queries, keys and values, in the order given."""
    return {f"{x}_conv.{name}": part for x, part in zip(order, channels.split(widths), strict=True)}


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


def _named(weights: Weights, prefix: str) -> dict[str, Tensor]:
    """The weights that begin with `prefix`, by the rest of their names."""
    named = weights.state_dict() if isinstance(weights, nn.Module) else weights
    return {name.removeprefix(prefix): x for name, x in named.items() if name.startswith(prefix)}


def _of_shapes(
    what: str, given: dict[str, Tensor], prefix: str, shapes: dict[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The weights as they are, if they are those of `shapes`."""
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
