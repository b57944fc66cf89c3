"""The delta rule and its decayed forms, chunk by chunk in PyTorch: the form for CPUs.

``S_t = (I − β_t k_t k_tᵀ) e^{g_t} ⊙ S_{t-1} + β_t k_t v_tᵀ``: a state is corrected by u_t, what a value lacks of being what the
state gives for its key. Within a chunk of C tokens the corrections ``U: [C, V]`` solve a triangular system, the WY form of a
product of Householder-like matrices,

    (I + diag(β) M) U = diag(β) (V − K̃ S_in),   M_ij = Σ_d k_id k_jd e^{G_id − G_jd} for j < i,   K̃ = K ⊙ e^G,

and then are values like any others: ``S_out = e^{G_C} ⊙ S_in + K̄ᵀ U`` with ``K̄ = K ⊙ e^{G_C − G}``. (DeltaNet,
https://arxiv.org/abs/2406.06484, section 3; with a decay a head Gated DeltaNet, https://arxiv.org/abs/2412.06464, section 3.3;
with one a key dimension Kimi Delta Attention, https://arxiv.org/abs/2510.26692, section 3.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lasp.kernels.chunk import Decay, as_given, by_token, chunks, power_of_two, unchunk
from lasp.kernels.recurrence import Recurrence, Tokens
from lasp.kernels.segments import Segments
from lasp.kernels.summary import Summary, act


@dataclass(frozen=True)
class ChunkedDelta(Recurrence):
    """``S_t = (I − β_t k_t k_tᵀ) e^{g_t} ⊙ S_{t-1} + β_t k_t v_tᵀ`` in PyTorch.

    The gates are ``beta: [B, T, H]``, and before it g, if there is one: ``[B, T, H]`` or ``[B, T, H, K]``. Each segment is one
    chunk, and all chunks are computed at once.

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
        chunk = _Chunk.of(tokens, segments)
        to_exit = (chunk.k * chunk.decay.to_end).transpose(-1, -2)
        return Summary(chunk.transition(), to_exit @ chunk.solve(chunk.v))

    @as_given
    def output(self, q: Tensor, tokens: Tokens, entry: Tensor, segments: Segments, scale: float) -> Tensor:
        chunk = _Chunk.of(tokens, segments)
        q = chunks(q, tokens, segments) * scale
        o = (q * chunk.decay.from_start) @ entry + chunk.decay.scores(q, chunk.k) @ chunk.corrections(entry)
        return unchunk(o, segments, tokens.v)

    @as_given
    def adjoint_summary(self, q: Tensor, tokens: Tokens, do: Tensor, segments: Segments, scale: float) -> Summary:
        chunk = _Chunk.of(tokens, segments)
        q, do = chunks(q, tokens, segments) * scale, chunks(do, tokens, segments)
        # What a query reads of the entering state: what is there, less what the corrections take away.
        reads = q * chunk.decay.from_start - chunk.decay.scores(q, chunk.k) @ chunk.solve(chunk.k_from_start)
        return Summary(chunk.transition().transpose(-1, -2), reads.transpose(-1, -2) @ do)

    @as_given
    def query_gradient(
        self, q: Tensor, tokens: Tokens, entry: Tensor, do: Tensor, segments: Segments, scale: float, gated: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        chunk = _Chunk.of(tokens, segments)
        do, u = chunks(do, tokens, segments), chunk.corrections(entry)
        from_entry = (do @ entry.transpose(-1, -2)) * chunk.decay.from_start
        dq = from_entry + chunk.decay.weigh_keys(do @ u.transpose(-1, -2), chunk.k)
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
        chunk = _Chunk.of(tokens, segments)
        k, decay, u = chunk.k, chunk.decay, chunk.corrections(entry)
        q, do = chunks(q, tokens, segments) * scale, chunks(do, tokens, segments)

        du = decay.scores(q, k).transpose(-1, -2) @ do + (k * decay.to_end) @ exit_gradient
        # The gradients of what the system's right side is before β, and of that side: dv is what the values have of it.
        dright = torch.linalg.solve_triangular(chunk.system.transpose(-1, -2), du, upper=True, unitriangular=True)
        dv = chunk.beta * dright
        dscores, dM = do @ u.transpose(-1, -2), -(dv @ u.transpose(-1, -2)).tril(-1)
        dk_start = -(dv @ entry.transpose(-1, -2)) * decay.from_start
        dk_exit = (u @ exit_gradient.transpose(-1, -2)) * decay.to_end
        dk = decay.weigh_queries(dscores, q) + decay.weigh_keys(dM, k) + decay.weigh_queries(dM, k) + dk_start + dk_exit
        gates: tuple[Tensor, ...] = ()
        if gated:
            right = chunk.v - chunk.k_from_start @ entry - chunk.M @ u
            gates = (unchunk((dright * right).sum(-1), segments, tokens.gates[-1]),)
            if len(tokens.gates) > 1:
                from_start = q * (do @ entry.transpose(-1, -2)) * decay.from_start + k * dk_start
                from_start += decay.pairs(dscores, q, k) + decay.pairs(dM, k, k)
                dg = decay.gradient(from_start, k * dk_exit, entry, exit_gradient)
                gates = (unchunk(dg, segments, tokens.gates[0]), *gates)
        return Tokens(unchunk(dk, segments, tokens.k), unchunk(dv, segments, tokens.v), gates)


@dataclass(frozen=True)
class _Chunk:
    """Chunks of tokens ``[B, n, H, C, ...]`` in the dtype of the state.

    Attributes:
        k: keys ``[.., C, K]``.
        v: values ``[.., C, V]``.
        beta: ``[.., C, 1]``.
        decay: their decays.
        M: what keys have of the keys before them, decayed: ``[.., C, C]``, strictly lower.
        system: ``I + diag(β) M``.
    """

    k: Tensor
    v: Tensor
    beta: Tensor
    decay: Decay
    M: Tensor
    system: Tensor

    @classmethod
    def of(cls, tokens: Tokens, segments: Segments) -> _Chunk:
        *g, beta = tokens.gates
        k, v, beta = (chunks(x, tokens, segments) for x in (tokens.k, tokens.v, beta.unsqueeze(-1)))
        decay = Decay.of(g[0] if g else None, tokens, segments)
        M = decay.scores(k, k).tril(-1)
        return cls(k, v, beta, decay, M, beta * M + torch.eye(M.shape[-1], dtype=M.dtype, device=M.device))

    @property
    def k_from_start(self) -> Tensor:
        """What keys read the entering state by: ``K̃``."""
        return self.k * self.decay.from_start

    def solve(self, right: Tensor) -> Tensor:
        """``(I + diag(β) M)⁻¹ diag(β) right``."""
        return torch.linalg.solve_triangular(self.system, self.beta * right, upper=False, unitriangular=True)

    def corrections(self, entry: Tensor) -> Tensor:
        """U, when the state `entry` enters."""
        return self.solve(self.v - self.k_from_start @ entry)

    def transition(self) -> Tensor:
        """``diag(e^{G_C}) − K̄ᵀ (I + diag(β) M)⁻¹ diag(β) K̃``: ``[B, n, H, K, K]``."""
        K = self.k.shape[-1]
        kept = act(
            self.decay.whole, torch.eye(K, dtype=self.k.dtype, device=self.k.device).expand(*self.k.shape[:3], K, K)
        )
        return kept - (self.k * self.decay.to_end).transpose(-1, -2) @ self.solve(self.k_from_start)
