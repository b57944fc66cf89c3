"""Where an exchange of many steps runs, beside the computation, and how its ranks send each other tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from lasp.parallel.exposure import exposed

#: As which torch's profiler shows an exchange.
SPAN = "lasp exchange"


class Running(Protocol):
    """Something that was set going: `wait` for what it makes."""

    def wait(self) -> Tensor:
        """The result, for the current stream to read."""


class Lane:
    """One for each group of ranks: its exchanges follow one another in the order of their start.

    On a GPU they run on a stream of their own and never hold the host up. On CPUs each step waits for the ones before it, so
    they run in a thread of their own.
    """

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(1, "lasp exchange")
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> Lane:
        """The group's lane."""
        if group not in _made:
            _made[group] = cls()
        return _made[group]

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


#: Tells what an exchange sends from all else that the group's ranks send each other, where the backend looks at it (gloo). NCCL
#: goes by the order in which the host starts things, which is the same on all ranks.
_TAG = 1 << 20


@dataclass(frozen=True)
class Peers:
    """Some ranks of a group, here numbered from 0, that send each other tensors.

    They need no group of their own: all goes from one rank to another, in the group that is there.

    Attributes:
        group: the sequence-parallel ranks.
        ranks: the numbers in the group of those that take part.
    """

    group: dist.ProcessGroup
    ranks: tuple[int, ...]

    @classmethod
    def all(cls, group: dist.ProcessGroup) -> Peers:
        """Every rank of the group."""
        return cls(group, tuple(range(dist.get_world_size(group))))

    def transfer(self, sent: Iterable[tuple[int, Tensor]], received: Iterable[tuple[int, Tensor]]) -> None:
        """Send contiguous tensors and receive others, all at once, and wait until they are there.

        Two ranks' transfers are matched in the order in which both name them.
        """
        ways = [self._way(dist.isend, x, rank) for rank, x in sent if x.numel()]
        ways += [self._way(dist.irecv, x, rank) for rank, x in received if x.numel()]
        if ways:
            with named_failure():
                for work in dist.batch_isend_irecv(ways):
                    work.wait()

    def _way(self, way: Callable[..., object], x: Tensor, rank: int) -> dist.P2POp:
        return dist.P2POp(way, x, group=self.group, group_peer=self.ranks[rank], tag=_TAG)


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
    with torch.no_grad(), record_function(SPAN):
        return compute()


class _InThread:
    def __init__(self, future: Future[Tensor]):
        self._future = future

    def wait(self) -> Tensor:
        return exposed(self._future.result, torch.device("cpu"))


class _OnStream:
    def __init__(self, compute: Callable[[], Tensor], given: Sequence[Tensor], stream: torch.cuda.Stream):
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream), record_function(SPAN):
            self._result = compute()
        for x in given:
            x.record_stream(stream)
        self._done = stream.record_event()

    def wait(self) -> Tensor:
        current = torch.cuda.current_stream(self._result.device)
        exposed(lambda: current.wait_event(self._done), current.device)
        self._result.record_stream(current)
        return self._result
