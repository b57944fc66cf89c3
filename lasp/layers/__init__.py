"""Token mixers, each an `nn.Module` from ``[B, T, hidden]`` to ``[B, T, hidden]``, and their parts."""

from lasp.layers.cache import AttentionState
from lasp.layers.convolution import ShortConvolution
from lasp.layers.delta import DeltaNet, GatedDeltaNet, KimiDeltaAttention
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
from lasp.layers.mamba import Mamba2
from lasp.layers.mixer import LinearMixer
from lasp.layers.mom import MixtureOfMemories
from lasp.layers.norm import GatedRMSNorm, GateFirstRMSNorm, RMSNorm
from lasp.layers.passage import MixerState
from lasp.layers.rotary import RopeScaling, rotate
from lasp.layers.router import Balance, Router, Routing, balance
from lasp.layers.softmax import SoftmaxAttention

__all__ = [
    "FEATURE_MAPS",
    "HGRN2",
    "MIXERS",
    "AttentionState",
    "Balance",
    "BasicLinearAttention",
    "DeltaNet",
    "GateFirstRMSNorm",
    "GatedDeltaNet",
    "GatedLinearAttention",
    "GatedRMSNorm",
    "KimiDeltaAttention",
    "LightningAttention",
    "LinearMixer",
    "Mamba2",
    "MixerState",
    "MixtureOfMemories",
    "RMSNorm",
    "Retention",
    "RopeScaling",
    "Router",
    "Routing",
    "ShortConvolution",
    "SimpleGLA",
    "SoftmaxAttention",
    "balance",
    "feature_map",
    "mixer_type",
    "rotate",
]
