"""LASP-2H's attention (https://arxiv.org/abs/2502.07563, Algorithm 7): every rank gathers all keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from lasp.parallel.attention.local import attend, attend_backward
from lasp.parallel.attention.mask import Mask, Reach, Span
from lasp.parallel.collectives import all_gather_rows, reduce_scatter_rows
from lasp.parallel.layout import SequenceLayout
from lasp.parallel.sequence_parallel import SequenceParallel


def all_gather_attention(
    q: Tensor, k: Tensor, v: Tensor, sp: SequenceParallel, reach: Reach, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention to the keys of all ranks, by one all-gather: the output and the log-sum-exp. Records no gradient.

    The gathered keys and values are not kept for the backward pass: memory grows with the sequence only within a layer.
    Shapes are `lasp.ops.softmax_attn`'s.
    """
    return attend(q, *_gather(k, v, sp), _mask(sp.layout, sp.rank, reach), scale)


def all_gather_backward(
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
    """Its gradients, by the same all-gather again and one reduce-scatter."""
    dq, dk, dv = attend_backward(do, o, lse, q, *_gather(k, v, sp), _mask(sp.layout, sp.rank, reach), scale)
    # The same ranks' shares of one key, from all that saw it, are summed in float32 at least.
    rows = torch.cat([dk, dv], dim=-1).to(torch.promote_types(k.dtype, torch.float32)).transpose(0, 1)
    mine, work = reduce_scatter_rows(rows, sp.group)
    work.wait()
    dk, dv = mine[: k.shape[1]].transpose(0, 1).to(k.dtype).split([k.shape[-1], v.shape[-1]], dim=-1)
    return dq, dk, dv


def _gather(k: Tensor, v: Tensor, sp: SequenceParallel) -> tuple[Tensor, Tensor]:
    """All ranks' keys and values ``[B, W · slots, Hk, D]``, rank after rank, each filled up to the longest's tokens."""
    rows = torch.cat([k, v], dim=-1).transpose(0, 1)
    missing = _slots(sp.layout) - rows.shape[0]
    if missing:
        rows = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
    gathered, work = all_gather_rows(rows, sp.group)
    work.wait()
    keys, values = gathered.transpose(0, 1).split([k.shape[-1], v.shape[-1]], dim=-1)
    return keys, values


def _slots(layout: SequenceLayout) -> int:
    return max(layout.local_tokens(rank) for rank in range(layout.world_size))


def _mask(layout: SequenceLayout, rank: int, reach: Reach) -> Mask:
    def build() -> Mask:
        keys = [Span.of(layout, source, padded=_slots(layout)) for source in range(layout.world_size)]
        return Mask(Span.of(layout, rank), Span.join(keys), reach)

    mask: Mask = layout.cached(("gathered mask", rank, reach), build)
    return mask
