"""Softmax attention on a sequence that several ranks share. Each way is a file; this table is where they get their names."""

from __future__ import annotations

from torch import Tensor

from lasp.parallel.attention.all_gather import all_gather_attention
from lasp.parallel.attention.local import differentiable_attention
from lasp.parallel.attention.mask import Mask, Reach, Span
from lasp.parallel.attention.ring import ring_attention
from lasp.parallel.sequence_parallel import SequenceParallel

ATTENTION = {"all-gather": all_gather_attention, "ring": ring_attention}


def attention(q: Tensor, k: Tensor, v: Tensor, sp: SequenceParallel, reach: Reach, scale: float) -> Tensor:
    """Attention to the keys of all ranks, the way that `sp` says. Shapes are `lasp.ops.softmax_attn`'s."""
    if sp.world_size > 1:
        return ATTENTION[sp.softmax](q, k, v, sp, reach, scale)

    def build() -> Mask:
        tokens = Span.of(sp.layout, sp.rank)
        return Mask(tokens, tokens, reach)

    mask: Mask = sp.layout.cached(("whole mask", reach), build)
    return differentiable_attention(q, k, v, mask, scale)


__all__ = ["ATTENTION", "Reach", "attention"]
