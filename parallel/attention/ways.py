"""The ways in which ranks share keys and values, by name: for each its output and its gradients, as plain functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lasp.parallel.attention.all_gather import all_gather_attention, all_gather_backward
from lasp.parallel.attention.local import attend, attend_backward
from lasp.parallel.attention.mask import Mask, Reach, Span
from lasp.parallel.attention.ring import ring_attention, ring_backward
from lasp.parallel.sequence_parallel import SequenceParallel


@dataclass(frozen=True)
class Way:
    """How one layer is computed.

    Attributes:
        forward: of (q, k, v, sp, reach, scale): the output and the log-sum-exp.
        backward: of (do, o, lse, q, k, v, sp, reach, scale): the gradients of q, k and v.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def whole_mask(sp: SequenceParallel, reach: Reach) -> Mask:
    """What this rank's queries see of its own keys, where it holds all."""

    def build() -> Mask:
        tokens = Span.of(sp.layout, sp.rank)
        return Mask(tokens, tokens, reach)

    mask: Mask = sp.layout.cached(("whole mask", reach), build)
    return mask


def alone(q: Tensor, k: Tensor, v: Tensor, sp: SequenceParallel, reach: Reach, scale: float) -> tuple[Tensor, Tensor]:
    """Attention where this rank holds all keys."""
    return attend(q, k, v, whole_mask(sp, reach), scale)


def alone_backward(
    do: Tensor,
    o: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sp: SequenceParallel,
    reach: Reach,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Its gradients."""
    return attend_backward(do, o, lse, q, k, v, whole_mask(sp, reach), scale)


_ALONE = Way(alone, alone_backward)
#: The ways of several ranks by name.
ATTENTION = {
    "all-gather": Way(all_gather_attention, all_gather_backward),
    "ring": Way(ring_attention, ring_backward),
}


def way(sp: SequenceParallel) -> Way:
    """The way that `sp` says."""
    return _ALONE if sp.world_size == 1 else ATTENTION[sp.softmax]
