"""Linear attention as ring attention computes it: keys and values go round, and queries are multiplied with keys first.

What LASP-2 is compared with in https://arxiv.org/abs/2502.07563, section 4 ("Ring Attention" on linear layers): the product
``(q kᵀ ⊙ M) v`` costs T² where the state costs T, and what travels grows with the sequence. ``M_ij = exp(C_i − C_j)`` for
keys that a query sees, with C the running sum of the log-decay, one number a head: decays of each key dimension do not fit
between queries and keys that are multiplied already.
"""

# ruff: noqa: ARG001
# An operator's schema says what its functions are given, whether each of them looks at it or not.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lasp.parallel.attention.local import wide
from lasp.parallel.attention.mask import Mask, Reach, Span
from lasp.parallel.attention.ring import Homing, ring_mask, rounds
from lasp.parallel.collectives import all_gather_rows
from lasp.parallel.exposure import exposed
from lasp.parallel.operators import name_in_graph
from lasp.parallel.sequence_parallel import SequenceParallel

#: Queries and keys are multiplied so many at a time.
TILE = 2048


def quadratic_linear(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, sp: SequenceParallel, causal: bool, scale: float
) -> Tensor:
    """``o_i = scale · Σ_j exp(C_i − C_j) (q_i · k_j) v_j`` over the keys of i's document, up to i if causal.

    Args:
        q: this rank's queries ``[B, T_local, H, K]``.
        k: its keys, alike.
        v: its values ``[B, T_local, H, V]``.
        g: their log-decay ``[H]`` or ``[B, T_local, H]``; none when None.
        sp: the ranks and the layout.
        causal: whether a token sees only itself and those before it.
        scale: the factor of the queries.

    Returns:
        ``[B, T_local, H, V]``.
    """
    if g is not None:
        # exp(-1000) is 0, and sums of no less keep their digits.
        g = g.clamp(min=-1000).expand(q.shape[:3])
    o: Tensor = torch.ops.lasp.quadratic(q, k, v, g, name_in_graph(sp), causal, scale)
    return o


def running_sum(x: Tensor, sp: SequenceParallel, reverse: bool = False) -> Tensor:
    """The sum over all tokens of the sequence up to each of this rank's, itself included; from each on if `reverse`.

    Args:
        x: this rank's ``[B, T_local, H]``; summed in float64, in which differences of sums over many tokens keep their digits.
        sp: the ranks and the layout.
        reverse: sum from the sequence's end.
    """
    layout = sp.layout
    lengths = [end - start for start, end in layout.runs_of(sp.rank)]
    order = [*reversed(layout.order())] if reverse else [*layout.order()]
    slots = max(len(runs) for runs in layout.runs)
    parts = x.double().split(lengths, dim=1) if lengths else ()
    sums = [part.flip(1).cumsum(1).flip(1) if reverse else part.cumsum(1) for part in parts]
    totals = x.new_zeros(slots, x.shape[0], x.shape[2], dtype=torch.float64)
    for i, run in enumerate(sums):
        totals[i] = run[:, 0 if reverse else -1]
    gathered, work = all_gather_rows(totals, sp.group)
    exposed(work.wait, gathered.device)
    along = gathered[[rank * slots + i for rank, i in order]]
    before = along.cumsum(0) - along
    return torch.cat(
        [run + before[order.index((sp.rank, i))].unsqueeze(1) for i, run in enumerate(sums)] or [x.double()], dim=1
    )


@dataclass(frozen=True)
class _Tile:
    """Some queries × some keys.

    Attributes:
        queries: which.
        keys: which.
        mask: which of the keys each of the queries sees.
    """

    queries: slice
    keys: slice
    mask: Mask

    @classmethod
    def of(cls, mask: Mask) -> list[_Tile]:
        """Those of a mask where anything is seen."""
        tiles = []
        for i in _slices(len(mask.queries)):
            for j in _slices(len(mask.keys)):
                part = Mask(_part(mask.queries, i), _part(mask.keys, j), mask.reach)
                if not part.nothing:
                    tiles.append(cls(i, j, part))
        return tiles

    def seen(self, like: Tensor) -> Tensor | None:
        """1 where a query sees a key and 0 where not ``[Tq, Tk]``; None where all see all."""
        if self.mask.everything:
            return None
        return self.mask.seen(like.device).to(like.dtype)

    def weights(self, c: tuple[Tensor, Tensor] | None, like: Tensor) -> Tensor | None:
        """M ``[Tq, Tk]``, or with decays ``[B, H, Tq, Tk]``; None where it is 1 everywhere."""
        seen = self.seen(like)
        if c is None:
            return seen
        sums, key_sums = c
        fall = sums[:, self.queries].transpose(1, 2).unsqueeze(-1) - key_sums[:, self.keys].transpose(1, 2).unsqueeze(
            -2
        )
        # Where a key comes after a query the difference is above 0, and its exponential may be infinite.
        decay = fall.clamp(max=0).exp().to(like.dtype)
        return decay if seen is None else decay * seen


def _tiles(sp: SequenceParallel, source: int, causal: bool) -> list[_Tile]:
    reach = Reach.of(causal, None)
    tiles: list[_Tile] = sp.layout.cached(
        ("tiles", sp.rank, source, reach), lambda: _Tile.of(ring_mask(sp.layout, sp.rank, source, reach))
    )
    return tiles


def _slices(count: int) -> Iterator[slice]:
    return (slice(start, min(start + TILE, count)) for start in range(0, count, TILE))


def _part(span: Span, tokens: slice) -> Span:
    return Span(span.position[tokens], span.document[tokens])


def _heads_first(x: Tensor, tokens: slice) -> Tensor:
    return x[:, tokens].transpose(1, 2)


@torch.library.custom_op(
    "lasp::quadratic",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? g, str sp, bool causal, float scale) -> Tensor",
)
def _quadratic(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, sp: str, causal: bool, scale: float) -> Tensor:
    ranks = SequenceParallel.named(sp)
    o = torch.zeros_like(v, dtype=wide(v.dtype), memory_format=torch.contiguous_format)
    sums = () if g is None else (running_sum(g, ranks),)
    for source, (block, *far) in rounds(ranks, torch.cat([k, v], dim=-1), *sums):
        keys, values = block.split([k.shape[-1], v.shape[-1]], dim=-1)
        for tile in _tiles(ranks, source, causal):
            scores = (_heads_first(q, tile.queries) @ _heads_first(keys, tile.keys).mT) * scale
            weights = tile.weights((sums[0], far[0]) if sums else None, scores)
            scores = scores if weights is None else scores * weights
            o[:, tile.queries] += (scores @ _heads_first(values, tile.keys)).transpose(1, 2)
    return o.to(v.dtype)


@_quadratic.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, sp: str, causal: bool, scale: float) -> Tensor:
    return v.new_empty(v.shape)


@torch.library.custom_op(
    "lasp::quadratic_backward",
    mutates_args=(),
    schema="(Tensor do, Tensor q, Tensor k, Tensor v, Tensor? g, str sp, bool causal, float scale) -> Tensor[]",
)
def _quadratic_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, sp: str, causal: bool, scale: float
) -> list[Tensor]:
    """The gradients of q, k, v, and of g where there is one."""
    ranks, widths = SequenceParallel.named(sp), [k.shape[-1], v.shape[-1], 1]
    dq = torch.zeros_like(q, dtype=wide(q.dtype), memory_format=torch.contiguous_format)
    sums = () if g is None else (running_sum(g, ranks),)
    dsums = dq.new_zeros(*q.shape[:3])
    home = Homing(ranks)
    for source, (block, *far) in rounds(ranks, torch.cat([k, v], dim=-1), *sums):
        keys, values = block.split(widths[:2], dim=-1)
        share = dq.new_zeros(*block.shape[:-1], sum(widths))
        dk, dv, dfar = share.split(widths, dim=-1)
        for tile in _tiles(ranks, source, causal):
            query, key, value = (
                _heads_first(q, tile.queries),
                _heads_first(keys, tile.keys),
                _heads_first(values, tile.keys),
            )
            out = _heads_first(do, tile.queries)
            scores, dscores = (query @ key.mT) * scale, out @ value.mT
            weights = tile.weights((sums[0], far[0]) if sums else None, scores)
            dscores = dscores if weights is None else dscores * weights
            if sums:
                # Of C_i − C_j: the product of what it scales and of the gradient of that.
                dfall = (scores * dscores).to(dq.dtype)
                dsums[:, tile.queries] += dfall.sum(-1).transpose(1, 2)
                dfar[:, tile.keys] -= dfall.sum(-2).transpose(1, 2).unsqueeze(-1)
            scores = scores if weights is None else scores * weights
            dv[:, tile.keys] += (scores.mT @ out).transpose(1, 2)
            dq[:, tile.queries] += (dscores @ key).transpose(1, 2) * scale
            dk[:, tile.keys] += (dscores.mT @ query).transpose(1, 2) * scale
        home.add(source, share)
    dk, dv, dfar = home.wait().split(widths, dim=-1)
    # Copies: what an operator returns shares no memory, not even none.
    found = [dq.to(q.dtype), *(x.to(y.dtype, copy=True).contiguous() for x, y in ((dk, k), (dv, v)))]
    if g is None:
        return found
    return [*found, running_sum(dsums + dfar.squeeze(-1), ranks, reverse=True).to(g.dtype)]


@_quadratic_backward.register_fake
def _(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    sp: str,
    causal: bool,
    scale: float,
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (q, k, v, *(() if g is None else (g,)))]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, g, *ctx.constants = inputs
    ctx.save_for_backward(q, k, v, g)


def _backward(ctx: Any, do: Tensor) -> tuple[Any, ...]:
    grads = torch.ops.lasp.quadratic_backward(do, *ctx.saved_tensors, *ctx.constants)
    return *grads[:3], grads[3] if len(grads) > 3 else None, None, None, None


_quadratic.register_autograd(_backward, setup_context=_setup)
