"""Softmax attention as operators of torch's library: what `torch.compile` sees of a layer whose keys ranks share.

As in `lasp.parallel.operators`, a graph names the ranks.
"""

# ruff: noqa: ARG001
# An operator's schema says what its functions are given, whether each of them looks at it or not.

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lasp.parallel.attention.local import wide
from lasp.parallel.attention.mask import Reach
from lasp.parallel.attention.ways import way
from lasp.parallel.sequence_parallel import SequenceParallel


def attention(q: Tensor, k: Tensor, v: Tensor, sp: SequenceParallel, low: int, high: int, scale: float) -> Tensor:
    """`lasp.parallel.attention.attention` in a graph that keeps the ranks of that name; the reach by its bounds."""
    o, _ = torch.ops.lasp.softmax(q, k, v, sp.name, low, high, scale)
    return o


@contextmanager
def _as_outside() -> Iterator[None]:
    """Inside an operator the dispatcher leaves autograd out; FlexAttention needs it there, for its backward and its masks."""
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.AutogradOther):
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.no_grad():
        yield


@torch.library.custom_op(
    "lasp::softmax",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, str sp, int low, int high, float scale) -> (Tensor, Tensor)",
)
def _softmax(q: Tensor, k: Tensor, v: Tensor, sp: str, low: int, high: int, scale: float) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp ``[B, H, T]``."""
    ranks = SequenceParallel.named(sp)
    with _as_outside():
        o, lse = way(ranks).forward(q, k, v, ranks, Reach(low, high), scale)
    return o.contiguous(), lse.to(wide(q.dtype)).contiguous()


@_softmax.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, sp: str, low: int, high: int, scale: float) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, T), dtype=wide(q.dtype))


@torch.library.custom_op(
    "lasp::softmax_backward",
    mutates_args=(),
    schema="(Tensor do, Tensor o, Tensor lse, Tensor q, Tensor k, Tensor v, str sp, int low, int high, float scale) "
    "-> (Tensor, Tensor, Tensor)",
)
def _softmax_backward(
    do: Tensor,
    o: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sp: str,
    low: int,
    high: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    ranks = SequenceParallel.named(sp)
    with _as_outside():
        dq, dk, dv = way(ranks).backward(do, o, lse, q, k, v, ranks, Reach(low, high), scale)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_softmax_backward.register_fake
def _(
    do: Tensor,
    o: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sp: str,
    low: int,
    high: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.constants = inputs
    ctx.save_for_backward(*output, q, k, v)


def _backward(ctx: Any, do: Tensor, _dlse: Tensor) -> tuple[Any, ...]:
    return *torch.ops.lasp.softmax_backward(do, *ctx.saved_tensors, *ctx.constants), None, None, None, None


_softmax.register_autograd(_backward, setup_context=_setup)
