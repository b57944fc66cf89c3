"""Recurrences with an elementwise transition, chunk by chunk in PyTorch: the form for CPUs.

One class serves three families, told apart by the log-decay's shape alone: none (identity), a number a head (scalar), K
numbers a head (diagonal). Within a chunk of C tokens, with ``G_i`` the running sum of the log-decay,

    o_i = S_inᵀ (q_i ⊙ e^{G_i}) + Σ_{j ≤ i} (Σ_d q_id k_jd e^{G_id − G_jd}) v_j

(GLA, https://arxiv.org/abs/2312.06635, eq. 4; without decay Katharopoulos et al., https://arxiv.org/abs/2006.16236; with a
number a head Mamba-2's SSD, https://arxiv.org/abs/2405.21060). Every exponent here is a sum over just the tokens between j
and i: never positive, so nothing overflows, and never the difference of two long sums, so a strong decay costs no digits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from lasp.kernels.recurrence import Recurrence, Tokens
from lasp.kernels.segments import Segments
from lasp.kernels.summary import Summary

P = ParamSpec("P")
R = TypeVar("R")


def _as_given(method: Callable[P, R]) -> Callable[P, R]:
    """Products in the dtypes that stand here: autocast, which a model may be in, would round states to its own."""

    @wraps(method)
    def exact(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return method(*args, **kwargs)

    return exact


@dataclass(frozen=True)
class ChunkedDecay(Recurrence):
    """``S_t = e^{g_t} ⊙ S_{t-1} + k_t v_tᵀ`` with g none, ``[B, T, H]`` or ``[B, T, H, K]``, in PyTorch.

    Each segment is one chunk, and all chunks are computed at once.

    Args:
        segment_size: the chunk's length C, a power of two.

    Raises:
        ValueError: where it is none.
    """

    segment_size: int = 64

    def __post_init__(self) -> None:
        if self.segment_size < 1 or self.segment_size & (self.segment_size - 1):
            raise ValueError(f"segment_size must be a power of two, given {self.segment_size}")

    def prepare(self, tokens: Tokens, segments: Segments) -> Tokens:
        # A constant decay is computed with as one by token; its gradient is then the tokens' sum.
        return replace(tokens, gates=tuple(g.expand(tokens.k.shape[:3]) if g.dim() == 1 else g for g in tokens.gates))

    @_as_given
    def summary(self, tokens: Tokens, segments: Segments) -> Summary:
        k, v = (_chunks(x, tokens, segments) for x in (tokens.k, tokens.v))
        decay = _Decay.of(tokens, segments)
        return Summary(decay.whole, (k * decay.to_end).transpose(-1, -2) @ v)

    @_as_given
    def output(self, q: Tensor, tokens: Tokens, entry: Tensor, segments: Segments, scale: float) -> Tensor:
        k, v = (_chunks(x, tokens, segments) for x in (tokens.k, tokens.v))
        q = _chunks(q, tokens, segments) * scale
        decay = _Decay.of(tokens, segments)
        o = (q * decay.from_start) @ entry + decay.scores(q, k) @ v
        return _tokens(o, segments, tokens.v)

    @_as_given
    def adjoint_summary(self, q: Tensor, tokens: Tokens, do: Tensor, segments: Segments, scale: float) -> Summary:
        q, do = _chunks(q, tokens, segments) * scale, _chunks(do, tokens, segments)
        decay = _Decay.of(tokens, segments)
        return Summary(decay.whole, (q * decay.from_start).transpose(-1, -2) @ do)

    @_as_given
    def query_gradient(
        self, q: Tensor, tokens: Tokens, entry: Tensor, do: Tensor, segments: Segments, scale: float, gated: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        k, v, do = (_chunks(x, tokens, segments) for x in (tokens.k, tokens.v, do))
        decay = _Decay.of(tokens, segments)
        dq = (do @ entry.transpose(-1, -2)) * decay.from_start + decay.weigh_keys(do @ v.transpose(-1, -2), k)
        return _tokens(dq * scale, segments, q), ()

    @_as_given
    def token_gradients(
        self,
        q: Tensor,
        tokens: Tokens,
        entry: Tensor,
        do: Tensor,
        exit_gradient: Tensor,
        segments: Segments,
        scale: float,
        gated: bool,
        kept: tuple[Tensor, ...],
    ) -> Tokens:
        k, v, do = (_chunks(x, tokens, segments) for x in (tokens.k, tokens.v, do))
        q = _chunks(q, tokens, segments) * scale
        decay = _Decay.of(tokens, segments)

        dv = decay.scores(q, k).transpose(-1, -2) @ do + (k * decay.to_end) @ exit_gradient
        dscores = do @ v.transpose(-1, -2)
        dk_within = decay.weigh_queries(dscores, q)
        dk_beyond = (v @ exit_gradient.transpose(-1, -2)) * decay.to_end
        gates: tuple[Tensor, ...] = ()
        if gated:
            per_head = isinstance(decay, _HeadDecay)
            # A pair (i, j) of tokens, j < i, decays by every gate in (j, i]. Its part of the gradient is added at i and
            # taken back at j by one sum from the end; i = j decays by nothing and is left out, or it would drown the rest.
            before = dscores.tril(-1)
            pairs = q * decay.weigh_keys(before, k) - k * decay.weigh_queries(before, q)
            from_entry = q * (do @ entry.transpose(-1, -2)) * decay.from_start
            to_exit = k * dk_beyond
            through = (entry * exit_gradient).sum(-1) * (decay.whole.unsqueeze(-1) if per_head else decay.whole)
            terms = (pairs + from_entry, to_exit, through.unsqueeze(-2))
            if per_head:
                terms = tuple(x.sum(-1, keepdim=True) for x in terms)  # type: ignore[assignment]
            dg = _sum_to_end(terms[0]) + _sum_before(terms[1]) + terms[2]
            gates = (_tokens(dg.squeeze(-1) if per_head else dg, segments, tokens.gates[0]),)
        return Tokens(_tokens(dk_within + dk_beyond, segments, tokens.k), _tokens(dv, segments, tokens.v), gates)


@dataclass(frozen=True)
class _Decay:
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
    def of(tokens: Tokens, segments: Segments) -> _HeadDecay | _KeyDecay:
        if not tokens.gates:
            one = torch.ones((), dtype=tokens.state_dtype, device=tokens.k.device)
            mask = one.expand(segments.size, segments.size).tril()
            return _HeadDecay(one, one, one.expand(1, len(segments), 1), mask)
        (g,) = tokens.gates
        per_head = g.dim() == 3
        g = _chunks(g.unsqueeze(-1) if per_head else g, tokens, segments)  # [B, n, H, C, 1 or K]
        from_start, to_end, whole = g.cumsum(-2).exp(), _sum_after(g).exp(), g.sum(-2).exp()
        if not per_head:
            return _KeyDecay(from_start, to_end, whole, _halves(g))
        causal = torch.ones(segments.size, segments.size, dtype=torch.bool, device=g.device).tril()
        # Row i, column j: the gates of tokens j+1..i, summed from j on.
        after = g.masked_fill(~causal.tril(-1), 0)
        between = after.cumsum(-2).exp().masked_fill(~causal, 0)
        return _HeadDecay(from_start, to_end, whole.squeeze(-1), between)


@dataclass(frozen=True)
class _HeadDecay(_Decay):
    """One number a head, or none: the decay is a factor of the scores.

    Attributes:
        between: over tokens j+1..i, 0 where j > i: ``[B, n, H, C, C]``, or ``[C, C]`` without decay.
    """

    between: Tensor

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """``[.., C, C]``: ``Σ_d q_id k_jd e^{G_id − G_jd}`` for j ≤ i, else 0."""
        return (q @ k.transpose(-1, -2)) * self.between

    def weigh_keys(self, weights: Tensor, k: Tensor) -> Tensor:
        """``Σ_{j ≤ i} weights_ij e^{G_id − G_jd} k_jd``: the gradient of `scores` for q."""
        return (weights * self.between) @ k

    def weigh_queries(self, weights: Tensor, q: Tensor) -> Tensor:
        """``Σ_{i ≥ j} weights_ij e^{G_id − G_jd} q_id``: the gradient of `scores` for k."""
        return (weights * self.between).transpose(-1, -2) @ q


@dataclass(frozen=True)
class _KeyDecay(_Decay):
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
        """As of `_HeadDecay`, and so are the two below."""
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


def _halves(g: Tensor) -> tuple[Tensor, ...]:
    """`_KeyDecay.halves` of the log-decays ``[B, n, H, C, K]``."""
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


def _chunks(x: Tensor, tokens: Tokens, segments: Segments) -> Tensor:
    """``[B, T, H, D]`` to ``[B, n, H, C, D]`` in the dtype of the state."""
    return segments.gather(x).to(tokens.state_dtype).transpose(2, 3)


def _tokens(x: Tensor, segments: Segments, like: Tensor) -> Tensor:
    """``[B, n, H, C, ...]`` to ``[B, T, H, ...]`` in the dtype of `like`."""
    return segments.scatter(x.transpose(2, 3)).to(like.dtype)


def _sum_to_end(x: Tensor) -> Tensor:
    """Sums over tokens i..C."""
    return x.flip(-2).cumsum(-2).flip(-2)


def _sum_after(x: Tensor) -> Tensor:
    """Sums over tokens i+1..C; a difference of two sums would round."""
    return torch.cat([_sum_to_end(x)[..., 1:, :], torch.zeros_like(x[..., :1, :])], dim=-2)


def _sum_before(x: Tensor) -> Tensor:
    """Sums over tokens 1..i-1, likewise."""
    return torch.cat([torch.zeros_like(x[..., :1, :]), x.cumsum(-2)[..., :-1, :]], dim=-2)
