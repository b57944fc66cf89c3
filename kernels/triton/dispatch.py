"""Tokens collected from groups on a GPU: `lasp.kernels.dispatch` in one kernel each way, every row read once."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasp.kernels.triton.launch import Kernel, Launch, ready

#: How many numbers of a row a program takes at a time.
BLOCK = 1024


@triton.jit
def collect_places(
    y, weights, place, out, D: tl.constexpr, CHOICES: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):
    """``out[t] = Σ_j weights[t, j] y[place[t, j]]``. Grid: (tokens, blocks of BLOCK numbers of a row, 1)."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for j in tl.static_range(CHOICES):
        row = tl.load(place + token * CHOICES + j)
        here = tl.load(y + row * D + at, mask=at < D, other=0.0).to(tl.float32)
        total += here * tl.load(weights + token * CHOICES + j).to(tl.float32) if WEIGHTED else here
    tl.store(out + token * D + at, total.to(out.dtype.element_ty), mask=at < D)


@triton.jit
def spread_tokens(do, y, weights, choice, dy, dweights, D: tl.constexpr, CHOICES: tl.constexpr, BLOCK: tl.constexpr):
    """The gradients of what was collected, and of its weights. Grid: (places, 1, 1)."""
    row = tl.program_id(0).to(tl.int64)
    chosen = tl.load(choice + row)
    token = chosen // CHOICES
    weight = tl.load(weights + chosen).to(tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, D, BLOCK):
        at = start + tl.arange(0, BLOCK)
        here = tl.load(do + token * D + at, mask=at < D, other=0.0).to(tl.float32)
        total += here * tl.load(y + row * D + at, mask=at < D, other=0.0).to(tl.float32)
        tl.store(dy + row * D + at, (here * weight).to(dy.dtype.element_ty), mask=at < D)
    tl.store(dweights + chosen, tl.sum(total, 0).to(dweights.dtype.element_ty))


_collect, _spread = Kernel(collect_places), Kernel(spread_tokens)


def collect(y: Tensor, weights: Tensor | None, place: Tensor) -> Tensor:
    """As `lasp.kernels.dispatch.collect`."""
    tokens, choices = place.shape
    out = y.new_empty(tokens, *y.shape[1:])
    y = ready(y)
    launch = _collecting(tokens, math.prod(y.shape[1:]), choices, weights is not None)
    launch(y, y if weights is None else ready(weights), ready(place), out)
    return out


def spread(do: Tensor, y: Tensor, weights: Tensor, choice: Tensor) -> tuple[Tensor, Tensor]:
    """As `lasp.kernels.dispatch.spread`."""
    do, y, weights = ready(do), ready(y), ready(weights)
    dy, dweights = torch.empty_like(y), torch.empty_like(weights)
    launch = _spreading(len(choice), math.prod(y.shape[1:]), weights.shape[1])
    launch(do, y, weights, ready(choice), dy, dweights)
    return dy, dweights


@lru_cache(maxsize=1024)
def _collecting(tokens: int, D: int, choices: int, weighted: bool) -> Launch:
    block = _block(D)
    return _collect.launch(
        (tokens, triton.cdiv(D, block), 1), D=D, CHOICES=choices, WEIGHTED=weighted, BLOCK=block, warps=4
    )


@lru_cache(maxsize=1024)
def _spreading(places: int, D: int, choices: int) -> Launch:
    return _spread.launch((places, 1, 1), D=D, CHOICES=choices, BLOCK=_block(D), warps=4)


def _block(D: int) -> int:
    return min(BLOCK, triton.next_power_of_2(max(D, 1)))
