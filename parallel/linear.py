"""One autograd function that joins any recurrence to any exchange on any layout.

Forward: summarise the local segments, compose them into runs, start the exchange, and when the states that enter the runs
are back, run forward from them. Backward: the same with the adjoint summaries from the sequence's end to its start; dq needs
no state's gradient and is computed while they travel. Besides the inputs, states are kept, and never more of them than keys
and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.kernels import Recurrence, Summary, Tokens
from lasp.parallel.exchange import PendingStates, Route
from lasp.parallel.plan import Plan
from lasp.parallel.sequence_parallel import SequenceParallel


@dataclass
class PendingLinear:
    """A linear layer whose states are travelling: `finish` it with the queries.

    Attributes:
        recurrence: what the tokens do to the state.
        tokens: the tokens as they were given.
        prepared: the same as the recurrence takes them.
        initial_state: the states before the documents.
        sp: the ranks and the layout.
        maps: the map over each segment.
        before: the map from what enters a run to what enters each of its segments.
        states: what enters the runs, under way.
    """

    recurrence: Recurrence
    tokens: Tokens
    prepared: Tokens
    initial_state: Tensor | None
    sp: SequenceParallel
    maps: Summary
    before: Summary
    states: PendingStates

    def finish(self, q: Tensor, scale: float, final_state: bool = False) -> tuple[Tensor, Tensor | None]:
        """Wait for the states and compute the output.

        Args:
            q: ``[B, T_local, H, K]``.
            scale: the factor of the queries.
            final_state: whether to return the documents' final states.

        Returns:
            ``o: [B, T_local, H, V]`` and, if asked for, the final states ``[B, N, H, K, V]``, the same on every rank.
        """
        o, final = _Linear.apply(
            self, scale, final_state, q, self.tokens.k, self.tokens.v, self.initial_state, *self.tokens.gates
        )
        if not final_state:
            return o, None
        # A document's final state is known where the document ends; elsewhere it is zero.
        return o, sum_over_ranks(final, self.sp)


def start_linear(
    recurrence: Recurrence, tokens: Tokens, initial_state: Tensor | None, sp: SequenceParallel
) -> PendingLinear:
    """Summarise the local tokens and start the exchange. Needs no queries: project them while the states travel.

    Args:
        recurrence: what the tokens do to the state.
        tokens: this rank's keys, values and gates.
        initial_state: ``[B, N, H, K, V]``, the state before each document, the same on every rank; zero when None.
        sp: the ranks and the layout.
    """
    with torch.no_grad():
        plan = Plan.of(sp.layout, sp.rank, recurrence.segment_size)
        prepared = recurrence.prepare(tokens, plan.segments)
        maps = recurrence.summary(prepared, plan.segments)
        before, runs = plan.forward.compose(maps, initial_state)
        states = sp.exchange.start(runs, Route.forward(sp.layout, sp.rank))
    return PendingLinear(recurrence, tokens, prepared, initial_state, sp, maps, before, states)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        pending: PendingLinear,
        scale: float,
        final_state: bool,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        initial_state: Tensor | None,
        *gates: Tensor,
    ) -> tuple[Tensor, Tensor]:
        recurrence, sp, tokens = pending.recurrence, pending.sp, pending.prepared
        plan = Plan.of(sp.layout, sp.rank, recurrence.segment_size)
        run_entry = pending.states.wait()
        entering = plan.forward.enter(pending.before, run_entry)
        o = recurrence.output(q, tokens, entering, plan.segments, scale)
        final = entering.new_zeros(0)
        if final_state:
            at = plan.tables(q.device)
            leaving = pending.maps.select(at.closing).apply(entering.index_select(1, at.closing))
            final = entering.new_zeros(q.shape[0], sp.layout.num_documents, *tokens.state_shape)
            final.index_copy_(1, at.closed, leaving)
        ctx.recurrence, ctx.sp, ctx.scale, ctx.final_state = recurrence, sp, scale, final_state
        # Few and long segments: their states are kept. Many short ones: they would be more than the tokens, and are made
        # again from the states that entered the runs.
        kept = entering if entering.nbytes <= k.nbytes + v.nbytes else None
        ctx.gates = len(gates)
        ctx.save_for_backward(
            q, tokens.k, tokens.v, initial_state, kept, run_entry if kept is None else None, *gates, *tokens.gates
        )
        return o, final

    @staticmethod
    def backward(ctx: Any, do: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, initial_state, entering, run_entry, *rest = ctx.saved_tensors
        gates, tokens = rest[: ctx.gates], Tokens(k, v, tuple(rest[ctx.gates :]))
        recurrence, sp, scale = ctx.recurrence, ctx.sp, ctx.scale
        plan = Plan.of(sp.layout, sp.rank, recurrence.segment_size)
        segments, at = plan.segments, plan.tables(q.device)
        gated = any(ctx.needs_input_grad[7:])

        # A final state's gradient is where the gradients of its document's states start from.
        maps = recurrence.adjoint_summary(q, tokens, do, segments, scale)
        after, runs = plan.backward.compose(maps, dfinal if ctx.final_state else None)
        states = sp.exchange.start(runs, Route.backward(sp.layout, sp.rank))

        if entering is None:
            before, _ = plan.forward.compose(recurrence.summary(tokens, segments), initial_state)
            entering = plan.forward.enter(before, run_entry)
        dq, kept = recurrence.query_gradient(q, tokens, entering, do, segments, scale, gated)

        leaving = plan.backward.enter(after, states.wait())
        dinitial = None
        if initial_state is not None:
            opening = maps.select(at.opening).apply(leaving.index_select(1, at.opening))
            dinitial = torch.zeros_like(initial_state)
            dinitial.index_copy_(1, at.opened, opening.to(initial_state.dtype))
        grads = recurrence.token_gradients(q, tokens, entering, do, leaving, segments, scale, gated, kept)
        # A gate that many tokens share has the sum of their gradients.
        dgates = [dg.sum_to_size(g.shape) for dg, g in zip(grads.gates, gates, strict=False)] or [None] * len(gates)
        return None, None, None, dq, grads.k, grads.v, dinitial, *dgates


def sum_over_ranks(x: Tensor, sp: SequenceParallel) -> Tensor:
    """The sum of the ranks' tensors, on every rank. Its gradient is a sum too: the loss is the sum of the ranks' losses."""
    return x if sp.world_size == 1 else _SumOverRanks.apply(x, sp.group)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        dx = dx.contiguous().clone()
        dist.all_reduce(dx, group=ctx.group)
        return dx, None
