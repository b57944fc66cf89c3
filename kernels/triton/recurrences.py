"""Recurrences with an elementwise transition on Triton's kernels: the form for GPUs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lasp.kernels.recurrence import Recurrence, Tokens
from lasp.kernels.segments import Segments
from lasp.kernels.summary import Summary
from lasp.kernels.triton import head_decay, key_decay
from lasp.kernels.triton.launch import Kernel, ready
from lasp.kernels.triton.tiling import MARK, column_tiles, key_tiles, processors, segment_size, tiles

_NONE, _CONSTANT, _BY_TOKEN = (kind.value for kind in (head_decay.NONE, head_decay.CONSTANT, head_decay.BY_TOKEN))
#: How products are computed for the dtypes that the kernels take.
PRECISION = {torch.bfloat16: "bf16", torch.float16: "tf32", torch.float32: "tf32x3"}
#: And those of queries and keys that were decayed each for itself, and have more digits for it.
PAIRS = {torch.bfloat16: "tf32", torch.float16: "tf32", torch.float32: "tf32x3"}

cumulate = Kernel(head_decay.cumulate)
summarise = Kernel(head_decay.summarise)
attend = Kernel(head_decay.attend)
attend_back = Kernel(head_decay.attend_back)
multiply_marks = Kernel(head_decay.multiply_marks)
gate_gradient = Kernel(head_decay.gate_gradient)
cumulate_keys = Kernel(key_decay.cumulate_keys)
summarise_keys = Kernel(key_decay.summarise_keys)
pair_up = Kernel(key_decay.pair_up)
attend_along_keys = Kernel(key_decay.attend_along_keys)
attend_across_keys = Kernel(key_decay.attend_across_keys)


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
            kept = (torch.empty(blocks, B, H, T, dtype=torch.float32, device=q.device), _marks(tokens, segments))
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
        k_dk = S_dS = dS_marks = entry
        _, marks = segments.marks(MARK, k.device)
        if gated:
            k_dk, dS_marks = torch.empty_like(kept[0]), torch.empty_like(kept[1])
            S_dS = torch.empty(for_k.blocks, B, H, n, dtype=torch.float32, device=k.device)
        # Gated, the two differ too much to run side by side.
        roles = [("both", for_v)] if K == V and not gated else [("dv", for_v), ("dk", for_k)]
        for role, tile in roles:
            attend_back(
                ((2 if role == "both" else 1) * tile.blocks, B * H, n),
                q, k, v, do, dk, dv, g, G, exit_gradient, entry, k_dk, S_dS, dS_marks, bounds, marks,
                scale, 1 / scale, T, H, n,
                K=K, V=V, BK=tiles(K, V, k.dtype).BA, BV=tiles(V, K, k.dtype).BA, BLOCK=tile.BC, C=tile.C, ROLE=role,
                DECAY=kind, EXACT=_exact(k), GATED=gated and role == "dk", MARK=MARK, STAGES=tile.stages,
                PRECISION=PRECISION[k.dtype], warps=tile.warps,
            )  # fmt: skip
        if not gated:
            return Tokens(dk, dv)
        constant = kind == _CONSTANT
        dg = (
            torch.empty(B, H, n, dtype=torch.float32, device=k.device)
            if constant
            else torch.empty_like(tokens.gates[0])
        )
        marks_dS = torch.empty(kept[1].shape[:3], dtype=torch.float32, device=k.device)
        multiply_marks((marks_dS.numel(), 1, 1), kept[1], dS_marks, marks_dS, SIZE=K * V, BLOCK=2048, warps=4)
        gate_gradient(
            (B * H, n, 1), dg, kept[0], k_dk, S_dS, marks_dS, bounds, marks, T, H, n, for_k.blocks, scale,
            DECAY=kind, MARK=MARK, warps=1,
        )  # fmt: skip
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
            A = S.new_ones(()).expand(1, n, 1)
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
        x_out, S_marks = kept if kept else (S, S)
        _, marks = segments.marks(MARK, a.device)
        attend(
            (B * H, n, tile.blocks),
            a, b, c, out, g, G, S, a if x is None else x, x_out, S_marks,
            segments.bounds(a.device), marks, scale, T, H, n,
            DA=DA, DC=DC, BA=tile.BA, BC=tile.BC, C=tile.C, DECAY=kind, ACROSS=across, EXACT=_exact(a),
            GATED=bool(kept), MARK=MARK, STAGES=tile.stages, PRECISION=PRECISION[a.dtype], warps=tile.warps,
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
        G = torch.empty(B, T, H, K, dtype=torch.float32, device=k.device)
        grid = (B * H, len(segments), min(64, -(-segments.size // tile.C)))
        cumulate_keys(grid, g, G, segments.bounds(g.device), T, H, K=K, C=tile.C, BK=tile.BA, warps=4)
        return Tokens(k, v, (g, G))

    def summary(self, tokens: Tokens, segments: Segments) -> Summary:
        return self._summary(tokens.k, tokens.v, tokens, segments, 1.0, False)

    def adjoint_summary(self, q: Tensor, tokens: Tokens, do: Tensor, segments: Segments, scale: float) -> Summary:
        return self._summary(ready(q), ready(do), tokens, segments, scale, True)

    def output(self, q: Tensor, tokens: Tokens, entry: Tensor, segments: Segments, scale: float) -> Tensor:
        q = ready(q)
        pairs = self._pairs(q, tokens, segments)
        return self._along(q, tokens.k, tokens.v, pairs, tokens, entry, segments, scale, False)

    def query_gradient(
        self, q: Tensor, tokens: Tokens, entry: Tensor, do: Tensor, segments: Segments, scale: float, gated: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        q, (_, G) = ready(q), tokens.gates
        kept = (torch.empty_like(G), torch.empty_like(entry)) if gated else ()
        dq = self._across(ready(do), tokens.v, tokens.k, q, tokens, entry, kept, G, segments, scale, False)
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
        q, do, (g, G) = ready(q), ready(do), tokens.gates
        pairs = self._pairs(q, tokens, segments)
        dv = self._along(tokens.k, q, do, pairs, tokens, exit_gradient, segments, scale, True)
        del pairs
        dg = G
        if gated:
            dg = kept[0] if g.dtype == torch.float32 else torch.empty_like(g)
        dk = self._across(tokens.v, do, q, tokens.k, tokens, exit_gradient, kept, dg, segments, scale, True)
        return Tokens(dk, dv, (dg,) if gated else ())

    def _summary(
        self, b: Tensor, c: Tensor, tokens: Tokens, segments: Segments, scale: float, reverse: bool
    ) -> Summary:
        B, T, H, DB = b.shape
        DC, n = c.shape[-1], len(segments)
        tile = key_tiles(DB, DC, b.dtype)
        S = torch.empty(B, n, H, DB, DC, dtype=torch.float32, device=b.device)
        A = torch.empty(B, n, H, DB, dtype=torch.float32, device=b.device)
        summarise_keys(
            (B * H, n, tile.blocks),
            b, c, tokens.gates[1], A, S, segments.bounds(b.device), scale, T, H, n,
            DB=DB, DC=DC, BB=tile.BA, BC=tile.BC, C=tile.C, REVERSE=reverse, STAGES=tile.stages,
            PRECISION=PRECISION[b.dtype], warps=tile.warps,
        )  # fmt: skip
        return Summary(A, S)

    def _pairs(self, q: Tensor, tokens: Tokens, segments: Segments) -> Tensor:
        """What `attend_along_keys` needs of queries and keys: ``[B, T, H, C]``."""
        B, T, H, K = q.shape
        tile = key_tiles(K, tokens.v.shape[-1], q.dtype)
        P = torch.empty(B, T, H, tile.C, dtype=q.dtype, device=q.device)
        pair_up(
            (B * H, len(segments), min(64, -(-segments.size // tile.C))),
            q, tokens.k, tokens.gates[1], P, segments.bounds(q.device), T, H,
            K=K, BK=min(tile.BA, 32), C=tile.C, LEVELS=_levels(tile.C), PRECISION=PAIRS[q.dtype], warps=4,
        )  # fmt: skip
        return P

    def _along(
        self, a: Tensor, b: Tensor, c: Tensor, P: Tensor, tokens: Tokens, S: Tensor, segments: Segments, scale: float,
        reverse: bool,
    ) -> Tensor:  # fmt: skip
        B, T, H, DA = a.shape
        DC, n = c.shape[-1], len(segments)
        out = torch.empty_like(c)
        tile = key_tiles(DA, DC, a.dtype)
        # The states' gradients have the scale in them.
        unscale = 1 / scale if reverse else 1.0
        attend_along_keys(
            (B * H, n, tile.blocks),
            a, b, c, out, P, tokens.gates[1], S, segments.bounds(a.device), scale, unscale, T, H, n,
            DA=DA, DC=DC, BA=tile.BA, BC=tile.BC, C=tile.C, REVERSE=reverse, STAGES=tile.stages,
            PRECISION=PRECISION[a.dtype], warps=tile.warps,
        )  # fmt: skip
        return out

    def _across(
        self, a: Tensor, b: Tensor, c: Tensor, x: Tensor, tokens: Tokens, S: Tensor, kept: tuple[Tensor, ...],
        dg: Tensor, segments: Segments, scale: float, reverse: bool,
    ) -> Tensor:  # fmt: skip
        B, T, H, DA = a.shape
        DC, n = c.shape[-1], len(segments)
        out = torch.empty_like(c)
        tile, summed = column_tiles(DA, DC, a.dtype), key_tiles(DA, DC, a.dtype).C
        partner, S_exit = kept if kept else (S, S)
        unscale = 1 / scale if reverse else 1.0
        attend_across_keys(
            (B * H, n, tile.blocks),
            a, b, c, out, x, tokens.gates[1], S, S_exit, partner, dg, segments.bounds(a.device), scale, unscale, T, H, n,
            DA=DA, DC=DC, BA=tile.BA, BC=tile.BC, C=tile.C, SUMMED=summed, REVERSE=reverse, GATED=bool(kept),
            LEVELS=_levels(tile.C), STAGES=tile.stages, PRECISION=PRECISION[a.dtype], warps=tile.warps,
        )  # fmt: skip
        return out


def triton_decay(tokens: Tokens) -> Recurrence:
    """The recurrence for such tokens, in segments that fill their device."""
    if tokens.gates and tokens.gates[0].dim() == 4:
        return TritonKeyDecay.of(tokens)
    return TritonHeadDecay.of(tokens)


def _marks(tokens: Tokens, segments: Segments) -> Tensor:
    """Room for the states every `MARK` tokens inside the segments: ``[marks, B, H, K, V]``."""
    count, _ = segments.marks(MARK, tokens.k.device)
    # A constant decay's gradient sums over all tokens, and an error of a mark with it.
    short = tokens.k.dtype == torch.bfloat16 and tokens.gates[0].dim() > 1
    dtype = torch.bfloat16 if short else torch.float32
    return torch.empty(count, tokens.k.shape[0], *tokens.state_shape, dtype=dtype, device=tokens.k.device)


def _levels(C: int) -> int:
    """How often a chunk of C tokens is halved to those that are near."""
    return (C // key_decay.NEAR.value).bit_length() - 1


def _exact(x: Tensor) -> bool:
    """Whether sums of log-decays may not be differences of longer ones: only where the result has the digits to show it."""
    return x.dtype == torch.float32
