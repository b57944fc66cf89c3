"""The delta rule with a decay of each key dimension on Triton's kernels: the form for GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lasp.kernels.recurrence import Tokens
from lasp.kernels.segments import Segments
from lasp.kernels.triton import key_delta
from lasp.kernels.triton.corrected import SOLVED, TritonDelta, as_computed, corrections, precision, value_gradient
from lasp.kernels.triton.launch import Kernel, Launch, ready
from lasp.kernels.triton.tiling import delta_tiles, padded

scale_keys = Kernel(key_delta.scale_keys)
scale_queries = Kernel(key_delta.scale_queries)
read_states = Kernel(key_delta.read_states)
read_gradients = Kernel(key_delta.read_gradients)
query_gradient = Kernel(key_delta.query_gradient)
key_gradient = Kernel(key_delta.key_gradient)
gate_gradient = Kernel(key_delta.gate_gradient)


@dataclass(frozen=True)
class TritonKeyDelta(TritonDelta):
    """``S_t = (I − β_t k_t k_tᵀ) diag(e^{g_t}) S_{t-1} + β_t k_t v_tᵀ``, g ``[B, T, H, K]``, and beta after it.

    Precision and arguments: as of `TritonDelta`.
    """

    def prepare(self, tokens: Tokens, segments: Segments) -> Tokens:
        k, v = as_computed(tokens.k), as_computed(tokens.v)
        g, beta = (ready(gate) for gate in tokens.gates)
        B, T, H, K = k.shape
        C = delta_tiles(K, v.shape[-1], k.dtype).C
        anchors, chunks = segments.chunks(C, k.device)
        starts, ends = torch.empty_like(k), torch.empty_like(k)
        W, M = (k.new_empty(B, T, H, C) for _ in range(2))
        whole = torch.empty(B, H, anchors, K, dtype=torch.float32, device=k.device)
        launch = _scale_keys(B, T, H, K, C, len(segments), segments.size, anchors, k.dtype)
        launch(k, beta, g, starts, ends, W, M, whole, segments.bounds(k.device), chunks)
        return Tokens(k, v, (g, beta, starts, ends, W, M, whole))

    def asked(self, q: Tensor, tokens: Tokens, segments: Segments) -> tuple[Tensor, Tensor]:
        q, k, W = as_computed(q), tokens.k, tokens.gates[4]
        B, T, H, K = k.shape
        starts, P = torch.empty_like(q), torch.empty_like(W)
        launch = _scale_queries(B, T, H, K, W.shape[-1], len(segments), segments.size, k.dtype)
        launch(q, k, tokens.gates[0], starts, P, segments.bounds(k.device))
        return starts, P

    def query_gradient(
        self, q: Tensor, tokens: Tokens, entry: Tensor, do: Tensor, segments: Segments, scale: float, gated: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        kept = corrections(tokens, entry, segments, gated)
        given, q, do, k, u = q.dtype, as_computed(q), as_computed(do), tokens.k, kept[0]
        B, T, H, K = k.shape
        V, n, size = u.shape[-1], len(segments), segments.size
        read = _read_states(do, u, tokens, entry, segments)
        dq, change = torch.empty_like(q), torch.empty_like(read)
        launch = _query_gradient(B, T, H, K, V, tokens.gates[4].shape[-1], n, size, k.dtype, scale)
        launch(q, k, u, do, tokens.gates[0], read, dq, change, segments.bounds(k.device))
        return dq.to(given), (*kept, change)

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
        k, v = tokens.k, tokens.v
        g, beta, starts, _, W, _, whole = tokens.gates
        B, T, H, K = k.shape
        V, C, n = v.shape[-1], W.shape[-1], len(segments)
        bounds = segments.bounds(k.device)
        anchors, chunks = segments.chunks(C, k.device)
        given, asked, do = q.dtype, self.asked(q, tokens, segments), as_computed(do)
        u, change = kept[0], kept[-1]
        dv, dbeta = value_gradient(asked, tokens, do, exit_gradient, kept, segments, scale, gated)
        from_start = _read_states(dv, u, tokens, entry, segments)
        to_end = torch.empty_like(from_start)
        S_dS = torch.empty(B, n, H, K, dtype=torch.float32, device=k.device)
        _read_gradients(B, T, H, K, V, C, n, anchors, k.dtype, scale)(
            u, do, dv, asked[0], starts, to_end, whole, exit_gradient, entry, S_dS, bounds, chunks
        )
        dk = torch.empty_like(k)
        launch = _key_gradient(B, T, H, K, V, C, n, segments.size, k.dtype, scale)
        launch(as_computed(q), k, u, do, dv, g, from_start, to_end, dk, change, bounds)
        gates: tuple[Tensor, ...] = ()
        if gated:
            dg = torch.empty_like(g)
            _gate_gradient(B, T, H, K, n)(change, S_dS, dg, bounds)
            gates = (dg, dbeta.to(beta.dtype))
        return Tokens(dk.to(given), dv.to(given), gates)


def _read_states(a: Tensor, u: Tensor, tokens: Tokens, entry: Tensor, segments: Segments) -> Tensor:
    B, T, H, K = tokens.k.shape
    _, _, _, ends, W, _, whole = tokens.gates
    anchors, chunks = segments.chunks(W.shape[-1], a.device)
    read = torch.empty(B, T, H, K, dtype=torch.float32, device=a.device)
    launch = _reading(B, T, H, K, u.shape[-1], W.shape[-1], len(segments), anchors, a.dtype)
    launch(a, u, ends, read, whole, entry, segments.bounds(a.device), chunks)
    return read


# -- what the launches of the kernels depend on -----------------------------------------------------------------------


_once = lru_cache(maxsize=4096)


def _sizes(C: int) -> int:
    """Of how many sizes there are blocks of 2, 4, 8 .. C tokens."""
    return C.bit_length() - 1


@_once
def _scale_keys(B: int, T: int, H: int, K: int, C: int, n: int, size: int, anchors: int, dtype: torch.dtype) -> Launch:
    return scale_keys.launch(
        (B * H, n, -(-size // C)), T, H, anchors,
        K=K, BK=padded(K), C=C, SIZES=_sizes(C), SOLVED=SOLVED, LEVELS=_sizes(C // SOLVED),
        PRECISION=precision(dtype), warps=8,
    )  # fmt: skip


@_once
def _scale_queries(B: int, T: int, H: int, K: int, C: int, n: int, size: int, dtype: torch.dtype) -> Launch:
    return scale_queries.launch(
        (B * H, n, -(-size // C)), T, H,
        K=K, BK=padded(K), C=C, SIZES=_sizes(C), PRECISION=precision(dtype), warps=8,
    )  # fmt: skip


@_once
def _reading(B: int, T: int, H: int, K: int, V: int, C: int, n: int, anchors: int, dtype: torch.dtype) -> Launch:
    tile = delta_tiles(V, K, dtype)
    BC = min(tile.BC, 64)
    return read_states.launch(
        (B * H, n, -(-K // BC)), T, H, n, anchors,
        K=K, V=V, BV=tile.BA, BC=BC, C=C, STAGES=tile.stages, PRECISION=precision(dtype), warps=4,
    )  # fmt: skip


@_once
def _read_gradients(
    B: int, T: int, H: int, K: int, V: int, C: int, n: int, anchors: int, dtype: torch.dtype, scale: float
) -> Launch:
    tile = delta_tiles(V, K, dtype)
    BC = min(tile.BC, 64)
    return read_gradients.launch(
        (B * H, n, -(-K // BC)), scale, T, H, n, anchors,
        K=K, V=V, BV=tile.BA, BC=BC, C=C, STAGES=min(tile.stages, 2), PRECISION=precision(dtype), warps=4,
    )  # fmt: skip


@_once
def _query_gradient(
    B: int, T: int, H: int, K: int, V: int, C: int, n: int, size: int, dtype: torch.dtype, scale: float
) -> Launch:
    return query_gradient.launch(
        (B * H, n, -(-size // C)), scale, T, H,
        K=K, V=V, BK=padded(K), BV=padded(V), C=C, SIZES=_sizes(C), PRECISION=precision(dtype), warps=8,
    )  # fmt: skip


@_once
def _key_gradient(
    B: int, T: int, H: int, K: int, V: int, C: int, n: int, size: int, dtype: torch.dtype, scale: float
) -> Launch:
    return key_gradient.launch(
        (B * H, n, -(-size // C)), scale, T, H,
        K=K, V=V, BK=padded(K), BV=padded(V), C=C, SIZES=_sizes(C), PRECISION=precision(dtype), warps=8,
    )  # fmt: skip


@_once
def _gate_gradient(B: int, T: int, H: int, K: int, n: int) -> Launch:
    BC = min(padded(K), 32)
    return gate_gradient.launch((B * H, n, -(-K // BC)), T, H, n, K=K, C=64, BC=BC, warps=4)
