"""Tokens sent to groups and back: sorted by group, each group's tokens in their order, as many as were sent."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lasp.kernels import triton


@dataclass(frozen=True)
class Dispatch:
    """Where the choices of tokens stand once they are sorted by group. Shapes depend on nothing but how many there are.

    Attributes:
        choice: the choice at each place, counted token by token, int64 ``[N]``; N = T · k.
        token: the token of each place, likewise.
        place: the place of each token's choices, int64 ``[T, k]``.
        counts: how many choices each group has, int64 ``[G]``.
    """

    choice: Tensor
    token: Tensor
    place: Tensor
    counts: Tensor

    @classmethod
    def of(cls, groups: Tensor, count: int) -> Dispatch:
        """Sort.

        Args:
            groups: the groups that each token chose, int64 ``[T, k]``, from 0 on.
            count: G, how many groups there are.
        """
        tokens, choices = groups.shape
        along, order = torch.sort(groups.flatten(), stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(order.numel(), device=order.device)
        # Of where groups begin: counting would look at the largest of them.
        bounds = torch.searchsorted(along, torch.arange(count + 1, device=along.device))
        return cls(order, order // max(choices, 1), place.view(tokens, choices), bounds.diff())

    def send(self, x: Tensor) -> Tensor:
        """``[T, ...]`` to ``[N, ...]``: each token to the places of its choices."""
        sent: Tensor = _Send.apply(x, self)
        return sent

    def collect(self, y: Tensor, weights: Tensor) -> Tensor:
        """``[N, ...]`` to ``[T, ...]``: the sum of what a token's choices gave, each times its weight.

        Args:
            y: what is at each place.
            weights: of each token's choices ``[T, k]``.

        Returns:
            The sums, made in float32 at least, in y's dtype.
        """
        collected: Tensor = _Collect.apply(y, weights, self)
        return collected


class Groups:
    """How many rows each group has, and what follows from it, made once for all projections.

    Args:
        counts: int64 ``[G]``.
        rows: N, their sum.
    """

    def __init__(self, counts: Tensor, rows: int):
        self.counts, self.rows = counts, rows

    @cached_property
    def bounds(self) -> Tensor:
        """The first row of each, and N: int64 ``[G + 1]``."""
        return torch.cat([self.counts.new_zeros(1), self.counts.cumsum(0)])

    @cached_property
    def ends(self) -> Tensor:
        """Where each ends, int32 ``[G]``."""
        return self.bounds[1:].to(torch.int32)

    @cached_property
    def of_row(self) -> Tensor:
        """The group of each row, int64 ``[N]``."""
        groups = torch.arange(len(self.counts), device=self.counts.device)
        return torch.repeat_interleave(groups, self.counts, output_size=self.rows)


class _Send(torch.autograd.Function):
    """Its gradient is gathered too, and not scattered: the same sum in the same order, whatever ran first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.dispatch = dispatch
        return x.index_select(0, dispatch.token)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return _form(dy).collect(dy, None, ctx.dispatch.place), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.dispatch = dispatch
        ctx.save_for_backward(y, weights)
        return _form(y).collect(y, weights, dispatch.place)

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor, Tensor, None]:
        y, weights = ctx.saved_tensors
        return *_form(y).spread(do, y, weights, ctx.dispatch.choice), None


def collect(y: Tensor, weights: Tensor | None, place: Tensor) -> Tensor:
    """The sums over a token's places, weighted if there are weights, in float32 at least.

    Args:
        y: ``[N, ...]``.
        weights: ``[T, k]``, or None for 1.
        place: int64 ``[T, k]``.

    Returns:
        ``[T, ...]`` in y's dtype.
    """
    at = y.index_select(0, place.flatten()).view(*place.shape, *y.shape[1:]).to(_wide(y))
    if weights is not None:
        at = at * weights.view(*weights.shape, *[1] * (y.dim() - 1))
    return at.sum(1).to(y.dtype)


def spread(do: Tensor, y: Tensor, weights: Tensor, choice: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of what is collected, and of its weights.

    Args:
        do: of the sums, ``[T, ...]``.
        y: what was collected, ``[N, ...]``.
        weights: ``[T, k]``.
        choice: the choice at each place, int64 ``[N]``.
    """
    here = do.index_select(0, choice // max(weights.shape[1], 1)).to(_wide(y))
    dy = here * weights.flatten().index_select(0, choice).view(-1, *[1] * (y.dim() - 1))
    dweights = torch.empty_like(weights.flatten())
    dweights[choice] = (here * y).flatten(1).sum(1).to(weights.dtype)
    return dy.to(y.dtype), dweights.view_as(weights)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _form(x: Tensor) -> Any:
    """Triton's kernels on a GPU, the functions above elsewhere."""
    if not triton.serves(x):
        return sys.modules[__name__]
    from lasp.kernels.triton import dispatch

    return dispatch
