"""Mixture of Memories on a GPU: the results of float64 on a CPU, and nothing that waits for the device."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from lasp import SequenceParallel
from lasp.layers import MIXERS, MixtureOfMemories
from tests.support import Inputs, assert_close, poisoned_memory

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
HIDDEN, HEADS, TOKENS = 64, 2, 300
DOCUMENTS = {"rows": None, "packed": (0, 1, 140, 161, TOKENS)}


def results(
    layer: nn.Module,
    x: Tensor,
    dy: Tensor,
    cu_seqlens: tuple[int, ...] | None,
    sp: SequenceParallel | None = None,
) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    named = dict(layer.named_parameters())
    y = layer(x, sp=sp, cu_seqlens=cu_seqlens)
    found = torch.autograd.grad(y, [x, *named.values()], dy, allow_unused=True)
    return {"y": y.detach(), "x": found[0]} | {
        name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found[1:], strict=True)
    }


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("recurrence", MIXERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 4e-2)], ids=str)
def test_layer(recurrence: str, documents: str, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    layer = MixtureOfMemories(HIDDEN, HEADS, recurrence=recurrence).to(dtype)
    # Of one kind of number all choices are the same.
    layer.router.to(torch.bfloat16).to(dtype)
    cu_seqlens, random = DOCUMENTS[documents], Inputs(1, torch.float64)
    x, dy = (random.normal(1 if cu_seqlens else 2, TOKENS, HIDDEN).to(torch.bfloat16).to(dtype) for _ in range(2))
    want = results(deepcopy(layer).double(), x.double(), dy.double(), cu_seqlens)
    with poisoned_memory():
        given = results(layer.cuda(), x.cuda(), dy.cuda(), cu_seqlens)
    assert_close({key: value.cpu() for key, value in given.items()}, want, tolerance)


@pytest.mark.parametrize("recurrence", ["basic", "gla", "gated_delta_net", "kda"])
def test_nothing_waits(recurrence: str) -> None:
    """How many tokens chose a memory stays on the device."""
    layer = MixtureOfMemories(HIDDEN, HEADS, recurrence=recurrence).to("cuda", torch.bfloat16)
    for seed in range(3):
        x = Inputs(seed, torch.float32).normal(2, TOKENS, HIDDEN).to("cuda", torch.bfloat16).requires_grad_()
        torch.cuda.synchronize()
        # Kernels are compiled first.
        torch.cuda.set_sync_debug_mode("error" if seed else "default")
        try:
            layer(x).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
