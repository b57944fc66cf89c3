"""Root-mean-square norms, computed in float32 at least and returned in the dtype of the input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or as it is where it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """``x / rms(x) · weight`` over the last axis, https://arxiv.org/abs/1910.07467.

    Args:
        width: size of the last axis.
        eps: added to the mean square.
    """

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """x: ``[..., width]``."""
        wide = at_least_float32(x)
        return F.rms_norm(wide, self.weight.shape, self.weight.to(wide.dtype), self.eps).to(x.dtype)


class GatedRMSNorm(RMSNorm):
    """``rmsnorm(x) · silu(gate)``: RetNet's and GLA's output gate, https://arxiv.org/abs/2307.08621, eq. 8.

    Args:
        width: size of the last axis.
        groups: how many parts of it, heads for instance, are normed by themselves; they share one weight.
        eps: added to the mean square.
    """

    def __init__(self, width: int, groups: int = 1, eps: float = 1e-5):
        super().__init__(width // groups, eps)
        self.groups = groups

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """x, gate: ``[..., width]``; without a gate the norm alone."""
        wide = at_least_float32(x).unflatten(-1, (self.groups, -1))
        normed = F.rms_norm(wide, self.weight.shape, self.weight.to(wide.dtype), self.eps).flatten(-2)
        if gate is not None:
            normed = normed * F.silu(at_least_float32(gate))
        return normed.to(x.dtype)
