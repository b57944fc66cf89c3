"""Linear attention with an identity, scalar or diagonal decay.

All ops take q, k: ``[B, T, H, K]``, v: ``[B, T, H, V]`` and return ``o: [B, T, H, V]`` in v's dtype and the final state in
float32 (float64 for float64 inputs), or None. q and k may have fewer heads than v, a divisor of its number: each then serves
as many of v's that follow one another. States are ``[N, H, K, V]``, N the number of packed documents, or B without them.
Under ``sp=`` the tensors hold this rank's tokens, and states are the same on every rank; `lasp.SequenceParallel` says how
their gradients are shared. Arguments that all ops have in common:

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
from functools import lru_cache

import torch
from torch import Tensor

from lasp.ops.inputs import CuSeqlens
from lasp.ops.pending import Pending, start
from lasp.parallel import SequenceParallel

__all__ = [
    "Pending",
    "gla",
    "lightning_attn",
    "lightning_log_decay",
    "linear_attn",
    "retention",
    "retention_log_decay",
    "simple_gla",
    "start",
]


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
