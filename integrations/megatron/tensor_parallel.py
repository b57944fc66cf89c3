"""A mixer of some of a layer's heads: what tensor-parallel ranks hold, whatever the mixer.

A rank computes with its own heads alone, and every gradient that it makes is its share: that of the tokens is summed over the
ranks where they enter the layer, that of a parameter which all ranks hold alike when it arrives. Which axis of a parameter
counts heads is read off the mixer: it is the one that is shorter where there are fewer heads.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from math import gcd
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lasp.layers import GatedRMSNorm
from lasp.layers.mom import PerMemory
from lasp.ops.norm import GATES, at_least_float32

#: A mixer of one of several equal parts of a layer's heads: which, and of how many.
Make = Callable[[tuple[int, int]], nn.Module]


class ToHeads(ColumnParallelLinear):
    """A projection of tokens, which every rank has whole, to the rank's heads; Megatron's, without its communication."""

    def __init__(self, like: nn.Linear, parts: int, config: TransformerConfig, group: dist.ProcessGroup):
        config = copy(config)
        config.sequence_parallel = False
        super().__init__(
            like.in_features, like.out_features * parts, config=config, init_method=config.init_method,
            gather_output=False, bias=like.bias is not None, skip_bias_add=False, disable_grad_reduce=True, tp_group=group,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, in]`` to ``[B, T, out / ranks]``."""
        y: Tensor = super().forward(x)[0]
        return y


class FromHeads(RowParallelLinear):
    """The projection of the rank's heads, summed over the ranks; Megatron's, which also deals out its tokens where asked."""

    def __init__(self, like: nn.Linear, parts: int, config: TransformerConfig, group: dist.ProcessGroup):
        super().__init__(
            like.in_features * parts, like.out_features, config=config, init_method=config.output_layer_init_method,
            bias=False, input_is_parallel=True, skip_bias_add=False, tp_group=group,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, in / ranks]`` to ``[B, T, out]``, of Megatron's sequence parallelism this rank's tokens."""
        # Contiguous: else Megatron would sum a copy, and give back what was not summed.
        y: Tensor = super().forward(x.transpose(0, 1).contiguous())[0]
        return y.transpose(0, 1)


class NormOfAllHeads(nn.Module):
    """`GatedRMSNorm` over the heads of all ranks.

    Args:
        norm: of this rank's heads.
        group: the tensor-parallel ranks.
    """

    def __init__(self, norm: GatedRMSNorm, group: dist.ProcessGroup):
        super().__init__()
        self.weight, self.eps, self.activation, self.group = norm.weight, norm.eps, norm.activation, group

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """x, gate: ``[..., width / ranks]``; without a gate the norm alone."""
        wide = at_least_float32(x)
        square: Tensor = _Summed.apply(wide.square().sum(-1, keepdim=True), self.group)
        normed = wide * torch.rsqrt(square / (x.shape[-1] * self.group.size()) + self.eps) * self.weight.to(wide.dtype)
        if gate is not None:
            normed = normed * GATES[self.activation](at_least_float32(gate))
        return normed.to(x.dtype)


def entered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x, alike on all ranks, of whose gradient each has a share: they are summed."""
    y: Tensor = _Entered.apply(x, group) if group.size() > 1 else x
    return y


class _Entered(torch.autograd.Function):
    # Megatron's function of the kind gives a gradient that is not contiguous back as it came: unsummed.

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return _sum(dy, ctx.group), None


class _Summed(torch.autograd.Function):
    """The sum over the ranks, each of which makes something of its own of it: so is the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _sum(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return _sum(dy, ctx.group), None


def _sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


class HeadParallel(MegatronModule):
    """What has a mixer of which tensor-parallel ranks hold parts.

    Attributes:
        mixer: this rank's part.
        tp_group: the tensor-parallel ranks.
    """

    mixer: nn.Module
    tp_group: dist.ProcessGroup

    def take_part(self, make: Make, heads: int, key_heads: int) -> None:
        """Make this rank's part, see `part_of`.

        Args:
            make: the mixer of a part of the heads.
            heads: how many there are in all.
            key_heads: of queries and keys.
        """
        self._axes = head_axes(make, heads, key_heads, self.tp_group.size())
        self.mixer = part_of(make, self._axes, self.config, self.tp_group)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """What Megatron's checkpoints hold of it, and which part of the whole that is."""
        found: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.mixer.state_dict(keep_vars=True), f"{prefix}mixer.", self._axes, sharded_offsets,
            tp_group=self.tp_group, dp_cp_group=(metadata or {})["dp_cp_group"],
        )  # fmt: skip
        return found


def part_of(make: Make, axes: dict[str, int], config: TransformerConfig, group: dist.ProcessGroup) -> nn.Module:
    """This rank's part of a mixer, on Megatron's device and in its dtype, initialised as Megatron's layers are.

    Projections are Megatron's own. What differs from head to head is marked as Megatron marks it; what is alike on all ranks
    has the gradients of all.

    Args:
        make: the mixer of a part of the heads.
        axes: which of each parameter's counts heads, see `head_axes`.
        config: Megatron's.
        group: the tensor-parallel ranks.
    """
    size, rank = group.size(), group.rank()
    device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
    with get_cuda_rng_tracker().fork(), torch.device(device):
        mixer = make((rank, size)).to(config.params_dtype)
    for path, module in list(mixer.named_modules()):
        if type(module) is nn.Linear:
            if (axis := axes.get(f"{path}.weight")) is not None:
                kind = (ToHeads, FromHeads)[axis]
                mixer.set_submodule(path, kind(module, size, config, group))
            elif config.perform_initialization:
                config.init_method(module.weight)
        elif isinstance(module, PerMemory) and config.perform_initialization:
            with get_cuda_rng_tracker().fork():
                config.init_method(module.weight)
        elif isinstance(module, GatedRMSNorm) and f"{path}.weight" in axes and size > 1:
            # Its weight counts heads: it is a norm of them all.
            mixer.set_submodule(path, NormOfAllHeads(module, group))
    for name, parameter in mixer.named_parameters():
        if name in axes:
            # Megatron's own projections are marked already.
            if not hasattr(parameter, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(parameter, True, axes[name], 1)
        elif size > 1:
            dist.broadcast(parameter.data, dist.get_global_rank(group, 0), group=group)
            parameter.register_hook(lambda gradient: _sum(gradient, group))
    return mixer


def head_axes(make: Make, heads: int, key_heads: int, parts: int) -> dict[str, int]:
    """The axis of each parameter that counts heads, by name; of those alike for all heads nothing.

    Args:
        make: the mixer of a part of the heads.
        heads: how many there are in all.
        key_heads: of queries and keys.
        parts: among how many ranks they are divided; of one, what it would be of more.
    """
    if parts == 1:
        common = gcd(heads, key_heads) if key_heads > 1 else heads
        parts = next((n for n in range(2, common + 1) if common % n == 0), 1)
    with torch.device("meta"):
        whole, part = (dict(make((0, count)).named_parameters()) for count in (1, parts))
    found = {}
    for name, parameter in part.items():
        shorter = [axis for axis, n in enumerate(parameter.shape) if n != whole[name].shape[axis]]
        assert len(shorter) <= 1, name
        if shorter:
            found[name] = shorter[0]
    return found
