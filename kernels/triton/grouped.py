"""The weight's gradient of a projection that differs from group to group of the rows: `lasp.ops.grouped`."""

from __future__ import annotations

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.triton.language import add_product
from lasp.kernels.triton.launch import Kernel, Launch, ready

#: Rows of a weight, its columns, and rows of tokens that a program multiplies at a time.
TILE = (128, 256, 64)


@triton.jit
def sum_of_outer_products(
    dy,
    x,
    dweight,
    bounds,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    BO: tl.constexpr,
    BI: tl.constexpr,
    BT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``dweight[g] = Σ_t dy_t x_tᵀ`` over the rows of each group. Grid: (blocks of OUT, blocks of IN, groups)."""
    # The last group is the largest where it is the shared memory's: it starts first.
    group = tl.num_programs(2) - 1 - tl.program_id(2)
    start = tl.load(bounds + group)
    length = (tl.load(bounds + group + 1) - start).to(tl.int32)
    dys = tl.make_tensor_descriptor(dy + start * OUT, shape=[length, OUT], strides=[OUT, 1], block_shape=[BT, BO])
    xs = tl.make_tensor_descriptor(x + start * IN, shape=[length, IN], strides=[IN, 1], block_shape=[BT, BI])
    down, across = tl.program_id(0) * BO, tl.program_id(1) * BI
    total = tl.zeros([BO, BI], dtype=tl.float32)
    for t in tl.range(0, length, BT, num_stages=STAGES):
        total = add_product(total, tl.trans(dys.load([t, down])), xs.load([t, across]), "bf16")
    rows, columns = down + tl.arange(0, BO), across + tl.arange(0, BI)
    at = dweight + group.to(tl.int64) * (OUT * IN) + rows[:, None] * IN + columns[None, :]
    tl.store(at, total.to(dweight.dtype.element_ty), mask=(rows < OUT)[:, None] & (columns < IN)[None, :])


_sum = Kernel(sum_of_outer_products)


def weight_gradient(dy: Tensor, x: Tensor, bounds: Tensor) -> Tensor:
    """The gradient ``[G, out, in]`` of a weight that differs from group to group, summed in float32.

    Args:
        dy: ``[N, out]``, bfloat16, `out` a multiple of 8.
        x: ``[N, in]``, likewise, sorted by group.
        bounds: the first row of each group, and N: int64 ``[G + 1]``.
    """
    out, into, groups = dy.shape[1], x.shape[1], len(bounds) - 1
    dweight = x.new_empty(groups, out, into)
    _launch(groups, out, into)(ready(dy), ready(x), dweight, bounds)
    return dweight


@lru_cache(maxsize=1024)
def _launch(groups: int, out: int, into: int) -> Launch:
    BO, BI, BT = TILE
    BO, BI = min(BO, _padded(out)), min(BI, _padded(into))
    return _sum.launch(
        (triton.cdiv(out, BO), triton.cdiv(into, BI), groups),
        OUT=out, IN=into, BO=BO, BI=BI, BT=BT, STAGES=4, warps=8 if BO * BI >= 128 * 128 else 4,
    )  # fmt: skip


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))
