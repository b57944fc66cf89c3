"""Linear attention with an identity, scalar or diagonal decay.

All ops take q, k: ``[B, T, H, K]``, v: ``[B, T, H, V]`` and return ``o: [B, T, H, V]`` in v's dtype and the final state in
float32 (float64 for float64 inputs), or None. States are ``[N, H, K, V]``, N the number of packed documents, or B without
them. Under ``sp=`` the tensors hold this rank's tokens, and states are the same on every rank; `lasp.SequenceParallel`
says how their gradients are shared. Arguments that all ops have in common:

    scale: the factor of the queries, ``K ** -0.5`` when None.
    initial_state: the state before each document, zero when None.
    output_final_state: whether to return the state after each document.
    cu_seqlens: boundaries of documents packed into one row, ``0 = c_0 < ... < c_N = T``. Under ``sp`` the layout has them.
    sp: the ranks that share the sequence.
    causal: whether a token reads the state up to itself, or the state after its document's last token.

All raise ValueError, on every rank of ``sp``, where a shape, a dtype, `cu_seqlens` or a log-decay above 0 is wrong, or ranks
disagree. Every op is `start`, which needs no queries and sends the states on their way, and `Pending.finish`.

All compile with ``torch.compile(fullgraph=True)``, where `cu_seqlens` must be integers and no tensor: a graph is made for one
layout, and another layout is another graph. A graph checks shapes, but looks at no decay's values and does not ask the other
ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.kernels import Tokens, elementwise_decay
from lasp.ops.inputs import (
    CuSeqlens,
    agree,
    check_axes,
    check_log_decay,
    check_tokens,
    describe,
    needs_gradient,
    sequence_of,
)
from lasp.parallel import SequenceParallel
from lasp.parallel.layer import PendingLayer, check_layer, start_layer
from lasp.parallel.operators import recurrence_of


@dataclass
class Pending:
    """The first half of an op, made by `start`: the states are travelling.

    The tokens' and the states' widths may be padded; `widths` are K and V as they were given.
    """

    op: str
    tokens: Tokens
    sp: SequenceParallel
    layer: PendingLayer
    widths: tuple[int, int]

    def finish(
        self, q: Tensor, scale: float | None = None, output_final_state: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Wait for the states and compute the output of the op; the arguments are the module's common ones."""
        k = self.tokens.k
        alike = [*k.shape[:3], self.widths[0]]

        def check() -> None:
            if list(q.shape) != alike or q.dtype != k.dtype:
                raise ValueError(
                    f"{self.op}: q and k must be alike, given q {_kind(q)} {list(q.shape)} and k {_kind(k)} {alike}"
                )
            if scale == 0:
                raise ValueError(f"{self.op}: scale must not be 0, which makes all outputs 0")
            check_layer(self.op, self.sp, k.shape[2], states=output_final_state)

        gradient = needs_gradient(q)

        def statement() -> str:
            return (
                f"{self.op}({describe(q=q)}, scale={scale}, output_final_state={output_final_state}, "
                f"gradient={gradient})"
            )

        call = ("finish", self.op, q.shape, q.dtype, *alike, k.dtype, scale, output_final_state, gradient)
        agree(self.sp, statement, check, call)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        if k.shape[-1] != q.shape[-1]:
            q = F.pad(q, (0, k.shape[-1] - q.shape[-1]))
        o, final = self.layer.finish(q, scale, output_final_state)
        K, V = self.widths
        o = o if o.shape[-1] == V else o[..., :V]
        return o, None if final is None else final[..., :K, :V].flatten(0, 1)


def start(
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: CuSeqlens = None,
    sp: SequenceParallel | None = None,
    causal: bool = True,
    op: str = "linear_attn",
) -> Pending:
    """Summarise the keys and values and send the states on their way, before there are any queries.

    ``pending = start(k, v, g, sp=sp); q = ...; o, final_state = pending.finish(q)`` computes q while the states travel.

    Args:
        k: ``[B, T, H, K]``.
        v: ``[B, T, H, V]``.
        g: the log-decay: None, ``[H]``, ``[B, T, H]`` or ``[B, T, H, K]``.
        initial_state: see the module.
        cu_seqlens: see the module.
        sp: see the module.
        causal: see the module.
        op: the name that errors begin with.
    """
    seq = sequence_of(k, cu_seqlens, sp)
    gradient = needs_gradient(k, v, g, initial_state)

    def statement() -> str:
        return (
            f"{op}({describe(k=k, v=v, initial_state=initial_state)}, g={'None' if g is None else f'{g.dim()} axes'}, "
            f"causal={causal}, gradient={gradient})"
        )

    def check() -> None:
        check_axes(op, k, "k", "B T H K")
        batch, tokens, heads, width = k.shape
        sizes = {"B": batch, "T": tokens, "H": heads, "K": width}
        check_axes(op, v, "v", "B T H V", **sizes)
        sizes |= {"V": v.shape[-1], "N": batch if seq.num_documents == 1 else seq.num_documents}
        if g is not None:
            check_axes(op, g, "g", {1: "H", 3: "B T H"}.get(g.dim(), "B T H K"), **sizes)
        check_axes(op, initial_state, "initial_state", "N H K V", **sizes)
        if k.dtype != v.dtype or not k.dtype.is_floating_point:
            raise ValueError(f"{op}: k and v must have one floating-point dtype, given {_kind(k)} and {_kind(v)}")
        if batch != 1 and seq.num_documents > 1:
            raise ValueError(f"{op}: packed documents come in one row: expected batch size 1, given {batch}")
        check_tokens(op, tokens, seq)
        check_layer(op, seq, heads, g, initial_state is not None, causal)
        if g is not None:
            check_log_decay(op, g)

    # Looking at a decay's values holds a device up: only on the CPU is every call looked at.
    call = None
    if g is None or g.device.type != "cpu":
        state = None if initial_state is None else initial_state.shape
        call = (op, k.shape, v.shape, None if g is None else g.shape, state, k.dtype, v.dtype, causal, gradient)
    agree(seq, statement, check, call)
    states = None if initial_state is None else initial_state.unflatten(0, (k.shape[0], -1))
    widths = (k.shape[-1], v.shape[-1])
    tokens = Tokens(k, v, () if g is None else (g,))
    recurrence, multiple = recurrence_of(elementwise_decay, tokens)
    pad = [-width % multiple for width in widths]
    if any(pad):
        # Further columns of zeros change nothing in the others. A gate of them stays 0.
        k, v = F.pad(k, (0, pad[0])), F.pad(v, (0, pad[1]))
        g = F.pad(g, (0, pad[0])) if g is not None and g.dim() == 4 else g
        states = None if states is None else F.pad(states, (0, pad[1], 0, pad[0]))
        tokens = Tokens(k, v, () if g is None else (g,))
    return Pending(op, tokens, seq, start_layer(recurrence, tokens, states, seq, causal), widths)


def linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: CuSeqlens = None,
    sp: SequenceParallel | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Basic linear attention: ``S_t = S_{t-1} + k_t v_tᵀ``, ``o_t = scale · S_tᵀ q_t``.

    Katharopoulos et al., https://arxiv.org/abs/2006.16236, eq. 9-10 without the normaliser. Apply feature maps to q and k
    before. Arguments and results: see the module.
    """
    pending = start(k, v, initial_state=initial_state, cu_seqlens=cu_seqlens, sp=sp, causal=causal)
    return pending.finish(q, scale, output_final_state)


def simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: CuSeqlens = None,
    sp: SequenceParallel | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Linear attention with one decay a head: ``S_t = exp(g_t) S_{t-1} + k_t v_tᵀ``.

    Mamba-2's scalar decay, https://arxiv.org/abs/2405.21060, section 3. `g`: the log-decay, at most 0: ``[B, T, H]``, or
    ``[H]`` where it is the same for all tokens. Other arguments and results: see the module.
    """
    return _decayed("simple_gla", q, k, v, g, (1, 3), scale, initial_state, output_final_state, cu_seqlens, sp, causal)


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: CuSeqlens = None,
    sp: SequenceParallel | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention: ``S_t = diag(exp(g_t)) S_{t-1} + k_t v_tᵀ``.

    GLA, https://arxiv.org/abs/2312.06635, eq. 3; HGRN2, https://arxiv.org/abs/2404.07904, with ``k = 1 − exp(g)``. `g`: the
    log-decay of each key dimension, ``[B, T, H, K]``, at most 0. Other arguments and results: see the module.
    """
    return _decayed("gla", q, k, v, g, (4,), scale, initial_state, output_final_state, cu_seqlens, sp, causal)


def lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    layer_idx: int = 0,
    num_layers: int = 1,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: CuSeqlens = None,
    sp: SequenceParallel | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Lightning attention: a constant decay a head, ``S_t = exp(g_h) S_{t-1} + k_t v_tᵀ``.

    Lightning Attention-2, https://arxiv.org/abs/2401.04658. `g`: the log-decays ``[H]``, those of `lightning_log_decay` for
    layer `layer_idx` of `num_layers` when None. Other arguments and results: see the module.
    """
    if g is None:
        g = _constant(lightning_log_decay, k, layer_idx, num_layers)
    return _decayed(
        "lightning_attn", q, k, v, g, (1,), scale, initial_state, output_final_state, cu_seqlens, sp, causal
    )


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: CuSeqlens = None,
    sp: SequenceParallel | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Retention: a constant decay a head, ``S_t = γ_h S_{t-1} + k_t v_tᵀ``.

    RetNet, https://arxiv.org/abs/2307.08621, eq. 3-8 after the rotation of q and k. `g`: the log-decays ``[H]``, those of
    `retention_log_decay` when None. Other arguments and results: see the module.
    """
    if g is None:
        g = _constant(retention_log_decay, k)
    return _decayed("retention", q, k, v, g, (1,), scale, initial_state, output_final_state, cu_seqlens, sp, causal)


def lightning_log_decay(
    heads: int, layer_idx: int = 0, num_layers: int = 1, device: torch.device | str | None = None
) -> Tensor:
    """The log-decays ``[H]`` of a Lightning layer: ``−(8 h / H) (1 − layer_idx / num_layers)`` for heads h = 1..H, float32.

    ALiBi's slopes, weaker in higher layers, as in TransNormerLLM, https://arxiv.org/abs/2307.14995, section 3.1.
    """
    slope = 8 / heads * (1 - layer_idx / num_layers)
    return -slope * torch.arange(1, heads + 1, dtype=torch.float32, device=device)


def retention_log_decay(heads: int, device: torch.device | str | None = None) -> Tensor:
    """The log-decays ``[H]`` of a Retention layer: ``log(1 − 2^(−5−h))`` for heads h = 0..H−1, float32 (RetNet, eq. 8)."""
    return torch.log1p(-(2.0 ** (-5 - torch.arange(heads, dtype=torch.float64)))).float().to(device)


def _constant(log_decay: Callable[..., Tensor], k: Tensor, *layer: int) -> Tensor:
    """The decays of k's heads, on its device: copied there once. A graph keeps its own."""
    if torch.compiler.is_compiling():
        return log_decay(k.shape[2], *layer, device=k.device)
    return _made_once(log_decay, k.shape[2], layer, k.device)


@lru_cache(maxsize=1024)
def _made_once(log_decay: Callable[..., Tensor], heads: int, layer: tuple[int, ...], device: torch.device) -> Tensor:
    # A tensor of inference mode could not be used in training afterwards.
    with torch.inference_mode(False):
        return log_decay(heads, *layer, device=device)


def _decayed(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    axes: tuple[int, ...],
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: CuSeqlens,
    sp: SequenceParallel | None,
    causal: bool,
) -> tuple[Tensor, Tensor | None]:
    if g.dim() not in axes:
        shapes = " or ".join({1: "[H]", 3: "[B, T, H]", 4: "[B, T, H, K]"}[n] for n in axes)
        raise ValueError(f"{op}: g must be {shapes}, given {list(g.shape)}")
    pending = start(k, v, g, initial_state=initial_state, cu_seqlens=cu_seqlens, sp=sp, causal=causal, op=op)
    return pending.finish(q, scale, output_final_state)


def _kind(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
