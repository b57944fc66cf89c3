"""The short causal convolution that some mixers put on their queries, keys and values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lasp.ops.conv import causal_conv1d
from lasp.ops.inputs import CuSeqlens
from lasp.parallel import SequenceParallel


class ShortConvolution(nn.Module):
    """A causal convolution of every channel by itself, within documents: H3, https://arxiv.org/abs/2212.14052.

    Args:
        channels: D.
        size: how many tokens it spans, the current one included.
        activation: what follows it, ``"silu"`` or None.
        bias: whether a learnt number is added to each channel, before the activation.
    """

    def __init__(self, channels: int, size: int = 4, activation: str | None = "silu", bias: bool = False):
        super().__init__()
        self.activation = activation
        bound = size**-0.5
        self.weight = nn.Parameter(torch.empty(channels, size).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Tensor, sp: SequenceParallel | None = None, cu_seqlens: CuSeqlens = None) -> Tensor:
        """x: ``[B, T, D]``."""
        return causal_conv1d(x, self.weight, self.bias, self.activation, cu_seqlens, sp)
