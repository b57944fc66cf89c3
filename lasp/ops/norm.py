"""Norms of vectors, computed in float32 at least and returned in the dtype of the input."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.kernels import triton

#: What an output gate may go through.
GATES: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or as it is where it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


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
        ValueError: where the shapes do not fit, or the activation is unknown.
    """
    if x.shape[-1] != groups * weight.shape[0] or (gate is not None and gate.shape != x.shape):
        raise ValueError(
            f"rms_norm: expected x [..., {groups * weight.shape[0]}] and a gate alike, given x {list(x.shape)}"
            + ("" if gate is None else f" and gate {list(gate.shape)}")
        )
    if activation not in GATES:
        raise ValueError(f"rms_norm: unknown activation={activation!r}: expected one of {', '.join(GATES)}")
    if triton.serves(x):
        from lasp.kernels.triton import norm

        if weight.shape[0] <= norm.WIDEST:
            return norm.rms_norm(x, gate, weight, eps, activation)
    wide = at_least_float32(x)
    # One group is no view: of a module's output FSDP wants none.
    rows = wide if groups == 1 else wide.unflatten(-1, (groups, -1))
    normed = F.rms_norm(rows, weight.shape, weight.to(wide.dtype), eps)
    normed = normed if groups == 1 else normed.flatten(-2)
    if gate is not None:
        normed = normed * GATES[activation](at_least_float32(gate))
    return normed.to(x.dtype)


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """``x / sqrt(Σ x² + eps)`` over the last axis: vectors of length 1, as the field makes its queries and keys."""
    if triton.serves(x):
        from lasp.kernels.triton import l2_norm as kernels
        from lasp.kernels.triton.norm import WIDEST

        if x.shape[-1] <= WIDEST:
            return kernels.l2_norm(x, eps)
    wide = at_least_float32(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)
