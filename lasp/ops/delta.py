"""The delta rule, plain and decayed: a state is corrected towards giving a token's value for its key.

With ``S'_t = exp(g_t) ⊙ S_{t-1}`` all are ``S_t = S'_t + β_t k_t (v_t − S'_tᵀ k_t)ᵀ``, ``o_t = scale · S_tᵀ q_t``. Shapes,
common arguments, errors and results are those of `lasp.ops.linear`; besides, all take

    beta: how far the state is corrected, ``[B, T, H]``. Between 0 and 1, or for keys of length 1 up to 2: then the transition
        ``I − β k kᵀ`` has negative eigenvalues (https://arxiv.org/abs/2411.12537).
    use_qk_l2norm_in_kernel: whether queries and keys are made of length 1 first. Without it keys should be: where β |k|² is
        above 2 the state grows without bound.

q and k may have fewer heads than v, a divisor of its number; g and beta have as many as v.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.ops.inputs import CuSeqlens, check_axes
from lasp.ops.pending import start
from lasp.parallel import SequenceParallel


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: CuSeqlens = None,
    sp: SequenceParallel | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """DeltaNet's recurrence, without a decay: https://arxiv.org/abs/2406.06484, eq. 2.

    Arguments and results: see the module.
    """
    return _corrected(
        "delta_rule", q, k, v, None, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel,
        cu_seqlens, sp, causal,
    )  # fmt: skip


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    cu_seqlens: CuSeqlens = None,
    sp: SequenceParallel | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Gated DeltaNet's recurrence, with a decay a head: https://arxiv.org/abs/2412.06464, eq. 10.

    Args:
        q: see the module.
        k: see the module.
        v: see the module.
        g: the log-decay, at most 0, ``[B, T, H]``; with `use_gate_in_kernel` what `decay_of` makes it of.
        beta: see the module.
        scale: see the module.
        initial_state: see the module.
        output_final_state: see the module.
        use_qk_l2norm_in_kernel: see the module.
        use_gate_in_kernel: whether g is the logits of the decay, which is then ``−exp(A_log) · softplus(g + dt_bias)``.
        A_log: ``[H]``.
        dt_bias: ``[H]``, 0 when None.
        cu_seqlens: see the module.
        sp: see the module.
        causal: see the module.
    """
    g = _log_decay("gated_delta_rule", g, 3, use_gate_in_kernel, A_log, dt_bias)
    return _corrected(
        "gated_delta_rule", q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel,
        cu_seqlens, sp, causal,
    )  # fmt: skip


def kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    cu_seqlens: CuSeqlens = None,
    sp: SequenceParallel | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Kimi Delta Attention's recurrence, with a decay a key dimension: https://arxiv.org/abs/2510.26692, eq. 1.

    As `gated_delta_rule` with g ``[B, T, H, K]``, A_log ``[H]`` and dt_bias ``[H, K]`` or ``[H · K]``.
    """
    g = _log_decay("kda", g, 4, use_gate_in_kernel, A_log, dt_bias)
    return _corrected(
        "kda",
        q,
        k,
        v,
        g,
        beta,
        scale,
        initial_state,
        output_final_state,
        use_qk_l2norm_in_kernel,
        cu_seqlens,
        sp,
        causal,
    )


def decay_of(logits: Tensor, A_log: Tensor, dt_bias: Tensor | None = None) -> Tensor:
    """``−exp(A_log) · softplus(logits + dt_bias)``, in float32 at least: Mamba's decay, https://arxiv.org/abs/2405.21060.

    Args:
        logits: ``[B, T, H]`` or ``[B, T, H, K]``.
        A_log: ``[H]``.
        dt_bias: ``[H]``, or ``[H, K]`` or ``[H · K]`` for one a key dimension; 0 when None.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    by_head = logits.shape[2:]
    if dt_bias is not None:
        logits = logits + dt_bias.to(logits.dtype).reshape(by_head)
    rate = A_log.to(logits.dtype).exp()
    return -(rate if logits.dim() == 3 else rate.unsqueeze(-1)) * F.softplus(logits)


def _log_decay(op: str, g: Tensor, axes: int, in_kernel: bool, A_log: Tensor | None, dt_bias: Tensor | None) -> Tensor:
    if g.dim() != axes:
        raise ValueError(f"{op}: g must be [{'B, T, H' if axes == 3 else 'B, T, H, K'}], given {list(g.shape)}")
    if not in_kernel:
        if A_log is not None or dt_bias is not None:
            raise ValueError(
                f"{op}: A_log and dt_bias make the decay of logits: pass use_gate_in_kernel=True with them"
            )
        return g
    if A_log is None:
        raise ValueError(f"{op}: use_gate_in_kernel=True needs A_log, the logarithms of the decays' rates, [H]")
    check_axes(op, A_log, "A_log", "H", H=g.shape[2])
    if dt_bias is not None and dt_bias.numel() != g.shape[2:].numel():
        raise ValueError(
            f"{op}: dt_bias must have the sizes of g but for B and T, {list(g.shape[2:])}, given {list(dt_bias.shape)}"
        )
    return decay_of(g, A_log, dt_bias)


def _corrected(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    use_qk_l2norm_in_kernel: bool,
    cu_seqlens: CuSeqlens,
    sp: SequenceParallel | None,
    causal: bool,
) -> tuple[Tensor, Tensor | None]:
    pending = start(
        k, v, g, beta, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, initial_state=initial_state,
        cu_seqlens=cu_seqlens, sp=sp, causal=causal, op=op,
    )  # fmt: skip
    return pending.finish(q, scale, output_final_state)
