"""How long a device takes: for a call, for its kernels alone, for copies and products; and one rank without the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

#: For how many milliseconds a call is timed at least: a host that is disturbed for a moment does not decide.
LONG_ENOUGH = 50.0


def milliseconds(call: Callable[[], Any], calls: int) -> float:
    """The median time of a call, on the device, the gaps between its kernels included; of `calls`, of short ones more."""
    for _ in range(3):
        call()

    def times(count: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        torch.cuda.synchronize()
        for first, last in events:
            first.record()
            call()
            last.record()
        torch.cuda.synchronize()
        return sorted(first.elapsed_time(last) for first, last in events)

    calls = max(calls, int(LONG_ENOUGH / max(times(3)[1], 0.1)))
    return times(calls)[calls // 2]


def busy(call: Callable[[], Any], calls: int) -> float:
    """The milliseconds that the device computes in a call, the gaps between its kernels left out."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / calls / 1000


def ceilings() -> tuple[float, float]:
    """What the device copies, bytes a second, and multiplies in bfloat16, operations a second."""
    x = torch.empty(2**30, dtype=torch.bfloat16, device="cuda").normal_()
    y = torch.empty_like(x)
    copied = 2 * x.nbytes / milliseconds(lambda: y.copy_(x), 10) * 1000
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return copied, 2 * 8192**3 / milliseconds(lambda: a @ b, 10) * 1000


@contextmanager
def fake_group(size: int) -> Iterator[dist.ProcessGroup]:
    """A process group of `size` ranks of which this is one in the middle, and whose states do not travel.

    torch's fake group copies what it is given to the place of every rank: not even that is done.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=size // 2 - 1, world_size=size)
    group = dist.group.WORLD
    assert group is not None

    def silent(rows: Tensor, _group: dist.ProcessGroup | None) -> tuple[Tensor, None]:
        return rows.new_empty(size * rows.shape[0], *rows.shape[1:]), None

    def unsent(*_: Any, **__: Any) -> None:
        pass

    with (
        patch("lasp.parallel.exchange.all_gather.all_gather_rows", silent),
        patch("torch.distributed.all_gather_into_tensor", unsent),
    ):
        yield group
    dist.destroy_process_group()
