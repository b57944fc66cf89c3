"""Recurrences with an elementwise transition, chunk by chunk in PyTorch: the form for CPUs.

One class serves three families, told apart by the log-decay's shape alone: none (identity), a number a head (scalar), K
numbers a head (diagonal). Within a chunk of C tokens, with ``G_i`` the running sum of the log-decay,

    o_i = S_inᵀ (q_i ⊙ e^{G_i}) + Σ_{j ≤ i} (Σ_d q_id k_jd e^{G_id − G_jd}) v_j

(GLA, https://arxiv.org/abs/2312.06635, eq. 4; without decay Katharopoulos et al., https://arxiv.org/abs/2006.16236; with a
number a head Mamba-2's SSD, https://arxiv.org/abs/2405.21060).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from lasp.kernels.chunk import Decay, as_given, by_token, chunks, power_of_two, unchunk
from lasp.kernels.recurrence import Recurrence, Tokens
from lasp.kernels.segments import Segments
from lasp.kernels.summary import Summary


@dataclass(frozen=True)
class ChunkedDecay(Recurrence):
    """``S_t = e^{g_t} ⊙ S_{t-1} + k_t v_tᵀ`` with g none, ``[B, T, H]`` or ``[B, T, H, K]``, in PyTorch.

    Each segment is one chunk, and all chunks are computed at once.

    Args:
        segment_size: the chunk's length C, a power of two.

    Raises:
        ValueError: where it is none.
    """

    segment_size: int = 32

    def __post_init__(self) -> None:
        power_of_two(self.segment_size)

    def prepare(self, tokens: Tokens, segments: Segments) -> Tokens:
        return replace(tokens, gates=tuple(by_token(g, tokens) for g in tokens.gates))

    @as_given
    def summary(self, tokens: Tokens, segments: Segments) -> Summary:
        k, v = (chunks(x, tokens, segments) for x in (tokens.k, tokens.v))
        decay = Decay.of(next(iter(tokens.gates), None), tokens, segments)
        return Summary(decay.whole, (k * decay.to_end).transpose(-1, -2) @ v)

    @as_given
    def output(self, q: Tensor, tokens: Tokens, entry: Tensor, segments: Segments, scale: float) -> Tensor:
        k, v = (chunks(x, tokens, segments) for x in (tokens.k, tokens.v))
        q = chunks(q, tokens, segments) * scale
        decay = Decay.of(next(iter(tokens.gates), None), tokens, segments)
        o = (q * decay.from_start) @ entry + decay.scores(q, k) @ v
        return unchunk(o, segments, tokens.v)

    @as_given
    def adjoint_summary(self, q: Tensor, tokens: Tokens, do: Tensor, segments: Segments, scale: float) -> Summary:
        q, do = chunks(q, tokens, segments) * scale, chunks(do, tokens, segments)
        decay = Decay.of(next(iter(tokens.gates), None), tokens, segments)
        return Summary(decay.whole, (q * decay.from_start).transpose(-1, -2) @ do)

    @as_given
    def query_gradient(
        self, q: Tensor, tokens: Tokens, entry: Tensor, do: Tensor, segments: Segments, scale: float, gated: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        k, v, do = (chunks(x, tokens, segments) for x in (tokens.k, tokens.v, do))
        decay = Decay.of(next(iter(tokens.gates), None), tokens, segments)
        dq = (do @ entry.transpose(-1, -2)) * decay.from_start + decay.weigh_keys(do @ v.transpose(-1, -2), k)
        return unchunk(dq * scale, segments, q), ()

    @as_given
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
        k, v, do = (chunks(x, tokens, segments) for x in (tokens.k, tokens.v, do))
        q = chunks(q, tokens, segments) * scale
        decay = Decay.of(next(iter(tokens.gates), None), tokens, segments)

        dv = decay.scores(q, k).transpose(-1, -2) @ do + (k * decay.to_end) @ exit_gradient
        dscores = do @ v.transpose(-1, -2)
        dk_within = decay.weigh_queries(dscores, q)
        dk_beyond = (v @ exit_gradient.transpose(-1, -2)) * decay.to_end
        gates: tuple[Tensor, ...] = ()
        if gated:
            pairs = decay.pairs(dscores, q, k)
            from_entry = q * (do @ entry.transpose(-1, -2)) * decay.from_start
            dg = decay.gradient(pairs + from_entry, k * dk_beyond, entry, exit_gradient)
            gates = (unchunk(dg, segments, tokens.gates[0]),)
        return Tokens(unchunk(dk_within + dk_beyond, segments, tokens.k), unchunk(dv, segments, tokens.v), gates)
