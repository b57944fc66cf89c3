"""Root-mean-square norms, with an output gate and without."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.ops.norm import at_least_float32, rms_norm


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
        return rms_norm(x, None, self.weight, self.eps)


class GatedRMSNorm(RMSNorm):
    """``rmsnorm(x) · activation(gate)``: RetNet's and GLA's output gate, https://arxiv.org/abs/2307.08621, eq. 8.

    Args:
        width: size of the last axis.
        groups: how many parts of it, heads for instance, are normed by themselves; they share one weight.
        eps: added to the mean square.
        activation: of the gate, a name in `GATES`.
    """

    def __init__(self, width: int, groups: int = 1, eps: float = 1e-5, activation: str = "silu"):
        super().__init__(width // groups, eps)
        self.groups, self.activation = groups, activation

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """x, gate: ``[..., width]``; without a gate the norm alone."""
        return rms_norm(x, gate, self.weight, self.eps, self.groups, self.activation)


class GateFirstRMSNorm(nn.Module):
    """``rmsnorm(x · silu(gate)) · weight``: Mamba-2's, https://arxiv.org/abs/2405.21060, section 7.

    Args:
        width: size of the last axis.
        groups: how many parts of it are normed by themselves; each has a weight of its own.
        eps: added to the mean square.
    """

    def __init__(self, width: int, groups: int = 1, eps: float = 1e-5):
        super().__init__()
        if groups < 1 or width % groups:
            raise ValueError(f"groups={groups} of a norm do not divide its width={width}")
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """x, gate: ``[..., width]``; without a gate the norm alone."""
        wide = at_least_float32(x)
        if gate is not None:
            wide = wide * F.silu(at_least_float32(gate))
        parts = wide.unflatten(-1, (self.groups, -1))
        normed = F.rms_norm(parts, parts.shape[-1:], None, self.eps).flatten(-2)
        return (normed * self.weight.to(wide.dtype)).to(x.dtype)
