"""The forms for GPUs, as Triton kernels. Nothing here imports Triton until it is used: a CPU needs none."""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache

import torch
from torch import Tensor


def serves(x: Tensor) -> bool:
    """Whether Triton's kernels compute with such tensors: on a GPU, but for float64, which PyTorch computes everywhere."""
    return x.is_cuda and x.dtype != torch.float64 and _installed()


@torch.compiler.assume_constant_result
def _installed() -> bool:
    return _found()


@cache
def _found() -> bool:
    if importlib.util.find_spec("triton") is not None:
        return True
    warnings.warn("triton is not installed: linear attention runs in PyTorch, many times slower", stacklevel=4)
    return False
