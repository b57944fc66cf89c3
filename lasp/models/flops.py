"""What a model computes for its tokens, and what a device could: model FLOPs utilisation (PaLM, https://arxiv.org/abs/2204.02311,
appendix B) is their ratio."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from lasp.layers.delta import DeltaNet
from lasp.layers.mixer import LinearMixer
from lasp.layers.mom import MixtureOfMemories, PerMemory
from lasp.layers.softmax import SoftmaxAttention
from lasp.models.config import LinearLlama3Config
from lasp.models.linear_llama3 import LinearLlama3

#: Dense peaks in TFLOP/s by what the products are computed in (float32 without TF32), and the names of the devices, as their
#: vendor's data sheets have them; of several the first that fits. A part of a device (MIG) has a part of its peak: not these.
PEAKS: dict[str, dict[str, float]] = {
    "bfloat16": {
        r"H100 PCIe": 756,
        r"H[12]00 NVL": 835,
        r"H100|H200|H800|GH200": 989,
        r"H20\b": 148,
        r"A100|A800": 312,
        r"L40S": 362,
    },
    "float32": {r"H100 PCIe": 51, r"H[12]00 NVL": 60, r"H100|H200|H800|GH200": 67, r"H20\b": 44, r"A100|A800": 19.5},
}


def peak_flops(device: str, dtype: str) -> float | None:
    """What a device of that name computes in a second at most, in products of that dtype; None where that is not known."""
    known = {} if "MIG" in device else PEAKS[dtype]
    return next((1e12 * peak for name, peak in known.items() if re.search(name, device)), None)


def outline(config: LinearLlama3Config) -> LinearLlama3:
    """The model without its numbers: modules and shapes alone."""
    with torch.device("meta"):
        return LinearLlama3(config)


def training_flops(model: LinearLlama3, documents: Sequence[int]) -> float:
    """What forward and backward of documents take: three times the forward.

    Products alone, as in the paper: no norms, decays, short convolutions or rotations, nothing that is computed again to save
    memory, and of softmax attention what the mask leaves.

    Args:
        model: its shapes are enough, see `outline`.
        documents: how many tokens each has that sees no other; of sequences that are one document each, their lengths.
    """
    return 3 * forward_flops(model, documents)


def forward_flops(model: LinearLlama3, documents: Sequence[int]) -> float:
    """What the forward of documents takes, the head included. The embedding is a look-up: nothing."""
    choices = model.config.top_k + model.config.shared_memory
    lengths = np.asarray(documents, dtype=np.float64)
    total = attended = 0.0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            total += 2 * module.weight.numel()
        elif isinstance(module, PerMemory):
            # Each of the memories that a token chose multiplies it once, the others not at all.
            total += 2 * module.weight[0].numel() * choices
        elif isinstance(module, SoftmaxAttention):
            attended += _attention(module, lengths)
        elif isinstance(module, MixtureOfMemories):
            total += (choices - 1) * _state(module.mixer)  # the mixer's own is the first
        elif isinstance(module, LinearMixer):
            total += _state(module)
    return total * float(lengths.sum()) + attended


def _state(mixer: LinearMixer) -> int:
    """A token writes ``k vᵀ`` to a state ``K × V`` and reads ``Sᵀ q``; the delta rule reads ``Sᵀ k`` too, to correct it."""
    products = 3 if isinstance(mixer, DeltaNet) else 2
    return 2 * products * mixer.heads * mixer.features_width * mixer.value_width


def _attention(layer: SoftmaxAttention, lengths: np.ndarray) -> float:
    """Scores and weighted values over what each token of a document sees: t tokens of the t-th, or the window."""
    window = lengths if layer.window is None else np.minimum(lengths, layer.window)
    seen = window * lengths - window * (window - 1) / 2
    return 2 * 2 * float(seen.sum()) * layer.o_proj.in_features
