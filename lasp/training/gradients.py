"""Gradients summed over all ranks, and their norm: of weights that every rank holds, and of weights that ranks share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.profiler import record_function

#: The largest buffer, in elements: 128 MiB of float32. A larger parameter has a buffer to itself.
BUCKET = 2**25


class Gradients:
    """Of one model's parameters.

    A parameter that every rank holds has for its gradient a view of a flat buffer: backward adds into it, nothing is copied to
    be sent, and there is one all-reduce a buffer. The gradient of one that ranks share is a `DTensor`; FSDP has summed it.

    Args:
        parameters: all of one dtype and device.
        group: the ranks.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], group: dist.ProcessGroup):
        self.group = group
        self.shared: list[nn.Parameter] = []
        buckets: list[list[nn.Parameter]] = []
        for parameter in parameters:
            self.device = parameter.device
            if isinstance(parameter, DTensor):
                self.shared.append(parameter)
                continue
            if not buckets or sum(p.numel() for p in buckets[-1]) + parameter.numel() > BUCKET:
                buckets.append([])
            buckets[-1].append(parameter)
        self.buffers = [_attach(bucket) for bucket in buckets]

    def zero(self) -> None:
        """Forget the last step's gradients."""
        for buffer in self.buffers:
            buffer.zero_()
        for parameter in self.shared:
            parameter.grad = None

    def sum(self) -> None:
        """Replace every gradient by its sum over the ranks: each rank's loss is its share of one global mean."""
        with record_function("lasp gradients"):
            works = [dist.all_reduce(buffer, group=self.group, async_op=True) for buffer in self.buffers]
            for work in works:
                if work is not None:
                    work.wait()

    def clip(self, limit: float) -> Tensor:
        """Scale the gradients to a global norm of at most `limit`; their norm before, without waiting for the device."""
        parts = [p.grad.to_local() for p in self.shared if isinstance(p.grad, DTensor)]
        squares = self._squares(self.buffers)
        if self.shared:
            of_parts = self._squares(parts)
            dist.all_reduce(of_parts, group=self.group)
            squares = squares + of_parts
        norm = squares.sqrt().to(torch.float32)
        factor = (limit / norm.clamp(min=1e-12)).clamp(max=1)
        for x in (*self.buffers, *parts):
            x.mul_(factor)
        return norm

    def _squares(self, given: Sequence[Tensor]) -> Tensor:
        """The sum of all squares: in float32 that over ten million numbers would be off by 4e-4 on a CPU."""
        norms = [torch.linalg.vector_norm(x, dtype=torch.float64).square() for x in given]
        return sum(norms, torch.zeros((), dtype=torch.float64, device=self.device))


def _attach(parameters: list[nn.Parameter]) -> Tensor:
    buffer = torch.zeros(sum(p.numel() for p in parameters), dtype=parameters[0].dtype, device=parameters[0].device)
    for parameter, piece in zip(parameters, buffer.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = piece.view_as(parameter)
    return buffer
