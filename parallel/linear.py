"""A linear layer with gradients: one autograd function around `lasp.parallel.passes`.

Under ``torch.compile`` the same functions are operators of torch's library instead: `lasp.parallel.operators`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lasp.kernels import Recurrence, Tokens
from lasp.parallel import operators, passes
from lasp.parallel.routed import Routed
from lasp.parallel.sequence_parallel import SequenceParallel


@dataclass
class PendingLinear:
    """A linear layer whose states are travelling: `finish` it with the queries.

    Attributes:
        tokens: the tokens as they were given.
        initial_state: the states before the documents.
        started: what is under way.
    """

    tokens: Tokens
    initial_state: Tensor | None
    started: passes.Started

    def finish(self, q: Tensor, scale: float, final_state: bool = False) -> tuple[Tensor, Tensor | None]:
        """Wait for the states and compute the output.

        Args:
            q: ``[B, T_local, H, K]``.
            scale: the factor of the queries.
            final_state: whether to return the documents' final states.

        Returns:
            ``o: [B, T_local, H, V]`` and, if asked for, the final states ``[B, N, H, K, V]``, the same on every rank.
        """
        tokens = self.tokens
        o, final = _Linear.apply(
            self.started, scale, final_state, q, tokens.k, tokens.v, self.initial_state, *tokens.gates
        )
        return o, final


def start_linear(
    recurrence: Recurrence | str,
    tokens: Tokens,
    initial_state: Tensor | None,
    sp: SequenceParallel,
    routed: Routed | None = None,
) -> PendingLinear | operators.TracedLinear:
    """Summarise the local tokens and start the exchange. Needs no queries: project them while the states travel.

    Args:
        recurrence: what the tokens do to the state; under ``torch.compile`` its name, from `operators.recurrence_of`.
        tokens: this rank's keys, values and gates.
        initial_state: ``[B, N, H, K, V]``, the state before each document, the same on every rank; zero when None.
        sp: the ranks and the layout.
        routed: how the tokens are routed to memories, if they are; states are then ``[1, B · M, H, K, V]``.

    Raises:
        NotImplementedError: for routed tokens under ``torch.compile``.
    """
    if isinstance(recurrence, str):
        if routed is not None:
            raise NotImplementedError("routed tokens are no part of a graph: compile what is around the layer")
        return operators.start_linear(recurrence, tokens, initial_state, sp)
    with torch.no_grad():
        return PendingLinear(tokens, initial_state, passes.start(recurrence, tokens, initial_state, sp, routed))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        started: passes.Started,
        scale: float,
        final_state: bool,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        initial_state: Tensor | None,
        *gates: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        o, final, entering, run_entry = passes.forward(started, q, scale, final_state)
        ctx.recurrence, ctx.sp, ctx.scale, ctx.final_state = started.recurrence, started.sp, scale, final_state
        ctx.routed = started.routed
        kept = passes.keeps_states(entering.nbytes, k, v)
        ctx.save_for_backward(q, k, v, initial_state, entering if kept else None, None if kept else run_entry, *gates)
        return o, final

    @staticmethod
    def backward(ctx: Any, do: Tensor, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, initial_state, entering, run_entry, *gates = ctx.saved_tensors
        grads = passes.backward(
            ctx.recurrence,
            ctx.sp,
            q,
            Tokens(k, v, tuple(gates)),
            initial_state,
            entering,
            run_entry,
            do,
            dfinal if ctx.final_state else None,
            ctx.scale,
            any(ctx.needs_input_grad[7:]),
            ctx.routed,
        )
        dgates = grads.gates or (None,) * len(gates)
        return None, None, None, grads.q, grads.k, grads.v, grads.initial_state, *dgates


def sum_over_ranks(x: Tensor, sp: SequenceParallel) -> Tensor:
    """The sum of the ranks' tensors, on every rank. Its gradient is a sum too: the loss is the sum of the ranks' losses."""
    if sp.world_size == 1:
        return x
    if torch.compiler.is_compiling():
        return operators.sum_over_ranks(x, sp)
    total: Tensor = _SumOverRanks.apply(x, sp)
    return total


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sp: SequenceParallel) -> Tensor:
        ctx.sp = sp
        return passes.total(x, sp)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return passes.total(dx, ctx.sp), None
