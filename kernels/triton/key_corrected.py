"""The delta rule with a decay of each key dimension on Triton's kernels: the form for GPUs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lasp.kernels.recurrence import Tokens
from lasp.kernels.segments import Segments
from lasp.kernels.triton import key_delta
from lasp.kernels.triton.corrected import (
    BY_KEY,
    SOLVED,
    Solved,
    TritonDelta,
    as_computed,
    corrections,
    precision,
    solved,
    value_gradient,
)
from lasp.kernels.triton.launch import Kernel, Launch, ready
from lasp.kernels.triton.tiling import delta_tiles, padded

cumulate = Kernel(key_delta.cumulate_keys)
scale_keys = Kernel(key_delta.scale_keys)
scale_queries = Kernel(key_delta.scale_queries)
read_states = Kernel(key_delta.read_states)
read_gradients = Kernel(key_delta.read_gradients)
query_gradient = Kernel(key_delta.query_gradient)
key_gradient = Kernel(key_delta.key_gradient)
gate_gradient = Kernel(key_delta.gate_gradient)


#: How many key dimensions a program takes at once that makes products of pairs. Of narrower tiles Triton 3.6 makes kernels that
#: read beyond their memory.
COLUMNS = 64


def triton_delta(tokens: Tokens) -> TritonDelta:
    """The delta rule for such tokens, by what their decay is of: a head or nothing, or a key dimension."""
    form = TritonKeyDelta if tokens.gates[0].dim() == 4 else TritonDelta
    return form.of(tokens)


@dataclass(frozen=True)
class TritonKeyDelta(TritonDelta):
    """``S_t = (I − β_t k_t k_tᵀ) diag(e^{g_t}) S_{t-1} + β_t k_t v_tᵀ``, g ``[B, T, H, K]``, and beta after it.

    Precision and arguments: as of `TritonDelta`.
    """

    def prepare(self, tokens: Tokens, segments: Segments) -> Solved:
        k, v = as_computed(tokens.k), as_computed(tokens.v)
        g, beta = (ready(gate) for gate in tokens.gates)
        bounds, sizes = segments.bounds(k.device), _Sizes.of(Tokens(k, v), segments)
        G = torch.empty_like(g, dtype=torch.float32 if k.dtype == torch.bfloat16 else torch.float64)
        starts, ends = torch.empty_like(k), torch.empty_like(k)
        W, M = (k.new_empty(*k.shape[:3], sizes.C) for _ in range(2))
        reaches = torch.empty(k.shape[:3], dtype=torch.int32, device=k.device)
        _cumulate(sizes)(g, G, reaches, bounds)
        _scale_keys(sizes)(k, beta, G, reaches, starts, ends, W, M, bounds)
        return Solved(
            k, v, tokens.gates, kind=BY_KEY, beta=beta, g=g, G=G, W=W, starts=starts, ends=ends, M=M, reaches=reaches
        )  # fmt: skip

    def prepare_backward(self, q: Tensor, tokens: Tokens, segments: Segments) -> Solved:
        prepared = self.prepare(tokens, segments)
        return replace(prepared, asked=self.asked(q, prepared, segments))

    def asked(self, q: Tensor, tokens: Tokens, segments: Segments) -> tuple[Tensor, Tensor]:
        q, x = as_computed(q), solved(tokens)
        if x.asked is not None:
            return x.asked
        starts, P = torch.empty_like(q), torch.empty_like(x.W)
        launch = _scale_queries(_Sizes.of(tokens, segments))
        launch(q, x.k, x.G, x.reaches, starts, P, segments.bounds(q.device))
        return starts, P

    def query_gradient(
        self, q: Tensor, tokens: Tokens, entry: Tensor, do: Tensor, segments: Segments, scale: float, gated: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        kept = corrections(tokens, entry, segments, gated)
        given, q, do = q.dtype, as_computed(q), as_computed(do)
        dq, change = torch.empty_like(q), torch.empty_like(q, dtype=torch.float32)
        _as_query(q, do, kept[0], tokens, entry, segments, scale, change, dq)
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
        given, k, x = q.dtype, tokens.k, solved(tokens)
        B, _, H, K = k.shape
        bounds, sizes = segments.bounds(k.device), _Sizes.of(tokens, segments)
        asked, q, do = self.asked(q, tokens, segments), as_computed(q), as_computed(do)
        u, change = kept[0], kept[-1]
        dv, dbeta = value_gradient(asked, tokens, do, exit_gradient, kept, segments, scale, gated)
        as_query = _as_query(k, dv, u, tokens, entry, segments, -1.0, change)
        read = torch.empty_like(as_query)
        S_dS = torch.empty(B, len(segments), H, K, dtype=torch.float32, device=k.device)
        _read_gradients(sizes, scale)(u, do, dv, q, k, read, x.G, exit_gradient, entry, S_dS, bounds)
        dk = torch.empty_like(k)
        _key_gradient(sizes, scale)(q, k, u, do, dv, x.G, x.reaches, as_query, read, dk, change, bounds)
        gates: tuple[Tensor, ...] = ()
        if gated:
            dg = torch.empty_like(x.g)
            _gate_gradient(sizes)(change, S_dS, dg, bounds)
            gates = (dg, dbeta.to(x.beta.dtype))
        return Tokens(dk.to(given), dv.to(given), gates)


def _as_query(
    x: Tensor, a: Tensor, u: Tensor, tokens: Tokens, entry: Tensor, segments: Segments, scale: float, change: Tensor,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The gradient of x as a query whose output has the gradient a; in float32, and of x the keys, where there is no `out`."""
    of = solved(tokens)
    bounds, sizes = segments.bounds(x.device), _Sizes.of(tokens, segments)
    read = torch.empty_like(x, dtype=torch.float32)
    _reading(sizes)(a, u, of.k, read, of.G, entry, bounds)
    dx = read if out is None else out
    _query_gradient(sizes, scale, out is None)(
        x, of.k, u, a, of.G, of.reaches, read, dx, change, bounds
    )  # fmt: skip
    return dx


# -- what the launches of the kernels depend on -----------------------------------------------------------------------


class _Sizes(NamedTuple):
    """C tokens a chunk, n segments of at most `size` tokens."""

    B: int
    T: int
    H: int
    K: int
    V: int
    C: int
    n: int
    size: int
    dtype: torch.dtype

    @classmethod
    def of(cls, tokens: Tokens, segments: Segments) -> _Sizes:
        (B, T, H, K), V, dtype = tokens.k.shape, tokens.v.shape[-1], tokens.k.dtype
        return cls(B, T, H, K, V, delta_tiles(K, V, dtype).C, len(segments), segments.size, dtype)

    @property
    def chunks(self) -> int:
        """How many the longest segment has."""
        return -(-self.size // self.C)

    @property
    def sizes(self) -> int:
        """Of how many sizes there are blocks of 2, 4, 8 .. C tokens."""
        return self.C.bit_length() - 1


_once = lru_cache(maxsize=4096)


@_once
def _cumulate(x: _Sizes) -> Launch:
    return cumulate.launch((x.B * x.H, x.n, x.chunks), x.T, x.H, K=x.K, BK=padded(x.K), C=x.C, SIZES=x.sizes, warps=4)


@_once
def _scale_keys(x: _Sizes) -> Launch:
    return scale_keys.launch(
        (x.B * x.H, x.n, x.chunks), x.T, x.H,
        K=x.K, BK=COLUMNS, C=x.C, SIZES=x.sizes, SOLVED=SOLVED, LEVELS=(x.C // SOLVED).bit_length() - 1,
        PRECISION=precision(x.dtype), warps=4,
    )  # fmt: skip


@_once
def _scale_queries(x: _Sizes) -> Launch:
    return scale_queries.launch(
        (x.B * x.H, x.n, x.chunks), x.T, x.H,
        K=x.K, BK=COLUMNS, C=x.C, SIZES=x.sizes, PRECISION=precision(x.dtype), warps=4,
    )  # fmt: skip


@_once
def _reading(x: _Sizes) -> Launch:
    tile = delta_tiles(x.V, x.K, x.dtype)
    BC = min(tile.BC, 64)
    return read_states.launch(
        (x.B * x.H, x.n, -(-x.K // BC)), x.T, x.H, x.n,
        K=x.K, V=x.V, BV=tile.BA, BC=BC, C=x.C, STAGES=tile.stages, PRECISION=precision(x.dtype), warps=4,
    )  # fmt: skip


@_once
def _read_gradients(x: _Sizes, scale: float) -> Launch:
    tile = delta_tiles(x.V, x.K, x.dtype)
    BC = min(tile.BC, 64)
    return read_gradients.launch(
        (x.B * x.H, x.n, -(-x.K // BC)), scale, x.T, x.H, x.n,
        K=x.K, V=x.V, BV=tile.BA, BC=BC, C=x.C, STAGES=min(tile.stages, 2), PRECISION=precision(x.dtype), warps=4,
    )  # fmt: skip


@_once
def _query_gradient(x: _Sizes, scale: float, as_keys: bool) -> Launch:
    return query_gradient.launch(
        (x.B * x.H, x.n, x.chunks * -(-x.K // COLUMNS)), scale, x.T, x.H,
        K=x.K, V=x.V, BV=padded(x.V), BC=COLUMNS, C=x.C, SIZES=x.sizes, AS_KEYS=as_keys,
        PRECISION=precision(x.dtype), warps=4,
    )  # fmt: skip


@_once
def _key_gradient(x: _Sizes, scale: float) -> Launch:
    return key_gradient.launch(
        (x.B * x.H, x.n, x.chunks * -(-x.K // COLUMNS)), scale, x.T, x.H,
        K=x.K, V=x.V, BV=padded(x.V), BC=COLUMNS, C=x.C, SIZES=x.sizes, PRECISION=precision(x.dtype), warps=4,
    )  # fmt: skip


@_once
def _gate_gradient(x: _Sizes) -> Launch:
    BC = min(padded(x.K), 32)
    return gate_gradient.launch((x.B * x.H, x.n, -(-x.K // BC)), x.T, x.H, x.n, K=x.K, C=64, BC=BC, warps=4)
