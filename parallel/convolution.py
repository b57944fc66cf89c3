"""The short causal convolution with gradients: joins what one device computes to the halo that other ranks hold.

The exchange and the kernels are one autograd function, so that the gradients of the halo's rows are added in place to the few
tokens that they belong to, and not as a second tensor of all tokens. Under ``torch.compile`` the same functions are operators
of torch's library, in which the ranks go by their name.
"""

from __future__ import annotations

from operator import index
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lasp.kernels import convolution as pytorch
from lasp.kernels import triton
from lasp.parallel.halo import Halo, bring, take_back
from lasp.parallel.operators import keep
from lasp.parallel.sequence_parallel import SequenceParallel


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, sp: SequenceParallel) -> Tensor:
    """``y_t = activation(bias + Σ_j weight[:, W−1−j] x_{t−j})`` within documents: `lasp.ops.causal_conv1d`.

    Args:
        x: ``[B, T_local, D]``.
        weight: ``[D, W]``.
        bias: ``[D]``, or None.
        silu: whether the activation is silu, or none.
        sp: the ranks and the layout.

    Returns:
        ``[B, T_local, D]`` in x's dtype.
    """
    y: Tensor
    if torch.compiler.is_compiling():
        y, _ = torch.ops.lasp.causal_conv1d(x, weight, bias, silu, keep(sp.name))
    else:
        y = _Convolution.apply(x, weight, bias, silu, sp)
    return y


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, sp: SequenceParallel) -> tuple[Tensor, Tensor]:
    """The output, and the halo ``[B, rows, D]``, which the backward reads again."""
    halo = Halo.of(sp.layout, sp.rank, weight.shape[1] - 1)
    rows = bring(x, halo, sp.group)
    return form_of(x, weight).forward(x, rows, weight, bias, silu, halo.pieces), rows


def backward(
    dy: Tensor, x: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, sp: SequenceParallel
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of x, weight and bias; the last two are this rank's shares."""
    halo = Halo.of(sp.layout, sp.rank, weight.shape[1] - 1)
    dx, drows, dweight, dbias = form_of(x, weight).backward(dy, x, rows, weight, bias, silu, halo.pieces)
    take_back(drows, dx, halo, sp.group)
    return dx, dweight, dbias


def form_of(x: Tensor, weight: Tensor) -> ModuleType:
    """Triton's kernels on a GPU, PyTorch elsewhere."""
    if triton.serves(x):
        from lasp.kernels.triton import convolution

        if weight.shape[1] <= convolution.MOST_TAPS:
            return convolution
    return pytorch


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, sp: SequenceParallel) -> Tensor:
        y, rows = forward(x, weight, bias, silu, sp)
        ctx.silu, ctx.sp = silu, sp
        ctx.save_for_backward(x, rows, weight, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        x, rows, weight, bias = ctx.saved_tensors
        return *backward(dy, x, rows, weight, bias, ctx.silu, ctx.sp), None, None


# -- the same as operators of torch's library, which a compiler takes as they are --------------------------------------


@torch.library.custom_op(
    "lasp::causal_conv1d",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, bool silu, str sp) -> (Tensor, Tensor)",
)
def _operator(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, sp: str) -> tuple[Tensor, Tensor]:
    y, rows = forward(x, weight, bias, silu, SequenceParallel.named(sp))
    return y, rows.contiguous()


@_operator.register_fake
def _(x: Tensor, weight: Tensor, _bias: Tensor | None, _silu: bool, sp: str) -> tuple[Tensor, Tensor]:
    ranks = SequenceParallel.named(sp)
    # A graph is made for one number of taps: `index` asks for the number itself.
    halo = Halo.of(ranks.layout, ranks.rank, index(weight.shape[1]) - 1)
    return x.new_empty(x.shape), x.new_empty(x.shape[0], halo.pieces.halo, x.shape[2])


@torch.library.custom_op(
    "lasp::causal_conv1d_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor halo, Tensor weight, Tensor? bias, bool silu, str sp) -> Tensor[]",
)
def _operator_backward(
    dy: Tensor, x: Tensor, halo: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, sp: str
) -> list[Tensor]:
    grads = backward(dy, x, halo, weight, bias, silu, SequenceParallel.named(sp))
    return [grad.contiguous() for grad in grads if grad is not None]


@_operator_backward.register_fake
def _(_dy: Tensor, x: Tensor, _halo: Tensor, weight: Tensor, bias: Tensor | None, *_: Any) -> list[Tensor]:
    return [y.new_empty(y.shape) for y in (x, weight, bias) if y is not None]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.silu, ctx.sp = inputs
    ctx.save_for_backward(x, output[1], weight, bias)


def _gradients(ctx: Any, dy: Tensor, _dhalo: Tensor) -> tuple[Tensor | None, ...]:
    dx, dweight, *dbias = torch.ops.lasp.causal_conv1d_backward(dy, *ctx.saved_tensors, ctx.silu, ctx.sp)
    return dx, dweight, dbias[0] if dbias else None, None, None


_operator.register_autograd(_gradients, setup_context=_setup)
