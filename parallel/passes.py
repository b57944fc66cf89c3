"""What a linear layer computes on one rank, as plain functions: start, forward, backward. They join any recurrence to any
exchange on any layout, and know nothing of autograd or of compilers.

Forward: summarise the local segments, compose them into runs, start the exchange, and when the states that enter the runs
are back, run forward from them. Backward: the same with the adjoint summaries from the sequence's end to its start; dq needs
no state's gradient and is computed while they travel. Besides the inputs, states are kept, and never more of them than keys
and values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from lasp.kernels import Ahead, Course, Recurrence, Summary, Tokens
from lasp.parallel.exchange import Route, Running
from lasp.parallel.exposure import exposed
from lasp.parallel.plan import Plan
from lasp.parallel.routed import Routed, RoutedPlan
from lasp.parallel.sequence_parallel import SequenceParallel


@dataclass
class Started:
    """A linear layer whose states are travelling.

    Attributes:
        recurrence: what the tokens do to the state.
        sp: the ranks and the layout.
        plan: how this rank's tokens are cut.
        tokens: the tokens as the recurrence takes them.
        maps: the map over each segment.
        travelling: the states, under way.
        routed: how the tokens are routed, if they are.
    """

    recurrence: Recurrence
    sp: SequenceParallel
    plan: Plan | RoutedPlan
    tokens: Tokens
    maps: Summary
    travelling: Travelling
    routed: Routed | None


@dataclass
class Travelling:
    """States between the segments of a rank, of which some are on their way from others.

    Attributes:
        plan: how the rank's tokens are cut.
        course: how the segments' maps compose.
        maps: the maps.
        seeds: the states that chains start from.
        ahead: what was composed before anything came; None where nothing comes.
        runs: what enters the runs, under way; None likewise.
    """

    plan: Plan | RoutedPlan
    course: Course
    maps: Summary
    seeds: Tensor | None
    ahead: Ahead | None = None
    runs: Running | None = None

    @classmethod
    def sent(
        cls,
        sp: SequenceParallel,
        plan: Plan | RoutedPlan,
        course: Course,
        maps: Summary,
        seeds: Tensor | None,
        route: Route,
    ) -> Travelling:
        """Send what this rank's runs do to the state, where there are any that could feel it."""
        if len(route.order) <= 1:
            return cls(plan, course, maps, seeds)
        ahead = course.ahead(maps, seeds)
        return cls(plan, course, maps, seeds, ahead, sp.exchange.start(plan.sent(ahead.leaving), route))

    def arrive(self) -> tuple[Tensor, Tensor | None]:
        """The states that enter the segments ``[B, n, H, K, V]``, and those that enter the runs, None where nothing can."""
        if self.ahead is None or self.runs is None:
            return self.course.states(self.maps, self.seeds, None), None
        entering = self.plan.received(self.runs.wait())
        return self.ahead.states(entering), entering


@dataclass
class Gradients:
    """The gradients of a layer's inputs; the gates' are empty where they were not wanted."""

    q: Tensor
    k: Tensor
    v: Tensor
    gates: tuple[Tensor, ...]
    initial_state: Tensor | None


def start(
    recurrence: Recurrence,
    tokens: Tokens,
    initial_state: Tensor | None,
    sp: SequenceParallel,
    routed: Routed | None = None,
) -> Started:
    """Summarise the local tokens, which may be routed, and start the exchange."""
    plan = Plan.of(sp.layout, sp.rank, recurrence.segment_size) if routed is None else routed.plan(recurrence)
    prepared = recurrence.prepare(tokens, plan.segments)
    maps = recurrence.summary(prepared, plan.segments)
    states = Travelling.sent(sp, plan, plan.forward, maps, initial_state, Route.forward(sp.layout, sp.rank))
    return Started(recurrence, sp, plan, prepared, maps, states, routed)


def keeps_states(size: int, k: Tensor, v: Tensor) -> bool:
    """Whether the backward gets every segment's state, of `size` bytes in all, or makes them again from the runs'.

    Few and long segments: their states are kept. Many short ones: they would be more than the tokens.
    """
    return size <= k.numel() * k.element_size() + v.numel() * v.element_size()


def forward(
    started: Started, q: Tensor, scale: float, final_state: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Wait for the states and compute the output.

    Returns:
        The output, the documents' final states ``[B, N, H, K, V]`` if asked for, the states that entered the segments
        ``[B, n, H, K, V]`` and those that entered the runs ``[B, R, H, K, V]``, None where nothing could.
    """
    recurrence, sp, tokens, plan = started.recurrence, started.sp, started.tokens, started.plan
    entering, run_entry = started.travelling.arrive()
    o = recurrence.output(q, tokens, entering, plan.segments, scale)
    if not final_state:
        return o, None, entering, run_entry
    final = plan.final_states(started.maps, started.travelling.seeds, entering)
    return o, total(final, sp), entering, run_entry


def backward(
    recurrence: Recurrence,
    sp: SequenceParallel,
    q: Tensor,
    tokens: Tokens,
    initial_state: Tensor | None,
    entering: Tensor | None,
    run_entry: Tensor | None,
    do: Tensor,
    dfinal: Tensor | None,
    scale: float,
    gated: bool,
    routed: Routed | None = None,
) -> Gradients:
    """The gradients of everything that went in.

    Args:
        recurrence: what the tokens did to the state.
        sp: the ranks and the layout.
        q: the queries.
        tokens: the tokens as they were given. What was derived from them is made again: it may be larger than they are.
        initial_state: the states before the documents.
        entering: the states that entered the segments; None where they are to be made again from `run_entry`.
        run_entry: the states that entered the runs.
        do: the gradient of the output.
        dfinal: this rank's share of the gradient of the final states, where they were asked for.
        scale: the factor of the queries.
        gated: whether the gates' gradients are wanted.
        routed: how the tokens are routed, if they are.
    """
    plan = Plan.of(sp.layout, sp.rank, recurrence.segment_size) if routed is None else routed.plan(recurrence)
    segments, given = plan.segments, tokens.gates
    tokens = recurrence.prepare_backward(q, tokens, segments)

    # A final state's gradient is where the gradients of its document's states start from.
    dfinal = None if dfinal is None else total(dfinal, sp)
    maps = recurrence.adjoint_summary(q, tokens, do, segments, scale)
    states = Travelling.sent(sp, plan, plan.backward, maps, dfinal, Route.backward(sp.layout, sp.rank))

    if entering is None:
        entering = plan.forward.states(recurrence.summary(tokens, segments), initial_state, run_entry)
    dq, kept = recurrence.query_gradient(q, tokens, entering, do, segments, scale, gated)

    leaving, _ = states.arrive()
    dinitial = None
    if initial_state is not None:
        dinitial = plan.initial_gradient(maps, dfinal, leaving).to(initial_state.dtype)
    grads = recurrence.token_gradients(q, tokens, entering, do, leaving, segments, scale, gated, kept)
    # A gate that many tokens share has the sum of their gradients.
    dgates = tuple(dg.sum_to_size(g.shape) for dg, g in zip(grads.gates, given, strict=False))
    return Gradients(dq, grads.k, grads.v, dgates, dinitial)


def total(x: Tensor, sp: SequenceParallel) -> Tensor:
    """The sum of the ranks' tensors, on every rank; of a single rank x itself."""
    if sp.world_size == 1:
        return x
    x = x.contiguous().clone()
    exposed(lambda: dist.all_reduce(x, group=sp.group), x.device)
    return x
