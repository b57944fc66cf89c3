"""Pretrain Linear-Llama3 in Megatron-Core, without Megatron's own training loop: on GPUs, and on CPUs to try it.

``torchrun --nproc-per-node 4 -m lasp.launch.pretrain_mcore --mixer gated_delta_net --tp 2 --cp 2`` starts from the weights that
``pretrain.py`` starts from and trains on the same sequences, so the two can be held against each other.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from torch import Tensor

from lasp import SequenceLayout
from lasp.launch.megatron_cpu import megatron_on_cpu
from lasp.models import LinearLlama3, LinearLlama3Config, import_pretrained
from lasp.parallel.mesh import launched_ranks, processes
from lasp.training import Options, errors_in_one_line
from lasp.training.choices import DTYPES
from lasp.training.loop import Loop
from lasp.training.schedule import learning_rate

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what is not installed and not used
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module

    from lasp.integrations.megatron import LaspOptions, lasp_layer_specs, load_whole, to_megatron
    from lasp.integrations.megatron.options import CORES
    from lasp.integrations.megatron.sharing import sequence_of


@dataclass(frozen=True)
class McoreOptions(Options):
    """Pretrain Linear-Llama3 in Megatron-Core."""

    layout: str = "zigzag"
    """Who holds which tokens of a sequence: zigzag, in which Megatron deals them out."""
    document_mask: bool = False
    """Not to be had here: the sequences are a plain stream."""
    out: Path = Path("runs/mcore")
    """Directory for metrics.jsonl, the plot and the checkpoints."""
    tp: int = 1
    """Tensor-parallel ranks, which share heads."""
    cp: int = 1
    """Context-parallel ranks, which share sequences."""
    pp: int = 1
    """Pipeline stages."""
    vpp: int | None = None
    """Virtual pipeline stages of each."""
    sequence_parallel: bool = False
    """Megatron's own sequence parallelism: tensor-parallel ranks deal out the tokens of norms."""
    distributed_optimizer: bool = False
    """Whether the ranks share the optimizer's state, and gradients travel while others are made."""
    micro_batch_size: int = 1
    """Sequences that go through the model at once."""

    def check(self, world_size: int) -> None:
        """Raise unless all of it can run on that many ranks: see `lasp.training.Options`."""
        for name in ("tp", "cp", "pp", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        if world_size % (self.tp * self.cp * self.pp):
            raise ValueError(f"--tp {self.tp} --cp {self.cp} --pp {self.pp}: do not divide the {world_size} ranks")
        if self.task != "text" or self.layout != "zigzag":
            raise ValueError(f"--task {self.task} --layout {self.layout}: Megatron's loop is given text, in zigzag")
        if self.fsdp or self.z_loss:
            raise ValueError(
                "--fsdp, --z-loss: not to be had in Megatron's loop; for the first use --distributed-optimizer"
            )
        if self.document_mask:
            raise ValueError("--document-mask: this loop reads a plain stream; leave it out")
        if self.sp == "none" and self.cp > 1:
            raise ValueError(f"--sp none, --cp {self.cp}: each rank would take its part of a sequence for all of it")
        data = world_size // (self.tp * self.cp * self.pp)
        if self.seq_len % (2 * self.cp):
            raise ValueError(f"--seq-len {self.seq_len}: must be a multiple of {2 * self.cp}, twice --cp")
        if self.batch_size % (data * self.micro_batch_size):
            raise ValueError(
                f"--batch-size {self.batch_size}: {data} data-parallel ranks with --micro-batch-size "
                f"{self.micro_batch_size} do not divide it"
            )
        model = self.model()
        if model.rope_scaling is not None:
            raise ValueError(
                f"--init-from {self.init_from}: its rotary positions are scaled ({model.rope_scaling.rope_type}), which they "
                "are not here; use pretrain.py"
            )
        stages = self.pp * (self.vpp or 1)
        if model.layers % stages or model.heads % self.tp:
            raise ValueError(
                f"--pp {self.pp} --vpp {self.vpp} --tp {self.tp}: the stages do not divide {model.layers} layers, or the "
                f"tensor-parallel ranks not {model.heads} heads"
            )
        if self.vpp is not None and self.pp == 1:
            raise ValueError(f"--vpp {self.vpp}: there are virtual stages where --pp is above 1")
        # All else is as without Megatron.
        Options.check(replace(self, sp_size=1 if self.sp == "none" else self.cp), self.cp * data)

    def model(self) -> LinearLlama3Config:
        """The preset, with what was given in its place; what Megatron's attention projects has no output gate."""
        config = super().model()
        return replace(config, gated=False) if config.mixer in CORES else config

    def ranks_of_a_sequence(self, world_size: int) -> int:
        """How many ranks share a sequence."""
        return self.cp

    def lasp(self) -> LaspOptions:
        """What the plug-in is told."""
        config = self.model()
        return LaspOptions(
            mixer=config.mixer, mom_recurrence=config.mom_recurrence, num_memories=config.num_memories,
            top_k=config.top_k, shared_memory=config.shared_memory, balance=self.balance, z_loss=self.router_z_loss,
            feature_map=config.feature_map, conv_size=config.conv_size, rope_theta=config.rope_theta, sp=self.sp,
            exchange=self.exchange, softmax_sp=self.softmax_sp,
        )  # fmt: skip

    def megatron(self) -> TransformerConfig:
        """What Megatron is told."""
        config, dtype = self.model(), DTYPES[self.dtype]
        recompute: dict[str, Any] = {
            "none": {},
            "selective": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
            "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        }
        return TransformerConfig(
            num_layers=config.layers, hidden_size=config.hidden, num_attention_heads=config.heads,
            num_query_groups=config.kv_heads or config.heads, ffn_hidden_size=config.intermediate,
            window_size=None if config.window is None else (config.window - 1, 0), layernorm_epsilon=config.norm_eps,
            tensor_model_parallel_size=self.tp, context_parallel_size=self.cp, pipeline_model_parallel_size=self.pp,
            virtual_pipeline_model_parallel_size=self.vpp, sequence_parallel=self.sequence_parallel and self.tp > 1,
            pipeline_dtype=dtype, params_dtype=dtype, bf16=dtype is torch.bfloat16, attention_dropout=0.0,
            hidden_dropout=0.0, normalization="RMSNorm", gated_linear_unit=True,
            activation_func=torch.nn.functional.silu, add_bias_linear=False, bias_activation_fusion=False,
            bias_dropout_fusion=False, masked_softmax_fusion=False, gradient_accumulation_fusion=False,
            batch_p2p_sync=self.device_type() == "cuda",
            hetereogenous_dist_checkpoint=True, finalize_model_grads_func=finalize_model_grads,
            **recompute[self.recompute],
        )  # fmt: skip


class McoreTrainer(Loop):
    """A model in Megatron-Core, its data, and how a step is dealt out; on all ranks, whose process group there is.

    Args:
        options: what to train.

    Raises:
        ValueError: where the data is missing or too short.
    """

    options: McoreOptions
    generates = False

    def __init__(self, options: McoreOptions):
        self.options = options
        self.source = options.source()
        parallel_state.initialize_model_parallel(
            options.tp, options.pp, virtual_pipeline_model_parallel_size=options.vpp,
            context_parallel_size=options.cp,
        )  # fmt: skip
        self.data_rank = parallel_state.get_data_parallel_rank()
        self.data_size = parallel_state.get_data_parallel_world_size()
        init_num_microbatches_calculator(
            dist.get_rank(), None, options.batch_size, options.micro_batch_size, self.data_size
        )
        model_parallel_cuda_manual_seed(options.seed, inference_rng_tracker=options.device_type() == "cpu")
        self._replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self.layout = SequenceLayout.zigzag(options.seq_len, options.cp)
        self.config = options.megatron()
        self.chunks = [self._chunk(stage) for stage in range(options.vpp or 1)]
        self._initialise()
        self.models = self._wrapped()
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam", lr=options.lr, weight_decay=options.weight_decay, adam_beta1=0.9, adam_beta2=0.95,
                clip_grad=options.clip, use_distributed_optimizer=options.distributed_optimizer,
                bf16=self.config.bf16, params_dtype=self.config.params_dtype,
            ),
            self.models,
        )  # fmt: skip
        if options.device_type() == "cuda" and not HAVE_APEX_OR_TE:
            for group in self.optimizer.param_groups:
                group["fused"] = True  # torch's AdamW: Megatron leaves it in pieces
        self.config.grad_scale_func = self.optimizer.scale_loss
        if options.distributed_optimizer:
            waits = [model.no_sync for model in self.models]
            self.config.no_sync_func = waits if options.vpp else waits[0]
        self.done = 0
        if options.resume is not None:
            self._resume(options.resume)

    def _chunk(self, stage: int) -> GPTModel:
        options, model = self.options, self.options.model()
        vp_stage = None if options.vpp is None else stage
        specs = lasp_layer_specs(self.config, model.pattern, options=options.lasp(), vp_stage=vp_stage)
        return GPTModel(
            self.config, specs, model.vocabulary, options.seq_len, position_embedding_type="rope",
            rotary_base=int(model.rope_theta), share_embeddings_and_output_weights=model.tied, vp_stage=vp_stage,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        )  # fmt: skip

    def _initialise(self) -> None:
        """The weights that ``pretrain.py`` starts from."""
        torch.manual_seed(self.options.seed)
        model = LinearLlama3(self.options.model())
        if self.options.init_from is not None:
            import_pretrained(model, self.options.init_from)
        weights = to_megatron(model.state_dict(), model.config)
        for chunk in self.chunks:
            chunk.to(self.options.device_type())
            load_whole(chunk, weights)

    def _wrapped(self) -> list[Any]:
        shared = self.options.distributed_optimizer
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=shared, overlap_grad_reduce=shared, grad_reduce_in_fp32=self.config.bf16
        )
        chunks = [Float16Module(self.config, chunk) if self.config.bf16 else chunk for chunk in self.chunks]
        return [
            DistributedDataParallel(self.config, ddp, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)
        ]

    def step(self) -> dict[str, Tensor]:
        """See `Loop.step`: its loss and the gradient's norm."""
        options = self.options
        for model in self.models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        batches = list(self._batches())
        found = get_forward_backward_func()(
            forward_step_func=_forward,
            data_iterator=[iter(batches) for _ in self.models] if options.vpp else iter(batches),
            model=self.models if options.vpp else self.models[0],
            num_microbatches=len(batches), seq_length=options.seq_len, micro_batch_size=options.micro_batch_size,
            forward_only=False,
        )  # fmt: skip
        for group in self.optimizer.param_groups:
            # Megatron's scheduler does both; left alone, what has one axis would decay too.
            group["lr"] = learning_rate(options, self.done)
            group["weight_decay"] = options.weight_decay * group["wd_mult"]
        _, norm, _ = self.optimizer.step()
        self.done += 1
        # Only the last stage has losses: sums, and how many they are of.
        total = torch.zeros(2, dtype=torch.float64, device=options.device_type())
        if found:
            total += torch.stack([row["loss"] for row in found]).sum(0)
        dist.all_reduce(total)
        return {"loss": total[0] / total[1], "grad_norm": torch.as_tensor(norm).to(total)}

    def split(self) -> str:
        """See `Loop.split`."""
        return f"DP {self.data_size} × TP {self.options.tp} × PP {self.options.pp} × CP {self.options.cp}"

    def explain(self) -> str:
        """Why states travel as they do, after a step."""
        group = parallel_state.get_context_parallel_group()
        return sequence_of(group, self.layout.local_tokens(group.rank()), None, self.options.lasp()).explain()

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        """This rank's micro-batches."""
        options, device = self.options, self.options.device_type()
        own = options.batch_size // self.data_size
        rank = parallel_state.get_context_parallel_rank()
        positions = self.layout.positions(rank).to(device)
        for first in range(0, own, options.micro_batch_size):
            rows = self.source.rows(self.done, own * self.data_rank + first, options.micro_batch_size)
            inputs, labels = (self.layout.shard(x, rank).to(device) for x in rows)
            yield {"input_ids": inputs, "labels": labels, "position_ids": positions.expand_as(inputs)}

    # -- checkpoints: Megatron's, which another split of the ranks reads too ------------------------------------------

    def _state(self, loading: bool) -> dict[str, Any]:
        how = {"distrib_optim_sharding_type": "fully_reshardable", "dp_cp_group": self._replicas}
        models = {f"model{i}": chunk.sharded_state_dict(metadata=how) for i, chunk in enumerate(self.chunks)}
        # The optimizer looks for its parameters in all of them.
        whole = models["model0"] if len(models) == 1 else models
        state = self.optimizer.sharded_state_dict(whole, is_loading=loading, metadata=how)
        return {**models, "optimizer": state, "step": self.done}

    def save(self) -> None:
        """Write a checkpoint of Megatron's, each rank its part."""
        folder = self.options.out / f"step_{self.done:07}"
        folder.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        dist_checkpointing.save(self._state(False), str(folder))
        if dist.get_rank() == 0:
            (self.options.out / "latest").write_text(folder.name)

    def wait(self) -> None:
        """See `Loop.wait`: `save` returns when they are."""

    def _resume(self, resume: str) -> None:
        latest = self.options.out / "latest"
        if resume == "auto" and not latest.is_file():
            return
        folder = self.options.out / latest.read_text() if resume == "auto" else Path(resume)
        if not folder.is_dir():
            raise ValueError(f"--resume {folder}: no such checkpoint")
        if self.options.distributed_optimizer and not HAVE_APEX_OR_TE:
            raise ValueError(
                f"--resume {folder}: without Apex or Transformer Engine, Megatron's distributed optimizer has no state to load "
                "into before its first step; train without --distributed-optimizer, or install one of them"
            )
        state = dist_checkpointing.load(self._state(True), str(folder))
        for i, chunk in enumerate(self.chunks):
            chunk.load_state_dict(state[f"model{i}"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = state["step"]


def _forward(batches: Iterator[dict[str, Tensor]], model: Any) -> tuple[Tensor, Any]:
    return model(**next(batches), attention_mask=None), partial(_loss)


def _loss(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The sum over this rank's targets, how many they are, and both for the record."""
    total, count = losses.float().sum(), torch.tensor(losses.numel(), dtype=torch.int, device=losses.device)
    return total, count, {"loss": torch.stack([total.detach(), count.float()])}


def main() -> None:
    """Options, ranks, model and data; then train."""
    program = "lasp.launch.pretrain_mcore"
    with errors_in_one_line(program):
        options = tyro.cli(McoreOptions, description=__doc__)
        options.check(launched_ranks())
    with processes(options.device_type()), megatron_on_cpu(), errors_in_one_line(program):
        closing = McoreTrainer(options).train()
    if closing:
        print(closing)


if __name__ == "__main__":
    main()
