"""The ways in which ranks share a linear layer: by states that travel, by heads, or by keys and values that travel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lasp.kernels import Recurrence, Tokens
from lasp.parallel.heads import all_heads, check_heads, own_heads, to_heads, to_tokens
from lasp.parallel.linear import start_linear
from lasp.parallel.quadratic import quadratic_linear
from lasp.parallel.routed import Routed
from lasp.parallel.sequence_parallel import SequenceParallel
from lasp.parallel.unmasked import unmasked_linear


class PendingLayer(Protocol):
    """A linear layer that waits for its queries."""

    def finish(self, q: Tensor, scale: float, final_state: bool = False) -> tuple[Tensor, Tensor | None]:
        """The output ``[B, T_local, H, V]``, and the documents' final states ``[B, N, H, K, V]`` if asked for."""


def start_layer(
    recurrence: Recurrence | str,
    tokens: Tokens,
    initial_state: Tensor | None,
    sp: SequenceParallel,
    causal: bool,
    routed: Routed | None = None,
) -> PendingLayer:
    """Start what needs no queries, the way that `sp` says.

    Args:
        recurrence: what the tokens do to the state, or its name, as `start_linear` takes it.
        tokens: this rank's keys, values and gates.
        initial_state: ``[B, N, H, K, V]``, the state before each document, the same on every rank; zero when None.
        sp: the ranks and the layout.
        causal: whether a token reads the state up to itself, or that after its document's last token.
        routed: how the tokens are routed to memories, if they are.
    """
    if routed is not None:
        return start_linear(recurrence, tokens, initial_state, sp, routed)
    if sp.linear == "ulysses":
        return _ByHeads.start(recurrence, tokens, initial_state, sp, causal)
    if sp.linear == "ring":
        return _Ring(tokens, sp, causal)
    if not causal:
        return _Unmasked(recurrence, tokens, initial_state, sp)
    return start_linear(recurrence, tokens, initial_state, sp)


def check_layer(
    op: str,
    sp: SequenceParallel,
    heads: int,
    g: Tensor | None = None,
    states: bool = False,
    causal: bool = True,
    corrected: bool = False,
) -> None:
    """Raise unless the layer can be computed the way that `sp` says.

    Args:
        op: the name that the error begins with.
        sp: the ranks and the layout.
        heads: how many there are.
        g: the log-decay.
        states: whether it starts from states that are given, or final ones are asked for.
        causal: whether a token reads the state up to itself.
        corrected: whether the state is corrected, by the delta rule.

    Raises:
        ValueError: naming what to choose instead.
    """
    if sp.linear == "ulysses":
        check_heads(op, heads, sp)
    if sp.linear != "ring":
        return
    what = None
    if corrected:
        what = "the delta rule"
    elif g is not None and g.dim() == 4:
        what = "a decay of each key dimension"
    elif g is not None and not causal:
        what = "a decay without the causal mask"
    elif states:
        what = "states"
    if what is not None:
        raise ValueError(
            f"{op}: the method ring multiplies queries with keys and cannot have {what}: choose the method lasp2 or lasp1"
        )


@dataclass(frozen=True)
class _Unmasked:
    recurrence: Recurrence | str
    tokens: Tokens
    initial_state: Tensor | None
    sp: SequenceParallel

    def finish(self, q: Tensor, scale: float, final_state: bool = False) -> tuple[Tensor, Tensor | None]:
        o, final = unmasked_linear(self.recurrence, q, self.tokens, self.initial_state, self.sp, scale)
        return o, final if final_state else None


@dataclass(frozen=True)
class _Ring:
    tokens: Tokens
    sp: SequenceParallel
    causal: bool

    def finish(self, q: Tensor, scale: float, final_state: bool = False) -> tuple[Tensor, Tensor | None]:
        assert not final_state
        k, v, gates = self.tokens.k, self.tokens.v, self.tokens.gates
        return quadratic_linear(q, k, v, gates[0] if gates else None, self.sp, self.causal, scale), None


@dataclass(frozen=True)
class _ByHeads:
    """All tokens of this rank's heads, as one rank computes them."""

    layer: PendingLayer
    sp: SequenceParallel

    @classmethod
    def start(
        cls,
        recurrence: Recurrence | str,
        tokens: Tokens,
        initial_state: Tensor | None,
        sp: SequenceParallel,
        causal: bool,
    ) -> _ByHeads:
        gates = tuple(own_heads(g, sp, 0) if g.dim() == 1 else to_heads(g, sp) for g in tokens.gates)
        here = Tokens(to_heads(tokens.k, sp), to_heads(tokens.v, sp), gates)
        states = None if initial_state is None else own_heads(initial_state, sp, 2)
        return cls(start_layer(recurrence, here, states, sp.whole, causal), sp)

    def finish(self, q: Tensor, scale: float, final_state: bool = False) -> tuple[Tensor, Tensor | None]:
        o, final = self.layer.finish(to_heads(q, self.sp), scale, final_state)
        if final is not None:
            final = all_heads(final.movedim(2, 0).contiguous(), self.sp).movedim(0, 2)
        return to_tokens(o, self.sp), final
