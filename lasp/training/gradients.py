"""Gradients in a few flat buffers, summed over all ranks by one all-reduce a buffer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

#: The largest buffer, in elements: 128 MiB of float32. A larger parameter has a buffer to itself.
BUCKET = 2**25


class Gradients:
    """Every parameter's gradient is a view of a flat buffer: backward adds into it, and nothing is copied to be sent.

    Args:
        parameters: all of one dtype and device.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        buckets: list[list[nn.Parameter]] = [[]]
        for parameter in parameters:
            if buckets[-1] and sum(p.numel() for p in buckets[-1]) + parameter.numel() > BUCKET:
                buckets.append([])
            buckets[-1].append(parameter)
        self.buffers = [_attach(bucket) for bucket in buckets]

    def zero(self) -> None:
        """Forget the last step's gradients."""
        for buffer in self.buffers:
            buffer.zero_()

    def sum_over(self, group: dist.ProcessGroup) -> None:
        """Replace every gradient by its sum over the ranks: each rank's loss is its share of one global mean."""
        works = [dist.all_reduce(buffer, group=group, async_op=True) for buffer in self.buffers]
        for work in works:
            if work is not None:
                work.wait()

    def clip(self, limit: float) -> Tensor:
        """Scale the gradients to a global norm of at most `limit`; their norm before, without waiting for the device."""
        # In float32 the sum over ten million numbers would be off by 4e-4 on a CPU.
        norms = [torch.linalg.vector_norm(buffer, dtype=torch.float64) for buffer in self.buffers]
        norm = torch.linalg.vector_norm(torch.stack(norms)).to(self.buffers[0].dtype)
        factor = (limit / norm.clamp(min=1e-12)).clamp(max=1)
        for buffer in self.buffers:
            buffer.mul_(factor)
        return norm


def _attach(parameters: list[nn.Parameter]) -> Tensor:
    buffer = torch.zeros(sum(p.numel() for p in parameters), dtype=parameters[0].dtype, device=parameters[0].device)
    for parameter, piece in zip(parameters, buffer.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = piece.view_as(parameter)
    return buffer
