"""The definition: every recurrence token by token in float64. Everything else in the library is held to it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Sequence[int] | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """Linear attention with an optional decay, one token after the other, differentiable, in float64.

    ``S_t = exp(g_t) ⊙ S_{t-1} + k_t u_tᵀ`` and ``o_t = scale · S_tᵀ q_t``; with ``causal=False`` every token reads the
    state after the last token of its document instead. Without beta u_t is v_t. With it, by the delta rule, the decayed state
    is corrected towards giving v_t for k_t: ``u_t = β_t (v_t − (exp(g_t) ⊙ S_{t-1})ᵀ k_t)``.

    Args:
        q: ``[B, T, H, K]``; or with fewer heads, each for as many of v's as there are to one of its.
        k: likewise.
        v: ``[B, T, H, V]``.
        g: the log-decay: None, ``[H]``, ``[B, T, H]`` or ``[B, T, H, K]``.
        beta: ``[B, T, H]``, or None.
        scale: ``K ** -0.5`` when None.
        initial_state: ``[B, N, H, K, V]``, one for each document, zero when None.
        cu_seqlens: document boundaries ``0 = c_0 < ... < c_N = T``; one document when None.
        causal: whether a token reads the state up to itself or the whole document's.

    Returns:
        ``o: [B, T, H, V]`` and the final states ``[B, N, H, K, V]``, both float64.
    """
    batch, length, heads, width = *v.shape[:3], q.shape[-1]
    q, k = (x.double().repeat_interleave(heads // x.shape[2], dim=2) for x in (q, k))
    q, v = q * (width**-0.5 if scale is None else scale), v.double()
    decay = torch.ones(1, 1, 1, 1, dtype=torch.float64) if g is None else g.double().exp()
    if decay.dim() == 1:
        decay = decay.view(1, 1, heads, 1)
    if decay.dim() == 3:
        decay = decay.unsqueeze(-1)
    decay = decay.expand(batch, length, heads, width)

    bounds = [0, length] if cu_seqlens is None else list(cu_seqlens)
    outputs, finals = [], []
    for n, (start, end) in enumerate(pairwise(bounds)):
        if initial_state is None:
            state = q.new_zeros(batch, heads, width, v.shape[-1])
        else:
            state = initial_state[:, n].double()
        states = []
        for t in range(start, end):
            state, u = decay[:, t, :, :, None] * state, v[:, t]
            if beta is not None:
                u = beta[:, t, :, None].double() * (u - torch.einsum("bhk,bhkv->bhv", k[:, t], state))
            state = state + k[:, t, :, :, None] * u[:, :, None, :]
            states.append(state)
        finals.append(state)
        read = states if causal else [state] * (end - start)
        outputs += [torch.einsum("bhk,bhkv->bhv", q[:, start + i], s) for i, s in enumerate(read)]
    o = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(v)
    return o, torch.stack(finals, dim=1)
