"""Heads dealt out in place of tokens: DeepSpeed-Ulysses, https://arxiv.org/abs/2309.14509.

Heads do not feel each other. An all-to-all gives each of W ranks all tokens of H / W heads, what follows is the work of one
rank that holds the whole sequence, and another all-to-all gives the tokens back. Each moves ``(W − 1) / W`` of a tensor, so the
bytes grow with the sequence, unlike an exchange of states, and H bounds the ranks.
"""

# ruff: noqa: ARG001
# An operator's schema says what its functions are given, whether each of them looks at it or not.

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.parallel.collectives import all_gather_rows, reduce_scatter_rows
from lasp.parallel.exposure import exposed
from lasp.parallel.layout import SequenceLayout
from lasp.parallel.operators import name_in_graph
from lasp.parallel.sequence_parallel import SequenceParallel


def to_heads(x: Tensor, sp: SequenceParallel) -> Tensor:
    """This rank's tokens of all heads ``[B, T_local, H, ...]`` to all tokens of its heads ``[B, T, H / W, ...]``, in order."""
    moved: Tensor = torch.ops.lasp.to_heads(x.flatten(3) if x.dim() > 3 else x.unsqueeze(-1), name_in_graph(sp))
    return moved.unflatten(-1, x.shape[3:]) if x.dim() > 3 else moved.squeeze(-1)


def to_tokens(x: Tensor, sp: SequenceParallel) -> Tensor:
    """All tokens of this rank's heads ``[B, T, H / W, D]`` to its tokens of all heads ``[B, T_local, H, D]``."""
    moved: Tensor = torch.ops.lasp.to_tokens(x, name_in_graph(sp))
    return moved


def own_heads(x: Tensor, sp: SequenceParallel, dim: int) -> Tensor:
    """This rank's part of what all ranks hold of all heads. Its gradient is this rank's share of theirs."""
    count = x.shape[dim] // sp.world_size
    return x.narrow(dim, sp.rank * count, count)


def all_heads(x: Tensor, sp: SequenceParallel) -> Tensor:
    """What each rank has of its heads ``[H / W, ...]``, of all heads on every rank. Gradients are summed over the ranks."""
    gathered: Tensor = torch.ops.lasp.all_heads(x, name_in_graph(sp))
    return gathered


def keys_to_heads(x: Tensor, sp: SequenceParallel) -> Tensor:
    """`to_heads` of keys or values ``[B, T_local, Hk, D]`` of grouped queries: each rank gets those that its queries see.

    A head that several ranks need is sent to each of them.
    """
    if x.shape[2] % sp.world_size:
        x = x.repeat_interleave(sp.world_size // x.shape[2], dim=2)
    return to_heads(x, sp)


def check_heads(op: str, heads: int, sp: SequenceParallel, kv_heads: int | None = None) -> None:
    """Raise unless the heads can be dealt out.

    Raises:
        ValueError: naming what to choose instead.
    """
    W = sp.world_size
    if heads % W:
        raise ValueError(
            f"{op}: ulysses deals heads out, and {heads} heads do not divide among {W} ranks: choose the method lasp2 "
            "(for softmax layers all-gather or ring), or another number of ranks"
        )
    if kv_heads is not None and kv_heads % W and W % kv_heads:
        raise ValueError(
            f"{op}: ulysses deals heads out, and {kv_heads} heads of keys neither divide among {W} ranks nor they among them: "
            "choose the softmax method all-gather or ring, or another number of ranks"
        )


def _order(layout: SequenceLayout, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """The place of each token of the sequence among the ranks' tokens in turn, and the inverse; None where it is its own."""

    def build() -> tuple[Tensor, Tensor] | None:
        positions = torch.cat([layout.positions(rank) for rank in range(layout.world_size)])
        if torch.equal(positions, torch.arange(len(positions))):
            return None
        return positions.argsort().to(device), positions.to(device)

    order: tuple[Tensor, Tensor] | None = layout.cached(("tokens in turn", device), build)
    return order


def _all_to_all(rows: Tensor, sent: list[int], received: list[int], sp: SequenceParallel) -> Tensor:
    came = rows.new_empty(sum(received), *rows.shape[1:])
    exposed(lambda: dist.all_to_all_single(came, rows.contiguous(), received, sent, group=sp.group), rows.device)
    return came


@torch.library.custom_op("lasp::to_heads", mutates_args=(), schema="(Tensor x, str sp) -> Tensor")
def _to_heads(x: Tensor, sp: str) -> Tensor:
    ranks = SequenceParallel.named(sp)
    layout, W = ranks.layout, ranks.world_size
    held = [layout.local_tokens(rank) for rank in range(W)]
    T, H = x.shape[1:3]
    rows = x.unflatten(2, (W, H // W)).permute(2, 1, 0, 3, 4).flatten(0, 1)
    came = _all_to_all(rows, [T] * W, held, ranks)
    order = _order(layout, x.device)
    came = came if order is None else came.index_select(0, order[0])
    return came.transpose(0, 1).contiguous()


@_to_heads.register_fake
def _(x: Tensor, sp: str) -> Tensor:
    ranks = SequenceParallel.named(sp)
    B, _, H, D = x.shape
    return x.new_empty(B, ranks.layout.total_tokens, H // ranks.world_size, D)


@torch.library.custom_op("lasp::to_tokens", mutates_args=(), schema="(Tensor x, str sp) -> Tensor")
def _to_tokens(x: Tensor, sp: str) -> Tensor:
    ranks = SequenceParallel.named(sp)
    layout, W = ranks.layout, ranks.world_size
    held = [layout.local_tokens(rank) for rank in range(W)]
    order = _order(layout, x.device)
    rows = x.transpose(0, 1)
    rows = rows if order is None else rows.index_select(0, order[1])
    here = held[ranks.rank]
    came = _all_to_all(rows, held, [here] * W, ranks)
    return came.unflatten(0, (W, here)).permute(2, 1, 0, 3, 4).flatten(2, 3).contiguous()


@_to_tokens.register_fake
def _(x: Tensor, sp: str) -> Tensor:
    ranks = SequenceParallel.named(sp)
    B, _, H, D = x.shape
    return x.new_empty(B, ranks.local_tokens, H * ranks.world_size, D)


@torch.library.custom_op("lasp::all_heads", mutates_args=(), schema="(Tensor x, str sp) -> Tensor")
def _all_heads(x: Tensor, sp: str) -> Tensor:
    gathered, work = all_gather_rows(x, SequenceParallel.named(sp).group)
    exposed(work.wait, x.device)
    return gathered


@_all_heads.register_fake
def _(x: Tensor, sp: str) -> Tensor:
    return x.new_empty(SequenceParallel.named(sp).world_size * x.shape[0], *x.shape[1:])


@torch.library.custom_op("lasp::sum_of_own_heads", mutates_args=(), schema="(Tensor x, str sp) -> Tensor")
def _sum_of_own_heads(x: Tensor, sp: str) -> Tensor:
    own, work = reduce_scatter_rows(x, SequenceParallel.named(sp).group)
    exposed(work.wait, x.device)
    return own


@_sum_of_own_heads.register_fake
def _(x: Tensor, sp: str) -> Tensor:
    return x.new_empty(x.shape[0] // SequenceParallel.named(sp).world_size, *x.shape[1:])


def _setup(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.sp = inputs[1]


def _adjoint(name: str) -> Any:
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return getattr(torch.ops.lasp, name)(dx, ctx.sp), None

    return backward


_to_heads.register_autograd(_adjoint("to_tokens"), setup_context=_setup)
_to_tokens.register_autograd(_adjoint("to_heads"), setup_context=_setup)
_all_heads.register_autograd(_adjoint("sum_of_own_heads"), setup_context=_setup)
