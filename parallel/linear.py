"""One autograd function that joins any recurrence to any exchange on any layout.

Forward: summarise the local segments, compose them into runs, start the exchange, and when the states that enter the runs
are back, run forward from them. Backward: the same with the adjoint summaries from the sequence's end to its start; dq needs
no state's gradient and is computed while they travel. Besides the inputs only the runs' entry states are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.kernels import Recurrence, Summary, Tokens
from lasp.kernels.summary import act
from lasp.parallel.exchange import PendingStates, Route
from lasp.parallel.plan import Plan
from lasp.parallel.sequence_parallel import SequenceParallel


@dataclass
class PendingLinear:
    """A linear layer whose states are travelling: `finish` it with the queries."""

    recurrence: Recurrence
    tokens: Tokens
    initial_state: Tensor | None
    sp: SequenceParallel
    scan: _Scan
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
        scan = _Scan.of(recurrence, tokens, initial_state, sp)
        states = sp.exchange.start(scan.runs, Route.forward(sp.layout, sp.rank))
    return PendingLinear(recurrence, tokens, initial_state, sp, scan, states)


@dataclass(frozen=True)
class _Scan:
    """The local segments composed from the start of their run on.

    Attributes:
        plan: the segments.
        prefixes: the map from the state entering the run to the one leaving each segment.
        initial: the states before the documents, ``[B, N or 1, H, K, V]``.
    """

    plan: Plan
    prefixes: Summary
    initial: Tensor

    @classmethod
    def of(cls, recurrence: Recurrence, tokens: Tokens, initial_state: Tensor | None, sp: SequenceParallel) -> _Scan:
        plan = Plan.of(sp.layout, sp.rank, recurrence.segment_size)
        at = plan.tables(tokens.k.device)
        maps = recurrence.summary(tokens, plan.segments)
        if initial_state is None:
            initial = maps.B.new_zeros(maps.B.shape[0], 1, *maps.B.shape[2:])
        else:
            initial = initial_state.to(maps.B.dtype)
            from_start = act(maps.A.index_select(1, at.opening), initial.index_select(1, at.opened))
            maps = Summary(maps.A, maps.B.index_add(1, at.opening, from_start))
        return cls(plan, plan.chain.scan(maps.reset(at.opens)), initial)

    @property
    def runs(self) -> Summary:
        """The summary of each run ``[B, R, ...]``."""
        return self.prefixes.select(self.plan.tables(self.prefixes.B.device).last)

    def states(self, run_entry: Tensor) -> tuple[Tensor, Tensor]:
        """The states entering and leaving each segment, when `run_entry` ``[B, R, H, K, V]`` enters the runs."""
        at = self.plan.tables(run_entry.device)
        leaving = self.prefixes.apply(run_entry.index_select(1, at.run))
        sources = torch.cat([run_entry, leaving, self.initial], dim=1)
        return sources.index_select(1, at.entry.clamp(max=sources.shape[1] - 1)), leaving


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
        scan, tokens = pending.scan, Tokens(k, v, gates)
        run_entry = pending.states.wait()
        entering, leaving = scan.states(run_entry)
        o = pending.recurrence.output(q, tokens, entering, scan.plan.segments, scale)
        final = run_entry.new_zeros(0)
        if final_state:
            at = scan.plan.tables(q.device)
            final = run_entry.new_zeros(q.shape[0], pending.sp.layout.num_documents, *tokens.state_shape)
            final.index_copy_(1, at.closed, leaving.index_select(1, at.closing))
        ctx.recurrence, ctx.sp, ctx.scale, ctx.final_state = pending.recurrence, pending.sp, scale, final_state
        ctx.save_for_backward(q, k, v, initial_state, run_entry, *gates)
        # The scan is left behind: backward makes it again instead of keeping every segment's state.
        return o, final

    @staticmethod
    def backward(ctx: Any, do: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, initial_state, run_entry, *gates = ctx.saved_tensors
        recurrence, sp, scale = ctx.recurrence, ctx.sp, ctx.scale
        tokens = Tokens(k, v, tuple(gates))
        plan = Plan.of(sp.layout, sp.rank, recurrence.segment_size)
        segments, at = plan.segments, plan.tables(q.device)

        # From the gradient at a segment's exit to the one at its entry; a final state's gradient joins at the exit.
        maps = recurrence.adjoint_summary(q, tokens, do, segments, scale)
        if ctx.final_state:
            joined = act(maps.A.index_select(1, at.closing), dfinal.index_select(1, at.closed))
            maps = Summary(maps.A, maps.B.index_add(1, at.closing, joined))
        suffixes = plan.chain.scan(maps.void(at.opens), reverse=True)
        states = sp.exchange.start(suffixes.select(at.first), Route.backward(sp.layout, sp.rank))

        entering, _ = _Scan.of(recurrence, tokens, initial_state, sp).states(run_entry)
        dq = recurrence.query_gradient(q, tokens, entering, do, segments, scale)

        at_run_exit = states.wait()
        at_entry = suffixes.apply(at_run_exit.index_select(1, at.run))
        at_exit = torch.cat([at_run_exit, at_entry], dim=1).index_select(1, at.exit)
        dinitial = None
        if initial_state is not None:
            opening = maps.select(at.opening).apply(at_exit.index_select(1, at.opening))
            dinitial = torch.zeros_like(initial_state)
            dinitial.index_copy_(1, at.opened, opening.to(initial_state.dtype))
        if ctx.final_state:
            at_exit = at_exit.index_add(1, at.closing, dfinal.index_select(1, at.closed))
        grads = recurrence.token_gradients(q, tokens, entering, do, at_exit, segments, scale)
        return None, None, None, dq, grads.k, grads.v, dinitial, *grads.gates


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
