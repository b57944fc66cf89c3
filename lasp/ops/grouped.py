"""A linear projection whose weight differs from group to group of the rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lasp.kernels import Groups, triton

#: Up to so many columns of all groups together, every row is multiplied with all of them: reading it takes longer.
NARROW = 128


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, groups: Groups) -> Tensor:
    """``x @ weight[g].T + bias[g]``, g being the group of each row.

    On a GPU nothing waits to learn how many rows a group has, but for weights of more than `NARROW` columns which are not
    bfloat16, or whose sizes are no multiples of 8.

    Args:
        x: ``[N, in]``, sorted by group.
        weight: ``[G, out, in]``.
        bias: ``[G, out]``, or None.
        groups: which rows are whose.

    Returns:
        ``[N, out]``, under autocast in its dtype.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    count, out, into = weight.shape
    if not x.is_cuda:
        return _one_by_one(x, weight, bias, groups)
    if count * out <= NARROW:
        of_all = F.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
        return of_all.view(len(x), count, out).take_along_dim(groups.of_row[:, None, None], 1).squeeze(1)
    if x.dtype != torch.bfloat16 or out % 8 or into % 8 or not len(x) or not triton.serves(x):
        return _one_by_one(x, weight, bias, groups)
    y: Tensor = _Grouped.apply(x, weight, groups)
    if bias is None:
        return y
    # A product, whose gradient is one too: sums over a group's rows are made in float32.
    own = groups.of_row[:, None] == torch.arange(count, device=x.device)
    return torch.addmm(y, own.to(y.dtype), bias)


def _one_by_one(x: Tensor, weight: Tensor, bias: Tensor | None, groups: Groups) -> Tensor:
    parts = x.split(groups.counts.tolist())
    biases = [None] * len(parts) if bias is None else bias.unbind()
    return torch.cat([F.linear(*each) for each in zip(parts, weight.unbind(), biases, strict=True)])


class _Grouped(torch.autograd.Function):
    """The products of all groups in one launch, whose bounds the device reads."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
        ctx.groups = groups
        ctx.save_for_backward(x, weight)
        y: Tensor = torch._grouped_mm(x.contiguous(), weight.transpose(1, 2), offs=groups.ends)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        from lasp.kernels.triton.grouped import weight_gradient

        (x, weight), groups = ctx.saved_tensors, ctx.groups
        dy = dy.contiguous()
        dx = torch._grouped_mm(dy, weight, offs=groups.ends) if ctx.needs_input_grad[0] else None
        # torch's own product of the kind takes no groups but of whole multiples of 8 rows.
        return dx, weight_gradient(dy, x, groups.bounds) if ctx.needs_input_grad[1] else None, None
