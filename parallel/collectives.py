"""The collectives that move tensors between ranks, by the one name each that all supported versions of torch have."""

from __future__ import annotations

import warnings

import torch.distributed as dist
from torch import Tensor

# torch 2.13 renames these two and keeps the old names; 2.11 and 2.12 have the old names alone.
for _name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
    warnings.filterwarnings("ignore", message=f".*{_name}.* is deprecated", category=FutureWarning)


def all_gather_rows(rows: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, dist.Work]:
    """Start gathering `rows` ``[n, ...]``, alike on all W ranks, into ``[W·n, ...]``; wait for the work before reading."""
    received = rows.new_empty(dist.get_world_size(group) * rows.shape[0], *rows.shape[1:])
    return received, dist.all_gather_into_tensor(received, rows.contiguous(), group=group, async_op=True)


def reduce_scatter_rows(rows: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, dist.Work]:
    """Start summing `rows` ``[W·n, ...]`` over the ranks, of which each receives its own n rows ``[n, ...]``."""
    received = rows.new_empty(rows.shape[0] // dist.get_world_size(group), *rows.shape[1:])
    return received, dist.reduce_scatter_tensor(received, rows.contiguous(), group=group, async_op=True)
