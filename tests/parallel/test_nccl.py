"""The linear ops on GPU tensors over NCCL. Four ranks share one device: right for correctness, useless for timing."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lasp import SequenceParallel
from tests.parallel.test_linear import OPS, TOLERANCE, run
from tests.support import DOCUMENTS, LAYOUTS, TOKENS, assert_close

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


def _port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _rank(rank: int, world: int, port: int) -> None:
    # NCCL takes ranks on one device for a mistake unless they seem to be on different hosts.
    os.environ |= {"NCCL_HOSTID": f"host{rank}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
    torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    try:
        for op in OPS:
            for name, layout in LAYOUTS.items():
                for documents, cu_seqlens in DOCUMENTS.items():
                    sp = SequenceParallel(dist.group.WORLD, layout(TOKENS, world, cu_seqlens))
                    for dtype, tolerance in TOLERANCE.items():
                        given, wanted = run(op, sp, documents, dtype, True, True, device="cuda")
                        assert all(x.is_cuda for x in given.values()), (op, name)
                        assert_close(given, wanted, tolerance)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_every_op_on_every_layout(world: int) -> None:
    mp.spawn(_rank, (world, _port()), nprocs=world)
