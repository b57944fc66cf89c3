"""Softmax attention and the causal convolution by their definitions, token by token, in the dtype that they are given."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    cu_seqlens: Sequence[int] | None = None,
) -> Tensor:
    """``[B, T, H, D]``: every query by itself, over the keys that it sees."""
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rows = []
    for first, end in pairwise(cu_seqlens or (0, q.shape[1])):
        for i in range(first, end):
            low = first if window is None else max(first, i - window + 1)
            high = i + 1 if causal else end if window is None else min(end, i + window)
            heads_out = []
            for h in range(heads):
                keys, values = k[:, low:high, h // group], v[:, low:high, h // group]
                weights = torch.softmax(scale * (keys @ q[:, i, h].unsqueeze(-1)).squeeze(-1), dim=-1)
                heads_out.append((weights.unsqueeze(-1) * values).sum(1))
            rows.append(torch.stack(heads_out, dim=1))
    return torch.stack(rows, dim=1)


def causal_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cu_seqlens: Sequence[int] | None = None,
) -> Tensor:
    """``[B, T, D]``: every token by itself, over the tokens of its document that its taps reach."""
    taps = weight.shape[1]
    rows = []
    for first, end in pairwise(cu_seqlens or (0, x.shape[1])):
        for t in range(first, end):
            y = torch.zeros_like(x[:, t]) if bias is None else bias.expand_as(x[:, t])
            for j in range(taps):
                if t - j >= first:
                    y = y + weight[:, taps - 1 - j] * x[:, t - j]
            rows.append(y if activation is None else F.silu(y))
    return torch.stack(rows, dim=1)
