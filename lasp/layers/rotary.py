"""Rotary position embedding, https://arxiv.org/abs/2104.09864, by each token's position within its document."""

from __future__ import annotations

from operator import index
from typing import cast

import torch
from torch import Tensor
from torch.compiler import assume_constant_result

from lasp.layers.norm import at_least_float32
from lasp.parallel import SequenceParallel
from lasp.parallel.operators import keep


def rotate(x: Tensor, sp: SequenceParallel, theta: float, offset: int = 0) -> Tensor:
    """Rotate the pairs ``(x_i, x_{i + D/2})`` by ``position · theta^(−2i/D)``.

    Args:
        x: ``[B, T, H, D]``, this rank's tokens.
        sp: the layout that knows their positions.
        theta: the base of the angles.
        offset: the position of a document's first token.

    Raises:
        ValueError: where D is odd.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"rotary positions need heads of even width, given {x.shape[-1]}: use another number of heads")
    wide = at_least_float32(x)
    width = index(x.shape[-1])
    if offset:
        cosine, sine = _angles_from(offset, sp, width, theta, wide.device, wide.dtype)
    elif torch.compiler.is_compiling():
        cosine, sine = _traced_angles(keep(sp.name), width, theta, wide.device, wide.dtype)
    else:
        cosine, sine = _angles(sp, width, theta, wide.device, wide.dtype)
    first, second = wide.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(x.dtype)


def _angles(
    sp: SequenceParallel, width: int, theta: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``[T, 1, D/2]``, made once for a layout and shared by its layers."""

    def build() -> tuple[Tensor, Tensor]:
        return _angles_from(0, sp, width, theta, device, dtype)

    return cast("tuple[Tensor, Tensor]", sp.layout.cached(("rotary", sp.rank, width, theta, device, dtype), build))


def _angles_from(
    offset: int, sp: SequenceParallel, width: int, theta: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    # float64: at two million tokens a float32 angle would be off by a tenth of a radian.
    positions = sp.layout.document_positions(sp.rank).to(device, torch.float64) + offset
    frequencies = theta ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
    angles = (positions[:, None] * frequencies).unsqueeze(1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@assume_constant_result
def _traced_angles(
    name: str, width: int, theta: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return _angles(SequenceParallel.named(name), width, theta, device, dtype)
