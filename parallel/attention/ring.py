"""Ring attention (https://arxiv.org/abs/2310.01889): keys and values go from rank to rank while each attends to what it holds.

In step s a rank holds the block of the rank s places before it. It sends that block on before it computes, so the next one
travels meanwhile. Backward, the blocks go round again, each followed by its gradients, which every rank adds to and which the
last hop brings home.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.parallel.attention.local import attend, attend_backward, merge, wide
from lasp.parallel.attention.mask import Mask, Reach, Span
from lasp.parallel.exposure import exposed
from lasp.parallel.layout import SequenceLayout
from lasp.parallel.sequence_parallel import SequenceParallel


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, sp: SequenceParallel, reach: Reach, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention to the keys of all ranks, of which a rank holds two blocks at a time: the output and the log-sum-exp.

    Records no gradient. Shapes are `lasp.ops.softmax_attn`'s.
    """
    o = q.new_zeros(q.shape, dtype=wide(q.dtype))
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=o.dtype)
    for source, (block,) in rounds(sp, torch.cat([k, v], dim=-1)):
        mask = ring_mask(sp.layout, sp.rank, source, reach)
        if not mask.nothing:
            keys, values = block.split([k.shape[-1], v.shape[-1]], dim=-1)
            o, lse = merge(o, lse, *attend(q, keys, values, mask, scale))
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
    dq = torch.zeros_like(q, dtype=wide(q.dtype))
    home = Homing(sp)
    for source, (block,) in rounds(sp, torch.cat([k, v], dim=-1)):
        mask = ring_mask(sp.layout, sp.rank, source, reach)
        share = torch.zeros_like(block, dtype=dq.dtype)
        if not mask.nothing:
            keys, values = block.split(widths, dim=-1)
            dq_share, *dkv = attend_backward(do, o, lse, q, keys, values, mask, scale)
            dq += dq_share
            share = torch.cat(dkv, dim=-1).to(dq.dtype)
        home.add(source, share)
    dk, dv = home.wait().to(k.dtype).split(widths, dim=-1)
    return dq.to(q.dtype), dk, dv


def rounds(sp: SequenceParallel, *block: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Every rank's block in turn, this rank's first, with the rank that it is of; the next one travels meanwhile.

    Args:
        sp: the ranks.
        block: this rank's tensors ``[B, T_local, ...]``.
    """
    for step in range(sp.world_size):
        source = (sp.rank - step) % sp.world_size
        hop = _Hop(block, source, sp) if step + 1 < sp.world_size else None
        yield source, block
        if hop is not None:
            block = hop.wait()


class Homing:
    """The gradient of each block, which follows the block round the ring and comes home with the last hop."""

    def __init__(self, sp: SequenceParallel):
        self.sp = sp
        self._hop: _Hop | None = None

    def add(self, source: int, share: Tensor) -> None:
        """This rank's share of the gradient of a block; what the ranks before it added travelled while it was computed."""
        if self._hop is not None:
            share = share + self._hop.wait()[0]
        self._hop = _Hop((share,), source, self.sp)

    def wait(self) -> Tensor:
        """The gradient of this rank's own block, after all ranks' shares."""
        assert self._hop is not None
        return self._hop.wait()[0]


class _Hop:
    """A block on its way to the next rank, and the one before it on its way here. Blocks without tokens stay at home.

    Args:
        block: tensors ``[B, tokens of its rank, ...]``.
        source: whose block it is.
        sp: the ranks.
    """

    def __init__(self, block: tuple[Tensor, ...], source: int, sp: SequenceParallel):
        expected = sp.layout.local_tokens((source - 1) % sp.world_size)
        self.sent = tuple(x.contiguous() for x in block)  # kept until it has left
        self.received = tuple(x.new_empty(x.shape[0], expected, *x.shape[2:]) for x in block)
        ways = [
            dist.P2POp(way, x, group=sp.group, group_peer=(sp.rank + places) % sp.world_size)
            for way, tensors, places in ((dist.isend, self.sent, 1), (dist.irecv, self.received, -1))
            for x in tensors
            if x.numel()
        ]
        self.works = dist.batch_isend_irecv(ways) if ways else []

    def wait(self) -> tuple[Tensor, ...]:
        """The block that came."""
        for work in self.works:
            exposed(work.wait, self.received[0].device)
        return self.received


def ring_mask(layout: SequenceLayout, rank: int, source: int, reach: Reach) -> Mask:
    """What the queries of one rank see of the keys of another."""
    mask: Mask = layout.cached(
        ("ring mask", rank, source, reach),
        lambda: Mask(Span.of(layout, rank), Span.of(layout, source), reach),
    )
    return mask
