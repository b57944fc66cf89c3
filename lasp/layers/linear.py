"""The linear mixers that add to their state. Each says only what it does differently from `LinearMixer`; `MIXERS` names all."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.layers.delta import DeltaNet, GatedDeltaNet, KimiDeltaAttention
from lasp.layers.mamba import Mamba2
from lasp.layers.mixer import LinearMixer, constant
from lasp.layers.passage import Passage
from lasp.ops.linear import lightning_log_decay, retention_log_decay
from lasp.ops.norm import at_least_float32

#: GLA's temperature of the gates: decays start near 1.
GATE_TEMPERATURE = 16
#: GLA's rank of the gate's projection.
GATE_RANK = 16


class BasicLinearAttention(LinearMixer):
    """No decay, features ``elu + 1``: Katharopoulos et al., https://arxiv.org/abs/2006.16236; a norm for its normaliser."""

    default_feature_map = "elu"
    gated = False


class LightningAttention(LinearMixer):
    """A constant decay a head, weaker in higher layers: Lightning Attention-2, https://arxiv.org/abs/2401.04658.

    In the block of TransNormerLLM, https://arxiv.org/abs/2307.14995: the norm is over all heads.
    """

    op = "lightning_attn"
    default_feature_map = "silu"
    normed_by_head = False
    decay: Tensor

    def build_decay(self, hidden: int) -> None:
        constant(self, lightning_log_decay, self.layer_idx, self.num_layers)

    def log_decay(self, x: Tensor, passage: Passage) -> Tensor:
        return self.decay


class Retention(LinearMixer):
    """A constant decay a head and rotated queries and keys: RetNet, https://arxiv.org/abs/2307.08621, eq. 5 and 8."""

    op = "retention"
    rotated = True
    decay: Tensor

    def build_decay(self, hidden: int) -> None:
        constant(self, retention_log_decay)

    def log_decay(self, x: Tensor, passage: Passage) -> Tensor:
        return self.decay


class SimpleGLA(LinearMixer):
    """A decay a head, by data: ``g = log σ(W x) / 16``. Mamba-2's scalar decay, https://arxiv.org/abs/2405.21060."""

    op = "simple_gla"
    writers = (*LinearMixer.writers, "decay_proj")

    def build_decay(self, hidden: int) -> None:
        self.decay_proj = nn.Linear(hidden, self.heads)

    def log_decay(self, x: Tensor, passage: Passage) -> Tensor:
        return F.logsigmoid(at_least_float32(passage.projected(x, self.decay_proj))) / GATE_TEMPERATURE


class GatedLinearAttention(LinearMixer):
    """A decay a key dimension, by data: ``g = log σ(W₂ W₁ x) / 16``: GLA, https://arxiv.org/abs/2312.06635, section 4.4."""

    op = "gla"
    writers = (*LinearMixer.writers, "decay_proj")

    def build_decay(self, hidden: int) -> None:
        self.decay_proj = nn.Sequential(
            nn.Linear(hidden, GATE_RANK, bias=False), nn.Linear(GATE_RANK, self.heads * self.features_width)
        )

    def log_decay(self, x: Tensor, passage: Passage) -> Tensor:
        g = F.logsigmoid(at_least_float32(passage.projected(x, self.decay_proj))) / GATE_TEMPERATURE
        return g.unflatten(-1, (self.heads, -1))


class HGRN2(LinearMixer):
    """Forget gates that are also the keys: ``f = γ + (1 − γ) σ(W x)``, ``g = log f``, ``k = 1 − f``.

    HGRN2, https://arxiv.org/abs/2404.07904, eq. 8. The lower bound γ of layer l of L is ``l / L``, where HGRN's learnt one
    (https://arxiv.org/abs/2311.04823, section 3.2) starts: lower layers forget, higher ones remember. The feature map is
    the queries' alone. The norm is over all heads: a layer that forgets fast has nearly the same key in every dimension, a
    head's output is then its value times the sum of its query, and a norm by head would jump where that sum is 0.
    """

    op = "gla"
    default_feature_map = "silu"
    gated = False
    conv_activation = None
    normed_by_head = False
    #: Its k_proj makes the forget gates.
    inheritable = ("q_proj", "v_proj", "o_proj")

    def build_decay(self, hidden: int) -> None:
        if self.key_heads != self.heads:
            raise ValueError("mixer hgrn2: its keys follow from the decay, of which there is one a head of the values")
        if self.feature_map.width is not None:
            raise ValueError("mixer hgrn2: its keys follow from the decay, use a feature_map that keeps the width")

    def keys_and_decay(self, x: Tensor, passage: Passage) -> tuple[Tensor, Tensor]:
        projected = passage.convolved(passage.projected(x, self.k_proj), self.k_conv).unflatten(-1, (self.heads, -1))
        logits = at_least_float32(projected)
        bound = self.layer_idx / self.num_layers
        # Not from f: near f = 1 there would be no digits left of 1 − f and log f, near f = 0 no log f.
        k = (1 - bound) * torch.sigmoid(-logits)
        g = F.logsigmoid(logits) if bound == 0 else torch.log1p(-k)
        return k.to(projected.dtype), g


#: The linear mixers by name, as ``--mixer`` takes them.
MIXERS: dict[str, type[LinearMixer]] = {
    "basic": BasicLinearAttention,
    "lightning": LightningAttention,
    "retention": Retention,
    "simple_gla": SimpleGLA,
    "gla": GatedLinearAttention,
    "hgrn2": HGRN2,
    "delta_net": DeltaNet,
    "gated_delta_net": GatedDeltaNet,
    "kda": KimiDeltaAttention,
    "mamba2": Mamba2,
}


def mixer_type(name: str) -> type[LinearMixer]:
    """The mixer of that name.

    Raises:
        ValueError: where there is none.
    """
    if name not in MIXERS:
        raise ValueError(f"unknown mixer={name!r}: expected one of {', '.join(MIXERS)}")
    return MIXERS[name]
