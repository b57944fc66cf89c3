"""The short convolution of routed tokens: over those that chose one memory, document by document, across ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lasp.kernels.convolution import Pieces
from lasp.parallel.collectives import all_gather_rows, reduce_scatter_rows
from lasp.parallel.convolution import form_of
from lasp.parallel.exposure import exposed
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
    halo = _before(x.squeeze(0), reach, routed) if tails is None else tails
    y: Tensor = _Convolution.apply(
        x, halo.reshape(1, -1, x.shape[2]), weight, bias, activation == "silu", routed.pieces(reach)
    )
    return y


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, halo: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, pieces: Pieces
    ) -> Tensor:
        ctx.silu, ctx.pieces = silu, pieces
        ctx.save_for_backward(x, halo, weight, bias)
        y: Tensor = form_of(x, weight).forward(x, halo, weight, bias, silu, pieces)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, halo, weight, bias = ctx.saved_tensors
        return *form_of(x, weight).backward(dy, x, halo, weight, bias, ctx.silu, ctx.pieces), None, None


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
    before = x.new_zeros(M, B, len(pieces), reach, D)
    order = _Order.of(sp.layout, sp.rank, x.device)
    if order.alone or not reach:
        return before.flatten(0, 2)
    tails, valid = _tails(x, reach, routed)
    rows = torch.cat([tails.flatten(1), valid.to(x.dtype).flatten(1)], 1)
    # Of x also where it has no tokens: all ranks take part in the gradients' collective.
    rows = F.pad(rows, (0, 0, 0, order.slots - rows.shape[0])) + x[:0].sum()
    rows = _Gathered.apply(rows, sp.group) if sp.world_size > 1 else rows
    rows = rows.index_select(0, order.rows)
    everywhere = rows[:, : B * M * reach * D].reshape(-1, B * M, reach, D)
    valid = rows[:, B * M * reach * D :].detach().round().long()
    found = _last(everywhere, valid, order, reach)
    # Nothing of it may be of use here, but the other ranks' gradients come by the same collective.
    halo = found.index_select(0, order.run).unflatten(1, (M, B)).permute(1, 2, 0, 3, 4)
    return before.index_copy(2, order.continuing, halo).flatten(0, 2)


def _tails(x: Tensor, reach: int, routed: Routed) -> tuple[Tensor, Tensor]:
    """Of each run the last tokens of each memory, in its last document: ``[R, M, B, reach, D]``, and how many ``[R, M, B]``."""
    sp, counts = routed.sp, routed.dispatch.counts
    pieces = len(sp.layout.pieces(sp.rank))
    last = _Order.of(sp.layout, sp.rank, x.device).last

    def of_runs(groups: Tensor) -> Tensor:
        return groups.view(routed.memories, routed.batch, pieces).index_select(2, last).permute(2, 0, 1)

    ends, valid = of_runs(counts.cumsum(0)), of_runs(counts).clamp(max=reach)
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
    """Of this rank's runs, the last of all tails before them in their first document: ``[R, M · B, reach, D]``.

    Args:
        tails: of all runs along the sequence ``[Q, M · B, reach, D]``, the last at the end.
        valid: how many each has ``[Q, M · B]``.
        order: where this rank's runs stand, and their documents begin.
        reach: how many are looked for.
    """
    Q, chains = valid.shape
    until = torch.cat([valid.new_zeros(1, chains), valid.cumsum(0)])
    wanted = until.index_select(0, order.own).unsqueeze(-1) - torch.arange(reach, 0, -1, device=valid.device)
    there = wanted >= until.index_select(0, order.starts).unsqueeze(-1)
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
    """The runs of all ranks along the sequence, as indices on a device, int64.

    Attributes:
        slots: the runs of the rank that has most.
        alone: whether no document goes on from one run to another.
        rows: of each run, where it is when each rank gives as many rows as that.
        own: the places of this rank's runs.
        starts: the place of the run in which the document begins with which each of them begins.
        last: the last piece of each of them.
        continuing: this rank's pieces whose documents began before them, and
        run: the runs of those.
    """

    slots: int
    alone: bool
    rows: Tensor
    own: Tensor
    starts: Tensor
    last: Tensor
    continuing: Tensor
    run: Tensor

    @classmethod
    def of(cls, layout: SequenceLayout, rank: int, device: torch.device) -> _Order:
        """Made once for a layout."""
        return layout.cached(("routed order", rank, device), lambda: cls._make(layout, rank, device))

    @classmethod
    def _make(cls, layout: SequenceLayout, rank: int, device: torch.device) -> _Order:
        order, slots, pieces = layout.order(), max(len(runs) for runs in layout.runs), layout.pieces(rank)
        ranges = [layout.runs[owner][run] for owner, run in order]
        place = {where: i for i, where in enumerate(order)}
        own = [place[rank, run] for run in range(len(layout.runs[rank]))]
        bounds = layout.cu_seqlens
        starts = []
        for i in own:
            begin = max(bound for bound in bounds[:-1] if bound <= ranges[i][0])
            starts.append(max(j for j, (start, _) in enumerate(ranges) if start <= begin))
        last = {piece.run: p for p, piece in enumerate(pieces)}
        continuing = [p for p, piece in enumerate(pieces) if not piece.opens]
        indices = (
            [owner * slots + run for owner, run in order], own, starts,
            [last[run] for run in range(len(last))], continuing, [pieces[p].run for p in continuing],
        )  # fmt: skip
        opened = set(bounds)
        alone = all(start in opened for start, _ in ranges)
        return cls(slots, alone, *(torch.tensor(x, dtype=torch.long).to(device) for x in indices))


class _Gathered(torch.autograd.Function):
    """The rows of all ranks; the gradient of a rank's own is what all have for them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        received, work = all_gather_rows(rows, group)
        exposed(work.wait, rows.device)
        return received

    @staticmethod
    def backward(ctx: Any, dreceived: Tensor) -> tuple[Tensor, None]:
        drows, work = reduce_scatter_rows(dreceived, ctx.group)
        exposed(work.wait, drows.device)
        return drows, None
