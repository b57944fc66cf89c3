"""The mixers of the delta rule, which corrects the state towards giving a token's value for its key."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lasp.layers.mamba import decay_parameters
from lasp.layers.mixer import LinearMixer, Writes
from lasp.layers.passage import Passage
from lasp.ops.delta import decay_of
from lasp.ops.norm import at_least_float32


class DeltaNet(LinearMixer):
    """The delta rule without a decay: ``S_t = (I − β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ``, ``β = σ(W x)``.

    DeltaNet, https://arxiv.org/abs/2406.06484, section 3.3: queries, keys and values through a short convolution and silu,
    queries and keys then of length 1.

    Args:
        hidden: see `LinearMixer`.
        heads: see `LinearMixer`.
        allow_neg_eigval: whether β is twice as large, so that the state's transition may have negative eigenvalues
            (https://arxiv.org/abs/2411.12537).
        options: see `LinearMixer`.
    """

    op = "delta_rule"
    writers = (*LinearMixer.writers, "beta_proj")
    default_conv_size = 4
    gated = False
    of_length_one = True

    def __init__(self, hidden: int, heads: int, *, allow_neg_eigval: bool = False, **options: Any):
        super().__init__(hidden, heads, **options)
        self.largest_beta = 2 if allow_neg_eigval else 1
        self.beta_proj = nn.Linear(hidden, heads, bias=False)

    def writes(self, x: Tensor, passage: Passage) -> Writes:
        k, v, g, *_ = super().writes(x, passage)
        return Writes(k, v, g, self.largest_beta * at_least_float32(passage.projected(x, self.beta_proj)).sigmoid())


class GatedDeltaNet(DeltaNet):
    """The delta rule with a decay a head: ``g = −exp(A_log) · softplus(W x + dt_bias)``, and an output gate.

    Gated DeltaNet, https://arxiv.org/abs/2412.06464, section 3.4; with fewer heads of queries and keys than of values it is
    the linear layer of Qwen3-Next. Arguments: see `DeltaNet`.
    """

    op = "gated_delta_rule"
    writers = (*DeltaNet.writers, "decay_proj")
    gated = True

    def build_decay(self, hidden: int) -> None:
        self.decay_proj = nn.Linear(hidden, self.heads, bias=False)
        self.A_log, self.dt_bias = decay_parameters(self.heads, self.heads)

    def log_decay(self, x: Tensor, passage: Passage) -> Tensor:
        return decay_of(passage.projected(x, self.decay_proj), self.A_log, self.dt_bias)


class KimiDeltaAttention(DeltaNet):
    """The delta rule with a decay a key dimension: ``g = −exp(A_log) · softplus(W₂ W₁ x + dt_bias)``, A_log a head.

    Kimi Delta Attention, https://arxiv.org/abs/2510.26692, section 4: the output gate is ``σ(W₂ W₁ x)``, and both low ranks
    are the width of a head's values. Arguments: see `DeltaNet`.
    """

    op = "kda"
    writers = (*DeltaNet.writers, "decay_proj")
    gated = True
    gate_activation = "sigmoid"

    def build_gate(self, hidden: int, values: int) -> nn.Module:
        return self._low_rank(hidden, values)

    def build_decay(self, hidden: int) -> None:
        width = self.heads * self.features_width
        self.decay_proj = self._low_rank(hidden, width)
        self.A_log, self.dt_bias = decay_parameters(self.heads, width)

    def log_decay(self, x: Tensor, passage: Passage) -> Tensor:
        return decay_of(passage.projected(x, self.decay_proj).unflatten(-1, (self.heads, -1)), self.A_log, self.dt_bias)

    def _low_rank(self, hidden: int, width: int) -> nn.Module:
        rank = self.value_width
        return nn.Sequential(nn.Linear(hidden, rank, bias=False), nn.Linear(rank, width, bias=False))
