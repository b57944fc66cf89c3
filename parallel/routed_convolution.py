"""The short convolution of routed tokens: over those that chose one memory, document by document, across ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lasp.parallel.collectives import all_gather_rows, reduce_scatter_rows
from lasp.parallel.layout import SequenceLayout
from lasp.parallel.routed import Routed


def routed_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    routed: Routed,
    tails: Tensor | None = None,
) -> Tensor:
    """`lasp.ops.causal_conv1d` of each memory's tokens by themselves: those before a token are those that chose its memory.

    Tokens before a run's first come from as many ranks back as it takes, all in one collective, and one for their gradients.

    Args:
        x: ``[1, N, D]``, as ``routed.dispatch.send`` gives it.
        weight: ``[D, W]``, the last tap for the token itself.
        bias: ``[D]``, or None.
        activation: ``"silu"`` or None.
        routed: how the tokens were routed.
        tails: what is before each group ``[G, W − 1, D]``, where that is not other ranks' (`tails_of`).

    Raises:
        ValueError: where there are more taps than x's dtype counts.
    """
    reach = weight.shape[1] - 1
    if reach > 2 / torch.finfo(x.dtype).eps:
        raise ValueError(
            f"routed_convolution: {x.dtype} counts to {int(2 / torch.finfo(x.dtype).eps)} taps, given {reach + 1}"
        )
    here, counts = x.squeeze(0), routed.dispatch.counts
    N = here.shape[0]
    wide = torch.promote_types(x.dtype, torch.float32)
    place = torch.arange(N, device=x.device)
    offset = place - (counts.cumsum(0) - counts)[routed.group]
    # After the tokens themselves come those before each group, the nearest last.
    rows = (
        torch.cat([here, (_before(here, reach, routed) if tails is None else tails).flatten(0, 1)]) if reach else here
    )
    y = here.new_zeros(here.shape, dtype=wide) if bias is None else bias.to(wide).expand(N, -1)
    for back in range(reach + 1):
        beyond = N + routed.group * reach + reach - back + offset
        source = rows.index_select(0, torch.where(offset >= back, place - back, beyond))
        y = y + source.to(wide) * weight[:, reach - back].to(wide)
    return (F.silu(y) if activation == "silu" else y).to(x.dtype).unsqueeze(0)


def tails_of(x: Tensor, before: Tensor, routed: Routed) -> Tensor:
    """The last tokens of each group and of what is before it, for what will follow: ``[G, W − 1, D]``, as `before`.

    Args:
        x: ``[1, N, D]``.
        before: the last tokens before each group.
        routed: how the tokens were routed.
    """
    counts, N, reach = routed.dispatch.counts, x.shape[1], before.shape[1]
    back = torch.arange(reach, 0, -1, device=x.device)
    group = torch.arange(len(counts), device=x.device)[:, None] * reach
    place = torch.where(
        back <= counts[:, None],
        counts.cumsum(0)[:, None] - back,
        N + group + reach + counts[:, None] - back,
    )
    rows = torch.cat([x.squeeze(0), before.flatten(0, 1)])
    return rows.index_select(0, place.flatten()).view_as(before)


def _before(x: Tensor, reach: int, routed: Routed) -> Tensor:
    """The last tokens before each group that chose the same memory in the same document: ``[G, reach, D]``, else zero."""
    sp, M, B = routed.sp, routed.memories, routed.batch
    pieces, D = sp.layout.pieces(sp.rank), x.shape[1]
    before = x.new_zeros(B, len(pieces), M, reach, D)
    order = _Order.of(sp.layout, sp.rank)
    if order.alone:
        return before.flatten(0, 2)
    tails, valid = _tails(x, reach, routed)
    rows = torch.cat([tails.flatten(1), valid.to(x.dtype).flatten(1)], 1)
    # Of x also where it has no tokens: all ranks take part in the gradients' collective.
    rows = F.pad(rows, (0, 0, 0, order.slots - rows.shape[0])) + x[:0].sum()
    rows = _Gathered.apply(rows, sp.group) if sp.world_size > 1 else rows
    rows = rows.index_select(0, torch.tensor(order.rows, device=x.device))
    everywhere = rows[:, : B * M * reach * D].reshape(-1, B * M, reach, D)
    valid = rows[:, B * M * reach * D :].detach().round().long()
    found = _last(everywhere, valid, order, reach)
    continuing = [p for p, piece in enumerate(pieces) if not piece.opens]
    if not continuing:
        # Of no use here, but the other ranks' gradients come by the same collective.
        return before.flatten(0, 2) + found.flatten()[:0].sum()
    run = torch.tensor([pieces[p].run for p in continuing], device=x.device)
    halo = found.index_select(0, run).unflatten(1, (B, M)).transpose(0, 1)
    return before.index_copy(1, torch.tensor(continuing, device=x.device), halo).flatten(0, 2)


def _tails(x: Tensor, reach: int, routed: Routed) -> tuple[Tensor, Tensor]:
    """Of each run the last tokens of each memory, in its last document: ``[R, B, M, reach, D]``, and how many ``[R, B, M]``."""
    sp, counts = routed.sp, routed.dispatch.counts
    pieces = sp.layout.pieces(sp.rank)
    last = {piece.run: p for p, piece in enumerate(pieces)}
    of = torch.tensor([last[run] for run in range(len(last))], dtype=torch.long, device=x.device)
    by_run = counts.view(routed.batch, len(pieces), routed.memories)
    ends = counts.cumsum(0).view_as(by_run).index_select(1, of).transpose(0, 1)
    valid = by_run.index_select(1, of).transpose(0, 1).clamp(max=reach)
    back = torch.arange(reach, 0, -1, device=x.device)
    inside = back <= valid.unsqueeze(-1)
    place = torch.where(inside, ends.unsqueeze(-1) - back, 0)
    tails = (
        x.index_select(0, place.flatten()).view(*place.shape, -1)
        if x.shape[0]
        else x.new_zeros(*place.shape, x.shape[1])
    )
    return tails.masked_fill(~inside.unsqueeze(-1), 0), valid


def _last(tails: Tensor, valid: Tensor, order: _Order, reach: int) -> Tensor:
    """Of this rank's runs, the last of all tails before them in their first document: ``[R, B · M, reach, D]``.

    Args:
        tails: of all runs along the sequence ``[Q, B · M, reach, D]``, the last at the end.
        valid: how many each has ``[Q, B · M]``.
        order: where this rank's runs stand, and their documents begin.
        reach: how many are looked for.
    """
    Q, chains = valid.shape
    until = torch.cat([valid.new_zeros(1, chains), valid.cumsum(0)])
    own, start = (torch.tensor(x, dtype=torch.long, device=valid.device) for x in (order.own, order.starts))
    wanted = until.index_select(0, own).unsqueeze(-1) - torch.arange(reach, 0, -1, device=valid.device)
    there = wanted >= until.index_select(0, start).unsqueeze(-1)
    # The run that has the wanted one: the first by whose end there are more.
    column = until[1:].t().contiguous()
    targets = wanted.permute(1, 0, 2).reshape(chains, -1)
    run = torch.searchsorted(column, targets.contiguous(), right=True).clamp(max=Q - 1)
    run = run.view(chains, len(order.own), reach).permute(1, 0, 2)
    chain = torch.arange(chains, device=valid.device)[:, None]
    within = reach - valid[run, chain] + wanted - until[run, chain]
    found = tails[run, chain, within.clamp(0, max(reach - 1, 0))]
    return found.masked_fill(~there.unsqueeze(-1), 0)


@dataclass(frozen=True)
class _Order:
    """The runs of all ranks along the sequence.

    Attributes:
        slots: the runs of the rank that has most.
        rows: of each run, where it is when each rank gives as many rows as that.
        own: the places of this rank's runs.
        starts: the place of the run in which the document begins with which each of them begins.
        alone: whether no document goes on from one run to another.
    """

    slots: int
    rows: tuple[int, ...]
    own: tuple[int, ...]
    starts: tuple[int, ...]
    alone: bool

    @classmethod
    def of(cls, layout: SequenceLayout, rank: int) -> _Order:
        """Made once for a layout."""
        return layout.cached(("routed order", rank), lambda: cls._make(layout, rank))

    @classmethod
    def _make(cls, layout: SequenceLayout, rank: int) -> _Order:
        order, slots = layout.order(), max(len(runs) for runs in layout.runs)
        ranges = [layout.runs[owner][run] for owner, run in order]
        place = {where: i for i, where in enumerate(order)}
        own = tuple(place[rank, run] for run in range(len(layout.runs[rank])))
        bounds = layout.cu_seqlens
        starts = []
        for i in own:
            begin = max(bound for bound in bounds[:-1] if bound <= ranges[i][0])
            starts.append(max(j for j, (start, _) in enumerate(ranges) if start <= begin))
        opened = set(bounds)
        return cls(
            slots,
            tuple(owner * slots + run for owner, run in order),
            own,
            tuple(starts),
            all(start in opened for start, _ in ranges),
        )


class _Gathered(torch.autograd.Function):
    """The rows of all ranks; the gradient of a rank's own is what all have for them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        received, work = all_gather_rows(rows, group)
        work.wait()
        return received

    @staticmethod
    def backward(ctx: Any, dreceived: Tensor) -> tuple[Tensor, None]:
        drows, work = reduce_scatter_rows(dreceived, ctx.group)
        work.wait()
        return drows, None
