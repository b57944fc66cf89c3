"""FSDP2 over all ranks, data-parallel and sequence-parallel: who holds which weights, and when they are gathered."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from lasp.layers.mom import PerMemory
from lasp.models import LinearLlama3

#: What has large weights, which under autocast are computed in bfloat16.
PROJECTIONS = nn.Linear | nn.Embedding | PerMemory


def share(model: LinearLlama3, ranks: DeviceMesh, dtype: torch.dtype) -> None:
    """Let ranks share the weights of all projections, layer by layer; what is small (norms, decays, convolutions) all hold.

    Each rank keeps its part of the weights in float32. A layer's are gathered in `dtype`, in one collective, while the layer
    before is computed, forgotten after it, and gathered again in the backward; gradients are summed in float32, not averaged:
    each rank's loss is its share of one mean.

    Args:
        model: the same on all ranks, on the CPU; its shared weights are then on the ranks' devices, the others where they were.
        ranks: of one axis, with a group of its own, so that weights do not queue with states.
        dtype: what the matrix products are computed in.
    """
    large = {id(p) for module in model.modules() if isinstance(module, PROJECTIONS) for p in module.parameters(False)}
    held = {p for p in model.parameters() if id(p) not in large}
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=ranks, mp_policy=policy, ignored_params=held)
    # Embedding and head, whose products autocast computes in dtype; embeddings themselves stay float32.
    fully_shard(model, mesh=ranks, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False), ignored_params=held)
    # What the head reads is asked for by this name; the head itself reads weights that are still there.
    register_fsdp_forward_method(model, "features")
    for module in _sharing(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def part(model: nn.Module) -> None:
    """Forget what was gathered and not needed for a backward: after a forward without one."""
    for module in _sharing(model):
        module.reshard()


def _sharing(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
