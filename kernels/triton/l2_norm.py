"""Vectors of length 1, in one kernel forward and one backward, which needs the results and not what they were made of."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lasp.kernels.triton.launch import Kernel, Launch, ready
from lasp.kernels.triton.norm import tile_of


def l2_norm(x: Tensor, eps: float) -> Tensor:
    """``x / sqrt(Σ x² + eps)`` over the last axis. Its result is kept, as what reads it does, and not x.

    Args:
        x: ``[..., N]``, bfloat16, float16 or float32, N at most `WIDEST`.
        eps: added to the sum of squares.
    """
    if torch.compiler.is_compiling():
        made: Tensor = torch.ops.lasp.l2_norm(x, eps)[0]
    else:
        made = _L2Norm.apply(x, eps)
    return made


@triton.jit(do_not_specialize=["rows"])
def unit_forward(x, y, lengths, rows, eps, N: tl.constexpr, R: tl.constexpr, BN: tl.constexpr):
    """`l2_norm`, and 1 over the length of each row. Grid: (blocks of R rows, 1, 1)."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.arange(0, BN)
    at = row[:, None] * N + column[None, :]
    inside = (row < rows)[:, None] & (column < N)[None, :]
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    short = tl.rsqrt(tl.sum(values * values, axis=1) + eps)
    tl.store(y + at, (values * short[:, None]).to(y.dtype.element_ty), mask=inside)
    tl.store(lengths + row, short, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def unit_backward(y, lengths, dy, dx, rows, N: tl.constexpr, R: tl.constexpr, BN: tl.constexpr):
    """Of the results, so that the inputs need not be kept. Grid: (blocks of R rows, 1, 1)."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.arange(0, BN)
    at = row[:, None] * N + column[None, :]
    inside = (row < rows)[:, None] & (column < N)[None, :]
    values = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    short = tl.load(lengths + row, mask=row < rows, other=0.0)
    slope -= values * tl.sum(slope * values, axis=1)[:, None]
    tl.store(dx + at, (slope * short[:, None]).to(dx.dtype.element_ty), mask=inside)


_forward, _backward = Kernel(unit_forward), Kernel(unit_backward)


def forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`l2_norm` without gradients, and 1 over the rows' lengths ``[rows]``, float32."""
    x = ready(x)
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    y, lengths = torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)
    _launch(_forward, rows, width, eps)(x, y, lengths)
    return y, lengths


def backward(dy: Tensor, y: Tensor, lengths: Tensor) -> Tensor:
    """The gradient of x."""
    dy, y = ready(dy), ready(y)
    dx = torch.empty_like(dy)
    _launch(_backward, len(lengths), y.shape[-1])(y, ready(lengths), dy, dx)
    return dx


@lru_cache(maxsize=1024)
def _launch(kernel: Kernel, rows: int, width: int, *eps: float) -> Launch:
    tile, warps = tile_of(width)
    return kernel.launch((triton.cdiv(rows, tile["R"]), 1, 1), rows, *eps, N=width, **tile, warps=warps)


class _L2Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        y, lengths = forward(x, eps)
        ctx.save_for_backward(y, lengths)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return backward(dy, *ctx.saved_tensors), None


# -- the same as operators of torch's library, which a compiler takes as they are --------------------------------------


@torch.library.custom_op("lasp::l2_norm", mutates_args=(), schema="(Tensor x, float eps) -> (Tensor, Tensor)")
def _operator(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return forward(x, eps)


@torch.library.custom_op(
    "lasp::l2_norm_backward", mutates_args=(), schema="(Tensor dy, Tensor y, Tensor lengths) -> Tensor"
)
def _operator_backward(dy: Tensor, y: Tensor, lengths: Tensor) -> Tensor:
    return backward(dy, y, lengths)


@_operator.register_fake
def _(x: Tensor, _eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


@_operator_backward.register_fake
def _(dy: Tensor, _y: Tensor, _lengths: Tensor) -> Tensor:
    return dy.new_empty(dy.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, float], output: tuple[Tensor, Tensor]) -> None:  # noqa: ARG001, torch calls it by these names
    ctx.save_for_backward(*output)


def _gradients(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor, None]:
    return torch.ops.lasp.l2_norm_backward(dy, *ctx.saved_tensors), None


_operator.register_autograd(_gradients, setup_context=_keep)
