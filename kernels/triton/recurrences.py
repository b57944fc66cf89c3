"""Recurrences with an elementwise transition on Triton's kernels: the form for GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from lasp.kernels.recurrence import Recurrence, Tokens
from lasp.kernels.segments import Segments
from lasp.kernels.summary import Summary
from lasp.kernels.triton import head_decay, key_decay
from lasp.kernels.triton.launch import Kernel, Launch, ready
from lasp.kernels.triton.tiling import (
    Tiles,
    column_tiles,
    gated_tiles,
    key_tiles,
    padded,
    processors,
    segment_size,
    tiles,
)

_NONE, _CONSTANT, _BY_TOKEN = (kind.value for kind in (head_decay.NONE, head_decay.CONSTANT, head_decay.BY_TOKEN))
#: How products are computed for the dtypes that the kernels take.
PRECISION = {torch.bfloat16: "bf16", torch.float16: "tf32", torch.float32: "tf32x3"}

cumulate = Kernel(head_decay.cumulate)
summarise = Kernel(head_decay.summarise)
attend = Kernel(head_decay.attend)
attend_back = Kernel(head_decay.attend_back)
gate_gradient = Kernel(head_decay.gate_gradient)
cumulate_keys = Kernel(key_decay.cumulate_keys)
summarise_keys = Kernel(key_decay.summarise_keys)
attend_keys = Kernel(key_decay.attend_keys)


@dataclass(frozen=True)
class TritonHeadDecay(Recurrence):
    """``S_t = e^{g_t} S_{t-1} + k_t v_tᵀ`` with g none, ``[H]`` or ``[B, T, H]``, for bfloat16, float16 and float32.

    Products are of bfloat16, of tf32 for float16, and of three tf32 parts, which is float32's accuracy, for float32.

    Args:
        segment_size: the longest segment, in tokens.
        width_multiple: of which K and V must be multiples.
    """

    segment_size: int
    width_multiple: int = 1

    @classmethod
    def of(cls, tokens: Tokens) -> TritonHeadDecay:
        """The recurrence for such tokens, in segments that fill their device."""
        B, T, H, K = tokens.k.shape
        tile = tiles(K, tokens.v.shape[-1], tokens.k.dtype)
        size = segment_size(B * H * tile.blocks, T, tile.C, processors(tokens.k.device))
        # The rows of a tensor descriptor start at multiples of 16 bytes.
        return cls(size, 16 // tokens.k.element_size())

    def prepare(self, tokens: Tokens, segments: Segments) -> Tokens:
        k, v = ready(tokens.k), ready(tokens.v)
        if not tokens.gates:
            return Tokens(k, v)
        g = ready(tokens.gates[0])
        if g.dim() == 1:
            return Tokens(k, v, (g,))
        B, T, H = g.shape
        G = torch.empty(B, H, T, dtype=torch.float32, device=g.device)
        C = tiles(k.shape[-1], v.shape[-1], k.dtype).C
        cumulate_launch(B, T, H, len(segments), segments.size, C)(g, G, segments.bounds(g.device))
        return Tokens(k, v, (g, G))

    def summary(self, tokens: Tokens, segments: Segments) -> Summary:
        return self._summary(tokens.k, tokens.v, tokens, segments, 1.0, False)

    def adjoint_summary(self, q: Tensor, tokens: Tokens, do: Tensor, segments: Segments, scale: float) -> Summary:
        return self._summary(ready(q), ready(do), tokens, segments, scale, True)

    def output(self, q: Tensor, tokens: Tokens, entry: Tensor, segments: Segments, scale: float) -> Tensor:
        o = torch.empty_like(tokens.v)
        self._attend(ready(q), tokens.k, tokens.v, o, tokens, entry, segments, scale, False)
        return o

    def query_gradient(
        self, q: Tensor, tokens: Tokens, entry: Tensor, do: Tensor, segments: Segments, scale: float, gated: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        q = ready(q)
        dq = torch.empty_like(q)
        kept: tuple[Tensor, ...] = ()
        if gated:
            B, T, H, K = q.shape
            blocks = gated_tiles(tokens.v.shape[-1], K, q.dtype).blocks
            kept = (torch.empty(blocks, B, H, T, dtype=torch.float32, device=q.device),)
        self._attend(
            ready(do), tokens.v, tokens.k, dq, tokens, entry, segments, scale, True, (q, *kept) if gated else ()
        )
        return dq, kept

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
        q, do, k, v = ready(q), ready(do), tokens.k, tokens.v
        B, T, H, K = k.shape
        V, n = v.shape[-1], len(segments)
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        bounds = segments.bounds(k.device)
        kind, g, G = self._decay(tokens)
        k_dk = S_dS = entry
        if gated:
            k_dk = torch.empty_like(kept[0])
            S_dS = torch.empty(*k_dk.shape[:3], n, dtype=torch.float32, device=k.device)
        # Side by side they read what they share once. Gated, the two differ too much.
        for role in ("both",) if K == V and not gated else ("dv", "dk"):
            launch = _attend_back(B, T, H, K, V, n, k.dtype, kind, role, gated and role == "dk", scale)
            launch(q, k, v, do, dk, dv, g, G, exit_gradient, entry, k_dk, S_dS, bounds)
        if not gated:
            return Tokens(dk, dv)
        gate = tokens.gates[0]
        dg = torch.empty_like(gate) if kind == _BY_TOKEN else torch.empty(B, H, n, dtype=torch.float32, device=k.device)
        gate_gradient_launch(B, T, H, n, len(k_dk), kind)(dg, kept[0], k_dk, S_dS, bounds)
        return Tokens(dk, dv, (dg if kind == _BY_TOKEN else dg.sum((0, 2)).to(gate.dtype),))

    def _decay(self, tokens: Tokens) -> tuple[int, Tensor, Tensor]:
        """The kind of decay, g and G, or whatever stands for them where there is none."""
        if not tokens.gates:
            return _NONE, tokens.k, tokens.k
        if len(tokens.gates) == 1:
            return _CONSTANT, tokens.gates[0], tokens.gates[0]
        return _BY_TOKEN, *tokens.gates

    def _summary(
        self, b: Tensor, c: Tensor, tokens: Tokens, segments: Segments, scale: float, reverse: bool
    ) -> Summary:
        B, T, H, DB = b.shape
        DC, n = c.shape[-1], len(segments)
        kind, g, G = self._decay(tokens)
        S = torch.empty(B, n, H, DB, DC, dtype=torch.float32, device=b.device)
        A = _ones(n, S.device) if kind == _NONE else torch.empty(B, n, H, dtype=torch.float32, device=b.device)
        launch = _summarise(B, T, H, DB, DC, n, b.dtype, kind, reverse, scale)
        launch(b, c, g, G, S if kind == _NONE else A, S, segments.bounds(b.device))
        return Summary(A, S)

    def _attend(
        self, a: Tensor, b: Tensor, c: Tensor, out: Tensor, tokens: Tokens, S: Tensor, segments: Segments, scale: float,
        across: bool, gated: tuple[Tensor, ...] = (),
    ) -> None:  # fmt: skip
        B, T, H, DA = a.shape
        kind, g, G = self._decay(tokens)
        launch = _attend(B, T, H, DA, c.shape[-1], len(segments), a.dtype, kind, across, bool(gated), scale)
        launch(a, b, c, out, g, G, S, *(gated or (a, S)), segments.bounds(a.device))


@dataclass(frozen=True)
class TritonKeyDecay(Recurrence):
    """``S_t = diag(e^{g_t}) S_{t-1} + k_t v_tᵀ`` with g ``[B, T, H, K]``, for bfloat16, float16 and float32.

    Precision and arguments: as of `TritonHeadDecay`.
    """

    segment_size: int
    width_multiple: int = 1

    @classmethod
    def of(cls, tokens: Tokens) -> TritonKeyDecay:
        """The recurrence for such tokens, in segments that fill their device."""
        B, T, H, K = tokens.k.shape
        tile = key_tiles(K, tokens.v.shape[-1], tokens.k.dtype)
        size = segment_size(B * H * tile.blocks, T, tile.C, processors(tokens.k.device))
        return cls(size, 16 // tokens.k.element_size())

    def prepare(self, tokens: Tokens, segments: Segments) -> Tokens:
        k, v, g = ready(tokens.k), ready(tokens.v), ready(tokens.gates[0])
        B, T, H, K = k.shape
        tile = key_tiles(K, v.shape[-1], k.dtype)
        anchors, chunks = self._anchors(tokens, segments)
        n, programs = len(segments), min(64, -(-segments.size // tile.C))
        G = torch.empty(B, T, H, K, dtype=torch.float32, device=k.device)
        between, farthest = G.new_empty(B, H, anchors, K), G.new_empty(B, H, n, programs)
        _cumulate_keys(B, T, H, K, n, anchors, programs, tile)(
            g, G, between, farthest, segments.bounds(g.device), chunks
        )
        return Tokens(k, v, (g, G, between, farthest))

    def summary(self, tokens: Tokens, segments: Segments) -> Summary:
        return self._summary(tokens.k, tokens.v, tokens, segments, 1.0, False)

    def adjoint_summary(self, q: Tensor, tokens: Tokens, do: Tensor, segments: Segments, scale: float) -> Summary:
        return self._summary(ready(q), ready(do), tokens, segments, scale, True)

    def output(self, q: Tensor, tokens: Tokens, entry: Tensor, segments: Segments, scale: float) -> Tensor:
        return self._attend(ready(q), tokens.k, tokens.v, tokens, entry, segments, scale, along=True, reverse=False)

    def query_gradient(
        self, q: Tensor, tokens: Tokens, entry: Tensor, do: Tensor, segments: Segments, scale: float, gated: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        q, G = ready(q), tokens.gates[1]
        kept = (torch.empty_like(G), torch.empty_like(entry)) if gated else ()
        also = (q, *kept, G) if gated else ()
        return self._attend(ready(do), tokens.v, tokens.k, tokens, entry, segments, scale, False, False, also), kept

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
        q, do, k, g = ready(q), ready(do), tokens.k, tokens.gates[0]
        dv = self._attend(k, q, do, tokens, exit_gradient, segments, scale, along=True, reverse=True)
        if not gated:
            return Tokens(self._attend(tokens.v, do, q, tokens, exit_gradient, segments, scale, False, True), dv)
        dg = kept[0] if g.dtype == torch.float32 else torch.empty_like(g)
        dk = self._attend(tokens.v, do, q, tokens, exit_gradient, segments, scale, False, True, (k, *kept, dg))
        return Tokens(dk, dv, (dg,))

    def _anchors(self, tokens: Tokens, segments: Segments) -> tuple[int, Tensor]:
        """How many chunks, each with an anchor, the segments have, and how many before each of them."""
        C = key_tiles(tokens.k.shape[-1], tokens.v.shape[-1], tokens.k.dtype).C
        return segments.chunks(C, tokens.k.device)

    def _summary(
        self, b: Tensor, c: Tensor, tokens: Tokens, segments: Segments, scale: float, reverse: bool
    ) -> Summary:
        B, T, H, DB = b.shape
        DC, n = c.shape[-1], len(segments)
        anchors, chunks = self._anchors(tokens, segments)
        g, G, between, _ = tokens.gates
        S = torch.empty(B, n, H, DB, DC, dtype=torch.float32, device=b.device)
        A = torch.empty(B, n, H, DB, dtype=torch.float32, device=b.device)
        _summarise_keys(B, T, H, DB, DC, n, anchors, b.dtype, reverse, scale)(
            b, c, g, G, between, A, S, segments.bounds(b.device), chunks
        )
        return Summary(A, S)

    def _attend(
        self, a: Tensor, b: Tensor, c: Tensor, tokens: Tokens, S: Tensor, segments: Segments, scale: float, along: bool,
        reverse: bool, gated: tuple[Tensor, ...] = (),
    ) -> Tensor:  # fmt: skip
        B, T, H, DA = a.shape
        out = torch.empty_like(c)
        anchors, chunks = self._anchors(tokens, segments)
        g, G, between, farthest = tokens.gates
        x, partner, S_exit, dg = gated or (out, G, S, G)
        launch = _attend_keys(
            B, T, H, DA, c.shape[-1], len(segments), anchors, farthest.shape[-1], a.dtype, along, reverse, bool(gated), scale
        )  # fmt: skip
        launch(a, b, c, out, x, g, G, between, farthest, S, S_exit, partner, dg, segments.bounds(a.device), chunks)
        return out


def triton_decay(tokens: Tokens) -> Recurrence:
    """The recurrence for such tokens, in segments that fill their device."""
    if tokens.gates and tokens.gates[0].dim() == 4:
        return TritonKeyDecay.of(tokens)
    return TritonHeadDecay.of(tokens)


@cache
def _ones(n: int, device: torch.device) -> Tensor:
    """The transition of n segments in which nothing decays."""
    return torch.ones((), device=device).expand(1, n, 1)


def _exact(dtype: torch.dtype) -> bool:
    """Whether sums of log-decays may not be differences of longer ones: only where the result has the digits to show it."""
    return dtype == torch.float32


# -- what the launches of the kernels depend on -----------------------------------------------------------------------


_once = lru_cache(maxsize=4096)


@_once
def cumulate_launch(B: int, T: int, H: int, n: int, size: int, C: int) -> Launch:
    BH = 8
    return cumulate.launch((n, min(64, -(-size // C)), B * -(-H // BH)), T, H, warps=2, C=C, BH=BH)


@_once
def _summarise(
    B: int, T: int, H: int, DB: int, DC: int, n: int, dtype: torch.dtype, kind: int, reverse: bool, scale: float
) -> Launch:
    tile = tiles(DB, DC, dtype)
    return summarise.launch(
        (B * H, n, tile.blocks), scale, T, H, n,
        DB=DB, DC=DC, BB=tile.BA, BC=tile.BC, C=tile.C, DECAY=kind, REVERSE=reverse, EXACT=_exact(dtype),
        STAGES=3 if tile.stages > 1 else 1, PRECISION=PRECISION[dtype], warps=4,
    )  # fmt: skip


@_once
def _attend(
    B: int, T: int, H: int, DA: int, DC: int, n: int, dtype: torch.dtype, kind: int, across: bool, gated: bool, scale: float
) -> Launch:  # fmt: skip
    tile = (gated_tiles if gated else tiles)(DA, DC, dtype)
    return attend.launch(
        (B * H, n, tile.blocks), scale, T, H, n,
        DA=DA, DC=DC, BA=tile.BA, BC=tile.BC, C=tile.C, DECAY=kind, ACROSS=across, STRICT=False,
        EXACT=_exact(dtype), GATED=gated, STAGES=tile.stages, PRECISION=PRECISION[dtype], warps=tile.warps,
    )  # fmt: skip


@_once
def _attend_back(
    B: int, T: int, H: int, K: int, V: int, n: int, dtype: torch.dtype, kind: int, role: str, gated: bool, scale: float
) -> Launch:  # fmt: skip
    tile = (gated_tiles if gated else tiles)(*((V, K) if role == "dk" else (K, V)), dtype)
    return attend_back.launch(
        ((2 if role == "both" else 1) * tile.blocks, B * H, n), scale, 1 / scale, T, H, n,
        K=K, V=V, BK=padded(K), BV=padded(V), BLOCK=tile.BC, C=tile.C, ROLE=role, DECAY=kind, EXACT=_exact(dtype),
        GATED=gated, STAGES=tile.stages, PRECISION=PRECISION[dtype], warps=tile.warps,
    )  # fmt: skip


@_once
def gate_gradient_launch(B: int, T: int, H: int, n: int, blocks: int, kind: int) -> Launch:
    return gate_gradient.launch((B * H, n, 1), T, H, n, blocks, DECAY=kind, BLOCK=4096, warps=8)


@_once
def _cumulate_keys(B: int, T: int, H: int, K: int, n: int, anchors: int, programs: int, tile: Tiles) -> Launch:
    return cumulate_keys.launch((B * H, n, programs), T, H, anchors, K=K, C=tile.C, BK=tile.BA, warps=4)


@_once
def _summarise_keys(
    B: int, T: int, H: int, DB: int, DC: int, n: int, anchors: int, dtype: torch.dtype, reverse: bool, scale: float
) -> Launch:
    tile = key_tiles(DB, DC, dtype)
    return summarise_keys.launch(
        (B * H, n, tile.blocks), scale, T, H, n, anchors,
        DB=DB, DC=DC, BB=tile.BA, BC=tile.BC, C=tile.C, REVERSE=reverse, EXACT=_exact(dtype), STAGES=tile.stages,
        PRECISION=PRECISION[dtype], warps=tile.warps,
    )  # fmt: skip


@_once
def _attend_keys(
    B: int, T: int, H: int, DA: int, DC: int, n: int, anchors: int, programs: int, dtype: torch.dtype, along: bool,
    reverse: bool, gated: bool, scale: float,
) -> Launch:  # fmt: skip
    tile = (key_tiles if along else column_tiles)(DA, DC, dtype)
    exact = _exact(dtype)
    return attend_keys.launch(
        (B * H, n, tile.blocks),
        # The states' gradients have the scale in them.
        scale, 1 / scale if reverse else 1.0,
        T, H, n, anchors, programs,
        DA=DA, DC=DC, BA=tile.BA, BC=tile.BC, C=0 if exact else key_tiles(DA, DC, dtype).C, ROWS=tile.C,
        SHORT=8 if exact else 16, ALONG=along, REVERSE=reverse, GATED=gated, STAGES=tile.stages,
        PRECISION=PRECISION[dtype], warps=tile.warps,
    )  # fmt: skip
