"""Ring attention (https://arxiv.org/abs/2310.01889): keys and values go from rank to rank while each attends to what it holds.

In step s a rank holds the block of the rank s places before it. It sends that block on before it computes, so the next one
travels meanwhile. Backward, the blocks go round again, each followed by its gradients, which every rank adds to and which the
last hop brings home.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.parallel.attention.local import attend, attend_backward, merge, wide
from lasp.parallel.attention.mask import Mask, Reach, Span
from lasp.parallel.layout import SequenceLayout
from lasp.parallel.sequence_parallel import SequenceParallel


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, sp: SequenceParallel, reach: Reach, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention to the keys of all ranks, of which a rank holds two blocks at a time: the output and the log-sum-exp.

    Records no gradient. Shapes are `lasp.ops.softmax_attn`'s.
    """
    block = torch.cat([k, v], dim=-1)
    o = q.new_zeros(q.shape, dtype=wide(q.dtype))
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=o.dtype)
    for step in range(sp.world_size):
        source = (sp.rank - step) % sp.world_size
        hop = _Hop(block, source, sp) if step + 1 < sp.world_size else None
        mask = _mask(sp.layout, sp.rank, source, reach)
        if not mask.nothing:
            keys, values = block.split([k.shape[-1], v.shape[-1]], dim=-1)
            o, lse = merge(o, lse, *attend(q, keys, values, mask, scale))
        if hop is not None:
            block = hop.wait()
    return o.to(q.dtype), lse


def ring_backward(
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
    """Its gradients, by another round of the blocks."""
    widths = [k.shape[-1], v.shape[-1]]
    block = torch.cat([k, v], dim=-1)
    dq = torch.zeros_like(q, dtype=wide(q.dtype))
    homing: _Hop | None = None
    for step in range(sp.world_size):
        source = (sp.rank - step) % sp.world_size
        hop = _Hop(block, source, sp) if step + 1 < sp.world_size else None
        mask = _mask(sp.layout, sp.rank, source, reach)
        share = None
        if not mask.nothing:
            keys, values = block.split(widths, dim=-1)
            dq_share, *dkv = attend_backward(do, o, lse, q, keys, values, mask, scale)
            dq += dq_share
            share = torch.cat(dkv, dim=-1).to(dq.dtype)
        # What the ranks before added to this block's gradient travelled while this rank computed its share.
        dblock = torch.zeros_like(block, dtype=dq.dtype) if homing is None else homing.wait()
        homing = _Hop(dblock if share is None else dblock + share, source, sp)
        if hop is not None:
            block = hop.wait()
    assert homing is not None
    dk, dv = homing.wait().to(k.dtype).split(widths, dim=-1)
    return dq.to(q.dtype), dk, dv


class _Hop:
    """A block on its way to the next rank, and the one before it on its way here. Blocks without tokens stay at home.

    Args:
        block: ``[B, tokens of its rank, Hk, D]``.
        source: whose block it is.
        sp: the ranks.
    """

    def __init__(self, block: Tensor, source: int, sp: SequenceParallel):
        expected = sp.layout.local_tokens((source - 1) % sp.world_size)
        self.sent = block.contiguous()  # kept until it has left
        self.received = block.new_empty(block.shape[0], expected, *block.shape[2:])
        ways = [
            dist.P2POp(way, tensor, group=sp.group, group_peer=(sp.rank + places) % sp.world_size)
            for way, tensor, places in ((dist.isend, self.sent, 1), (dist.irecv, self.received, -1))
            if tensor.numel()
        ]
        self.works = dist.batch_isend_irecv(ways) if ways else []

    def wait(self) -> Tensor:
        """The block that came."""
        for work in self.works:
            work.wait()
        return self.received


def _mask(layout: SequenceLayout, rank: int, source: int, reach: Reach) -> Mask:
    mask: Mask = layout.cached(
        ("ring mask", rank, source, reach),
        lambda: Mask(Span.of(layout, rank), Span.of(layout, source), reach),
    )
    return mask
