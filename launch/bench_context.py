"""A Gated DeltaNet layer under context parallelism: this plug-in's beside Megatron-Core's own, which deals out its heads.

``torchrun --nproc-per-node 4 -m lasp.launch.bench_context --result context.json``, with flash-linear-attention installed, which
Megatron's layer is made of: how many bytes a rank sends for a layer, counted as they are sent, and how long a layer takes.
Plotted over the length. On CPUs Megatron's layer runs its slow form, which sends the same.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn
from torch.nn.functional import normalize, silu

from lasp.launch.megatron_cpu import megatron_on_cpu
from lasp.launch.record import command_of, record
from lasp.launch.traffic import counted
from lasp.parallel.mesh import launched_ranks, processes
from lasp.training.choices import DTYPES
from lasp.training.command import errors_in_one_line

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what is not installed and not used
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import ModuleSpec, TransformerConfig

    from lasp.integrations.megatron import LaspOptions
    from lasp.integrations.megatron.mixer import LaspMixer
    from lasp.integrations.megatron.norm import Norm


@dataclass(frozen=True)
class Options:
    """What is measured."""

    tokens: tuple[int, ...] = (4096, 16384, 65536, 262144, 1048576)
    """Lengths of a sequence, over all ranks."""
    hidden: int = 2048
    """Width of the model."""
    heads: int = 16
    """Heads, of keys and of values."""
    width: int = 128
    """Of a head's keys and values."""
    dtype: str = "bfloat16"
    """Of weights and tokens."""
    calls: int = 5
    """Timed calls, of which the least counts."""
    device: str = "cuda"
    """Where to measure: cpu or cuda."""
    result: Path = Path("bench_context.json")
    """Where the JSON goes, and with another suffix the plot."""


@dataclass
class Row:
    """A layer at a length.

    Attributes:
        layer: "lasp" or "megatron".
        ranks: how many share the sequence.
        tokens: of the whole sequence.
        forward_bytes: what a rank sends for the layer's forward.
        both_bytes: for forward and backward.
        calls: the collectives of both, by name.
        both_ms: milliseconds of both, of the slowest rank.
        peak: GiB of both, above the parameters, the input and its gradient.
    """

    layer: str
    ranks: int
    tokens: int
    forward_bytes: int
    both_bytes: int
    calls: dict[str, int]
    both_ms: float
    peak: float


def config_of(options: Options, ranks: int) -> TransformerConfig:
    """What Megatron is told."""
    dtype = DTYPES[options.dtype]
    return TransformerConfig(
        num_layers=1, hidden_size=options.hidden, num_attention_heads=options.heads, normalization="RMSNorm",
        context_parallel_size=ranks, params_dtype=dtype, pipeline_dtype=dtype, bf16=dtype is torch.bfloat16,
        activation_func=silu, add_bias_linear=False, linear_conv_kernel_dim=4,
        linear_key_head_dim=options.width, linear_value_head_dim=options.width, linear_num_key_heads=options.heads,
        linear_num_value_heads=options.heads, gradient_accumulation_fusion=False,
        deterministic_mode=options.device == "cpu",
    )  # fmt: skip


def layers(options: Options, config: TransformerConfig) -> dict[str, nn.Module]:
    """This project's, and Megatron's where its version has one that knows of context parallelism."""
    groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
    given = LaspOptions(mixer="gated_delta_net", conv_size=4, key_width=options.width, value_width=options.width)
    found: dict[str, nn.Module] = {"lasp": LaspMixer(config, 1, groups, options=given)}
    try:
        from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules, common
    except ImportError as missing:
        raise ValueError(f"this version of megatron-core has no Gated DeltaNet of its own: {missing}") from missing
    if options.device == "cuda":
        import fla.ops.common.chunk_o

        # Before Triton 3.7.1 it refuses its gated backward on Hopper. At a width of 128, which is measured here, it is right.
        fla.ops.common.chunk_o.TRITON_ABOVE_3_7_1 = True
    else:
        common.l2norm = normalize
    parts = GatedDeltaNetSubmodules(
        in_proj=ModuleSpec(ColumnParallelLinear), out_norm=ModuleSpec(Norm), out_proj=ModuleSpec(RowParallelLinear)
    )
    found["megatron"] = GatedDeltaNet(config, parts, 1, pg_collection=groups)
    return {name: layer.to(options.device, config.params_dtype) for name, layer in found.items()}


def measure(name: str, layer: nn.Module, tokens: int, options: Options) -> Row:
    """A layer at a length, on all ranks."""
    ranks, cuda = dist.get_world_size(), options.device == "cuda"
    x = torch.randn(tokens // ranks, 1, options.hidden, device=options.device, dtype=DTYPES[options.dtype])
    x.requires_grad_()
    dy = torch.randn_like(x)

    def forward() -> Tensor:
        y: Tensor = layer(x, None)[0]
        return y

    def both() -> None:
        forward().backward(dy)

    both()
    with counted() as traffic:
        y = forward()
        sent = traffic.sent
        y.backward(dy)
    del y
    held = 0
    if cuda:
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        both()
    peak = (torch.cuda.max_memory_allocated() - held) / 2**30 if cuda else 0.0
    slowest = torch.tensor([_milliseconds(both, options)], dtype=torch.float64, device=options.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return Row(name, ranks, tokens, sent, traffic.sent, traffic.calls, slowest.item(), peak)


def _milliseconds(call: Callable[[], None], options: Options) -> float:
    """The least of some calls, which all ranks begin together."""
    if options.device == "cpu":
        return 0.0
    times = []
    for _ in range(options.calls):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        dist.barrier()
        first.record()
        call()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last))
    return min(times)


def dealt_bytes(tokens: int, ranks: int, hidden_of_values: int, hidden_of_keys: int, heads: int, size: int = 2) -> int:
    """What a rank sends for a layer, forward and backward, where its heads are dealt out.

    Queries, keys, values, the gate and two numbers a head go to the ranks that have the heads, and what they made comes back;
    so do the gradients.

    Args:
        tokens: of the whole sequence.
        ranks: how many share it.
        hidden_of_values: heads times the width of their values.
        hidden_of_keys: heads times the width of their keys.
        heads: how many.
        size: bytes of a number.
    """
    channels = 2 * hidden_of_keys + 2 * hidden_of_values + 2 * heads + hidden_of_values
    return 2 * (tokens // ranks) * channels * size * (ranks - 1) // ranks


def state_bytes(ranks: int, heads: int, width: int, conv_size: int = 4, size: int = 2) -> int:
    """What a rank sends for a layer, forward and backward, where its states are gathered: the same for every length.

    In zigzag a rank has two runs of tokens. A run's summary, in float32, is what it adds to the state and what becomes of a
    state that enters. The convolution's queries, keys and values go from the end of a run to where the next begins; of the
    first rank one end goes to another in the forward, and one gradient in the backward.

    Args:
        ranks: how many share the sequence; the bytes are those of the first.
        heads: how many.
        width: of a head's keys and values.
        conv_size: how many tokens the convolution sees.
        size: bytes of a number.
    """
    states = (ranks - 1) * 2 * heads * 2 * width * width * 4
    return 2 * states + 2 * 3 * heads * width * (conv_size - 1) * size


def plot(rows: list[Row], path: Path) -> None:
    """Bytes and times over the length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4))
    for axis, what, told in ((axes[0], "both_bytes", "MiB a rank sends"), (axes[1], "both_ms", "milliseconds")):
        for layer in dict.fromkeys(row.layer for row in rows):
            own = [row for row in rows if row.layer == layer]
            scale = 2**20 if what == "both_bytes" else 1
            axis.plot([row.tokens for row in own], [getattr(row, what) / scale for row in own], "o-", label=layer)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel(f"tokens of a sequence on {rows[0].ranks} ranks")
        axis.set_ylabel(f"{told}, forward and backward")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    program = "lasp.launch.bench_context"
    speaks = os.environ.get("RANK", "0") == "0"
    with errors_in_one_line(program):
        options = tyro.cli(Options, description=__doc__, console_outputs=speaks)
        ranks = launched_ranks()
        if ranks < 2 or options.heads % ranks or any(tokens % (2 * ranks) for tokens in options.tokens):
            raise ValueError(
                f"{ranks} ranks: expected several that divide --heads {options.heads} and half of --tokens"
            )
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: this machine has no CUDA device")
    rows = []
    with processes(options.device), megatron_on_cpu():
        parallel_state.initialize_model_parallel(context_parallel_size=ranks)
        model_parallel_cuda_manual_seed(0, inference_rng_tracker=options.device == "cpu")
        for tokens in options.tokens:
            for name, layer in layers(options, config_of(options, ranks)).items():
                rows.append(measure(name, layer, tokens, options))
                if speaks:
                    print(rows[-1], flush=True)
                    record(options.result, command_of(program), rows)
                    plot(rows, options.result.with_suffix(".png"))
                layer.zero_grad(set_to_none=True)
                gc.collect()


if __name__ == "__main__":
    main()
