"""Token mixers, each an `nn.Module` from ``[B, T, hidden]`` to ``[B, T, hidden]``, and their parts."""

from lasp.layers.convolution import ShortConvolution
from lasp.layers.features import FEATURE_MAPS, feature_map
from lasp.layers.linear import (
    HGRN2,
    MIXERS,
    BasicLinearAttention,
    GatedLinearAttention,
    LightningAttention,
    Retention,
    SimpleGLA,
    mixer_type,
)
from lasp.layers.mixer import LinearMixer
from lasp.layers.norm import GatedRMSNorm, RMSNorm
from lasp.layers.rotary import rotate
from lasp.layers.softmax import SoftmaxAttention

__all__ = [
    "FEATURE_MAPS",
    "HGRN2",
    "MIXERS",
    "BasicLinearAttention",
    "GatedLinearAttention",
    "GatedRMSNorm",
    "LightningAttention",
    "LinearMixer",
    "RMSNorm",
    "Retention",
    "ShortConvolution",
    "SimpleGLA",
    "SoftmaxAttention",
    "feature_map",
    "mixer_type",
    "rotate",
]
