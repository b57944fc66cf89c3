"""Which memories a token writes to and reads, and how much of each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lasp.ops.norm import at_least_float32


class Routing(NamedTuple):
    """What tokens chose.

    Attributes:
        probabilities: of all memories ``[B, T, M]``, float32 (float64 for float64 layers).
        memories: the k that each token chose ``[B, T, k]``, int64, the likeliest first.
        weights: of the chosen, of sum 1 ``[B, T, k]``, likewise.
    """

    probabilities: Tensor
    memories: Tensor
    weights: Tensor


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
        probabilities = at_least_float32(self.proj(x)).softmax(-1)
        # torch.topk leaves open which of two alike it takes.
        likeliest, memories = torch.sort(probabilities, dim=-1, descending=True, stable=True)
        likeliest = likeliest[..., : self.top_k]
        weights = likeliest / likeliest.sum(-1, keepdim=True)
        return Routing(probabilities, memories[..., : self.top_k].contiguous(), weights)
