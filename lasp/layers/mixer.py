"""What all linear mixers share: projections, the short convolution, the feature map, the state's exchange, norm and gate."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lasp.layers.convolution import ShortConvolution
from lasp.layers.features import feature_map as find_feature_map
from lasp.layers.norm import GatedRMSNorm
from lasp.layers.passage import MixerState, Passage
from lasp.layers.rotary import RopeScaling
from lasp.ops.inputs import CuSeqlens, sequence_of
from lasp.ops.pending import start
from lasp.parallel import SequenceParallel


def head_width(hidden: int, heads: int) -> int:
    """Width of one head.

    Raises:
        ValueError: where the heads do not divide the hidden width.
    """
    if heads < 1 or hidden % heads:
        raise ValueError(f"heads={heads} does not divide hidden={hidden}")
    return hidden // heads


class Writes(NamedTuple):
    """What tokens do to the state, and what of them goes past it.

    Attributes:
        k: keys ``[B, T, key_heads, K]``.
        v: values ``[B, T, H, V]``.
        g: the log-decay: None, ``[H]``, ``[B, T, H]`` or ``[B, T, H, K]``.
        beta: how far the delta rule corrects the state, ``[B, T, H]``; None where values are added.
        skip: what is added to the output, ``[B, T, H, V]``, or None.
    """

    k: Tensor
    v: Tensor
    g: Tensor | None = None
    beta: Tensor | None = None
    skip: Tensor | None = None


class LinearMixer(nn.Module):
    """A layer of linear attention, ``[B, T, hidden] → [B, T, hidden]``. Subclasses say what differs: decay, defaults.

    What tokens write comes first and the exchange of the states starts; queries and the output gate are projected while the
    states travel (LASP-2, https://arxiv.org/abs/2502.07563, section 3.2).

    Args:
        hidden: width of the model.
        heads: H, of the values.
        key_heads: of queries and keys, a divisor of H, each for as many heads of the values that follow one another; the
            mixer's own when None, for most H.
        key_width: of a head's queries and keys; what the feature map asks for, else ``hidden / heads``, when None.
        value_width: of a head's values; ``hidden / heads`` when None, or as many times as much as the mixer says.
        part: which part of the layer's heads this is, and of how many equal ones, where ranks share them: `heads` are the
            part's. For decays that depend on the head.
        layer_idx: which of the model's layers this is, for decays that depend on it.
        num_layers: how many layers the model has.
        feature_map: of queries and keys, a name in `FEATURE_MAPS`; the mixer's own when None.
        conv_size: width of the short convolution on queries, keys and values; 0 for none, the mixer's own when None.
        gated: whether the output is gated; as the mixer is when None.
        rope_theta: base of the rotation, for mixers that rotate.
        rope_scaling: of its frequencies; none when None.
        norm_eps: of the output's norm.

    Raises:
        ValueError: where the widths do not divide or the feature map is unknown.
    """

    #: The name that errors of the op begin with.
    op = "linear_attn"
    #: The feature map when none is asked for.
    default_feature_map = "identity"
    #: The width of the short convolution when none is asked for.
    default_conv_size = 0
    #: The heads of queries and keys when none are asked for; None for those of the values.
    default_key_heads: int | None = None
    #: How much wider values are than the model, when nothing is asked for.
    expansion = 1
    #: Whether the output is gated, when nothing is asked for, and what the gate's projection goes through.
    gated = True
    gate_activation = "silu"
    #: What follows the short convolution, and whether it has a bias.
    conv_activation: str | None = "silu"
    conv_bias = False
    #: Whether the norm of the output is taken over each head by itself, or over all heads at once.
    normed_by_head = True
    #: Whether queries and keys are rotated by their position.
    rotated = False
    #: Whether queries and keys are made of length 1.
    of_length_one = False
    #: The projections by which tokens write to the state.
    writers: tuple[str, ...] = ("k_proj", "v_proj")
    #: The projections that mean what those of the same name mean in softmax attention, and can begin as these.
    inheritable: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    #: The factor of the queries; None for ``K ** -0.5``.
    scale: float | None = None

    def __init__(
        self,
        hidden: int,
        heads: int,
        *,
        key_heads: int | None = None,
        key_width: int | None = None,
        value_width: int | None = None,
        part: tuple[int, int] = (0, 1),
        layer_idx: int = 0,
        num_layers: int = 1,
        feature_map: str | None = None,
        conv_size: int | None = None,
        gated: bool | None = None,
        rope_theta: float = 10000.0,
        rope_scaling: RopeScaling | None = None,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        self.heads, self.layer_idx, self.num_layers = heads, layer_idx, num_layers
        self.rope_theta, self.rope_scaling = rope_theta, rope_scaling
        self.part = part
        self.key_heads = (self.default_key_heads or heads) if key_heads is None else key_heads
        if self.key_heads < 1 or heads % self.key_heads:
            raise ValueError(f"key_heads={self.key_heads} does not divide heads={heads}")
        self.feature_map = find_feature_map(self.default_feature_map if feature_map is None else feature_map)
        self.key_width = key_width or self.feature_map.width or head_width(hidden, heads)
        self.value_width = value_width or self.expansion * head_width(hidden, heads)
        keys, values = self.key_heads * self.key_width, heads * self.value_width
        self.q_proj = nn.Linear(hidden, keys, bias=False)
        self.k_proj = nn.Linear(hidden, keys, bias=False)
        self.v_proj = nn.Linear(hidden, values, bias=False)
        self.gate_proj = self.build_gate(hidden, values) if (self.gated if gated is None else gated) else None
        self.o_proj = nn.Linear(values, hidden, bias=False)
        conv_size = self.default_conv_size if conv_size is None else conv_size
        self.q_conv, self.k_conv, self.v_conv = (
            ShortConvolution(channels, conv_size, self.conv_activation, self.conv_bias) if conv_size else None
            for channels in (keys, keys, values)
        )
        self.norm = self.build_norm(values, norm_eps)
        self.build_decay(hidden)

    @property
    def features_width(self) -> int:
        """K of the state: the width of a head's features, which Taylor's map makes more of than there are keys."""
        return self.feature_map(torch.zeros(self.key_width)).shape[-1]

    def build_gate(self, hidden: int, values: int) -> nn.Module:
        """The projection of the output gate."""
        return nn.Linear(hidden, values, bias=False)

    def build_norm(self, values: int, eps: float) -> nn.Module:
        """The norm of the output and its gate."""
        return GatedRMSNorm(values, self.heads if self.normed_by_head else 1, eps, self.gate_activation)

    def build_decay(self, hidden: int) -> None:
        """Make the parameters of `log_decay`."""

    def log_decay(self, x: Tensor, passage: Passage) -> Tensor | None:
        """The log-decay of x's tokens: None, ``[H]``, ``[B, T, H]`` or ``[B, T, H, K]``, in float32 at least."""
        return None

    def queries(self, x: Tensor, passage: Passage) -> Tensor:
        """``[B, T, key_heads, K]``."""
        return self.features(passage.convolved(passage.asked(x, self.q_proj), self.q_conv), passage)

    def keys_and_decay(self, x: Tensor, passage: Passage) -> tuple[Tensor, Tensor | None]:
        """The keys ``[B, T, key_heads, K]`` and the log-decay; together, for mixers whose keys follow from their decay."""
        return self.features(
            passage.convolved(passage.projected(x, self.k_proj), self.k_conv), passage
        ), self.log_decay(x, passage)

    def features(self, x: Tensor, passage: Passage) -> Tensor:
        """The features of queries or keys ``[B, T, key_heads · D]``, by head."""
        x = x.unflatten(-1, (self.key_heads, -1))
        return self.feature_map(passage.rotated(x, self.rope_theta, self.rope_scaling) if self.rotated else x)

    def writes(self, x: Tensor, passage: Passage) -> Writes:
        """All that needs no queries."""
        k, g = self.keys_and_decay(x, passage)
        v = passage.convolved(passage.projected(x, self.v_proj), self.v_conv)
        return Writes(k, v.unflatten(-1, (self.heads, -1)), g)

    def forward(self, x: Tensor, sp: SequenceParallel | None = None, cu_seqlens: CuSeqlens = None) -> Tensor:
        """Mix the tokens.

        Args:
            x: ``[B, T, hidden]``, this rank's tokens.
            sp: the ranks that share the sequence, and its documents.
            cu_seqlens: the boundaries of packed documents, where there is no `sp`.
        """
        return self.mix(x, Passage(sequence_of(x, cu_seqlens, sp)))[0]

    def initial_state(self, batch: int) -> MixerState:
        """The state before any token, for `step`.

        Args:
            batch: how many sequences are decoded at once.
        """
        like = self.o_proj.weight
        dtype = torch.promote_types(like.dtype, torch.float32)
        memory = like.new_zeros(batch, self.heads, self.features_width, self.value_width, dtype=dtype)
        convs = [conv for conv in (self.k_conv, self.v_conv, self.q_conv) if conv is not None]
        tails = tuple(like.new_zeros(batch, conv.weight.shape[1] - 1, conv.weight.shape[0]) for conv in convs)
        return MixerState(memory, tails, like.new_zeros(batch, dtype=torch.int64))

    def step(self, x: Tensor, state: MixerState) -> tuple[Tensor, MixerState]:
        """Mix the tokens that follow on those that made the state: for decoding, one or more at a time, on one device.

        Args:
            x: ``[B, T, hidden]``; T may differ from call to call.
            state: `initial_state`, or what the last call gave.

        Returns:
            The output, what `forward` gives for these tokens of the whole sequence, and the state after them.

        Raises:
            ValueError: where the state is of another batch size.
        """
        if state.memory.shape[0] != x.shape[0]:
            raise ValueError(f"step: x holds {x.shape[0]} sequences and the state {state.memory.shape[0]}")
        passage = Passage(sequence_of(x, None, None), state)
        y, memory = self.mix(x, passage)
        assert memory is not None
        return y, MixerState(memory, tuple(passage.tails), state.position + x.shape[1])

    def mix(self, x: Tensor, passage: Passage) -> tuple[Tensor, Tensor | None]:
        """The output, and the memory after the last token where the passage follows on one."""
        before, writes = passage.before, self.writes(passage.sent(x), passage)
        pending = start(
            writes.k, writes.v, writes.g, writes.beta, use_qk_l2norm_in_kernel=self.of_length_one,
            initial_state=None if before is None else before.memory, sp=passage.sp, routed=passage.routed, op=self.op,
        )  # fmt: skip
        q = self.queries(x, passage)
        gate = None if self.gate_proj is None else self.gate_proj(x)
        o, memory = pending.finish(q, self.scale, output_final_state=before is not None)
        o = passage.collected(o if writes.skip is None else o + writes.skip)
        return self.o_proj(self.norm(o.flatten(-2), gate)), memory


def constant(mixer: LinearMixer, log_decay: Callable[..., Tensor], *layer: int) -> None:
    """Give the mixer a log-decay ``[H]`` that is not learnt and not saved: of all the layer's heads, its part."""
    own, parts = mixer.part
    decay = log_decay(parts * mixer.heads, *layer).chunk(parts)[own]
    mixer.register_buffer("decay", decay.to(torch.float32, copy=True), persistent=False)
