"""The short causal convolution, bias and activation in one kernel forward and one backward: `lasp.kernels.convolution`.

A program walks along the tokens of one piece with some channels and holds the last W−1 rows in registers, so every row is
read once, wherever it lies: among the local tokens or in the halo. The backward walks W−1 tokens further than it owns,
computes the pre-activation again, and holds the last slopes alike. A fixed number of programs sum what they see of the
weight's gradient, each by itself, and the few sums are added at the end: in one order, so two runs give the same bits.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.convolution import Pieces
from lasp.kernels.triton.launch import Kernel, Launch, ready
from lasp.kernels.triton.tiling import processors

#: How many tokens of a piece are one block, and how many of them are read before they are used.
BLOCK, AHEAD = 32, 4
#: The most taps that a program holds, and that do not reach over a whole block.
MOST_TAPS = 32
#: By the number of taps, how many channels a thread has: the last W − 1 rows of them fit into its registers.
CHANNELS = {4: 4, 8: 2, MOST_TAPS: 1}
#: How many warps share the blocks in the backward, for each of the device's processors.
WARPS = 32


@triton.jit
def row_before(x, halo, at, start, halo_end, before, channel, D: tl.constexpr):
    """The row at place `at` of a piece that starts at `start`, before which stand the `before` halo rows up to halo_end."""
    inside = channel < D
    here = tl.load(x + at * D + channel, mask=inside & (at >= start), other=0.0)
    row = halo_end + at - start
    there = tl.load(halo + row * D + channel, mask=inside & (at < start) & (row >= halo_end - before), other=0.0)
    return here.to(tl.float32) + there.to(tl.float32)


@triton.jit(do_not_specialize=["T", "rows"])
def convolution_forward(
    x,
    halo,
    weight,
    bias,
    y,
    blocks,
    T,
    rows,
    D: tl.constexpr,
    W: tl.constexpr,
    BIASED: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    BD: tl.constexpr,
):
    """Grid: (blocks, blocks of BD channels, B)."""
    blocks += tl.program_id(0).to(tl.int64) * 5
    first, start, end = tl.load(blocks).to(tl.int64), tl.load(blocks + 1).to(tl.int64), tl.load(blocks + 2)
    halo_end, before = tl.load(blocks + 3).to(tl.int64), tl.load(blocks + 4)
    stop = tl.minimum(first + BLOCK, end)
    channel = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = channel < D
    batch = tl.program_id(2).to(tl.int64)
    x += batch * T * D
    y += batch * T * D
    halo += batch * rows * D
    base = tl.zeros([BD], dtype=tl.float32)
    if BIASED:
        base += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    taps = ()
    for j in tl.static_range(W):
        taps += (tl.load(weight + channel * W + j, mask=inside, other=0.0).to(tl.float32),)
    seen = ()
    for i in tl.static_range(W - 1):
        seen += (row_before(x, halo, first - (W - 1) + i, start, halo_end, before, channel, D),)
    for t in range(first, stop, AHEAD):
        for i in tl.static_range(AHEAD):
            seen += (tl.load(x + (t + i) * D + channel, mask=inside & (t + i < stop), other=0.0).to(tl.float32),)
        for i in tl.static_range(AHEAD):
            sum = base
            for j in tl.static_range(W):
                sum += taps[j] * seen[i + j]
            if SILU:
                sum *= tl.sigmoid(sum)
            tl.store(y + (t + i) * D + channel, sum.to(y.dtype.element_ty), mask=inside & (t + i < stop))
        seen = seen[AHEAD:]


@triton.jit(do_not_specialize=["T", "rows", "count"])
def convolution_backward(
    x,
    halo,
    weight,
    bias,
    dy,
    dx,
    dhalo,
    sums,
    blocks,
    T,
    rows,
    count,
    D: tl.constexpr,
    W: tl.constexpr,
    BIASED: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    BD: tl.constexpr,
):
    """Grid: (programs, blocks of BD channels, B); ``sums: [B, programs, W + 1, D]``, the weight's and the bias' gradients."""
    programs = tl.num_programs(0)
    program = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = channel < D
    batch = tl.program_id(2).to(tl.int64)
    x += batch * T * D
    dy += batch * T * D
    dx += batch * T * D
    halo += batch * rows * D
    dhalo += batch * rows * D
    base = tl.zeros([BD], dtype=tl.float32)
    if BIASED:
        base += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    taps = ()
    dtaps = ()
    for j in tl.static_range(W):
        taps += (tl.load(weight + channel * W + j, mask=inside, other=0.0).to(tl.float32),)
        dtaps += (tl.zeros([BD], dtype=tl.float32),)
    dbase = tl.zeros([BD], dtype=tl.float32)
    for block in range(program * count // programs, (program + 1) * count // programs):
        row = blocks + block * 5
        first, start, end = tl.load(row).to(tl.int64), tl.load(row + 1).to(tl.int64), tl.load(row + 2)
        halo_end, before = tl.load(row + 3).to(tl.int64), tl.load(row + 4)
        stop = tl.minimum(first + BLOCK, end)
        seen = ()
        slopes = ()
        for i in tl.static_range(W - 1):
            seen += (row_before(x, halo, first - (W - 1) + i, start, halo_end, before, channel, D),)
            slopes += (tl.zeros([BD], dtype=tl.float32),)
        for t in range(first, stop + (W - 1), AHEAD):
            given = ()
            for i in tl.static_range(AHEAD):
                there = inside & (t + i < end)
                seen += (tl.load(x + (t + i) * D + channel, mask=there, other=0.0).to(tl.float32),)
                given += (tl.load(dy + (t + i) * D + channel, mask=there, other=0.0).to(tl.float32),)
            for i in tl.static_range(AHEAD):
                slope = given[i]
                if SILU:
                    sum = base
                    for j in tl.static_range(W):
                        sum += taps[j] * seen[i + j]
                    share = tl.sigmoid(sum)
                    slope *= share * (1 + sum * (1 - share))
                slopes += (slope,)
                # Tokens past the stop are another block's.
                owned = tl.where(t + i < stop, slope, 0.0)
                dbase += owned
                further = ()
                for j in tl.static_range(W):
                    further += (dtaps[j] + owned * seen[i + j],)
                dtaps = further
                # By now all are seen that read the row W−1 back.
                back = t + i - (W - 1)
                total = tl.zeros([BD], dtype=tl.float32)
                for j in tl.static_range(W):
                    total += taps[W - 1 - j] * slopes[i + j]
                tl.store(
                    dx + back * D + channel,
                    total.to(dx.dtype.element_ty),
                    mask=inside & (back >= first) & (back < stop),
                )
                if back < start:
                    # A block has no fewer than W − 1 tokens or is its piece's last: only a piece's first comes here.
                    halo_row = halo_end + back - start
                    tl.store(
                        dhalo + halo_row * D + channel,
                        total.to(dhalo.dtype.element_ty),
                        mask=inside & (halo_row >= halo_end - before),
                    )
            seen = seen[AHEAD:]
            slopes = slopes[AHEAD:]
    sums += (batch * programs + program) * (W + 1) * D
    for j in tl.static_range(W):
        tl.store(sums + j * D + channel, dtaps[j], mask=inside)
    tl.store(sums + W * D + channel, dbase, mask=inside)


_forward, _backward = Kernel(convolution_forward), Kernel(convolution_backward)


def forward(x: Tensor, halo: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, pieces: Pieces) -> Tensor:
    """As `lasp.kernels.convolution.forward`, for x in bfloat16, float16 or float32."""
    x, halo, weight = ready(x), ready(halo), ready(weight)
    bias = bias if bias is None else ready(bias)
    y = torch.empty_like(x)
    blocks = pieces.blocks(BLOCK, x.device)
    (B, T, D), W = x.shape, weight.shape[1]
    launch = _launch(_forward, len(blocks), B, D, W, bias is not None, silu, T, halo.shape[1])
    launch(x, halo if halo.numel() else x, weight, weight if bias is None else bias, y, blocks)
    return y


def backward(
    dy: Tensor, x: Tensor, halo: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, pieces: Pieces
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As `lasp.kernels.convolution.backward`, for x in bfloat16, float16 or float32."""
    dy, x, halo, weight = ready(dy), ready(x), ready(halo), ready(weight)
    bias = bias if bias is None else ready(bias)
    # Before a piece without tokens nothing is read.
    dx, dhalo = torch.empty_like(x), torch.zeros_like(halo)
    blocks = pieces.blocks(BLOCK, x.device)
    (B, T, D), W = x.shape, weight.shape[1]
    channels, warps = _tile(D, W)
    programs = min(len(blocks), max(1, processors(x.device) * WARPS // max(1, warps * triton.cdiv(D, channels) * B)))
    sums = x.new_empty(B, programs, W + 1, D, dtype=torch.float32)
    launch = _launch(_backward, programs, B, D, W, bias is not None, silu, T, halo.shape[1], len(blocks))
    launch(
        x, halo if halo.numel() else x, weight, weight if bias is None else bias, dy, dx,
        dhalo if halo.numel() else dx, sums, blocks,
    )  # fmt: skip
    dweight = sums[:, :, :W].sum((0, 1)).t().to(weight.dtype).contiguous()
    return dx, dhalo, dweight, None if bias is None else sums[:, :, W].sum((0, 1)).to(bias.dtype)


@lru_cache(maxsize=1024)
def _launch(kernel: Kernel, programs: int, B: int, D: int, W: int, biased: bool, silu: bool, *numbers: int) -> Launch:
    channels, warps = _tile(D, W)
    return kernel.launch(
        (programs, triton.cdiv(D, channels), B), *numbers,
        D=D, W=W, BIASED=biased, SILU=silu, BLOCK=BLOCK, AHEAD=AHEAD, BD=channels, warps=warps,
    )  # fmt: skip


def _tile(width: int, taps: int) -> tuple[int, int]:
    """How many channels a program has, and how many warps."""
    by_warp = 32 * next(channels for most, channels in CHANNELS.items() if taps <= most)
    warps = min(4, triton.next_power_of_2(triton.cdiv(width, by_warp)))
    return warps * by_warp, warps
