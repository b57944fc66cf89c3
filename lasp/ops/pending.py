"""What all linear ops are: `start`, which needs no queries and sends the states on their way, and `Pending.finish`."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from lasp.kernels import Tokens, delta_rule, elementwise_decay
from lasp.kernels.one_token import OneToken
from lasp.ops.inputs import (
    CuSeqlens,
    agree,
    check_axes,
    check_log_decay,
    check_routed,
    check_tokens,
    describe,
    needs_gradient,
    sequence_of,
)
from lasp.ops.norm import l2_norm
from lasp.parallel import SequenceParallel
from lasp.parallel.layer import PendingLayer, check_layer, start_layer
from lasp.parallel.operators import recurrence_of
from lasp.parallel.routed import Routed


@dataclass
class Pending:
    """The first half of an op, made by `start`: the states are travelling.

    Attributes:
        op: the name that errors begin with.
        like: the keys as they were given, which queries must be like.
        sp: the ranks and the layout.
        layer: what is under way.
        widths: K and V as they were given; the tokens' and the states' may be padded.
        padding: by how much K is.
        groups: how many heads of the values there are to one of the queries and keys.
        normalised: whether queries are made of length 1.
        routed: how the tokens were routed, if they were.
    """

    op: str
    like: Tensor
    sp: SequenceParallel
    layer: PendingLayer
    widths: tuple[int, int]
    padding: int
    groups: int
    normalised: bool
    routed: Routed | None = None

    def finish(
        self, q: Tensor, scale: float | None = None, output_final_state: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Wait for the states and compute the output of the op; the arguments are the module's common ones."""
        k = self.like

        def check() -> None:
            if q.shape != k.shape or q.dtype != k.dtype:
                raise ValueError(
                    f"{self.op}: q and k must be alike, given q {_kind(q)} {list(q.shape)} and k {_kind(k)} {list(k.shape)}"
                )
            if scale == 0:
                raise ValueError(f"{self.op}: scale must not be 0, which makes all outputs 0")
            check_layer(self.op, self.sp, k.shape[2] * self.groups, states=output_final_state)
            if output_final_state and self.routed is not None and not self.routed.whole:
                raise ValueError(
                    f"{self.op}: memories have final states on one rank, in rows of one document: leave out output_final_state"
                )

        gradient = needs_gradient(q)

        def statement() -> str:
            return (
                f"{self.op}({describe(q=q)}, scale={scale}, output_final_state={output_final_state}, "
                f"gradient={gradient})"
            )

        call = ("finish", self.op, q.shape, q.dtype, k.shape, k.dtype, self.groups, scale, output_final_state, gradient)
        agree(self.sp, statement, check, call)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        q = _of_the_values_heads(q, self.groups, self.normalised)
        q = F.pad(q, (0, self.padding)) if self.padding else q
        o, final = self.layer.finish(q, scale, output_final_state)
        K, V = self.widths
        o = o if o.shape[-1] == V else o[..., :V]
        return o, None if final is None else final[..., :K, :V].flatten(0, 1)


def start(
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    use_qk_l2norm_in_kernel: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: CuSeqlens = None,
    sp: SequenceParallel | None = None,
    causal: bool = True,
    routed: Routed | None = None,
    op: str = "linear_attn",
) -> Pending:
    """Summarise the keys and values and send the states on their way, before there are any queries.

    ``pending = start(k, v, g, sp=sp); q = ...; o, final_state = pending.finish(q)`` computes q while the states travel.

    Args:
        k: ``[B, T, H, K]``, or with fewer heads, a divisor of v's, each shared by as many of v's that follow one another.
        v: ``[B, T, H, V]``.
        g: the log-decay: None, ``[H]``, ``[B, T, H]`` or ``[B, T, H, K]``.
        beta: how far the delta rule corrects the state, ``[B, T, H]``; None where values are added as they are.
        use_qk_l2norm_in_kernel: whether queries and keys are made of length 1 first.
        initial_state: see `lasp.ops.linear`.
        cu_seqlens: see `lasp.ops.linear`.
        sp: see `lasp.ops.linear`.
        causal: see `lasp.ops.linear`.
        routed: how the tokens were routed to memories, which are heads of their own; k, v and gates are then those of
            ``routed.dispatch.send``'s tokens, in one row: ``[1, N, H, ...]``.
        op: the name that errors begin with.
    """
    seq = sequence_of(k, cu_seqlens, sp) if routed is None else routed.sp
    gradient = needs_gradient(k, v, g, beta, initial_state)

    def statement() -> str:
        return (
            f"{op}({describe(k=k, v=v, beta=beta, initial_state=initial_state)}, "
            f"g={'None' if g is None else f'{g.dim()} axes'}, use_qk_l2norm_in_kernel={use_qk_l2norm_in_kernel}, "
            f"causal={causal}, routed={None if routed is None else routed.memories}, gradient={gradient})"
        )

    def check() -> None:
        check_axes(op, k, "k", "B T H K")
        batch, tokens, _, width = k.shape
        sizes = {"B": batch, "T": tokens, "K": width}
        check_axes(op, v, "v", "B T H V", **sizes)
        sizes |= {
            "H": v.shape[2],
            "V": v.shape[3],
            "N": (batch if routed is None else routed.batch * routed.memories)
            if seq.num_documents == 1
            else seq.num_documents,
        }
        if not k.shape[2] or v.shape[2] % k.shape[2]:
            raise ValueError(
                f"{op}: v must have as many heads as q and k, or a multiple, given v {list(v.shape)} and k {list(k.shape)}"
            )
        if g is not None:
            check_axes(op, g, "g", {1: "H", 3: "B T H"}.get(g.dim(), "B T H K"), **sizes)
        check_axes(op, beta, "beta", "B T H", **sizes)
        check_axes(op, initial_state, "initial_state", "N H K V", **sizes)
        if k.dtype != v.dtype or not k.dtype.is_floating_point:
            raise ValueError(f"{op}: k and v must have one floating-point dtype, given {_kind(k)} and {_kind(v)}")
        if routed is not None:
            check_routed(op, routed, batch, tokens, initial_state, causal)
        elif batch != 1 and seq.num_documents > 1:
            raise ValueError(f"{op}: packed documents come in one row: expected batch size 1, given {batch}")
        else:
            check_tokens(op, tokens, seq)
        check_layer(op, seq, v.shape[2], g, initial_state is not None, causal, beta is not None)
        if g is not None:
            check_log_decay(op, g)

    # Looking at a decay's values holds a device up: only on the CPU is every call looked at.
    call = None
    if g is None or g.device.type != "cpu":
        shapes = tuple(None if x is None else (x.shape, x.dtype) for x in (k, v, g, beta, initial_state))
        memories = None if routed is None else (routed.batch, routed.memories, routed.tokens)
        call = (op, shapes, memories, use_qk_l2norm_in_kernel, causal, gradient)
    agree(seq, statement, check, call)
    like, widths, groups = k, (k.shape[-1], v.shape[-1]), v.shape[2] // k.shape[2]
    k = _of_the_values_heads(k, groups, use_qk_l2norm_in_kernel)
    states = None if initial_state is None else initial_state.unflatten(0, (k.shape[0], -1))
    if k.shape[1] == 1 and seq.world_size == 1 and seq.num_documents == 1 and routed is None:
        alone = OneToken(k, v, g, beta, states)
        return Pending(op, like, seq, alone, widths, 0, groups, use_qk_l2norm_in_kernel)
    gates = tuple(gate for gate in (g, beta) if gate is not None)
    recurrence, multiple = recurrence_of(elementwise_decay if beta is None else delta_rule, Tokens(k, v, gates))
    pad = [-width % multiple for width in widths]
    if any(pad):
        # Further columns of zeros change nothing in the others. A gate of them stays 0.
        k, v = F.pad(k, (0, pad[0])), F.pad(v, (0, pad[1]))
        gates = tuple(F.pad(gate, (0, pad[0])) if gate.dim() == 4 else gate for gate in gates)
        states = None if states is None else F.pad(states, (0, pad[1], 0, pad[0]))
    layer = start_layer(recurrence, Tokens(k, v, gates), states, seq, causal, routed)
    return Pending(op, like, seq, layer, widths, pad[0], groups, use_qk_l2norm_in_kernel, routed)


def _of_the_values_heads(x: Tensor, groups: int, normalised: bool) -> Tensor:
    """Queries or keys as the recurrence takes them: of length 1 if asked for, and as many heads as the values have."""
    x = l2_norm(x) if normalised else x
    return x if groups == 1 else x.repeat_interleave(groups, dim=2)


def _kind(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
