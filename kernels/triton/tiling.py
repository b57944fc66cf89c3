"""How a computation is cut for a device: tiles of a kernel by shape and dtype, segments by the number of processors.

Nothing is tuned at run time: the choices below were measured on an H100 and an H200, and a kernel is compiled once for each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch

from lasp.kernels.triton.language import INTERPRETED


@dataclass(frozen=True)
class Tiles:
    """How kernels are cut for products of width DA with columns of width DC.

    Attributes:
        BA: DA, padded to a power of two.
        BC: how many of DC's columns a program takes.
        blocks: how many programs that makes.
        C: tokens a chunk.
        warps: warps a program.
        stages: chunks whose tiles are in flight.
    """

    BA: int
    BC: int
    blocks: int
    C: int
    warps: int
    stages: int


@cache
def tiles(DA: int, DC: int, dtype: torch.dtype) -> Tiles:
    """The tiles for inputs of a dtype."""
    BA, BC = padded(DA), padded(DC)
    if dtype != torch.bfloat16:
        C, warps, stages, BC = 32, 4, 1, min(BC, 32)
    elif BA > 128:
        C, warps, stages, BC = 64, 8, 2, min(BC, 64)
    elif BA * BC >= 128 * 128:
        C, warps, stages, BC = 64, 8, 3, 128
    else:
        C, warps, stages = 64, 4, 2
        BC = min(BC, 128)
    if INTERPRETED:
        C = 16
    return Tiles(BA, BC, -(-DC // BC), C, warps, stages)


@cache
def gated_tiles(DA: int, DC: int, dtype: torch.dtype) -> Tiles:
    """Those of the kernels that also make what the gates' gradients sum over. Sums are made for the C of `tiles`: keep it."""
    tile = tiles(DA, DC, dtype)
    # Two programs a processor: one computes while the other waits.
    if tile.warps == 8 and tile.BA <= 128:
        return replace(tile, BC=64, blocks=-(-DC // 64), warps=4, stages=2)
    return tile


@cache
def key_tiles(DA: int, DC: int, dtype: torch.dtype) -> Tiles:
    """The tiles of `key_decay`'s kernels. C is the same for K and V as for V and K: sums are made for all of them."""
    BA, BC = padded(DA), padded(DC)
    if dtype != torch.bfloat16:
        # float32 is walked in short chunks; these are for what needs no pairs.
        C, warps, stages, BC = 16 if dtype == torch.float32 else 32, 4, 1, min(BC, 32)
    elif max(BA, BC) > 128:
        C, warps, stages, BC = 32, 8, 1, min(BC, 64)
    else:
        C, warps, stages, BC = 64, 8, 2, min(BC, 128)
    if INTERPRETED:
        C = min(C, 32)
    return Tiles(BA, BC, -(-DC // BC), C, warps, stages)


@cache
def column_tiles(DA: int, DC: int, dtype: torch.dtype) -> Tiles:
    """Those of `key_decay.attend_keys` where the decay is on the columns: half the rows, so that nothing is spilled."""
    tile = key_tiles(DA, DC, dtype)
    return replace(tile, C=max(tile.C // 2, 16), stages=3 if tile.stages > 1 else 1)


@cache
def delta_tiles(DA: int, DC: int, dtype: torch.dtype) -> Tiles:
    """The tiles of the walks of `delta`. C is the same for all widths: a system is solved for all of them."""
    BA, BC = padded(DA), padded(DC)
    if dtype != torch.bfloat16:
        C, warps, stages, BC = 32, 4, 1, min(BC, 32)
    elif BA * BC == 128 * 128:
        C, warps, stages = 64, 8, 3
    else:
        C, warps, stages, BC = 64, 4 if BA <= 128 else 8, 2, min(BC, 64)
    return Tiles(BA, BC, -(-DC // BC), C, warps, stages)


def padded(width: int) -> int:
    """The next power of two, at least 16: the least that a product of tiles takes."""
    return max(16, 1 << (width - 1).bit_length())


@cache
def processors(device: torch.device) -> int:
    """How many programs a device runs at once; a few in the interpreter, so that there is something to compose."""
    return 6 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=1024)
def segment_size(programs: int, tokens: int, chunk: int, processors: int) -> int:
    """The length of segments, in whole chunks, by which `programs` programs a segment fill the processors.

    Programs run in waves: the time is that of the waves, and each further segment of a sequence costs a state to move.
    """
    chunks = max(1, -(-tokens // chunk))
    best, least = chunks, float("inf")
    for count in range(1, min(chunks, -(-4 * processors // programs)) + 1):
        length = -(-chunks // count)
        segments = -(-chunks // length)
        cost = -(-programs * segments // processors) * (length + 2)
        if cost < least:
            best, least = length, cost
    return best * chunk
