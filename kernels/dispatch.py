"""Tokens sent to groups and back: sorted by group, each group's tokens in their order, as many as were sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dispatch:
    """Where the choices of tokens stand once they are sorted by group. Shapes depend on nothing but how many there are.

    Attributes:
        token: the token of each place, int64 ``[N]``.
        place: the place of each token's choices, int64 ``[T, k]``; N = T · k.
        counts: how many choices each group has, int64 ``[G]``.
    """

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
        return cls(order // max(choices, 1), place.view(tokens, choices), bounds.diff())

    def send(self, x: Tensor) -> Tensor:
        """``[T, ...]`` to ``[N, ...]``: each token to the places of its choices."""
        sent: Tensor = _Send.apply(x, self.token, self.place)
        return sent

    def collect(self, y: Tensor, weights: Tensor) -> Tensor:
        """``[N, ...]`` to ``[T, ...]``: the sum of what a token's choices gave, each times its weight.

        Args:
            y: what is at each place.
            weights: of each token's choices ``[T, k]``.
        """
        collected: Tensor = _Collect.apply(y, weights, self.token, self.place)
        return collected


class _Send(torch.autograd.Function):
    """Its gradient is gathered too, and not scattered: the same sum in the same order, whatever ran first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return _at(dy, place).sum(1), None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, token: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(y, weights, token, place)
        return (_at(y, place) * _like(weights, y)).sum(1).to(y.dtype)

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y, weights, token, place = ctx.saved_tensors
        # Of each place: its token's choices are in the order of their places in `place`.
        weight = torch.empty_like(weights.flatten())
        weight[place.flatten()] = weights.flatten()
        dy = do.index_select(0, token) * weight.view(-1, *[1] * (do.dim() - 1))
        dweights = (_at(y, place) * do.unsqueeze(1)).flatten(2).sum(-1, dtype=weights.dtype)
        return dy.to(y.dtype), dweights, None, None


def _at(y: Tensor, place: Tensor) -> Tensor:
    """``[N, ...]`` to ``[T, k, ...]``."""
    return y.index_select(0, place.flatten()).view(*place.shape, *y.shape[1:])


def _like(weights: Tensor, y: Tensor) -> Tensor:
    return weights.view(*weights.shape, *[1] * (y.dim() - 1))
