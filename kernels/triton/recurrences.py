"""Recurrences with an elementwise transition on Triton's kernels: the form for GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lasp.kernels.recurrence import Recurrence, Tokens
from lasp.kernels.segments import Segments
from lasp.kernels.summary import Summary
from lasp.kernels.triton import head_decay, key_decay
from lasp.kernels.triton.launch import Kernel, ready
from lasp.kernels.triton.tiling import column_tiles, key_tiles, processors, segment_size, tiles

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
        C = tiles(k.shape[-1], v.shape[-1], k.dtype).C
        G = torch.empty(B, H, T, dtype=torch.float32, device=g.device)
        BH = 8
        grid = (len(segments), min(64, -(-segments.size // C)), B * -(-H // BH))
        cumulate(grid, g, G, segments.bounds(g.device), T, H, warps=2, C=C, BH=BH)
        return Tokens(k, v, (g, G))

    def summary(self, tokens: Tokens, segments: Segments) -> Summary:
        return self._summary(tokens.k, tokens.v, tokens, segments, 1.0, False)

    def adjoint_summary(self, q: Tensor, tokens: Tokens, do: Tensor, segments: Segments, scale: float) -> Summary:
        return self._summary(ready(q), ready(do), tokens, segments, scale, True)

    def output(self, q: Tensor, tokens: Tokens, entry: Tensor, segments: Segments, scale: float) -> Tensor:
        o = torch.empty_like(tokens.v)
        self._attend(ready(q), tokens.k, tokens.v, o, tokens, entry, segments, scale, False, None)
        return o

    def query_gradient(
        self, q: Tensor, tokens: Tokens, entry: Tensor, do: Tensor, segments: Segments, scale: float, gated: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        q = ready(q)
        dq = torch.empty_like(q)
        kept: tuple[Tensor, ...] = ()
        if gated:
            B, T, H, K = q.shape
            blocks = tiles(tokens.v.shape[-1], K, q.dtype).blocks
            kept = (torch.empty(blocks, B, H, T, dtype=torch.float32, device=q.device),)
        self._attend(ready(do), tokens.v, tokens.k, dq, tokens, entry, segments, scale, True, q, kept)
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
        for_v, for_k = tiles(K, V, k.dtype), tiles(V, K, k.dtype)
        k_dk = S_dS = entry
        if gated:
            k_dk = torch.empty_like(kept[0])
            S_dS = torch.empty(for_k.blocks, B, H, n, dtype=torch.float32, device=k.device)
        # Gated, the two differ too much to run side by side.
        roles = [("both", for_v)] if K == V and not gated else [("dv", for_v), ("dk", for_k)]
        for role, tile in roles:
            attend_back(
                ((2 if role == "both" else 1) * tile.blocks, B * H, n),
                q, k, v, do, dk, dv, g, G, exit_gradient, entry, k_dk, S_dS, bounds,
                scale, 1 / scale, T, H, n,
                K=K, V=V, BK=tiles(K, V, k.dtype).BA, BV=tiles(V, K, k.dtype).BA, BLOCK=tile.BC, C=tile.C, ROLE=role,
                DECAY=kind, EXACT=_exact(k), GATED=gated and role == "dk", STAGES=tile.stages, PRECISION=PRECISION[k.dtype],
                warps=tile.warps,
            )  # fmt: skip
        if not gated:
            return Tokens(dk, dv)
        constant = kind == _CONSTANT
        dg = (
            torch.empty(B, H, n, dtype=torch.float32, device=k.device)
            if constant
            else torch.empty_like(tokens.gates[0])
        )
        gate_gradient(
            (B * H, n, 1), dg, kept[0], k_dk, S_dS, bounds, T, H, n, for_k.blocks, DECAY=kind, BLOCK=1024, warps=4
        )
        return Tokens(dk, dv, (dg.sum((0, 2)).to(tokens.gates[0].dtype) if constant else dg,))

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
        tile = tiles(DB, DC, b.dtype)
        kind, g, G = self._decay(tokens)
        S = torch.empty(B, n, H, DB, DC, dtype=torch.float32, device=b.device)
        if kind == _NONE:
            A = _one(S.device).expand(1, n, 1)
        else:
            A = torch.empty(B, n, H, dtype=torch.float32, device=b.device)
        summarise(
            (B * H, n, tile.blocks),
            b, c, g, G, S if kind == _NONE else A, S, segments.bounds(b.device), scale, T, H, n,
            DB=DB, DC=DC, BB=tile.BA, BC=tile.BC, C=tile.C, DECAY=kind, REVERSE=reverse, EXACT=_exact(b),
            STAGES=3 if tile.stages > 1 else 1, PRECISION=PRECISION[b.dtype], warps=4,
        )  # fmt: skip
        return Summary(A, S)

    def _attend(
        self, a: Tensor, b: Tensor, c: Tensor, out: Tensor, tokens: Tokens, S: Tensor, segments: Segments, scale: float,
        across: bool, x: Tensor | None, kept: tuple[Tensor, ...] = (),
    ) -> None:  # fmt: skip
        B, T, H, DA = a.shape
        DC, n = c.shape[-1], len(segments)
        tile = tiles(DA, DC, a.dtype)
        kind, g, G = self._decay(tokens)
        attend(
            (B * H, n, tile.blocks),
            a, b, c, out, g, G, S, a if x is None else x, kept[0] if kept else S,
            segments.bounds(a.device), scale, T, H, n,
            DA=DA, DC=DC, BA=tile.BA, BC=tile.BC, C=tile.C, DECAY=kind, ACROSS=across, EXACT=_exact(a),
            GATED=bool(kept), STAGES=tile.stages, PRECISION=PRECISION[a.dtype], warps=tile.warps,
        )  # fmt: skip


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
        programs = min(64, -(-segments.size // tile.C))
        G = torch.empty(B, T, H, K, dtype=torch.float32, device=k.device)
        between = G.new_empty(B, H, anchors, K)
        farthest = G.new_empty(B, H, len(segments), programs)
        cumulate_keys(
            (B * H, len(segments), programs), g, G, between, farthest, segments.bounds(g.device), chunks, T, H, anchors,
            K=K, C=tile.C, BK=tile.BA, warps=4,
        )  # fmt: skip
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
        dq = self._attend(
            ready(do),
            tokens.v,
            tokens.k,
            tokens,
            entry,
            segments,
            scale,
            False,
            False,
            (q, *kept, G) if gated else None,
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
        tile = key_tiles(DB, DC, b.dtype)
        anchors, chunks = self._anchors(tokens, segments)
        g, G, between, _ = tokens.gates
        S = torch.empty(B, n, H, DB, DC, dtype=torch.float32, device=b.device)
        A = torch.empty(B, n, H, DB, dtype=torch.float32, device=b.device)
        summarise_keys(
            (B * H, n, tile.blocks),
            b, c, g, G, between, A, S, segments.bounds(b.device), chunks, scale, T, H, n, anchors,
            DB=DB, DC=DC, BB=tile.BA, BC=tile.BC, C=tile.C, REVERSE=reverse, EXACT=_exact(b), STAGES=tile.stages,
            PRECISION=PRECISION[b.dtype], warps=tile.warps,
        )  # fmt: skip
        return Summary(A, S)

    def _attend(
        self, a: Tensor, b: Tensor, c: Tensor, tokens: Tokens, S: Tensor, segments: Segments, scale: float, along: bool,
        reverse: bool, gated: tuple[Tensor, ...] | None = None,
    ) -> Tensor:  # fmt: skip
        B, T, H, DA = a.shape
        DC, n = c.shape[-1], len(segments)
        out = torch.empty_like(c)
        C = key_tiles(DA, DC, a.dtype).C
        tile = (key_tiles if along else column_tiles)(DA, DC, a.dtype)
        anchors, chunks = self._anchors(tokens, segments)
        g, G, between, farthest = tokens.gates
        x, partner, S_exit, dg = gated or (out, G, S, G)
        attend_keys(
            (B * H, n, tile.blocks),
            a, b, c, out, x, g, G, between, farthest, S, S_exit, partner, dg, segments.bounds(a.device), chunks,
            # The states' gradients have the scale in them.
            scale, 1 / scale if reverse else 1.0,
            T, H, n, anchors, farthest.shape[-1],
            DA=DA, DC=DC, BA=tile.BA, BC=tile.BC, C=0 if _exact(a) else C, ROWS=tile.C, SHORT=8 if _exact(a) else 16,
            ALONG=along, REVERSE=reverse, GATED=gated is not None, STAGES=tile.stages, PRECISION=PRECISION[a.dtype],
            warps=tile.warps,
        )  # fmt: skip
        return out


def triton_decay(tokens: Tokens) -> Recurrence:
    """The recurrence for such tokens, in segments that fill their device."""
    if tokens.gates and tokens.gates[0].dim() == 4:
        return TritonKeyDecay.of(tokens)
    return TritonHeadDecay.of(tokens)


@cache
def _one(device: torch.device) -> Tensor:
    return torch.ones((), device=device)


def _exact(x: Tensor) -> bool:
    """Whether sums of log-decays may not be differences of longer ones: only where the result has the digits to show it."""
    return x.dtype == torch.float32
