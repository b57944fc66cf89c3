"""A tiny model in Megatron-Core, trained for some steps as its own loop does it, on any split of the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.num_microbatches_calculator import (
    init_num_microbatches_calculator,
    unset_num_microbatches_calculator,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from lasp import SequenceLayout
from lasp.integrations.megatron import LaspOptions, lasp_layer_specs, load_whole
from lasp.integrations.megatron.convert import named_in_whole

VOCABULARY, HIDDEN, HEADS, LAYERS, TOKENS, SEQUENCES, STEPS = 64, 32, 4, 4, 64, 2, 5


@dataclass(frozen=True)
class Split:
    """How the ranks are used, and what else of Megatron is.

    Attributes:
        tp: tensor parallel.
        cp: context parallel.
        pp: pipeline stages.
        vpp: virtual stages of each.
        sequence_parallel: Megatron's own.
        distributed: whether the optimizer's state is.
        rows: sequences of a micro-batch.
        documents: boundaries of packed documents.
        config: more of Megatron's configuration.
    """

    tp: int = 1
    cp: int = 1
    pp: int = 1
    vpp: int | None = None
    sequence_parallel: bool = False
    distributed: bool = False
    rows: int = 1
    documents: tuple[int, ...] | None = None
    config: dict[str, Any] = field(default_factory=dict)


@dataclass
class Run:
    """What a run gave, of all steps: losses, norms of gradients; and the weights that it began with, of this rank."""

    losses: list[float]
    norms: list[float]
    begun: dict[str, Tensor]


#: What Megatron knows of its groups, by split.
_groups: dict[tuple[int | None, ...], dict[str, Any]] = {}


@contextmanager
def megatron(split: Split) -> Iterator[None]:
    """Megatron's groups, on all ranks; made once for each split."""
    key = split.tp, split.cp, split.pp, split.vpp
    state = vars(parallel_state)
    if key not in _groups:
        parallel_state.initialize_model_parallel(
            split.tp, split.pp, virtual_pipeline_model_parallel_size=split.vpp, context_parallel_size=split.cp
        )
        _groups[key] = {name: value for name, value in state.items() if name.startswith("_") and name[1].isupper()}
    state.update(_groups[key])
    data = parallel_state.get_data_parallel_world_size()
    # More data-parallel ranks than sequences: each has them all.
    data = data if data * split.rows <= SEQUENCES else 1
    init_num_microbatches_calculator(dist.get_rank(), None, SEQUENCES, split.rows, data)
    try:
        model_parallel_cuda_manual_seed(1, inference_rng_tracker=True, force_reset_rng=True)
        yield
    finally:
        unset_num_microbatches_calculator()
        parallel_state.destroy_model_parallel()


def configuration(split: Split) -> TransformerConfig:
    return TransformerConfig(
        num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=HEADS, ffn_hidden_size=48,
        tensor_model_parallel_size=split.tp, context_parallel_size=split.cp, pipeline_model_parallel_size=split.pp,
        virtual_pipeline_model_parallel_size=split.vpp, sequence_parallel=split.sequence_parallel,
        pipeline_dtype=torch.float32, batch_p2p_sync=False, attention_dropout=0.0, hidden_dropout=0.0,
        normalization="RMSNorm", gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False,
        hetereogenous_dist_checkpoint=True,
        bias_activation_fusion=False, bias_dropout_fusion=False, masked_softmax_fusion=False,
        gradient_accumulation_fusion=False, finalize_model_grads_func=finalize_model_grads, **split.config,
    )  # fmt: skip


def chunks(split: Split, pattern: str, options: LaspOptions) -> list[GPTModel]:
    """The parts of the model that this rank has: one, or as many as there are virtual stages."""
    config = configuration(split)
    made = []
    for stage in range(split.vpp or 1):
        vp_stage = None if split.vpp is None else stage
        specs = lasp_layer_specs(config, pattern, options=options, vp_stage=vp_stage)
        made.append(
            GPTModel(
                config, specs, VOCABULARY, TOKENS, position_embedding_type="rope", vp_stage=vp_stage,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
                share_embeddings_and_output_weights=False,
            )
        )  # fmt: skip
    return made


class Training:
    """A model, wrapped, and its optimizer: within `megatron` of the same split.

    Args:
        split: of the ranks.
        pattern: of the layers.
        options: the plug-in's.
        weights: what the whole model begins with, as `Run.begun` of a run on one rank has it; its own when None.
    """

    def __init__(
        self, split: Split, pattern: str, options: LaspOptions, weights: dict[str, Tensor] | None = None
    ) -> None:
        self.split, self.models = split, chunks(split, pattern, options)
        if weights is not None:
            for model in self.models:
                load_whole(model, weights)
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=split.distributed, overlap_grad_reduce=split.distributed, bucket_size=4096
        )
        config = self.models[0].config
        self.wrapped = [
            DistributedDataParallel(config, ddp, model, disable_bucketing=i > 0) for i, model in enumerate(self.models)
        ]
        # What Adam divides by is kept away from 0: else rounding decides on the steps of weights that have no gradient.
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam", lr=2e-3, adam_eps=1e-5, clip_grad=1.0, use_distributed_optimizer=split.distributed
            ),
            self.wrapped,
        )
        config.grad_scale_func = self.optimizer.scale_loss
        if split.distributed:
            config.no_sync_func = [m.no_sync for m in self.wrapped] if split.vpp else self.wrapped[0].no_sync

    def weights(self) -> dict[str, Tensor]:
        """A copy of this rank's, by what they are called in the whole model."""
        return {name: p.detach().clone() for model in self.models for name, p in named_in_whole(model)}

    def step(self, step: int) -> tuple[float, float]:
        """Train on a step's sequences: the loss and the gradient's norm."""
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        for model in self.wrapped:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        rows = self.split.rows
        alone = size * rows > SEQUENCES
        own = range(0, SEQUENCES, rows) if alone else range(rows * rank, SEQUENCES, rows * size)
        batches = [batch(step, i, self.split) for i in own]
        found = get_forward_backward_func()(
            forward_step_func=_forward,
            data_iterator=[iter(batches) for _ in self.wrapped] if self.split.vpp else iter(batches),
            model=self.wrapped if self.split.vpp else self.wrapped[0],
            num_microbatches=len(batches),
            seq_length=TOKENS,
            micro_batch_size=rows,
            forward_only=False,
        )
        _, norm, _ = self.optimizer.step()
        return _mean([row["loss"] for row in found]), float(norm)

    def sharded_state(self, loading: bool) -> dict[str, Any]:
        """What Megatron's checkpoints hold."""
        model = self.models[0].sharded_state_dict()
        return {"model": model, "optimizer": self.optimizer.sharded_state_dict(model, is_loading=loading)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what was loaded."""
        self.models[0].load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def train(split: Split, pattern: str, options: LaspOptions, weights: dict[str, Tensor] | None = None) -> Run:
    """Train on all ranks; the arguments are those of `Training`."""
    with megatron(split):
        training = Training(split, pattern, options, weights)
        begun = training.weights()
        losses, norms = zip(*(training.step(step) for step in range(STEPS)), strict=True)
    return Run(list(losses), list(norms), begun)


def _mean(losses: list[Tensor]) -> float:
    """Of all micro-batches of all ranks; only the last stage has any."""
    total = torch.zeros(2)
    if losses:
        total += torch.tensor([sum(float(loss) for loss in losses), len(losses)])
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


def tokens_of(step: int, index: int) -> Tensor:
    """A sequence and the token after it. Each token follows from those before: something can be learnt."""
    random = torch.Generator().manual_seed(1000 * step + index)
    start, along = torch.randint(0, VOCABULARY, (1, 1), generator=random), torch.arange(TOKENS + 1)
    return (start + 5 * along + along // 9) % VOCABULARY


def batch(step: int, index: int, split: Split) -> dict[str, Any]:
    """This rank's tokens of a micro-batch's sequences, from that one on."""
    tokens = torch.cat([tokens_of(step, index + row) for row in range(split.rows)])
    cp, rank = split.cp, parallel_state.get_context_parallel_rank()
    if split.documents is None:
        layout, packed = SequenceLayout.zigzag(TOKENS, cp), None
    else:
        layout = SequenceLayout.zigzag_per_document(TOKENS, cp, split.documents)
        bounds = torch.tensor(split.documents, dtype=torch.int32)
        longest = int(bounds.diff().max())
        packed = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=longest, max_seqlen_kv=longest)
    inputs, labels = (layout.shard(x, rank) for x in (tokens[:, :-1], tokens[:, 1:]))
    positions = layout.document_positions(rank).expand_as(inputs)
    return {"input_ids": inputs, "labels": labels, "position_ids": positions, "packed_seq_params": packed}


def _forward(data: Iterator[dict[str, Any]], model: Any) -> tuple[Tensor, Any]:
    given = next(data)
    return model(**given, attention_mask=None), partial(_loss)


def _loss(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    total, count = losses.float().sum(), torch.tensor(losses.numel(), dtype=torch.int)
    return total, count, {"loss": total.detach() / count}


def alone(pattern: str, options: LaspOptions, split: Split) -> Run:
    """The same on one rank; all of them do it, each with all data."""
    return train(
        replace(split, tp=1, cp=1, pp=1, vpp=None, sequence_parallel=False, distributed=False), pattern, options
    )
