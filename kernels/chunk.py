"""What happens within chunks of tokens, in PyTorch: how they decay, and what pairs of them give to each other.

Every exponent here is a sum over just the tokens between two places: never positive, so nothing overflows, and never the
difference of two long sums, so a strong decay costs no digits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from lasp.kernels.recurrence import Tokens
from lasp.kernels.segments import Segments

P = ParamSpec("P")
R = TypeVar("R")


def as_given(method: Callable[P, R]) -> Callable[P, R]:
    """Products in the dtypes that stand here: autocast, which a model may be in, would round states to its own."""

    @wraps(method)
    def exact(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return method(*args, **kwargs)

    return exact


def chunks(x: Tensor, tokens: Tokens, segments: Segments) -> Tensor:
    """``[B, T, H, D]`` to ``[B, n, H, C, D]`` in the dtype of the state."""
    return segments.gather(x).to(tokens.state_dtype).transpose(2, 3)


def unchunk(x: Tensor, segments: Segments, like: Tensor) -> Tensor:
    """``[B, n, H, C, ...]`` to ``[B, T, H, ...]`` in the dtype of `like`."""
    return segments.scatter(x.transpose(2, 3)).to(like.dtype)


def power_of_two(size: int) -> None:
    """Raise ValueError unless a chunk can be halved down to single tokens."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"segment_size must be a power of two, given {size}")


def by_token(g: Tensor, tokens: Tokens) -> Tensor:
    """A constant decay is computed with as one by token; its gradient is then the tokens' sum."""
    return g.expand(tokens.k.shape[:3]) if g.dim() == 1 else g


@dataclass(frozen=True)
class Decay(ABC):
    """A chunk's decays, all as factors in [0, 1].

    Attributes:
        from_start: over tokens 1..i, ``[B, n, H, C, K]`` or with K = 1 when it is one number a head.
        to_end: over tokens i+1..C, same shape.
        whole: over the whole chunk, in the shape of `Summary.A`.
    """

    from_start: Tensor
    to_end: Tensor
    whole: Tensor

    @staticmethod
    def of(g: Tensor | None, tokens: Tokens, segments: Segments) -> Decay:
        """Those of a log-decay: None, ``[B, T, H]`` or ``[B, T, H, K]``."""
        if g is None:
            one = torch.ones((), dtype=tokens.state_dtype, device=tokens.k.device)
            mask = one.expand(segments.size, segments.size).tril()
            return HeadDecay(one, one, one.expand(1, len(segments), 1), mask)
        per_head = g.dim() == 3
        g = chunks(g.unsqueeze(-1) if per_head else g, tokens, segments)  # [B, n, H, C, 1 or K]
        from_start, to_end, whole = g.cumsum(-2).exp(), _sum_after(g).exp(), g.sum(-2).exp()
        if not per_head:
            return KeyDecay(from_start, to_end, whole, _halves(g))
        causal = torch.ones(segments.size, segments.size, dtype=torch.bool, device=g.device).tril()
        # Row i, column j: the gates of tokens j+1..i, summed from j on.
        after = g.masked_fill(~causal.tril(-1), 0)
        between = after.cumsum(-2).exp().masked_fill(~causal, 0)
        return HeadDecay(from_start, to_end, whole.squeeze(-1), between)

    @abstractmethod
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """``[.., C, C]``: ``Σ_d q_id k_jd e^{G_id − G_jd}`` for j ≤ i, else 0."""

    @abstractmethod
    def weigh_keys(self, weights: Tensor, k: Tensor) -> Tensor:
        """``Σ_{j ≤ i} weights_ij e^{G_id − G_jd} k_jd``: the gradient of `scores` for q."""

    @abstractmethod
    def weigh_queries(self, weights: Tensor, q: Tensor) -> Tensor:
        """``Σ_{i ≥ j} weights_ij e^{G_id − G_jd} q_id``: the gradient of `scores` for k."""

    def pairs(self, weights: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """What pairs of tokens give to the sum from the end that is the log-decay's gradient, when `scores` has `weights`.

        A pair (i, j), j < i, decays by every gate in (j, i]. Its part is added at i and taken back at j; i = j decays by
        nothing and is left out, or it would drown the rest.
        """
        before = weights.tril(-1)
        return q * self.weigh_keys(before, k) - k * self.weigh_queries(before, q)

    @abstractmethod
    def gradient(self, from_start: Tensor, to_end: Tensor, entry: Tensor, exit_gradient: Tensor) -> Tensor:
        """That of the log-decay: ``[B, n, H, C]``, or ``[B, n, H, C, K]`` of one a key dimension.

        Args:
            from_start: what decays from the chunk's start to each token, times its gradient, and `pairs`: ``[B, n, H, C, K]``.
            to_end: what decays from each token to the chunk's end, likewise.
            entry: the state that enters the chunk.
            exit_gradient: the gradient of the state that leaves it.
        """


@dataclass(frozen=True)
class HeadDecay(Decay):
    """One number a head, or none: the decay is a factor of the scores.

    Attributes:
        between: over tokens j+1..i, 0 where j > i: ``[B, n, H, C, C]``, or ``[C, C]`` without decay.
    """

    between: Tensor

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2)) * self.between

    def weigh_keys(self, weights: Tensor, k: Tensor) -> Tensor:
        return (weights * self.between) @ k

    def weigh_queries(self, weights: Tensor, q: Tensor) -> Tensor:
        return (weights * self.between).transpose(-1, -2) @ q

    def gradient(self, from_start: Tensor, to_end: Tensor, entry: Tensor, exit_gradient: Tensor) -> Tensor:
        through = (entry * exit_gradient).sum((-2, -1)) * self.whole
        from_start, to_end = (x.sum(-1, keepdim=True) for x in (from_start, to_end))
        return (_sum_to_end(from_start) + _sum_before(to_end)).squeeze(-1) + through.unsqueeze(-1)


@dataclass(frozen=True)
class KeyDecay(Decay):
    """One number a key dimension. The chunk is halved again and again, down to single tokens.

    A pair j < i falls on either side of one halving's middle: it decays from j to the middle, then from there to i. Both
    factors are at most 1, and neither underflows unless their product does, so pairs are products of matrices as they are
    without decay. GLA, https://arxiv.org/abs/2312.06635, section 4.3, has this at two levels, with a part that is not.

    Attributes:
        halves: for halves of C/2, C/4, ..., 1 tokens, ``[B, n, H, m, 2, s, K]``: a token's decay to the middle of its
            block of 2s tokens, from before it or from after it.
    """

    halves: tuple[Tensor, ...]

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        scores = q.new_zeros(*q.shape[:-1], q.shape[-2])
        scores.diagonal(dim1=-2, dim2=-1).copy_((q * k).sum(-1))
        for decay in self.halves:
            before, after = _split(k, decay)[0], _split(q, decay)[1]
            _across(scores, decay).copy_(after @ before.transpose(-1, -2))
        return scores

    def weigh_keys(self, weights: Tensor, k: Tensor) -> Tensor:
        weighed = _diagonal(weights) * k
        for decay in self.halves:
            before = _split(k, decay)[0]
            _blocks(weighed, decay)[..., 1, :, :] += (_across(weights, decay) @ before) * decay[..., 1, :, :]
        return weighed

    def weigh_queries(self, weights: Tensor, q: Tensor) -> Tensor:
        weighed = _diagonal(weights) * q
        for decay in self.halves:
            after, across = _split(q, decay)[1], _across(weights, decay)
            _blocks(weighed, decay)[..., 0, :, :] += (across.transpose(-1, -2) @ after) * decay[..., 0, :, :]
        return weighed

    def gradient(self, from_start: Tensor, to_end: Tensor, entry: Tensor, exit_gradient: Tensor) -> Tensor:
        through = (entry * exit_gradient).sum(-1) * self.whole
        return _sum_to_end(from_start) + _sum_before(to_end) + through.unsqueeze(-2)


def _halves(g: Tensor) -> tuple[Tensor, ...]:
    """`KeyDecay.halves` of the log-decays ``[B, n, H, C, K]``."""
    halves, size = [], g.shape[-2] // 2
    while size:
        before, after = g.unflatten(-2, (-1, 2, size)).unbind(-3)
        halves.append(torch.stack([_sum_after(before), after.cumsum(-2)], dim=-3).exp())
        size //= 2
    return tuple(halves)


def _blocks(x: Tensor, halves: Tensor) -> Tensor:
    """``[.., C, K]`` as the halves of blocks ``[.., m, 2, s, K]``; a view."""
    return x.unflatten(-2, halves.shape[-4:-1])


def _split(x: Tensor, halves: Tensor) -> tuple[Tensor, ...]:
    """The first and the second halves of blocks, decayed to their middle: ``[.., m, s, K]`` each."""
    return (_blocks(x, halves) * halves).unbind(-3)


def _across(pairs: Tensor, halves: Tensor) -> Tensor:
    """Of pairs ``[.., C, C]`` those from a block's second half to its first: ``[.., m, s, s]``; a view."""
    sizes = halves.shape[-4:-1]
    blocks = pairs.unflatten(-1, sizes).unflatten(-4, sizes)
    return blocks[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _diagonal(pairs: Tensor) -> Tensor:
    """``[.., C, C]`` to ``[.., C, 1]``."""
    return pairs.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)


def _sum_to_end(x: Tensor) -> Tensor:
    """Sums over tokens i..C."""
    return x.flip(-2).cumsum(-2).flip(-2)


def _sum_after(x: Tensor) -> Tensor:
    """Sums over tokens i+1..C; a difference of two sums would round."""
    return torch.cat([_sum_to_end(x)[..., 1:, :], torch.zeros_like(x[..., :1, :])], dim=-2)


def _sum_before(x: Tensor) -> Tensor:
    """Sums over tokens 1..i-1, likewise."""
    return torch.cat([torch.zeros_like(x[..., :1, :]), x.cumsum(-2)[..., :-1, :]], dim=-2)
