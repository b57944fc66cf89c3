"""Rotary position embedding, https://arxiv.org/abs/2104.09864, by each token's position within its document."""

from __future__ import annotations

from operator import index
from typing import cast

import torch
from torch import Tensor
from torch.compiler import assume_constant_result

from lasp.ops.norm import at_least_float32
from lasp.parallel import SequenceParallel
from lasp.parallel.operators import keep


def rotate(x: Tensor, sp: SequenceParallel, theta: float, positions: Tensor | None = None) -> Tensor:
    """Rotate the pairs ``(x_i, x_{i + D/2})`` by ``position · theta^(−2i/D)``.

    Args:
        x: ``[B, T, H, D]``, this rank's tokens.
        sp: the layout that knows their positions.
        theta: the base of the angles.
        positions: of the tokens ``[T]`` or ``[B, T]``, where they are not those of the layout.

    Raises:
        ValueError: where D is odd.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"rotary positions need heads of even width, given {x.shape[-1]}: use another number of heads")
    wide = at_least_float32(x)
    width = index(x.shape[-1])
    if positions is not None:
        cosine, sine = _angles_at(positions, width, theta, wide.dtype)
    elif torch.compiler.is_compiling():
        cosine, sine = _traced_angles(keep(sp.name), width, theta, wide.device, wide.dtype)
    else:
        cosine, sine = _angles(sp, width, theta, wide.device, wide.dtype)
    one, other = wide.chunk(2, dim=-1)
    return torch.cat([one * cosine - other * sine, other * cosine + one * sine], dim=-1).to(x.dtype)


def _angles_at(positions: Tensor, width: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``[.., T, 1, D/2]`` of positions ``[.., T]``."""
    # float64: at two million tokens a float32 angle would be off by a tenth of a radian.
    frequencies = theta ** (-torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width)
    angles = (positions.to(torch.float64).unsqueeze(-1) * frequencies).unsqueeze(-2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _angles(
    sp: SequenceParallel, width: int, theta: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Those of the layout's positions, made once for it and shared by its layers."""

    def build() -> tuple[Tensor, Tensor]:
        return _angles_at(sp.layout.document_positions(sp.rank).to(device), width, theta, dtype)

    return cast("tuple[Tensor, Tensor]", sp.layout.cached(("rotary", sp.rank, width, theta, device, dtype), build))


@assume_constant_result
def _traced_angles(
    name: str, width: int, theta: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return _angles(SequenceParallel.named(name), width, theta, device, dtype)
