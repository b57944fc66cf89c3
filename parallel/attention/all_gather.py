"""LASP-2H's attention (https://arxiv.org/abs/2502.07563, Algorithm 7): every rank gathers all keys and values.

Head group by head group: while one group's attention is computed, the next group's keys and values travel, and backward the
last group's gradients on their way home. So no more than two groups of the whole sequence are held at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.parallel.attention.local import attend, attend_backward, wide
from lasp.parallel.attention.mask import Mask, Reach, Span
from lasp.parallel.collectives import all_gather_rows, reduce_scatter_rows
from lasp.parallel.exposure import exposed
from lasp.parallel.layout import SequenceLayout
from lasp.parallel.sequence_parallel import SequenceParallel

#: Head groups: no more than so many, and none of which less is gathered than so many bytes.
MOST_GROUPS, LEAST_BYTES = 4, 2**23


def all_gather_attention(
    q: Tensor, k: Tensor, v: Tensor, sp: SequenceParallel, reach: Reach, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention to the keys of all ranks: the output and the log-sum-exp. Records no gradient.

    The gathered keys and values are not kept for the backward pass. Shapes are `lasp.ops.softmax_attn`'s.
    """
    mask = _mask(sp.layout, sp.rank, reach)
    parts = [attend(q[:, :, heads], keys, values, mask, scale) for heads, keys, values in _gathered(q, k, v, sp)]
    o, lse = zip(*parts, strict=True)
    return torch.cat(o, dim=2), torch.cat(lse, dim=1)


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
    """Its gradients, by the same gathering again and a reduce-scatter of each group."""
    mask = _mask(sp.layout, sp.rank, reach)
    widths = [k.shape[-1], v.shape[-1]]
    queries, homing = [], []
    for heads, keys, values in _gathered(q, k, v, sp):
        o_, lse_, q_ = o[:, :, heads], lse[:, heads], q[:, :, heads]
        dq, *dkv = attend_backward(do[:, :, heads], o_, lse_, q_, keys, values, mask, scale)
        queries.append(dq)
        # The ranks' shares of one key, from all that saw it, are summed in float32 at least.
        rows = torch.cat(dkv, dim=-1).to(wide(k.dtype)).transpose(0, 1).contiguous()
        homing.append((rows, *reduce_scatter_rows(rows, sp.group)))
    own = []
    for _, mine, work in homing:
        exposed(work.wait, mine.device)
        own.append(mine[: k.shape[1]].transpose(0, 1).to(k.dtype))
    dk, dv = torch.cat(own, dim=2).split(widths, dim=-1)
    return torch.cat(queries, dim=2), dk, dv


def _gathered(q: Tensor, k: Tensor, v: Tensor, sp: SequenceParallel) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Each group's heads of queries, and all ranks' keys and values for them ``[B, W · slots, heads, D]``."""
    slots, kv_heads, shared = _slots(sp.layout), k.shape[2], q.shape[2] // k.shape[2]
    rows = torch.cat([k, v], dim=-1).transpose(0, 1)
    missing = slots - rows.shape[0]
    if missing:
        rows = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
    count = min(MOST_GROUPS, kv_heads, max(1, sp.world_size * rows.nbytes // LEAST_BYTES))
    bounds = [kv_heads * i // count for i in range(count + 1)]

    def start(group: int) -> tuple[Tensor, dist.Work]:
        return all_gather_rows(rows[:, :, bounds[group] : bounds[group + 1]], sp.group)

    ahead = start(0)
    for group in range(count):
        gathered, work = ahead
        if group + 1 < count:
            ahead = start(group + 1)
        exposed(work.wait, gathered.device)
        keys, values = gathered.transpose(0, 1).split([k.shape[-1], v.shape[-1]], dim=-1)
        yield slice(bounds[group] * shared, bounds[group + 1] * shared), keys, values


def _slots(layout: SequenceLayout) -> int:
    return max(layout.local_tokens(rank) for rank in range(layout.world_size))


def _mask(layout: SequenceLayout, rank: int, reach: Reach) -> Mask:
    def build() -> Mask:
        keys = [Span.of(layout, source, padded=_slots(layout)) for source in range(layout.world_size)]
        return Mask(Span.of(layout, rank), Span.join(keys), reach)

    mask: Mask = layout.cached(("gathered mask", rank, reach), build)
    return mask
