"""`lasp.parallel.passes` as operators of torch's library: what `torch.compile` sees of a linear layer.

A graph holds tensors, numbers and strings, so the ranks and the recurrence go by their names, which say all that the shapes
depend on: a graph that a compiler keeps on disk means the same in the next process. What is under way between start and
finish stays here, under a ticket that the graph hands from one to the other.
"""

# ruff: noqa: ARG001
# An operator's schema says what its functions are given, whether each of them looks at it or not.

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from operator import index
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.compiler import assume_constant_result

from lasp.kernels import Recurrence, Tokens
from lasp.parallel import passes
from lasp.parallel.sequence_parallel import SequenceParallel

_recurrences: dict[str, Recurrence] = {}
_serials = count()
_tickets = count()
#: What was started and not finished: the tensors that it was started with, and the rest.
_started: dict[int, tuple[Tokens, passes.Started]] = {}


@dataclass(frozen=True)
class TracedLinear:
    """`PendingLinear` in a graph: recurrence and ranks by name, what is under way by its ticket."""

    recurrence: str
    tokens: Tokens
    initial_state: Tensor | None
    sp: SequenceParallel
    ticket: Tensor

    def finish(self, q: Tensor, scale: float, final_state: bool = False) -> tuple[Tensor, Tensor | None]:
        """As `PendingLinear.finish`."""
        k, v, gates = self.tokens.k, self.tokens.v, list(self.tokens.gates)
        o, final, _ = torch.ops.lasp.linear_finish(
            self.ticket, q, k, v, gates, self.initial_state, self.recurrence, self.sp.name, scale, final_state
        )
        return o, final if final_state else None


def start_linear(recurrence: str, tokens: Tokens, initial_state: Tensor | None, sp: SequenceParallel) -> TracedLinear:
    """`lasp.parallel.start_linear` in a graph."""
    keep(sp.name)
    gates = [g.detach() for g in tokens.gates]
    state = None if initial_state is None else initial_state.detach()
    ticket = torch.ops.lasp.linear_start(
        tokens.k.detach(), tokens.v.detach(), gates, state, recurrence, sp.name, _serial()
    )
    return TracedLinear(recurrence, tokens, initial_state, sp, ticket)


def sum_over_ranks(x: Tensor, sp: SequenceParallel) -> Tensor:
    """`lasp.parallel.linear.sum_over_ranks` in a graph."""
    total: Tensor = torch.ops.lasp.sum_over_ranks(x, keep(sp.name))
    return total


# -- what a graph takes for constant ---------------------------------------------------------------------------------


def recurrence_of(choose: Callable[[Tokens], Recurrence], tokens: Tokens) -> tuple[Recurrence | str, int]:
    """What `choose` picks for such tokens, and of which K and V must be multiples. In a graph the recurrence's name."""
    if not torch.compiler.is_compiling():
        recurrence = choose(tokens)
        return recurrence, recurrence.width_multiple
    shapes = tuple(tuple(index(n) for n in x.shape) for x in (tokens.k, tokens.v, *tokens.gates))
    return _choice(choose, shapes, tokens.k.dtype, tokens.k.device)


@assume_constant_result
def _choice(
    choose: Callable[[Tokens], Recurrence],
    shapes: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[str, int]:
    with FakeTensorMode():
        k, v, *gates = (torch.empty(shape, dtype=dtype, device=device) for shape in shapes)
        recurrence = choose(Tokens(k, v, tuple(gates)))
    return name_of(recurrence), recurrence.width_multiple


def name_of(recurrence: Recurrence) -> str:
    """The name by which operators find a recurrence: those that compare equal share one."""
    name = repr(recurrence)
    assert _recurrences.setdefault(name, recurrence) == recurrence, f"two recurrences are written {name}"
    return name


@assume_constant_result
def keep(name: str) -> str:
    """Keep the ranks of that name alive: a graph names them."""
    SequenceParallel.named(name, keep=True)
    return name


def name_in_graph(sp: SequenceParallel) -> str:
    """The name by which operators that serve graphs and eager calls alike find the ranks."""
    return keep(sp.name) if torch.compiler.is_compiling() else sp.name


@assume_constant_result
def _serial() -> str:
    """Another one for each start in a graph: two starts that look alike must not become one, each is finished once."""
    return str(next(_serials))


# -- the operators ---------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "lasp::linear_start",
    mutates_args=(),
    schema="(Tensor k, Tensor v, Tensor[] gates, Tensor? initial_state, str recurrence, str sp, str serial) -> Tensor",
)
def _linear_start(
    k: Tensor, v: Tensor, gates: list[Tensor], initial_state: Tensor | None, recurrence: str, sp: str, serial: str
) -> Tensor:
    tokens = Tokens(k, v, tuple(gates))
    ticket = next(_tickets)
    _started[ticket] = (
        tokens,
        passes.start(_recurrences[recurrence], tokens, initial_state, SequenceParallel.named(sp)),
    )
    return torch.tensor([ticket])


@_linear_start.register_fake
def _(*_: Any) -> Tensor:
    return torch.empty(1, dtype=torch.long)


@torch.library.custom_op(
    "lasp::linear_finish",
    mutates_args=(),
    schema="(Tensor ticket, Tensor q, Tensor k, Tensor v, Tensor[] gates, Tensor? initial_state, str recurrence, str sp, "
    "float scale, bool final_state) -> (Tensor, Tensor, Tensor)",
)
def _linear_finish(
    ticket: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: list[Tensor],
    initial_state: Tensor | None,
    recurrence: str,
    sp: str,
    scale: float,
    final_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the final states (empty if not asked for), and the states that the backward starts from."""
    given, started = _started.pop(int(ticket))
    here = Tokens(k, v, tuple(gates))
    if not all(map(_same, (given.k, given.v, *given.gates), (k, v, *gates))):
        # A compiler may have copied what start was given, and put something else in the copy's place since.
        started.tokens = started.recurrence.prepare(here, started.plan.segments)
    o, final, entering, run_entry = passes.forward(started, q, scale, final_state)
    if passes.keeps_states(entering.nbytes, k, v):
        states = entering
    elif run_entry is not None:
        states = run_entry
    else:
        states = entering.new_zeros(_state_shape(here, _runs(started.sp)))
    return o.contiguous(), entering.new_empty(0) if final is None else final.contiguous(), states.contiguous()


@_linear_finish.register_fake
def _(
    ticket: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: list[Tensor],
    initial_state: Tensor | None,
    recurrence: str,
    sp: str,
    scale: float,
    final_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    ranks, tokens = SequenceParallel.named(sp), Tokens(k, v)
    states = _segments(ranks, recurrence) if _kept(ranks, recurrence, tokens) else _runs(ranks)
    final = _state_shape(tokens, ranks.num_documents) if final_state else (0,)
    return (
        v.new_empty(v.shape),
        k.new_empty(final, dtype=tokens.state_dtype),
        k.new_empty(_state_shape(tokens, states), dtype=tokens.state_dtype),
    )


@torch.library.custom_op(
    "lasp::linear_backward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor[] gates, Tensor? initial_state, Tensor states, Tensor do, "
    "Tensor? dfinal, str recurrence, str sp, float scale, bool gated) -> Tensor[]",
)
def _linear_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: list[Tensor],
    initial_state: Tensor | None,
    states: Tensor,
    do: Tensor,
    dfinal: Tensor | None,
    recurrence: str,
    sp: str,
    scale: float,
    gated: bool,
) -> list[Tensor]:
    """The gradients of q, k, v, of the initial states if there are any, and of the gates if `gated`."""
    job, ranks, tokens = _recurrences[recurrence], SequenceParallel.named(sp), Tokens(k, v, tuple(gates))
    entering, run_entry = (states, None) if _kept(ranks, recurrence, tokens) else (None, states)
    grads = passes.backward(job, ranks, q, tokens, initial_state, entering, run_entry, do, dfinal, scale, gated)
    found = (grads.q, grads.k, grads.v, *(() if grads.initial_state is None else (grads.initial_state,)))
    return [x.contiguous() for x in (*found, *(grads.gates if gated else ()))]


@_linear_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: list[Tensor],
    initial_state: Tensor | None,
    states: Tensor,
    do: Tensor,
    dfinal: Tensor | None,
    recurrence: str,
    sp: str,
    scale: float,
    gated: bool,
) -> list[Tensor]:
    like = (q, k, v, *(() if initial_state is None else (initial_state,)), *(gates if gated else ()))
    return [x.new_empty(x.shape) for x in like]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, q, k, v, gates, initial_state, *ctx.constants = inputs
    ctx.gates = len(gates)
    ctx.save_for_backward(q, k, v, initial_state, output[2], *gates)


def _backward(ctx: Any, do: Tensor, dfinal: Tensor, _dstates: Tensor) -> tuple[Any, ...]:
    q, k, v, initial_state, states, *gates = ctx.saved_tensors
    recurrence, sp, scale, final_state = ctx.constants
    needed = ctx.needs_input_grad[4]
    gated = any(needed) if isinstance(needed, list | tuple) else bool(needed)
    dfinal_ = dfinal if final_state else None
    dq, dk, dv, *rest = torch.ops.lasp.linear_backward(
        q, k, v, gates, initial_state, states, do, dfinal_, recurrence, sp, scale, gated
    )
    dinitial = None if initial_state is None else rest.pop(0)
    return None, dq, dk, dv, rest if gated else [None] * len(gates), dinitial, None, None, None, None


_linear_finish.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("lasp::sum_over_ranks", mutates_args=(), schema="(Tensor x, str sp) -> Tensor")
def _sum_over_ranks(x: Tensor, sp: str) -> Tensor:
    ranks = SequenceParallel.named(sp)
    return x.contiguous().clone() if ranks.world_size == 1 else passes.total(x, ranks)


@_sum_over_ranks.register_fake
def _(x: Tensor, sp: str) -> Tensor:
    return x.new_empty(x.shape)


def _setup_sum(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.sp = inputs[1]


def _backward_sum(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
    return torch.ops.lasp.sum_over_ranks(dx, ctx.sp), None


_sum_over_ranks.register_autograd(_backward_sum, setup_context=_setup_sum)


def _segments(sp: SequenceParallel, recurrence: str) -> int:
    """Into how many segments this rank's tokens are cut."""
    size = _recurrences[recurrence].segment_size
    return sum(-(-piece.length // size) for piece in sp.layout.pieces(sp.rank))


def _runs(sp: SequenceParallel) -> int:
    return len(sp.layout.runs_of(sp.rank))


def _kept(sp: SequenceParallel, recurrence: str, tokens: Tokens) -> bool:
    """Whether `linear_finish` hands the segments' states on, or the runs'."""
    size = math.prod(_state_shape(tokens, _segments(sp, recurrence))) * tokens.state_dtype.itemsize
    return passes.keeps_states(size, tokens.k, tokens.v)


def _state_shape(tokens: Tokens, states: int) -> tuple[int, ...]:
    return (tokens.k.shape[0], states, *tokens.state_shape)


def _same(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are the same memory, looked at in the same way."""
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride() and x.dtype == y.dtype
