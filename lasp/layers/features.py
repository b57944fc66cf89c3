"""Feature maps: what turns queries and keys into the features whose products linear attention sums.

Each takes ``x: [..., D]`` and returns ``[..., D']`` in x's dtype; all but Taylor's keep the width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class FeatureMap:
    """A function by its name on the command line.

    Attributes:
        function: ``[..., D]`` to ``[..., D']``.
        width: the D of a head's queries and keys that it asks for; None for the width of a head.
    """

    function: Callable[[Tensor], Tensor]
    width: int | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x).to(x.dtype)


def _elu(x: Tensor) -> Tensor:
    """``elu(x) + 1``: Katharopoulos et al., https://arxiv.org/abs/2006.16236, eq. 7."""
    return F.elu(x) + 1


def _softmax(x: Tensor) -> Tensor:
    """Softmax over the width: Efficient Attention, https://arxiv.org/abs/1812.01243, for queries and keys alike."""
    return torch.softmax(x, dim=-1)


def _taylor(x: Tensor) -> Tensor:
    """``[1, x / D^(1/4), (x ⊗ x) / √(2D)]``, so that ``φ(q)·φ(k) = 1 + q·k/√D + (q·k)²/2D``: exp to the second order.

    Based, https://arxiv.org/abs/2402.18668, section 4.1. Returns ``[..., 1 + D + D²]``.
    """
    width = x.shape[-1]
    square = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)
    return torch.cat([torch.ones_like(x[..., :1]), x / width**0.25, square / (2 * width) ** 0.5], dim=-1)


#: The feature maps by name, as ``--feature-map`` takes them. Taylor's squares the width: Based gives it 16.
FEATURE_MAPS = {
    "identity": FeatureMap(lambda x: x),
    "elu": FeatureMap(_elu),
    "relu": FeatureMap(F.relu),
    "silu": FeatureMap(F.silu),
    "softmax": FeatureMap(_softmax),
    "taylor": FeatureMap(_taylor, width=16),
}


def feature_map(name: str) -> FeatureMap:
    """The feature map of that name.

    Raises:
        ValueError: where there is none.
    """
    if name not in FEATURE_MAPS:
        raise ValueError(f"unknown feature_map={name!r}: expected one of {', '.join(FEATURE_MAPS)}")
    return FEATURE_MAPS[name]
