"""A mixture's load-balancing loss, through Megatron's mechanism for such: a gradient that waits at the layer's output."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, save_to_aux_losses_tracker
from torch import Tensor

from lasp.layers import MixtureOfMemories, balance

if TYPE_CHECKING:
    from lasp.integrations.megatron.mixer import LaspMixer


def balanced(y: Tensor, layer: LaspMixer) -> Tensor:
    """y as it is, whose backward starts that of the losses of what the layer's mixture chose.

    The tokens of a micro-batch are balanced, over all context-parallel ranks; tensor-parallel ranks, which all choose alike,
    have a share each. The losses, before their weights, go to Megatron's tracker of such.

    Args:
        y: the layer's output.
        layer: whose mixture has chosen.
    """
    config, options, cp_group = layer.config, layer.options, layer.cp_group
    assert isinstance(layer.mixer, MixtureOfMemories)
    assert layer.mixer.routing is not None
    found = balance([layer.mixer.routing], cp_group if cp_group.size() > 1 else None)
    loss = (options.balance * found.loss + options.z_loss * found.z_loss) / layer.linear_layers
    for name, share in (("mom_balance_loss", found.loss), ("mom_z_loss", found.z_loss)):
        save_to_aux_losses_tracker(name, share, layer.layer_number, config.num_layers, reduce_group=cp_group)
    if config.num_moe_experts is None:
        # Megatron's schedules set it where there are experts.
        MoEAuxLossAutoScaler.set_loss_scale(_loss_scale(config, cp_group.size(), y.device))
    scaled: Tensor = MoEAuxLossAutoScaler.apply(y, loss / layer.tp_group.size())
    return scaled


def _loss_scale(config: TransformerConfig, cp_size: int, device: torch.device) -> Tensor:
    """What the gradient of a micro-batch's loss is multiplied with, as in Megatron's schedules."""
    one = torch.ones(1, device=device)
    scale: Tensor = one if config.grad_scale_func is None else config.grad_scale_func(one)
    return scale if config.calculate_per_token_loss else scale * cp_size / get_num_microbatches()
