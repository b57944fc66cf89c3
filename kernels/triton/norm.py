"""The root-mean-square norm with its gate in one kernel forward and one backward.

Both read each row once and compute in float32. The backward computes a row's mean square again, for it has the row at hand,
so nothing is kept but the inputs. A fixed number of programs sum what they see of the weight's gradient, each by itself, and
the few sums are added at the end: in one order, so that two runs give the same bits.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lasp.kernels.triton.launch import Kernel, Launch, ready
from lasp.kernels.triton.tiling import processors

#: How many numbers a program holds at once, and of each of its threads.
TILE, BY_THREAD = 2048, 16
#: How many warps share the rows in the backward, for each of the device's processors.
WARPS = 32


def rms_norm(x: Tensor, gate: Tensor | None, weight: Tensor, eps: float, activation: str = "silu") -> Tensor:
    """``x / rms(x) · weight · activation(gate)``, every N numbers of the last axis by themselves.

    https://arxiv.org/abs/1910.07467, eq. 4; the gate as in https://arxiv.org/abs/2307.08621, eq. 8.

    Args:
        x: ``[..., n · N]``, bfloat16, float16 or float32.
        gate: alike, in a dtype of its own, or None.
        weight: ``[N]``, N at most `WIDEST`.
        eps: added to the mean square.
        activation: ``"silu"`` or ``"sigmoid"``.

    Returns:
        Alike, in x's dtype.
    """
    if torch.compiler.is_compiling():
        return torch.ops.lasp.rms_norm(x, gate, weight, eps, activation)
    return _RMSNorm.apply(x, gate, weight, eps, activation)


@triton.jit(do_not_specialize=["rows"])
def norm_forward(x, gate, weight, y, rows, eps, N: tl.constexpr, GATE: tl.constexpr, R: tl.constexpr, BN: tl.constexpr):
    """Grid: (blocks of R rows, 1, 1). Rows of N numbers, in tiles ``[R, BN]``. GATE: "silu", "sigmoid", or "" for none."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.arange(0, BN)
    inside = (row < rows)[:, None] & (column < N)[None, :]
    at = row[:, None] * N + column[None, :]
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=column < N, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(values * values, axis=1) / N + eps)
    normed = values * rstd[:, None] * scale[None, :]
    if GATE != "":
        opening = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
        normed *= tl.sigmoid(opening)
        if GATE == "silu":
            normed *= opening
    tl.store(y + at, normed.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def norm_backward(
    x,
    gate,
    weight,
    dy,
    dx,
    dgate,
    dweight,
    rows,
    eps,
    N: tl.constexpr,
    GATE: tl.constexpr,
    R: tl.constexpr,
    BN: tl.constexpr,
):
    """Grid: (programs, 1, 1), which take blocks of R rows by turns; ``dweight: [programs, N]``."""
    column = tl.arange(0, BN)
    scale = tl.load(weight + column, mask=column < N, other=0.0).to(tl.float32)
    total = tl.zeros([R, BN], dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, R), tl.num_programs(0)):
        row = tl.cast(block, tl.int64) * R + tl.arange(0, R)
        inside = (row < rows)[:, None] & (column < N)[None, :]
        at = row[:, None] * N + column[None, :]
        values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        slope = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(values * values, axis=1) / N + eps)[:, None]
        values *= rstd
        if GATE != "":
            opening = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
            share = tl.sigmoid(opening)
            steep = slope * values * scale[None, :] * share
            if GATE == "silu":
                steep *= 1 + opening * (1 - share)
                share *= opening
            else:
                steep *= 1 - share
            tl.store(dgate + at, steep.to(dgate.dtype.element_ty), mask=inside)
            slope *= share
        total += slope * values
        slope *= scale[None, :]
        along = tl.sum(slope * values, axis=1)[:, None] / N
        tl.store(dx + at, (rstd * (slope - values * along)).to(dx.dtype.element_ty), mask=inside)
    tl.store(dweight + tl.program_id(0) * N + column, tl.sum(total, axis=0), mask=column < N)


_forward, _backward = Kernel(norm_forward), Kernel(norm_backward)

#: The widest row that a program holds.
WIDEST = 8192


def forward(x: Tensor, gate: Tensor | None, weight: Tensor, eps: float, activation: str) -> Tensor:
    """`rms_norm` without gradients."""
    x, weight = ready(x), ready(weight)
    y = torch.empty_like(x)
    launch = _launch(
        _forward, None, x.numel() // weight.numel(), weight.numel(), "" if gate is None else activation, eps
    )
    launch(x, x if gate is None else ready(gate), weight, y)
    return y


def backward(
    dy: Tensor, x: Tensor, gate: Tensor | None, weight: Tensor, eps: float, activation: str
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The gradients of x, gate and weight, each in its tensor's dtype."""
    dy, x, weight = ready(dy), ready(x), ready(weight)
    dx, dgate = torch.empty_like(x), None
    if gate is not None:
        gate = ready(gate)
        dgate = torch.empty_like(gate)
    rows, width = x.numel() // weight.numel(), weight.numel()
    tile, warps = tile_of(width)
    programs = min(triton.cdiv(rows, tile["R"]), processors(x.device) * WARPS // warps)
    dweight = x.new_empty(programs, width, dtype=torch.float32)
    launch = _launch(_backward, programs, rows, width, "" if gate is None else activation, eps)
    launch(x, x if gate is None else gate, weight, dy, dx, dx if dgate is None else dgate, dweight)
    return dx, dgate, dweight.sum(0).to(weight.dtype)


@lru_cache(maxsize=1024)
def _launch(kernel: Kernel, programs: int | None, rows: int, width: int, gate: str, eps: float) -> Launch:
    """By so many programs, or by one for each tile."""
    tile, warps = tile_of(width)
    grid = (programs or triton.cdiv(rows, tile["R"]), 1, 1)
    return kernel.launch(grid, rows, eps, N=width, GATE=gate, **tile, warps=warps)


def tile_of(width: int) -> tuple[dict[str, int], int]:
    """The tile of a program, and how many warps hold it."""
    padded = triton.next_power_of_2(width)
    rows = max(1, TILE // padded)
    return {"R": rows, "BN": padded}, max(1, rows * padded // (32 * BY_THREAD))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor | None, weight: Tensor, eps: float, activation: str) -> Tensor:
        ctx.how = eps, activation
        ctx.save_for_backward(x, gate, weight)
        return forward(x, gate, weight, eps, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight = ctx.saved_tensors
        return *backward(dy, x, gate, weight, *ctx.how), None, None


# -- the same as operators of torch's library, which a compiler takes as they are --------------------------------------


@torch.library.custom_op(
    "lasp::rms_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor? gate, Tensor weight, float eps, str activation) -> Tensor",
)
def _operator(x: Tensor, gate: Tensor | None, weight: Tensor, eps: float, activation: str) -> Tensor:
    return forward(x, gate, weight, eps, activation)


@torch.library.custom_op(
    "lasp::rms_norm_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor? gate, Tensor weight, float eps, str activation) -> Tensor[]",
)
def _operator_backward(
    dy: Tensor, x: Tensor, gate: Tensor | None, weight: Tensor, eps: float, activation: str
) -> list[Tensor]:
    return [grad for grad in backward(dy, x, gate, weight, eps, activation) if grad is not None]


@_operator.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@_operator_backward.register_fake
def _(_dy: Tensor, x: Tensor, gate: Tensor | None, weight: Tensor, *_: Any) -> list[Tensor]:
    return [y.new_empty(y.shape) for y in (x, gate, weight) if y is not None]


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor | None, Tensor, float, str], **_: Any) -> None:
    *tensors, eps, activation = inputs
    ctx.how = eps, activation
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx, *dgate, dweight = torch.ops.lasp.rms_norm_backward(dy, *ctx.saved_tensors, *ctx.how)
    return dx, dgate[0] if dgate else None, dweight, None, None


_operator.register_autograd(_gradients, setup_context=_keep)
