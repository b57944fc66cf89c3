"""Where an exchange of many steps runs: beside the computation, on ranks' own groups, so that nothing else comes between."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor


class Running(Protocol):
    """Something that was set going: `wait` for what it makes."""

    def wait(self) -> Tensor:
        """The result, for the current stream to read."""


class Lane:
    """One for each group of ranks, made by all of them together: its exchanges follow one another in the order of their start.

    On a GPU they run on a stream of their own and never hold the host up. On CPUs each step waits for the ones before it, so
    they run in a thread of their own.

    Attributes:
        group: the same ranks as a group for exchanges alone: what else the ranks send each other cannot be mistaken for it.
    """

    def __init__(self, group: dist.ProcessGroup):
        self._timeout = timeout_of(group)
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self.group = self.among(dist.get_process_group_ranks(group))
        self._worker = ThreadPoolExecutor(1, "lasp exchange")
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> Lane:
        """The group's lane. All its ranks ask for it the first time."""
        if group not in _made:
            _made[group] = cls(group)
        return _made[group]

    def among(self, ranks: Sequence[int]) -> dist.ProcessGroup:
        """Some of the ranks, by their numbers in the job, as a group for exchanges: made by them together, once."""
        key = tuple(ranks)
        if key not in self._groups:
            self._groups[key] = dist.new_group(list(key), timeout=self._timeout, use_local_synchronization=True)
        return self._groups[key]

    def run(self, compute: Callable[[], Tensor], given: Sequence[Tensor]) -> Running:
        """Run what communicates and computes, after everything that the current stream was told.

        Args:
            compute: makes the result.
            given: the tensors that it reads.
        """
        device = given[0].device
        if device.type != "cuda":
            return _InThread(self._worker.submit(_quietly, compute))
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return _OnStream(compute, given, self._streams[device])


_made: WeakKeyDictionary[dist.ProcessGroup, Lane] = WeakKeyDictionary()


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    """How long the group's ranks wait for each other."""
    backend = group._get_backend(torch.device("cuda" if "nccl" in dist.get_backend(group) else "cpu"))
    limit: timedelta = backend.options._timeout
    return limit


def transfer(
    sent: Sequence[tuple[int, Tensor]], received: Sequence[tuple[int, Tensor]], group: dist.ProcessGroup
) -> None:
    """Send contiguous tensors to ranks of the group and receive others, all at once, and wait until they are there.

    Two ranks' transfers are matched in the order in which both name them.
    """
    ways = [dist.P2POp(dist.isend, x, group=group, group_peer=rank) for rank, x in sent if x.numel()]
    ways += [dist.P2POp(dist.irecv, x, group=group, group_peer=rank) for rank, x in received if x.numel()]
    if ways:
        with named_failure():
            for work in dist.batch_isend_irecv(ways):
                work.wait()


@contextmanager
def named_failure() -> Iterator[None]:
    """What is between ranks fails because one of them has; the backend's line does not say so."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            "an exchange of states broke off: a rank has ended, or kept the others waiting for longer than the process "
            f"group's timeout; look at the first rank that failed ({str(error).splitlines()[0]})"
        ) from error


def _quietly(compute: Callable[[], Tensor]) -> Tensor:
    """A thread begins with gradients recorded."""
    with torch.no_grad():
        return compute()


class _InThread:
    def __init__(self, future: Future[Tensor]):
        self._future = future

    def wait(self) -> Tensor:
        return self._future.result()


class _OnStream:
    def __init__(self, compute: Callable[[], Tensor], given: Sequence[Tensor], stream: torch.cuda.Stream):
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            self._result = compute()
        for x in given:
            x.record_stream(stream)
        self._done = stream.record_event()

    def wait(self) -> Tensor:
        current = torch.cuda.current_stream(self._result.device)
        current.wait_event(self._done)
        self._result.record_stream(current)
        return self._result
