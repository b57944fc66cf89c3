"""Megatron's own pretraining, with this project's layers: ``torchrun --nproc-per-node 8 -m lasp.launch.pretrain_megatron``.

All of Megatron's options are there, and those of `lasp.integrations.megatron.add_lasp_args`: ``--sp lasp2 --mixer
gated_delta_net --pattern LLLN``. Of a Megatron checkout that is on the Python path, the data are those of its
``pretrain_gpt.py``; with the wheels alone, ``--data-path`` and ``--mock-data``, documents masked with
``--dataloader-inter-document-masking``.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lasp.training.command import errors_in_one_line

PROGRAM = "lasp.launch.pretrain_megatron"


def main() -> None:
    """Options and data, then Megatron's loop."""
    # Before Blackwell Megatron asks for it where tensors or sequences are shared; CUDA reads it once.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with errors_in_one_line(PROGRAM):
        _there()
        from megatron.core.enums import ModelType
        from megatron.training import pretrain
        from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
        from megatron.training.arguments import parse_and_validate_args

        from lasp.integrations.megatron import add_lasp_args

        if {"-h", "--help"} & set(sys.argv):
            # Megatron's own help is long, and in some versions ends in an error.
            parser = ArgumentParser(
                f"python -m {PROGRAM}", description=__doc__, formatter_class=RawDescriptionHelpFormatter
            )
            add_lasp_args(parser).parse_args(["--help"])
        if not torch.cuda.is_available():
            raise ValueError("Megatron's loop needs GPUs; lasp.launch.pretrain_mcore trains on CPUs too")
        args = parse_and_validate_args(extra_args_provider=add_lasp_args)
        _check(args)
        model = gpt_config_from_args(args)
        model.transformer_layer_spec = partial(_layers, args)
        # What does not go together is said before there are ranks.
        _layers(args, model, pp_rank=0, vp_stage=0 if args.virtual_pipeline_model_parallel_size else None)
        step, datasets = _data()
        _keep_helpers()
    pretrain(pretrain_cfg_container_from_args(args, model), datasets, ModelType.encoder_or_decoder, step)


def _there() -> None:
    """Raise unless there is a `megatron.training` that is made of what this calls."""
    if find_spec("megatron") is None or find_spec("megatron.training") is None:
        raise ValueError(
            "no megatron.training: install megatron-core 0.19 or newer (Python 3.12), or put a Megatron checkout on "
            "PYTHONPATH; lasp.launch.pretrain_mcore needs megatron.core alone"
        )
    from megatron.training import argument_utils

    if not hasattr(argument_utils, "pretrain_cfg_container_from_args"):
        raise ValueError(
            "this megatron.training is older than 0.19: give lasp.integrations.megatron.lasp_layer_specs(...) to its GPTModel "
            "as transformer_layer_spec, and add_lasp_args to its pretrain() as extra_args_provider"
        )


def _check(args: Any) -> None:
    """Raise where Megatron's data would not be what the layers take them for."""
    if args.reset_attention_mask or args.reset_position_ids:
        raise ValueError("--reset-attention-mask, --reset-position-ids: use --dataloader-inter-document-masking")
    if args.dataloader_inter_document_masking and args.context_parallel_size > 1:
        raise ValueError(
            f"--dataloader-inter-document-masking, --context-parallel-size {args.context_parallel_size}: Megatron deals out "
            "the whole sequence then, and the rotary positions of its attention are those of documents that are dealt out each"
        )


def _keep_helpers() -> None:
    """Wheels bring the datasets' helpers compiled, and no Makefile, without which Megatron would end."""
    from megatron.core.datasets import utils

    if not (Path(utils.__file__).parent / "Makefile").is_file() and find_spec("megatron.core.datasets.helpers_cpp"):
        utils.compile_helpers = lambda: None


def _layers(args: Any, model: Any, vp_stage: int | None = None, pp_rank: int | None = None) -> Any:
    """The layers of a pipeline stage, as Megatron's builder of models asks for them."""
    from lasp.integrations.megatron import lasp_layer_specs
    from lasp.integrations.megatron.arguments import options_of

    return lasp_layer_specs(
        model.transformer, args.pattern, options=options_of(args), vp_stage=vp_stage, pp_rank=pp_rank,
        use_transformer_engine=model.transformer.transformer_impl == "transformer_engine",
    )  # fmt: skip


def _data() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What makes a micro-batch's losses, and what makes the datasets."""
    if find_spec("pretrain_gpt") is not None:
        import pretrain_gpt

        step, datasets = pretrain_gpt.forward_step, pretrain_gpt.train_valid_test_datasets_provider
    else:
        step, datasets = forward_step, datasets_of
    datasets.is_distributed = True
    return step, datasets


def datasets_of(samples: list[int], vp_stage: int | None = None) -> Any:  # noqa: ARG001 - Megatron wants it there
    """The datasets to train on, to validate and to test with: on every rank, which so needs nothing of another.

    Args:
        samples: how many of each.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training import get_args
    from megatron.training.utils import get_blend_and_blend_per_split

    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed, sequence_length=args.seq_length, blend=blend, blend_per_split=blend_per_split,
        split=args.split, path_to_cache=args.data_cache_path, mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args), reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=args.eod_mask_loss, create_attention_mask=False,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        context_parallel_size=args.context_parallel_size, data_parallel_size=args.data_parallel_size,
        inter_document_masking=args.dataloader_inter_document_masking,
    )  # fmt: skip
    kind = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(kind, samples, lambda: True, config).build()


def forward_step(batches: Iterator[dict[str, Tensor]], model: Any) -> tuple[Any, Callable[..., Any]]:
    """A micro-batch's losses, and what makes one of them.

    Args:
        batches: this data-parallel rank's.
        model: a pipeline stage.
    """
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.utils import flatten_batch_for_packed_sequences, get_batch_on_this_cp_rank

    batch = {name: x.cuda(non_blocking=True) for name, x in next(batches).items() if isinstance(x, Tensor)}
    packed = None
    if (bounds := batch.get("cu_seqlens")) is not None:
        batch = flatten_batch_for_packed_sequences(batch)
        bounds = batch["cu_seqlens"].squeeze(0)
        longest = int(batch["max_seqlen"].max())
        packed = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
        )
    group = parallel_state.get_context_parallel_group()
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], packed_seq_params=packed)
    return losses, partial(_loss, batch["loss_mask"])


def _loss(mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The sum over this rank's targets, how many they are, and both for the record."""
    mask = mask.flatten().float()
    total, count = (losses.flatten().float() * mask).sum(), mask.sum().int()
    return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}


if __name__ == "__main__":
    main()
