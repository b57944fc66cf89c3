"""The linear layers that bring projections of their own, as Megatron's `self_attention`."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from lasp.integrations.megatron.balance import balanced
from lasp.integrations.megatron.options import LaspOptions
from lasp.integrations.megatron.sharing import sequence_of
from lasp.integrations.megatron.tensor_parallel import HeadParallel, entered
from lasp.layers import MixtureOfMemories, mixer_type
from lasp.models import MIXTURE


class LaspMixer(HeadParallel):
    """A linear mixer or a mixture of memories in place of Megatron's self-attention.

    Each tensor-parallel rank has its part of the heads, and all tokens of its context-parallel rank.

    Args:
        config: Megatron's.
        layer_number: which layer of the model it is, from 1.
        pg_collection: the groups; Megatron's global ones when None.
        cp_comm_type: not used: how states travel is `options.exchange`.
        options: the mixer, and how sequences are shared.
        linear_layers: how many of them the model has: the losses of mixtures are a mean over layers.
        name: not used: what newer versions of Megatron call the layer.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection | None = None,
        cp_comm_type: str | None = None,
        options: LaspOptions | None = None,
        linear_layers: int = 1,
        name: str | None = None,
    ):
        super().__init__(config=config)
        self.options = options or LaspOptions()
        self.layer_number, self.linear_layers = layer_number, linear_layers
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.tp_group, self.cp_group = groups.tp, groups.cp
        self.heads = config.num_attention_heads
        self.key_heads = self.options.key_heads or mixer_type(self.options.recurrence).default_key_heads or self.heads
        self.take_part(self._make, self.heads, self.key_heads)

    def _make(self, part: tuple[int, int]) -> nn.Module:
        """The mixer of a part of the heads."""
        config, options, (_, parts) = self.config, self.options, part
        kind = mixer_type(options.recurrence)
        width = config.hidden_size // self.heads
        given: dict[str, Any] = {
            **options.mixer_options(),
            "key_heads": max(1, self.key_heads // parts),
            "value_width": options.value_width or kind.expansion * width,
            "part": part,
            "layer_idx": self.layer_number - 1,
            "num_layers": config.num_layers,
            "norm_eps": config.layernorm_epsilon,
        }
        if options.key_width is None and parts > 1:
            # What a head's width is follows from all heads.
            with torch.device("meta"):
                given["key_width"] = kind(config.hidden_size, self.heads, feature_map=options.feature_map).key_width
        if options.mixer != MIXTURE:
            return kind(config.hidden_size, self.heads // parts, **given)
        return MixtureOfMemories(
            config.hidden_size, self.heads // parts, recurrence=options.mom_recurrence,
            num_memories=options.num_memories, top_k=options.top_k, shared_memory=options.shared_memory, **given,
        )  # fmt: skip

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        inference_context: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
        inference_params: Any = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """Mix the tokens.

        Args:
            hidden_states: ``[s, b, hidden]``; under Megatron's sequence parallelism a part of the rank's tokens.
            attention_mask: not used: the mixers are causal.
            inference_context: None; `lasp.layers` decode by themselves.
            packed_seq_params: the documents, where b = 1 holds several.
            inference_params: None, likewise.
            others: not used: positions are the mixer's own.

        Returns:
            The output, likewise, and no bias.
        """
        if inference_context is not None or inference_params is not None:
            raise NotImplementedError("LaspMixer: Megatron's inference is not there; decode with lasp.layers' step()")
        if self.config.sequence_parallel:
            x = gather_from_sequence_parallel_region(hidden_states, group=self.tp_group)
        else:
            x = entered(hidden_states, self.tp_group)
        x = x.transpose(0, 1)
        sp = sequence_of(self.cp_group, x.shape[1], packed_seq_params, self.options)
        y = self.mixer(x, sp=sp).transpose(0, 1)
        if isinstance(self.mixer, MixtureOfMemories) and self.training and torch.is_grad_enabled():
            y = balanced(y, self)
        return y, None
