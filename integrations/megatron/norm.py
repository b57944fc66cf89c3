"""The norm of Megatron's layers where neither Apex nor Transformer Engine brings one."""

from __future__ import annotations

from megatron.core.transformer import TransformerConfig

from lasp.layers import RMSNorm


class Norm(RMSNorm):
    """`lasp.layers.RMSNorm`, whose weight's gradient Megatron sums under its sequence parallelism.

    Args:
        config: Megatron's.
        hidden_size: size of the last axis.
        eps: added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__(hidden_size, eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
