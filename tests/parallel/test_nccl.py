"""The ops on GPU tensors over NCCL. Four ranks share one device: right for correctness, useless for timing."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lasp import SequenceParallel
from lasp.layers import MixtureOfMemories
from lasp.parallel.exchange import EXCHANGES
from lasp.parallel.sequence_parallel import SOFTMAX
from tests.lasp import test_mom_gpu
from tests.parallel import test_attention, test_convolution
from tests.parallel.test_exchange import NODES
from tests.parallel.test_linear import OPS, TOLERANCE, run
from tests.parallel.test_methods import without_states
from tests.support import DOCUMENTS, LAYOUTS, TOKENS, Inputs, assert_close

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


def _port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _rank(rank: int, world: int, port: int, check: Callable[[int], None]) -> None:
    # NCCL takes ranks on one device for a mistake unless they seem to be on different hosts.
    os.environ |= {"NCCL_HOSTID": f"host{rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
    torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    try:
        check(world)
    finally:
        dist.destroy_process_group()


def _linear(world: int) -> None:
    for op in OPS:
        for layout in LAYOUTS.values():
            for documents, cu_seqlens in DOCUMENTS.items():
                sp = SequenceParallel(dist.group.WORLD, layout(TOKENS, world, cu_seqlens))
                for dtype, tolerance in TOLERANCE.items():
                    _check(run(op, sp, documents, dtype, True, True, device="cuda"), tolerance)


def _exchanges(world: int) -> None:
    for name in EXCHANGES:
        for nodes in NODES[world]:
            for layout in LAYOUTS.values():
                sp = SequenceParallel(
                    dist.group.WORLD, layout(TOKENS, world, DOCUMENTS["packed"]), exchange=name, nodes=nodes
                )
                for op in ("linear_attn", "simple_gla", "gla", "delta_rule"):
                    _check(run(op, sp, "packed", torch.float64, True, True, device="cuda"), 1e-10)


def _methods(world: int) -> None:
    for layout in LAYOUTS.values():
        for documents, cu_seqlens in DOCUMENTS.items():
            whole = layout(TOKENS, world, cu_seqlens)
            for op in ("linear_attn", "retention", "simple_gla"):
                sp = SequenceParallel(dist.group.WORLD, whole, method="ulysses")
                _check(run(op, sp, documents, torch.float64, True, True, device="cuda"), 1e-10)
                by_tokens, by_states = (
                    without_states(op, SequenceParallel(dist.group.WORLD, whole, method=m), documents, True, "cuda")
                    for m in ("ring", "lasp2")
                )
                _check((by_tokens, by_states), 1e-10)


def _softmax(world: int) -> None:
    for softmax in SOFTMAX:
        for name, layout in LAYOUTS.items():
            for documents, cu_seqlens in DOCUMENTS.items():
                sp = SequenceParallel(dist.group.WORLD, layout(TOKENS, world, cu_seqlens), softmax=softmax)
                for seen in test_attention.SEEN:
                    _check(test_attention.run(sp, documents, torch.float64, seen, device="cuda"), 1e-10)
                # float32 is compiled, for each shape anew.
                if (name, documents) == ("table", "packed"):
                    _check(test_attention.run(sp, documents, torch.float32, "causal", device="cuda"), 1e-5)


def _convolution(world: int) -> None:
    for layout in LAYOUTS.values():
        for documents, cu_seqlens in DOCUMENTS.items():
            sp = SequenceParallel(dist.group.WORLD, layout(TOKENS, world, cu_seqlens))
            for dtype, tolerance in TOLERANCE.items():
                for taps in test_convolution.TAPS:
                    _check(test_convolution.run(sp, documents, dtype, taps, "silu", device="cuda"), tolerance)


def _mixtures(world: int) -> None:
    """Whole layers in Triton's kernels against one rank's in float64: outputs and every gradient."""
    for recurrence in ("basic", "gla", "gated_delta_net", "kda"):
        torch.manual_seed(0)
        layer = MixtureOfMemories(64, 4, recurrence=recurrence)
        # Of one kind of number all choices are the same.
        layer.router.bfloat16().float()
        random = Inputs(1, torch.float32)
        for layout in LAYOUTS.values():
            for cu_seqlens in DOCUMENTS.values():
                sp = SequenceParallel(dist.group.WORLD, layout(TOKENS, world, cu_seqlens))
                x, dy = (random.normal(1 if cu_seqlens else 2, TOKENS, 64).bfloat16().float() for _ in range(2))
                want = test_mom_gpu.results(deepcopy(layer).double(), x.double(), dy.double(), cu_seqlens)
                here = deepcopy(layer).cuda()
                own = [sp.layout.shard(part, sp.rank).cuda() for part in (x, dy)]
                given = test_mom_gpu.results(here, own[0], own[1], None, sp)
                for key, value in given.items():
                    if key in ("y", "x"):
                        want[key] = sp.layout.shard(want[key], sp.rank)
                    else:
                        dist.all_reduce(value)
                assert_close({key: value.cpu() for key, value in given.items()}, want, 1e-4)


def _check(results: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]], tolerance: float) -> None:
    given, wanted = results
    assert all(x.is_cuda for x in given.values())
    assert_close(given, wanted, tolerance)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("check", [_linear, _exchanges, _methods, _softmax, _convolution, _mixtures])
def test_every_op_on_every_layout(world: int, check: Callable[[int], None]) -> None:
    mp.spawn(_rank, (world, _port(), check), nprocs=world)
