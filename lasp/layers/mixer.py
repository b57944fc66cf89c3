"""What all linear mixers share: projections, the short convolution, the feature map, the state's exchange, norm and gate."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lasp.layers.convolution import ShortConvolution
from lasp.layers.features import feature_map as find_feature_map
from lasp.layers.norm import GatedRMSNorm
from lasp.layers.rotary import rotate
from lasp.ops.inputs import CuSeqlens, sequence_of
from lasp.ops.linear import start
from lasp.parallel import SequenceParallel


def head_width(hidden: int, heads: int) -> int:
    """Width of one head.

    Raises:
        ValueError: where the heads do not divide the hidden width.
    """
    if heads < 1 or hidden % heads:
        raise ValueError(f"heads={heads} does not divide hidden={hidden}")
    return hidden // heads


class LinearMixer(nn.Module):
    """A layer of linear attention, ``[B, T, hidden] → [B, T, hidden]``. Subclasses say what differs: decay, defaults.

    Keys, values and decays come first and the exchange of the states starts; queries and the output gate are projected
    while the states travel (LASP-2, https://arxiv.org/abs/2502.07563, section 3.2).

    Args:
        hidden: width of the model.
        heads: H; each has ``hidden / heads`` values.
        layer_idx: which of the model's layers this is, for decays that depend on it.
        num_layers: how many layers the model has.
        feature_map: of queries and keys, a name in `FEATURE_MAPS`; the mixer's own when None.
        conv_size: width of the short convolution on queries, keys and values; 0 for none.
        rope_theta: base of the rotation, for mixers that rotate.
        norm_eps: of the output's norm.
    """

    #: The name that errors of the op begin with.
    op = "linear_attn"
    #: The feature map when none is asked for.
    default_feature_map = "identity"
    #: Whether the output is gated by ``silu(W x)``.
    gated = True
    #: What follows the short convolution.
    conv_activation: str | None = "silu"
    #: Whether the norm of the output is taken over each head by itself, or over all heads at once.
    normed_by_head = True
    #: Whether queries and keys are rotated by their position.
    rotated = False

    def __init__(
        self,
        hidden: int,
        heads: int,
        *,
        layer_idx: int = 0,
        num_layers: int = 1,
        feature_map: str | None = None,
        conv_size: int = 0,
        rope_theta: float = 10000.0,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        width = head_width(hidden, heads)
        self.heads, self.layer_idx, self.num_layers, self.rope_theta = heads, layer_idx, num_layers, rope_theta
        self.feature_map = find_feature_map(self.default_feature_map if feature_map is None else feature_map)
        self.key_width = self.feature_map.width or width
        keys = heads * self.key_width
        self.q_proj = nn.Linear(hidden, keys, bias=False)
        self.k_proj = nn.Linear(hidden, keys, bias=False)
        self.v_proj = nn.Linear(hidden, hidden, bias=False)
        self.gate_proj = nn.Linear(hidden, hidden, bias=False) if self.gated else None
        self.o_proj = nn.Linear(hidden, hidden, bias=False)
        self.q_conv, self.k_conv, self.v_conv = (
            ShortConvolution(channels, conv_size, self.conv_activation) if conv_size else None
            for channels in (keys, keys, hidden)
        )
        self.norm = GatedRMSNorm(hidden, heads if self.normed_by_head else 1, norm_eps)
        self.build_decay(hidden)

    def build_decay(self, hidden: int) -> None:
        """Make the parameters of `log_decay`."""

    def log_decay(self, x: Tensor) -> Tensor | None:
        """The log-decay of x's tokens: None, ``[H]``, ``[B, T, H]`` or ``[B, T, H, K]``, in float32 at least."""
        return None

    def queries(self, x: Tensor, sp: SequenceParallel) -> Tensor:
        """``[B, T, H, K]``."""
        return self.features(self.heads_of(self.q_proj(x), self.q_conv, sp), sp)

    def keys_and_decay(self, x: Tensor, sp: SequenceParallel) -> tuple[Tensor, Tensor | None]:
        """The keys ``[B, T, H, K]`` and the log-decay; together, for mixers whose keys follow from their decay."""
        return self.features(self.heads_of(self.k_proj(x), self.k_conv, sp), sp), self.log_decay(x)

    def features(self, x: Tensor, sp: SequenceParallel) -> Tensor:
        """The features of queries or keys ``[B, T, H, D]``."""
        return self.feature_map(rotate(x, sp, self.rope_theta) if self.rotated else x)

    def heads_of(self, x: Tensor, conv: ShortConvolution | None, sp: SequenceParallel) -> Tensor:
        """``[B, T, H · D]`` to ``[B, T, H, D]``, through the short convolution where there is one."""
        x = x if conv is None else conv(x, sp=sp)
        return x.unflatten(-1, (self.heads, -1))

    def forward(self, x: Tensor, sp: SequenceParallel | None = None, cu_seqlens: CuSeqlens = None) -> Tensor:
        """Mix the tokens.

        Args:
            x: ``[B, T, hidden]``, this rank's tokens.
            sp: the ranks that share the sequence, and its documents.
            cu_seqlens: the boundaries of packed documents, where there is no `sp`.
        """
        seq = sequence_of(x, cu_seqlens, sp)
        k, g = self.keys_and_decay(x, seq)
        v = self.heads_of(self.v_proj(x), self.v_conv, seq)
        pending = start(k, v, g, sp=seq, op=self.op)
        q = self.queries(x, seq)
        gate = None if self.gate_proj is None else self.gate_proj(x)
        o, _ = pending.finish(q)
        return self.o_proj(self.norm(o.flatten(-2), gate))


def constant(mixer: nn.Module, log_decay: Tensor) -> None:
    """Give the mixer a log-decay ``[H]`` that is not learnt and not saved."""
    mixer.register_buffer("decay", log_decay.to(torch.float32), persistent=False)
