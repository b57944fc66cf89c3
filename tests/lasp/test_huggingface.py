"""Layers made of Hugging Face's weights compute what transformers computes with them, forward and backward, on every rank."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lasp import SequenceLayout, SequenceParallel
from lasp.layers import huggingface
from tests.support import Inputs, assert_close, relative_error, sum_over_ranks

HIDDEN, TOKENS = 16, 37
NAMES = ("qwen3_next", "qwen3_5", "kimi_linear", "mamba2")


@dataclass
class Published:
    """A layer of transformers with random weights, and the two functions that take it.

    Attributes:
        module: the layer.
        config: its configuration.
        layer: makes it a layer of this library.
        weights: gives its weights, or their gradients, the names of that layer.
    """

    module: nn.Module
    config: Any
    layer: Callable[..., nn.Module]
    weights: Callable[..., dict[str, Tensor]]


def published(name: str, dtype: torch.dtype = torch.float64) -> Published:
    """Fewer heads of keys than of values where that can be, and widths that differ."""
    qwen = {
        "hidden_size": HIDDEN, "num_hidden_layers": 1, "layer_types": ["linear_attention"], "linear_num_key_heads": 2,
        "linear_num_value_heads": 6, "linear_key_head_dim": 4, "linear_value_head_dim": 5, "linear_conv_kernel_dim": 4,
    }  # fmt: skip
    module: nn.Module
    if name == "qwen3_next":
        from transformers import Qwen3NextConfig
        from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

        config: Any = Qwen3NextConfig(**qwen)
        module = Qwen3NextGatedDeltaNet(config, layer_idx=0)
        made = huggingface.gated_delta_net, huggingface.gated_delta_net_weights
    elif name == "qwen3_5":
        from transformers import Qwen3_5TextConfig
        from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

        config = Qwen3_5TextConfig(**qwen)
        module = Qwen3_5GatedDeltaNet(config, layer_idx=0)
        made = huggingface.gated_delta_net, huggingface.gated_delta_net_weights
    elif name == "kimi_linear":
        from transformers import KimiLinearConfig
        from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

        config = KimiLinearConfig(
            hidden_size=HIDDEN, num_hidden_layers=1, layer_types=["linear_attention"], linear_num_heads=3,
            linear_head_dim=6, linear_conv_kernel_dim=4,
        )  # fmt: skip
        module = KimiLinearDeltaAttention(config, layer_idx=0)
        made = huggingface.kda, huggingface.kda_weights
    else:
        from transformers import Mamba2Config
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

        config = Mamba2Config(
            hidden_size=HIDDEN, num_hidden_layers=1, num_heads=4, head_dim=8, expand=2, state_size=6, n_groups=2,
            conv_kernel=4, chunk_size=16,
        )  # fmt: skip
        module = Mamba2Mixer(config, layer_idx=0)
        made = huggingface.mamba2, huggingface.mamba2_weights
    x = Inputs(3, torch.float64)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * x.normal(*parameter.shape))
    return Published(module.to(dtype), config, *made)


@contextmanager
def wide() -> Iterator[None]:
    """transformers asks for float32 by name, whatever its inputs: here it gets float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(Tensor, "float", Tensor.double)
        yield


def theirs(given: Published, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The output and all gradients of the layer of transformers, named as ours."""
    given.module.zero_grad()
    x = x.detach().clone().requires_grad_()
    with wide():
        y = given.module(x)
    y.backward(dy)
    assert x.grad is not None
    gradients = {name: p.grad for name, p in given.module.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad} | given.weights(gradients, given.config)


def ours(layer: nn.Module, x: Tensor, dy: Tensor, **sequence) -> dict[str, Tensor]:
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = layer(x, **sequence)
    y.backward(dy)
    assert x.grad is not None
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(layer.parameters()))
    return {"y": y.detach(), "dx": x.grad} | {name: grad.clone() for name, grad in gradients.items()}


def sequence(batch: int) -> tuple[Tensor, Tensor]:
    x = Inputs(4, torch.float64)
    return x.normal(batch, TOKENS, HIDDEN), x.normal(batch, TOKENS, HIDDEN)


@pytest.mark.parametrize("name", NAMES)
def test_what_transformers_computes(name: str) -> None:
    given, (x, dy) = published(name), sequence(2)
    assert_close(ours(given.layer(given.module, given.config), x, dy), theirs(given, x, dy), 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_what_transformers_computes_in_float32(name: str) -> None:
    """As it is, without a changed dtype; from a whole model's weights."""
    given, (x, dy) = published(name, torch.float32), sequence(1)
    x, dy = x.float(), dy.float()
    model = {f"model.layers.7.mixer.{key}": weight for key, weight in given.module.state_dict().items()}
    layer = given.layer(model | {"model.embedding.weight": x}, given.config, prefix="model.layers.7.mixer.")
    found = ours(layer, x, dy)
    assert relative_error(found["y"], given.module(x)) < 1e-5
    assert_close(found, theirs(given, x, dy), 1e-4)


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("name", NAMES)
def test_what_transformers_computes_on_all_ranks(groups: dict[int, dist.ProcessGroup], name: str) -> None:
    given, (x, dy) = published(name), sequence(1)
    want, layer = theirs(given, x, dy), given.layer(given.module, given.config)
    for world in (1, 2, 4):
        for build in (SequenceLayout.contiguous, SequenceLayout.zigzag):
            sp = SequenceParallel(groups[world], build(TOKENS, world))
            found = ours(layer, sp.layout.shard(x, sp.rank), sp.layout.shard(dy, sp.rank), sp=sp)
            found = {key: y if key in ("y", "dx") else sum_over_ranks(y, sp.group) for key, y in found.items()}
            parts = {key: sp.layout.shard(y, sp.rank) if key in ("y", "dx") else y for key, y in want.items()}
            assert_close(found, parts, 1e-9)


def test_the_layer_keeps_dtypes_and_shares_no_memory() -> None:
    given = published("qwen3_next", torch.bfloat16)
    given.module.A_log.data = given.module.A_log.data.float()
    layer = given.layer(given.module, given.config)
    assert (layer.A_log.dtype, layer.q_proj.weight.dtype) == (torch.float32, torch.bfloat16)
    assert all(p.requires_grad for p in layer.parameters())
    before = layer.o_proj.weight.clone()
    with torch.no_grad():
        given.module.out_proj.weight.zero_()
    assert torch.equal(layer.o_proj.weight, before)


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_are_not_the_layers(name: str) -> None:
    given = published(name)
    weights = given.module.state_dict()
    (rate,) = (key for key in weights if key.endswith("A_log"))
    lacking = {key: x for key, x in weights.items() if key != rate} | {"B_log": weights[rate]}
    with pytest.raises(ValueError, match=rf"the weights are not a layer's: missing {rate}; unexpected B_log"):
        given.layer(lacking, given.config)
    with pytest.raises(ValueError, match=r"the weights of prefix 'x\.' are not a layer's: missing .*; unexpected none"):
        given.layer(weights, given.config, prefix="x.")
    (out,) = (key for key in weights if key in ("out_proj.weight", "o_proj.weight"))
    with pytest.raises(ValueError, match=rf"{out} must be \[16, \d\d\] by the configuration, given \[3, 16\]"):
        given.layer(weights | {out: torch.zeros(3, HIDDEN)}, given.config)
    given.config.hidden_act = "gelu"
    with pytest.raises(ValueError, match="hidden_act='gelu': expected silu"):
        given.layer(weights, given.config)


def test_what_mamba2_has_not() -> None:
    given = published("mamba2")
    given.config.time_step_limit = (0.0, 1.0)
    with pytest.raises(ValueError, match=r"time_step_limit=\(0.0, 1.0\) bounds the time steps"):
        given.layer(given.module, given.config)
    given.config.use_bias = True
    with pytest.raises(ValueError, match="its projections have biases"):
        given.layer(given.module, given.config)


def test_the_library_does_not_import_transformers() -> None:
    code = "import sys, lasp.layers.huggingface; print('transformers' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"
