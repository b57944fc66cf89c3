"""Softmax attention, across ranks and within documents."""

from __future__ import annotations

from torch import Tensor

from lasp.ops.inputs import CuSeqlens, agree, check_axes, check_tokens, describe, needs_gradient, sequence_of
from lasp.parallel import SequenceParallel
from lasp.parallel.attention import Reach, attention, check_attention


def softmax_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    cu_seqlens: CuSeqlens = None,
    sp: SequenceParallel | None = None,
) -> Tensor:
    """Softmax attention within documents: ``o_i = Σ_j softmax_j(scale · q_i · k_j) v_j``.

    Under `sp` the keys and values travel as `SequenceParallel`'s `softmax` says: gathered (LASP-2H,
    https://arxiv.org/abs/2502.07563, section 3.4), round a ring (Ring Attention, https://arxiv.org/abs/2310.01889), or by heads
    (Ulysses, https://arxiv.org/abs/2309.14509).

    Args:
        q: ``[B, T, H, D]``; under `sp` this rank's tokens.
        k: ``[B, T, Hk, D]``, Hk a divisor of H: each head of keys serves H / Hk consecutive heads of queries.
        v: ``[B, T, Hk, D]``.
        causal: whether a token sees only itself and those before it.
        window: a token sees those less than `window` tokens away: itself and the window − 1 before it, and as many after it
            unless causal. All when None.
        scale: the factor of the scores, ``D ** -0.5`` when None.
        cu_seqlens: boundaries of documents packed into one row. Under `sp` the layout has them.
        sp: the ranks that share the sequence.

    Returns:
        ``[B, T, H, D]`` in q's dtype.

    Raises:
        ValueError: on every rank of `sp`, where a shape, a dtype, the window or `cu_seqlens` is wrong, or ranks disagree.
    """
    seq = sequence_of(q, cu_seqlens, sp)

    def check() -> None:
        check_axes("softmax_attn", q, "q", "B T H D")
        batch, tokens, heads, width = q.shape
        check_axes("softmax_attn", k, "k", "B T Hk D", B=batch, T=tokens, D=width)
        kv_heads = k.shape[2]
        check_axes("softmax_attn", v, "v", "B T Hk D", B=batch, T=tokens, Hk=kv_heads, D=width)
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(
                f"softmax_attn: the {kv_heads} heads of k and v must divide the {heads} heads of q "
                f"(q {list(q.shape)}, k {list(k.shape)})"
            )
        if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
            raise ValueError(
                f"softmax_attn: q, k and v must have one floating-point dtype, given {q.dtype}, {k.dtype}, {v.dtype}"
            )
        if window is not None and window < 1:
            raise ValueError(f"softmax_attn: window must be at least 1, a token sees itself; given {window}")
        if batch != 1 and seq.num_documents > 1:
            raise ValueError(f"softmax_attn: packed documents come in one row: expected batch size 1, given {batch}")
        check_tokens("softmax_attn", tokens, seq)
        check_attention("softmax_attn", seq, heads, kv_heads)

    agree(
        seq,
        f"softmax_attn({describe(q=q, k=k, v=v)}, causal={causal}, window={window}, scale={scale}, "
        f"gradient={needs_gradient(q, k, v)})",
        check,
    )
    return attention(q, k, v, seq, Reach.of(causal, window), q.shape[-1] ** -0.5 if scale is None else scale)
