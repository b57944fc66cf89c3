"""What all kernels share: products of tiles at a stated precision, and the tokens of a segment as a tensor descriptor."""

from __future__ import annotations

import os

import triton
import triton.language as tl

#: Whether kernels run in Triton's interpreter, on CPU tensors. Read once, as Triton itself does.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

# The interpreter multiplies the raw bits of bfloat16 tiles: there they are widened first.
_WIDEN: tl.constexpr = tl.constexpr(INTERPRETED)
#: Log-decays are kept in powers of two: exp2 is the instruction that the device has.
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def product(x, y, PRECISION: tl.constexpr):
    """``x @ y`` in float32. PRECISION: "bf16", or how float32 tiles are multiplied: "tf32", "tf32x3", "ieee"."""
    if PRECISION != "bf16":
        return tl.dot(x.to(tl.float32), y.to(tl.float32), input_precision=PRECISION)
    if _WIDEN:
        return tl.dot(x.to(tl.bfloat16).to(tl.float32), y.to(tl.bfloat16).to(tl.float32))
    return tl.dot(x.to(tl.bfloat16), y.to(tl.bfloat16))


@triton.jit
def add_product(sum, x, y, PRECISION: tl.constexpr):
    """``sum + x @ y``, as `product`."""
    if PRECISION != "bf16":
        return tl.dot(x.to(tl.float32), y.to(tl.float32), sum, input_precision=PRECISION)
    if _WIDEN:
        return tl.dot(x.to(tl.bfloat16).to(tl.float32), y.to(tl.bfloat16).to(tl.float32), sum)
    return tl.dot(x.to(tl.bfloat16), y.to(tl.bfloat16), sum)


@triton.jit
def split(x):
    """A float32 tile in two parts, high and low: what bfloat16 keeps of it, and what it keeps of the rest."""
    # Rounded by its bits, which spares a conversion there and back.
    high = ((x.to(tl.int32, bitcast=True) + 0x8000) & -0x10000).to(tl.float32, bitcast=True)
    return high.to(tl.bfloat16), (x - high).to(tl.bfloat16)


@triton.jit
def opaque(x):
    """x, which is bfloat16, as a left operand that Triton does not look through.

    It would make what it looks through a second time, in registers, and in every group of warps that multiplies with it.
    """
    if _WIDEN:
        return x
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], tl.bfloat16, is_pure=False, pack=2)


@triton.jit
def fine_product(sum, x, y, PRECISION: tl.constexpr):
    """``sum + x @ y`` without rounding float32 tiles to the precision: "bf16" takes them in two parts, "tf32" in three."""
    if PRECISION == "bf16":
        if x.dtype == tl.float32:
            high, low = split(x)
            if y.dtype == tl.float32:
                y_high, y_low = split(y)
                sum = add_product(sum, high, y_high, PRECISION)
                sum = add_product(sum, low, y_high, PRECISION)
                sum = add_product(sum, high, y_low, PRECISION)
            else:
                sum = add_product(sum, low, y, PRECISION)
                sum = add_product(sum, high, y, PRECISION)
        elif y.dtype == tl.float32:
            y_high, y_low = split(y)
            sum = add_product(sum, x, y_high, PRECISION)
            sum = add_product(sum, x, y_low, PRECISION)
        else:
            sum = add_product(sum, x, y, PRECISION)
    else:
        sum = add_product(sum, x, y, "tf32x3" if PRECISION == "tf32" else PRECISION)
    return sum


@triton.jit
def tokens_of(x, first, length, heads, D: tl.constexpr, C: tl.constexpr, BD: tl.constexpr):
    """One head's rows of ``x: [B, T, H, D]`` in a segment of `length` tokens, in tiles ``[C, BD]``.

    `first` is the row of the segment's first token, ``(b · T + t) · H + h``, int64. What lies outside the segment reads as
    zero and is not written.
    """
    return tl.make_tensor_descriptor(
        x + first * D, shape=[length, D], strides=[heads.to(tl.int64) * D, 1], block_shape=[C, BD]
    )


@triton.jit
def segment_of(bounds, T, H):
    """Of a program on a grid (B · H, segments, ..): its batch and head, its segment's first token and length, and `first`.

    `first` is the row of that token in ``[B · T · H, D]``, as `tokens_of` takes it.
    """
    bh = tl.program_id(0).to(tl.int64)
    start = tl.load(bounds + tl.program_id(1))
    length = (tl.load(bounds + tl.program_id(1) + 1) - start).to(tl.int32)
    return bh // H, bh % H, start, length, (bh // H * T + start) * H + bh % H


@triton.jit
def _places(x, row, left, rows, columns, H, D: tl.constexpr):
    at = x + row * D + rows[:, None] * (H * D) + columns[None, :]
    return at, (rows < left)[:, None] & (columns < D)[None, :]


@triton.jit
def load_rows(x, row, left, rows, columns, H, D: tl.constexpr):
    """Tokens of a chunk from ``x: [B, T, H, D]``, zero where there are none: for a program that takes no more than one chunk.

    There a tensor descriptor takes longer to make than the tile to load. The chunk's first token is at `row`, counted as
    `tokens_of` does, and there are `left` tokens from it to the segment's end.
    """
    at, inside = _places(x, row, left, rows, columns, H, D)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def store_rows(x, tile, row, left, rows, columns, H, D: tl.constexpr):
    """Write what `load_rows` reads, in the dtype of x."""
    at, inside = _places(x, row, left, rows, columns, H, D)
    tl.store(at, tile.to(x.dtype.element_ty), mask=inside)
