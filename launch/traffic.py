"""What a rank sends: the bytes of every collective, and how many there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor


@dataclass
class Traffic:
    """What was sent.

    Attributes:
        calls: how many collectives, by their names in torch.distributed.
        sent: bytes that left this rank for others, where every one of W ranks passes on W - 1 parts of W (of an all-reduce
            twice).
    """

    calls: dict[str, int] = field(default_factory=dict)
    sent: int = 0

    def add(self, name: str, sent: float) -> None:
        """One more call."""
        self.calls[name] = self.calls.get(name, 0) + 1
        self.sent += round(sent)


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count what this rank sends within the block."""
    traffic = Traffic()
    with ExitStack() as stack:
        for name, size in _SENT.items():
            stack.enter_context(patch.object(dist, name, _counting(getattr(dist, name), name, size, traffic)))
        yield traffic


def _counting(call: Callable[..., Any], name: str, size: Callable[..., float], traffic: Traffic) -> Callable[..., Any]:
    def counting(*args: Any, **kwargs: Any) -> Any:
        traffic.add(name, size(*args, **kwargs))
        return call(*args, **kwargs)

    return counting


def _gathered(_output: Tensor, rows: Tensor, group: dist.ProcessGroup | None = None, **_: Any) -> float:
    return rows.nbytes * (_size(group) - 1)


def _scattered(_output: Tensor, rows: Tensor, *_: Any, group: dist.ProcessGroup | None = None, **__: Any) -> float:
    return rows.nbytes * _others(group)


def _reduced(x: Tensor, *_: Any, group: dist.ProcessGroup | None = None, **__: Any) -> float:
    return 2 * x.nbytes * _others(group)


def _dealt(_output: Tensor, rows: Tensor, *splits: Any, group: dist.ProcessGroup | None = None, **named: Any) -> float:
    input_split_sizes = splits[1] if len(splits) > 1 else named.get("input_split_sizes")
    if not input_split_sizes:
        return rows.nbytes * _others(group)
    kept = input_split_sizes[dist.get_rank(group)]
    return rows.nbytes * (1 - kept / max(1, sum(input_split_sizes)))


def _handed(ways: list[dist.P2POp], *_: Any, **__: Any) -> float:
    return sum(way.tensor.nbytes for way in ways if way.op is dist.isend)


def _size(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group)


def _others(group: dist.ProcessGroup | None) -> float:
    return (_size(group) - 1) / _size(group)


#: What a call of each sends, from its arguments.
_SENT: dict[str, Callable[..., float]] = {
    "all_gather_into_tensor": _gathered,
    "reduce_scatter_tensor": _scattered,
    "all_reduce": _reduced,
    "all_to_all_single": _dealt,
    "batch_isend_irecv": _handed,
}
