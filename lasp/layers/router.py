"""Which memories a token writes to and reads, and how much of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.ops.norm import at_least_float32


class Routing(NamedTuple):
    """What tokens chose.

    Attributes:
        probabilities: of all memories ``[B, T, M]``, float32 (float64 for float64 layers).
        memories: the k that each token chose ``[B, T, k]``, int64, the likeliest first.
        weights: of the chosen, of sum 1 ``[B, T, k]``, likewise.
        log_partition: ``log Σ_m e^{logit_m}`` ``[B, T]``, likewise.
        dropped: how many choices stand in no memory, int64 ``[]``, where that was looked at.
    """

    probabilities: Tensor
    memories: Tensor
    weights: Tensor
    log_partition: Tensor
    dropped: Tensor | None = None


class Router(nn.Module):
    """The k likeliest of M memories by ``softmax(W x)``: MoM, https://arxiv.org/abs/2502.13685, section 3.1.

    Of memories that are equally likely the first is chosen, on every device and every rank.

    Args:
        hidden: width of the model.
        num_memories: M.
        top_k: k.

    Raises:
        ValueError: where there is no memory, or k is not from 1 to M.
    """

    def __init__(self, hidden: int, num_memories: int, top_k: int):
        super().__init__()
        if num_memories < 1:
            raise ValueError(f"num_memories={num_memories}: expected at least 1")
        if not 1 <= top_k <= num_memories:
            raise ValueError(f"top_k={top_k}: expected from 1 to num_memories={num_memories}")
        self.top_k = top_k
        self.proj = nn.Linear(hidden, num_memories, bias=False)

    def forward(self, x: Tensor) -> Routing:
        """x: ``[B, T, hidden]``."""
        with torch.autocast(x.device.type, enabled=False):
            # Whatever else is rounded: a choice is not.
            x, weight = at_least_float32(x), at_least_float32(self.proj.weight)
            logits = F.linear(x, weight)
            probabilities = logits.softmax(-1)
        # torch.topk leaves open which of two alike it takes.
        likeliest, memories = torch.sort(probabilities, dim=-1, descending=True, stable=True)
        likeliest = likeliest[..., : self.top_k]
        weights = likeliest / likeliest.sum(-1, keepdim=True)
        chosen = memories[..., : self.top_k].contiguous()
        return Routing(probabilities, chosen, weights, logits.logsumexp(-1))


class Balance(NamedTuple):
    """How evenly tokens choose, of all layers that route.

    Attributes:
        loss: this rank's share of ``M Σ_m f_m P_m``, the layers' mean: 1 where all memories are chosen alike.
        load: f, the share of the choices that each memory has ``[M]``, the layers' mean, over all ranks.
        entropy: this rank's share of that of the probabilities, in nats, the mean over tokens and layers.
        z_loss: this rank's share of the mean of ``log_partition²``, likewise: ST-MoE, https://arxiv.org/abs/2202.08906, eq. 5.
        dropped: this rank's choices that stand in no memory, of all layers: none, unless something is wrong.
    """

    loss: Tensor
    load: Tensor
    entropy: Tensor
    z_loss: Tensor
    dropped: Tensor


def balance(routings: Sequence[Routing], group: dist.ProcessGroup | None) -> Balance:
    """The load-balancing loss, f and P being means over all tokens of a step: those of all ranks of the group.

    Switch Transformers, https://arxiv.org/abs/2101.03961, eq. 4, as MoM has it. Shares add up over the ranks, as do those of
    the gradients. One all-reduce, for all layers.

    Args:
        routings: what each layer's router chose, of this rank's tokens.
        group: the ranks that share the step, over both sequences and batch; None for this rank alone.
    """
    likely = torch.stack([routing.probabilities.flatten(0, -2).sum(0) for routing in routings])
    layers, memories = likely.shape
    chosen = likely.new_zeros(layers, memories)
    for row, routing in zip(chosen, routings, strict=True):
        choices = routing.memories.flatten()
        row.scatter_add_(0, choices, row.new_ones(choices.shape))
    if group is not None:
        dist.all_reduce(chosen, group=group)
    top_k = routings[0].memories.shape[-1]
    tokens = chosen[0].sum() / top_k
    load = chosen / (tokens * top_k)
    loss = memories * (load * likely / tokens).sum() / layers
    probabilities = torch.stack([routing.probabilities.detach() for routing in routings])
    entropy = -torch.special.xlogy(probabilities, probabilities).sum() / tokens / layers
    z_loss = torch.stack([routing.log_partition for routing in routings]).square().sum() / tokens / layers
    dropped = likely.new_zeros(()) + sum(routing.dropped for routing in routings if routing.dropped is not None)
    return Balance(loss, load.mean(0), entropy, z_loss, dropped.detach())
