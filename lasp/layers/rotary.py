"""Rotary position embedding, https://arxiv.org/abs/2104.09864, by each token's position within its document."""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import index
from typing import cast

import torch
from torch import Tensor
from torch.compiler import assume_constant_result

from lasp.ops.norm import at_least_float32
from lasp.parallel import SequenceParallel
from lasp.parallel.operators import keep


@dataclass(frozen=True)
class RopeScaling:
    """Slower rotations, for sequences longer than a model was first trained on; named as in Hugging Face's ``config.json``.

    Attributes:
        rope_type: "llama3": of the rotations that turn less than `low_freq_factor` times over the first length, the
            frequencies are divided by `factor`; of those that turn more than `high_freq_factor` times they stay; between the
            two it is linear in the turns (Llama 3.1, https://arxiv.org/abs/2407.21783, as its authors publish it). "linear":
            all frequencies are divided (https://arxiv.org/abs/2306.15595).
        factor: at least 1.
        low_freq_factor: of "llama3".
        high_freq_factor: likewise.
        original_max_position_embeddings: the length of the sequences that the model was first trained on, likewise.

    Raises:
        ValueError: naming the attribute that cannot be.
    """

    rope_type: str = "llama3"
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if self.rope_type not in ("llama3", "linear"):
            raise ValueError(f"rope_type={self.rope_type!r}: expected llama3 or linear")
        if not self.factor >= 1:
            raise ValueError(f"factor={self.factor} of the rotary positions' scaling must be at least 1")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor} must be above 0 and below high_freq_factor={self.high_freq_factor}"
            )
        if self.original_max_position_embeddings < 1:
            raise ValueError(
                f"original_max_position_embeddings={self.original_max_position_embeddings} must be at least 1"
            )

    def of(self, frequencies: Tensor) -> Tensor:
        """The frequencies, scaled."""
        if self.rope_type == "linear":
            return frequencies / self.factor
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


def rotate(
    x: Tensor,
    sp: SequenceParallel,
    theta: float,
    positions: Tensor | None = None,
    scaling: RopeScaling | None = None,
) -> Tensor:
    """Rotate the pairs ``(x_i, x_{i + D/2})`` by ``position · theta^(−2i/D)``.

    Args:
        x: ``[B, T, H, D]``, this rank's tokens.
        sp: the layout that knows their positions.
        theta: the base of the angles.
        positions: of the tokens ``[T]`` or ``[B, T]``, where they are not those of the layout.
        scaling: of the frequencies ``theta^(−2i/D)``.

    Raises:
        ValueError: where D is odd.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"rotary positions need heads of even width, given {x.shape[-1]}: use another number of heads")
    wide = at_least_float32(x)
    width = index(x.shape[-1])
    if positions is not None:
        cosine, sine = _angles_at(positions, width, theta, scaling, wide.dtype)
    elif torch.compiler.is_compiling():
        cosine, sine = _traced_angles(keep(sp.name), width, theta, scaling, wide.device, wide.dtype)
    else:
        cosine, sine = _angles(sp, width, theta, scaling, wide.device, wide.dtype)
    one, other = wide.chunk(2, dim=-1)
    return torch.cat([one * cosine - other * sine, other * cosine + one * sine], dim=-1).to(x.dtype)


def _angles_at(
    positions: Tensor, width: int, theta: float, scaling: RopeScaling | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``[.., T, 1, D/2]`` of positions ``[.., T]``."""
    # float64: at two million tokens a float32 angle would be off by a tenth of a radian.
    frequencies = theta ** (-torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width)
    if scaling is not None:
        frequencies = scaling.of(frequencies)
    angles = (positions.to(torch.float64).unsqueeze(-1) * frequencies).unsqueeze(-2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _angles(
    sp: SequenceParallel,
    width: int,
    theta: float,
    scaling: RopeScaling | None,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Those of the layout's positions, made once for it and shared by its layers."""

    def build() -> tuple[Tensor, Tensor]:
        return _angles_at(sp.layout.document_positions(sp.rank).to(device), width, theta, scaling, dtype)

    key = ("rotary", sp.rank, width, theta, scaling, device, dtype)
    return cast("tuple[Tensor, Tensor]", sp.layout.cached(key, build))


@assume_constant_result
def _traced_angles(
    name: str, width: int, theta: float, scaling: RopeScaling | None, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return _angles(SequenceParallel.named(name), width, theta, scaling, device, dtype)
