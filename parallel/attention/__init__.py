"""Softmax attention on a sequence that several ranks share. Each way is a file; this table is where they get their names."""

from __future__ import annotations

from operator import index
from typing import Any

import torch
from torch import Tensor
from torch.compiler import assume_constant_result

from lasp.parallel.attention import operators
from lasp.parallel.attention.local import flex_attention_with_gradients, triangular_attention
from lasp.parallel.attention.mask import Reach
from lasp.parallel.attention.ways import ATTENTION, way, whole_mask
from lasp.parallel.heads import check_heads, keys_to_heads, to_heads, to_tokens
from lasp.parallel.operators import keep
from lasp.parallel.sequence_parallel import SequenceParallel


def attention(q: Tensor, k: Tensor, v: Tensor, sp: SequenceParallel, reach: Reach, scale: float) -> Tensor:
    """Attention to the keys of all ranks, the way that `sp` says. Shapes are `lasp.ops.softmax_attn`'s."""
    if sp.softmax == "ulysses" and sp.world_size > 1:
        q, k, v = to_heads(q, sp), keys_to_heads(k, sp), keys_to_heads(v, sp)
        return to_tokens(attention(q, k, v, sp.whole, reach, scale), sp)
    if torch.compiler.is_compiling():
        low, high = index(reach.low), index(reach.high)
        if _traced_triangular(keep(sp.name), low, high):
            return triangular_attention(q, k, v, scale)
        return operators.attention(q, k, v, sp, low, high, scale)
    if sp.world_size == 1:
        mask = whole_mask(sp, reach)
        if mask.triangular:
            return triangular_attention(q, k, v, scale)
        if q.is_cuda and not mask.nothing:
            return flex_attention_with_gradients(q, k, v, mask, scale)
    output: Tensor = _Attention.apply(q, k, v, sp, reach, scale)
    return output


def check_attention(op: str, sp: SequenceParallel, heads: int, kv_heads: int) -> None:
    """Raise ValueError unless so many heads can be shared the way that `sp` says."""
    if sp.softmax == "ulysses" and sp.world_size > 1:
        check_heads(op, heads, sp, kv_heads)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sp: SequenceParallel, reach: Reach, scale: float) -> Tensor:
        o, lse = way(sp).forward(q, k, v, sp, reach, scale)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.sp, ctx.reach, ctx.scale = sp, reach, scale
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        return *way(ctx.sp).backward(do, o, lse, q, k, v, ctx.sp, ctx.reach, ctx.scale), None, None, None


@assume_constant_result
def _traced_triangular(name: str, low: int, high: int) -> bool:
    sp = SequenceParallel.named(name)
    return sp.world_size == 1 and whole_mask(sp, Reach(low, high)).triangular


__all__ = ["ATTENTION", "Reach", "attention", "check_attention"]
