"""How long the computation waits for what travels between ranks: what of an exchange no computation hides.

Every wait of this library goes through `exposed`. While no meter runs it only waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.profiler import record_function

R = TypeVar("R")

#: As which torch's profiler shows a wait that is metered.
SPAN = "lasp waiting"


class Meter:
    """Adds up the waits inside its ``with`` blocks, of all threads, which autograd's backward has on a GPU.

    On CPUs these are the times in which the host is blocked. On a GPU events are recorded before and after the wait in the
    stream that computes: no host and no device waits for the meter.
    """

    def __init__(self) -> None:
        self._blocked: list[float] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._before: Meter | None = None

    def __enter__(self) -> Meter:
        global _meter
        self._before, _meter = _meter, self
        return self

    def __exit__(self, *_: object) -> None:
        global _meter
        _meter, self._before = self._before, None

    def time(self, wait: Callable[[], R], device: torch.device) -> R:
        """Wait, and add how long that took."""
        with record_function(SPAN):
            if device.type == "cuda":
                stream = torch.cuda.current_stream(device)
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record(stream)
                result = wait()
                last.record(stream)
                self._events.append((first, last))
            else:
                began = time.perf_counter()
                result = wait()
                self._blocked.append(time.perf_counter() - began)
        return result

    def read(self) -> float:
        """The seconds since the last reading; waits for the device unless it has come so far."""
        blocked, self._blocked = self._blocked, []
        events, self._events = self._events, []
        for _, last in events[-1:]:
            last.synchronize()
        return sum(blocked) + sum(first.elapsed_time(last) for first, last in events) / 1000


_meter: Meter | None = None


def exposed(wait: Callable[[], R], device: torch.device) -> R:
    """Wait for what comes from other ranks: what `wait` returns.

    Args:
        wait: returns when the current stream, or on CPUs the host, may read what came.
        device: where the tensors are.
    """
    return wait() if _meter is None else _meter.time(wait, device)
