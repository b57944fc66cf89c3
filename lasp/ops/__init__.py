"""The operations: what a model calls on the tokens of one rank, or of a whole sequence."""

from lasp.ops.conv import causal_conv1d
from lasp.ops.delta import delta_rule, gated_delta_rule, kda
from lasp.ops.linear import gla, lightning_attn, linear_attn, retention, simple_gla
from lasp.ops.softmax import softmax_attn

__all__ = [
    "causal_conv1d",
    "delta_rule",
    "gated_delta_rule",
    "gla",
    "kda",
    "lightning_attn",
    "linear_attn",
    "retention",
    "simple_gla",
    "softmax_attn",
]
