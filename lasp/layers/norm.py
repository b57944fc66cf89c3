"""Root-mean-square norms, computed in float32 at least and returned in the dtype of the input."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.kernels import triton

#: What an output gate may go through.
GATES: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}


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


def rms_norm(
    x: Tensor, gate: Tensor | None, weight: Tensor, eps: float, groups: int = 1, activation: str = "silu"
) -> Tensor:
    """``x / rms(x) · weight · activation(gate)``, every N numbers of the last axis by themselves.

    Args:
        x: ``[..., groups · N]``.
        gate: alike, or None.
        weight: ``[N]``.
        eps: added to the mean square.
        groups: how many rows of N numbers the last axis holds.
        activation: of the gate, a name in `GATES`.

    Returns:
        Alike, in x's dtype.

    Raises:
        ValueError: where the shapes do not fit.
    """
    if x.shape[-1] != groups * weight.shape[0] or (gate is not None and gate.shape != x.shape):
        raise ValueError(
            f"rms_norm: expected x [..., {groups * weight.shape[0]}] and a gate alike, given x {list(x.shape)}"
            + ("" if gate is None else f" and gate {list(gate.shape)}")
        )
    if triton.serves(x):
        from lasp.kernels.triton import norm

        if weight.shape[0] <= norm.WIDEST and (gate is None or activation == "silu"):
            return norm.rms_norm(x, gate, weight, eps)
    wide = at_least_float32(x).unflatten(-1, (groups, -1))
    normed = F.rms_norm(wide, weight.shape, weight.to(wide.dtype), eps).flatten(-2)
    if gate is not None:
        normed = normed * GATES[activation](at_least_float32(gate))
    return normed.to(x.dtype)
