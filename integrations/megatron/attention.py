"""What stands under Megatron's own self-attention, as its `core_attention`: softmax, and linear mixers without projections."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor, nn

from lasp.integrations.megatron.options import LaspOptions
from lasp.integrations.megatron.sharing import sequence_of
from lasp.integrations.megatron.tensor_parallel import HeadParallel
from lasp.layers import LinearMixer, mixer_type
from lasp.layers.passage import Passage
from lasp.ops.softmax import softmax_attn
from lasp.parallel import SequenceParallel


class Core(MegatronModule):
    """What both cores share: Megatron's axes, and the sequence.

    Args:
        config: Megatron's.
        layer_number: which layer of the model it is, from 1.
        attn_mask_type: causal.
        attention_type: "self".
        cp_comm_type: not used: what travels how is said by `options`.
        softmax_scale: the factor of softmax's scores; ``D ** -0.5`` when None.
        pg_collection: the groups; Megatron's global ones when None.
        options: the mixer, and how sequences are shared.

    Raises:
        ValueError: where the mask is another.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str = "self",
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        options: LaspOptions | None = None,
    ):
        super().__init__(config=config)
        if attn_mask_type not in (AttnMaskType.causal, AttnMaskType.padding_causal):
            raise ValueError(f"attn_mask_type={attn_mask_type}: expected causal")
        self.options, self.layer_number, self.scale = options or LaspOptions(), layer_number, softmax_scale
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.tp_group, self.cp_group = groups.tp, groups.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: ``[s, b, heads, D]``, or of packed documents ``[t, heads, D]``.
            key: likewise, of as many heads or a divisor.
            value: likewise.
            attention_mask: not used: all is causal.
            attn_mask_type: not used, likewise.
            attention_bias: None.
            packed_seq_params: the documents, where they are packed.

        Returns:
            ``[s, b, heads · D]``, or ``[t, heads · D]``.
        """
        if attention_bias is not None:
            raise ValueError("attention_bias: this attention has none")
        packed = query.dim() == 3
        q, k, v = (x.unsqueeze(0) if packed else x.transpose(0, 1) for x in (query, key, value))
        o = self.attend(q, k, v, sequence_of(self.cp_group, q.shape[1], packed_seq_params, self.options)).flatten(-2)
        return o.squeeze(0) if packed else o.transpose(0, 1).contiguous()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, sp: SequenceParallel) -> Tensor:
        """Of ``[B, T, heads, D]``, likewise."""
        raise NotImplementedError


class SoftmaxCore(Core):
    """Softmax attention whose keys and values travel among the context-parallel ranks (LASP-2H), on any device."""

    def __init__(self, config: TransformerConfig, layer_number: int, *args: Any, **options: Any):
        super().__init__(config, layer_number, *args, **options)
        self.window: int | None = None
        if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
            before = config.window_size[0]
            self.window = None if before < 0 else before + 1

    def attend(self, q: Tensor, k: Tensor, v: Tensor, sp: SequenceParallel) -> Tensor:
        return softmax_attn(q, k, v, window=self.window, scale=self.scale, sp=sp)


class _Given(nn.Identity):
    """In place of a projection whose output is there: `_Projected` knows it."""


@dataclass
class _Projected(Passage):
    """Tokens of which queries, keys and values are given."""

    given: dict[nn.Module, Tensor] = field(default_factory=dict)

    def projected(self, x: Tensor, projection: nn.Module) -> Tensor:
        return self.given[projection] if projection in self.given else super().projected(x, projection)

    asked = projected


class LinearCore(Core, HeadParallel):
    """A linear mixer whose queries, keys, values and output Megatron's self-attention projects."""

    def __init__(self, config: TransformerConfig, layer_number: int, *args: Any, **options: Any):
        super().__init__(config, layer_number, *args, **options)
        self.heads = config.num_attention_heads
        self.take_part(self._make, self.heads, self.heads)

    def _make(self, part: tuple[int, int]) -> LinearMixer:
        config, parts = self.config, part[1]
        mixer = mixer_type(self.options.mixer)(
            config.kv_channels * self.heads, self.heads // parts, gated=False, part=part,
            key_width=config.kv_channels, value_width=config.kv_channels, feature_map=self.options.feature_map,
            layer_idx=self.layer_number - 1, num_layers=config.num_layers,
            rope_theta=self.options.rope_theta, norm_eps=config.layernorm_epsilon,
        )  # fmt: skip
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(mixer, name, _Given())
        return mixer

    def attend(self, q: Tensor, k: Tensor, v: Tensor, sp: SequenceParallel) -> Tensor:
        mixer, groups = self.mixer, q.shape[2] // k.shape[2]
        assert isinstance(mixer, LinearMixer)
        if groups > 1:
            k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
        given: dict[nn.Module, Tensor] = {
            projection: x.flatten(-2) for projection, x in ((mixer.q_proj, q), (mixer.k_proj, k), (mixer.v_proj, v))
        }
        o = mixer.mix(given[mixer.q_proj], _Projected(sp, given=given))[0]
        return o.unflatten(-1, (q.shape[2], -1))


class Unrotated(SelfAttention):
    """Megatron's self-attention for a linear core, which itself rotates what it wants rotated."""

    def forward(self, *args: Any, rotary_pos_emb: Any = None, **options: Any) -> tuple[Tensor, Tensor]:
        """See `megatron.core.transformer.attention.Attention`."""
        found: tuple[Tensor, Tensor] = super().forward(*args, rotary_pos_emb=None, **options)
        return found
