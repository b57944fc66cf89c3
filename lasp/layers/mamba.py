"""Mamba-2's mixer, and its decay, which later mixers took over."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.layers.mixer import LinearMixer, Writes
from lasp.layers.norm import GateFirstRMSNorm
from lasp.layers.passage import Passage
from lasp.ops.norm import at_least_float32

#: The rates of the decay and the time steps that a layer starts with: uniform, and uniform in the logarithm.
RATES, TIME_STEPS = (1.0, 16.0), (1e-3, 1e-1)


def decay_parameters(heads: int, biases: int) -> tuple[nn.Parameter, nn.Parameter]:
    """``A_log: [heads]`` and ``dt_bias: [biases]`` of a decay ``−exp(A_log) · softplus(W x + dt_bias)``, float32.

    Rates are uniform in 1..16; where W x is 0, time steps are log-uniform in 0.001..0.1: Mamba-2's initial values,
    https://arxiv.org/abs/2405.21060, as its authors publish it. They are parameters of the mixer itself, so that what
    initialises projections leaves them alone, and have one axis, so that weights' decay does.
    """
    a_log = torch.empty(heads).uniform_(*RATES).log()
    step = torch.empty(biases).uniform_(*(math.log(limit) for limit in TIME_STEPS)).exp()
    # The inverse of softplus.
    return nn.Parameter(a_log), nn.Parameter(step + torch.log(-torch.expm1(-step)))


class Mamba2(LinearMixer):
    """A scalar decay and a time step a head: ``S_t = exp(−a Δ_t) S_{t-1} + B_t (Δ_t x_t)ᵀ``, ``y_t = S_tᵀ C_t + D x_t``.

    Mamba-2, https://arxiv.org/abs/2405.21060, section 7: ``Δ = softplus(W x + dt_bias)``, ``a = exp(A_log)``. The keys B and
    the queries C are shared by the heads of a group, of which there are `key_heads`, 1 if not given; `key_width` is the size
    of the state, N. The one convolution of the paper, of every channel by itself, stands as one each on x, B and C. The norm
    is of the gated output, over each group by itself. Values are twice as wide as the model.
    """

    op = "simple_gla"
    writers = (*LinearMixer.writers, "dt_proj")
    default_conv_size = 4
    default_key_heads = 1
    expansion = 2
    conv_bias = True
    scale = 1.0

    def build_norm(self, values: int, eps: float) -> nn.Module:
        return GateFirstRMSNorm(values, self.key_heads, eps)

    def build_decay(self, hidden: int) -> None:
        self.dt_proj = nn.Linear(hidden, self.heads, bias=False)
        self.A_log, self.dt_bias = decay_parameters(self.heads, self.heads)
        self.D = nn.Parameter(torch.ones(self.heads))

    def writes(self, x: Tensor, passage: Passage) -> Writes:
        k, v, *_ = super().writes(x, passage)
        wide = at_least_float32(v)
        dt = F.softplus(at_least_float32(passage.projected(x, self.dt_proj)) + self.dt_bias)
        values, skip = (wide * factor.unsqueeze(-1) for factor in (dt, self.D))
        return Writes(k, values.to(v.dtype), -self.A_log.to(dt.dtype).exp() * dt, skip=skip.to(v.dtype))
