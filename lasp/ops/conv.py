"""The short causal convolution of linear mixers, depthwise, across ranks and within documents."""

from __future__ import annotations

from torch import Tensor

from lasp.ops.inputs import CuSeqlens, agree, check_axes, check_tokens, describe, needs_gradient, sequence_of
from lasp.parallel import SequenceParallel
from lasp.parallel.convolution import convolution

#: The activations by name; both names of the one are the field's.
ACTIVATIONS = (None, "silu", "swish")


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cu_seqlens: CuSeqlens = None,
    sp: SequenceParallel | None = None,
) -> Tensor:
    """Causal depthwise convolution: ``y_t = activation(bias + Σ_j weight[:, W−1−j] x_{t−j})``, j from 0 to W−1.

    Tokens before a document's first count as zero. H3, https://arxiv.org/abs/2212.14052, section 3.1 (its shift, with learnt
    weights), as in Mamba, https://arxiv.org/abs/2312.00752, section 3.4. The sum is in float32 at least.

    Args:
        x: ``[B, T, D]``; under `sp` this rank's tokens.
        weight: ``[D, W]``, the last tap for the token itself.
        bias: ``[D]``, or None.
        activation: None, ``"silu"`` or ``"swish"`` (its other name).
        cu_seqlens: boundaries of documents packed into one row. Under `sp` the layout has them.
        sp: the ranks that share the sequence. The few tokens before each run come from as many ranks back as it takes.

    Returns:
        ``[B, T, D]`` in x's dtype.

    Raises:
        ValueError: on every rank of `sp`, where a shape, a dtype, the activation or `cu_seqlens` is wrong, or ranks disagree.
    """
    seq = sequence_of(x, cu_seqlens, sp)

    def check() -> None:
        check_axes("causal_conv1d", x, "x", "B T D")
        check_axes("causal_conv1d", weight, "weight", "D W", D=x.shape[2])
        check_axes("causal_conv1d", bias, "bias", "D", D=x.shape[2])
        if weight.shape[1] < 1:
            raise ValueError(f"causal_conv1d: weight must have at least one tap, given {list(weight.shape)}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"causal_conv1d: unknown activation={activation!r}: expected None, silu or swish")
        if x.shape[0] != 1 and seq.layout.num_documents > 1:
            raise ValueError(
                f"causal_conv1d: packed documents come in one row: expected batch size 1, given {x.shape[0]}"
            )
        check_tokens("causal_conv1d", x.shape[1], seq)

    kinds = tuple(None if y is None else (y.shape, y.dtype) for y in (x, weight, bias))
    agree(
        seq,
        lambda: (
            f"causal_conv1d({describe(x=x)}, weight={list(weight.shape)}, activation={activation}, "
            f"gradient={needs_gradient(x)})"
        ),
        check,
        call=("causal_conv1d", kinds, activation, needs_gradient(x)),
    )
    return convolution(x, weight, bias, activation is not None, seq)
