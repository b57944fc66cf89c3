"""Whether a run can be: every option that cannot is one clear error, before anything is computed."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lasp.data import BYTES, tokenizer_of
from lasp.layers import FEATURE_MAPS, MIXERS
from lasp.models import MIXTURE, PRESETS, RECOMPUTE
from lasp.models.pretrained import pretrained_tokenizer
from lasp.parallel.exchange import EXCHANGES
from lasp.parallel.sequence_parallel import METHODS, SOFTMAX
from lasp.training.choices import DTYPES, LAYOUTS, SCHEDULES, TASKS
from lasp.training.dashboards import needed
from lasp.training.trace import steps_of

if TYPE_CHECKING:
    from lasp.training.options import Options

#: What each option that names something may name.
CHOICES: dict[str, Collection[str]] = {
    "preset": PRESETS,
    "mixer": (*MIXERS, MIXTURE),
    "mom_recurrence": MIXERS,
    "feature_map": FEATURE_MAPS,
    "sp": ("none", *METHODS),
    "layout": LAYOUTS,
    "exchange": ("auto", *EXCHANGES),
    "softmax_sp": ("auto", *SOFTMAX),
    "recompute": RECOMPUTE,
    "schedule": SCHEDULES,
    "task": TASKS,
    "dtype": DTYPES,
    "device": ("auto", "cpu", "cuda"),
}
#: Those that are numbers, by what they must at least be; where one is not given, it is whatever fits.
AT_LEAST = {
    1: (
        "seq_len", "batch_size", "micro_batch_size", "steps", "log_interval", "checkpoint_interval", "keep_checkpoints",
        "eval_interval", "eval_steps",
    ),
    0: ("lr", "warmup", "weight_decay", "balance", "router_z_loss", "z_loss", "seed"),
}  # fmt: skip
ABOVE_0 = {"clip": ", inf for no clipping", "peak_tflops": ""}
SHARES = ("min_lr", "decay")


def check(options: Options, world_size: int) -> None:
    """Raise unless all of it can run on that many ranks.

    Raises:
        ValueError: naming the option that cannot.
    """
    _check_each(options)
    _check_data(options)
    _check_watching(options)
    if options.init_from is not None:
        _check_start(options, options.init_from)
    _check_model(options)
    _check_split(options, world_size)


def _check_each(options: Options) -> None:
    for name, known in CHOICES.items():
        value = getattr(options, name)
        if value is not None and value not in known:
            raise ValueError(f"{_flag(name)} {value}: unknown, expected one of {', '.join(known)}")
    for least, names in AT_LEAST.items():
        for name in names:
            value = getattr(options, name)
            if value is not None and not value >= least:
                raise ValueError(f"{_flag(name)} {value}: must be at least {least}")
    for name, hint in ABOVE_0.items():
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ValueError(f"{_flag(name)} {value}: must be above 0{hint}")
    for name in SHARES:
        if not 0 <= getattr(options, name) <= 1:
            raise ValueError(f"{_flag(name)} {getattr(options, name)}: must be from 0 to 1")
    if options.seed >= 2**31:
        raise ValueError(f"--seed {options.seed}: must be less than 2^31")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no CUDA device")


def _check_data(options: Options) -> None:
    if options.data_weights and len(options.data_weights) != len(options.data):
        raise ValueError(f"--data-weights {options.data_weights}: expected one for each of {len(options.data)} --data")
    if not 0 <= options.validation < 1:
        raise ValueError(f"--validation {options.validation}: must be at least 0 and less than 1")


def _check_watching(options: Options) -> None:
    if options.profile is not None and steps_of(options.profile)[1] > options.steps:
        raise ValueError(f"--profile {options.profile}: the last step is --steps {options.steps}")
    if options.tensorboard:
        needed("torch.utils.tensorboard", "--tensorboard")
    if options.wandb is not None:
        needed("wandb", "--wandb")


def _check_start(options: Options, directory: Path) -> None:
    if options.preset != type(options).preset:
        raise ValueError(f"--preset {options.preset}: the model is that of --init-from {directory}, leave one out")
    # A Llama's vocabulary has room for 256 tokens too, which mean other things.
    if options.task == "text" and options.tokenizer == BYTES != (own := pretrained_tokenizer(directory)):
        raise ValueError(f"--tokenizer {BYTES}: the model of --init-from has another, use --tokenizer {own}")


def _check_model(options: Options) -> None:
    model = options.model()
    if options.task == "text" and model.vocabulary < (tokens := tokenizer_of(options.tokenizer).vocabulary):
        raise ValueError(
            f"--tokenizer {options.tokenizer}: its {tokens} tokens exceed the vocabulary of {model.vocabulary}"
            + (f"; use --vocabulary {-(-tokens // 64) * 64}" if options.init_from is None else " of --init-from")
        )
    if model.mixer == MIXTURE and options.sp != "none" and METHODS[options.sp].linear != "states":
        states = ", ".join(name for name, method in METHODS.items() if method.linear == "states")
        raise ValueError(
            f"--sp {options.sp}: memories are states that travel, and with it none do; use one of {states}"
        )


def _check_split(options: Options, world_size: int) -> None:
    if options.sp == "none" and options.sp_size not in (None, 1):
        raise ValueError(f"--sp-size {options.sp_size}: --sp none shares no sequence, use --sp {next(iter(METHODS))}")
    sp_size = options.ranks_of_a_sequence(world_size)
    if sp_size < 1 or world_size % sp_size:
        raise ValueError(f"--sp-size {sp_size}: does not divide the {world_size} ranks")
    replicas = world_size // sp_size
    if options.batch_size % replicas:
        raise ValueError(
            f"--batch-size {options.batch_size}: the {replicas} data-parallel ranks "
            f"({world_size} ranks, --sp-size {sp_size}) do not divide it"
        )
    rows = options.batch_size // replicas
    if options.micro_batch_size is not None and rows % options.micro_batch_size:
        raise ValueError(
            f"--micro-batch-size {options.micro_batch_size}: does not divide the {rows} sequences a step of a "
            f"data-parallel rank"
        )
    if options.seq_len < sp_size:
        raise ValueError(f"--seq-len {options.seq_len}: shorter than --sp-size {sp_size}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
