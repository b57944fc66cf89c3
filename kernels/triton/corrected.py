"""The delta rule on Triton's kernels: the form for GPUs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from lasp.kernels.recurrence import Recurrence, Tokens
from lasp.kernels.segments import Segments
from lasp.kernels.summary import Summary
from lasp.kernels.triton import delta, head_decay
from lasp.kernels.triton.launch import Kernel, Launch, ready
from lasp.kernels.triton.recurrences import attend, cumulate_launch, gate_gradient_launch
from lasp.kernels.triton.tiling import Tiles, delta_tiles, gated_tiles, processors, segment_size, tiles

#: What the decay is of: there is none, heads, or key dimensions.
_NONE, _BY_TOKEN, BY_KEY = head_decay.NONE.value, head_decay.BY_TOKEN.value, delta.BY_KEY.value

#: A system is solved token by token within blocks of so many, and by products beyond.
SOLVED = 8

invert = Kernel(delta.invert)
correct = Kernel(delta.correct)
correct_back = Kernel(delta.correct_back)
key_gradient = Kernel(delta.key_gradient)


@dataclass(frozen=True, kw_only=True)
class Solved(Tokens):
    """Tokens as the kernels take them, the systems of whose chunks are solved. Another tensor stands for what there is not.

    Attributes:
        kind: of the decay.
        beta: as the kernels take it.
        g: the log-decay, likewise, and G its running sums.
        W: the solutions.
        starts: the keys; decayed from their chunk's start where the decay is by key.
        ends: the keys decayed to their chunk's end, likewise.
        M: the pairs of keys, likewise.
        reaches: of the chunks (`lasp.kernels.triton.key_delta`), likewise.
        asked: what `TritonDelta.asked` gives, where it is known already.
    """

    kind: int
    beta: Tensor
    g: Tensor
    G: Tensor
    W: Tensor
    starts: Tensor
    ends: Tensor
    M: Tensor
    reaches: Tensor
    asked: tuple[Tensor, Tensor] | None = None


def solved(tokens: Tokens) -> Solved:
    """Tokens that `TritonDelta.prepare` made."""
    assert isinstance(tokens, Solved), "the delta rule's kernels take prepared tokens"
    return tokens


@dataclass(frozen=True)
class TritonDelta(Recurrence):
    """``S_t = (I − β_t k_t k_tᵀ) e^{g_t} S_{t-1} + β_t k_t v_tᵀ`` for bfloat16, float16 and float32.

    The gates are ``beta: [B, T, H]``, and before it g, if there is one: ``[B, T, H]``. Products are of bfloat16, and for the
    other dtypes, which are computed in float32, of three tf32 parts.

    Args:
        segment_size: the longest segment, in tokens.
        width_multiple: of which K and V must be multiples.
    """

    segment_size: int
    width_multiple: int = 1

    @classmethod
    def of(cls, tokens: Tokens) -> TritonDelta:
        """The recurrence for such tokens, in segments that fill their device."""
        B, T, H, K = tokens.k.shape
        tile = delta_tiles(K, tokens.v.shape[-1], inner(tokens.k.dtype))
        # Programs wait for one product after the other: a processor has room for several.
        size = segment_size(B * H * tile.blocks, T, tile.C, 2 * processors(tokens.k.device))
        return cls(size, 16 // tokens.k.element_size())

    def prepare(self, tokens: Tokens, segments: Segments) -> Tokens:
        k, v = as_computed(tokens.k), as_computed(tokens.v)
        B, T, H, K = k.shape
        tile = delta_tiles(K, v.shape[-1], k.dtype)
        bounds, (*decay, beta) = segments.bounds(k.device), tokens.gates
        beta = ready(beta)
        kind, g, G = _NONE, k, k
        if decay:
            kind, g = _BY_TOKEN, ready(decay[0].expand(k.shape[:3]))
            G = torch.empty(B, H, T, dtype=torch.float32, device=k.device)
            cumulate_launch(B, T, H, len(segments), segments.size, tile.C)(g, G, bounds)
        W = torch.empty(B, T, H, tile.C, dtype=k.dtype, device=k.device)
        _invert(B, T, H, K, len(segments), segments.size, tile, k.dtype, kind)(k, beta, g, G, W, bounds)
        return Solved(
            k, v, tokens.gates, kind=kind, beta=beta, g=g, G=G, W=W, starts=k, ends=k, M=W, reaches=beta
        )  # fmt: skip

    def asked(self, q: Tensor, tokens: Tokens, segments: Segments) -> tuple[Tensor, Tensor]:
        """Queries as the walks take them, and what they make of the chunk's keys, where the walks do not make it."""
        return as_computed(q), tokens.k

    def summary(self, tokens: Tokens, segments: Segments) -> Summary:
        maps = _unwritten(tokens, segments)
        for role in ("summary", "transition"):
            _walk(role, (tokens.k, tokens.k), tokens, maps.B, maps.A, (), segments, 1.0)
        return maps

    def output(self, q: Tensor, tokens: Tokens, entry: Tensor, segments: Segments, scale: float) -> Tensor:
        o = torch.empty_like(tokens.v)
        _walk("output", self.asked(q, tokens, segments), tokens, entry, entry, (o,), segments, scale)
        return o.to(q.dtype)

    def adjoint_summary(self, q: Tensor, tokens: Tokens, do: Tensor, segments: Segments, scale: float) -> Summary:
        maps = _unwritten(tokens, segments)
        asked, do = self.asked(q, tokens, segments), as_computed(do)
        for role in ("summary", "transition"):
            _walk_back(role, asked, tokens, do, maps.B, maps.A, (), segments, scale)
        return maps

    def query_gradient(
        self, q: Tensor, tokens: Tokens, entry: Tensor, do: Tensor, segments: Segments, scale: float, gated: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        kept = corrections(tokens, entry, segments, gated)
        dq, with_q = self._as_query(
            as_computed(do), kept[0], as_computed(q), tokens, entry, segments, scale, gated, False
        )
        return dq.to(q.dtype), (*kept, *with_q)

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
        given, q, do, k, v = q.dtype, as_computed(q), as_computed(do), tokens.k, tokens.v
        B, T, H, K = k.shape
        V, n, bounds = v.shape[-1], len(segments), segments.bounds(k.device)
        x = solved(tokens)
        u = kept[0]
        dv, dbeta = value_gradient((q, k), tokens, do, exit_gradient, kept, segments, scale, gated)
        decayed = gated and x.kind == _BY_TOKEN
        dk, with_k = self._as_query(dv, u, k, tokens, entry, segments, -1.0, gated, True)
        k_dk = S_dS = entry
        if decayed:
            k_dk = torch.empty(delta_tiles(V, K, k.dtype).blocks, B, H, T, dtype=torch.float32, device=k.device)
            S_dS = torch.empty(*k_dk.shape[:3], n, dtype=torch.float32, device=k.device)
        launch = _key_gradient(B, T, H, K, V, n, k.dtype, x.kind, decayed, scale)
        launch(q, k, u, do, dv, dk, x.g, x.G, exit_gradient, entry, k_dk, S_dS, bounds)
        gates: tuple[Tensor, ...] = ()
        if gated:
            gates = (dbeta.to(x.beta.dtype),)
        if decayed:
            dg = torch.empty_like(x.g)
            sums = (kept[2].add_(with_k[0]).sum(0), k_dk.sum(0), S_dS.sum(0))
            gate_gradient_launch(B, T, H, n, 1, x.kind)(dg, *sums, bounds)
            gates = (dg, *gates)
        return Tokens(dk.to(given), dv.to(given), gates)

    def _as_query(
        self, do: Tensor, u: Tensor, x: Tensor, tokens: Tokens, entry: Tensor, segments: Segments, scale: float,
        gated: bool, strict: bool,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
        """The gradient of x as a query whose output has the gradient do, and what its decay's gradient needs of it."""
        B, T, H, K = x.shape
        of = solved(tokens)
        gated = gated and of.kind == _BY_TOKEN
        tile = _attend_tiles(u.shape[-1], K, x.dtype, gated)
        dx = torch.empty_like(x)
        kept = (torch.empty(tile.blocks, B, H, T, dtype=torch.float32, device=x.device),) if gated else ()
        launch = _attend(B, T, H, u.shape[-1], K, len(segments), x.dtype, of.kind, strict, gated, scale)
        launch(do, u, of.k, dx, of.g, of.G, entry, x, *(kept or (entry,)), segments.bounds(x.device))
        return dx, kept


def corrections(tokens: Tokens, entry: Tensor, segments: Segments, gated: bool) -> tuple[Tensor, ...]:
    """U, and if their factors have a gradient what they are of."""
    found = tuple(torch.empty_like(tokens.v) for _ in range(2 if gated else 1))
    _walk("corrections", (tokens.k, tokens.k), tokens, entry, entry, found, segments, 1.0)
    return found


def value_gradient(
    asked: tuple[Tensor, Tensor], tokens: Tokens, do: Tensor, exit_gradient: Tensor, kept: tuple[Tensor, ...],
    segments: Segments, scale: float, gated: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dv, and if `gated` dbeta ``[B, T, H]``; `kept` is what `corrections` gave."""
    B, T, H, V = tokens.v.shape
    dv = torch.empty_like(tokens.v)
    out: tuple[Tensor, ...] = (dv,)
    if gated:
        blocks = delta_tiles(tokens.k.shape[-1], V, tokens.k.dtype).blocks
        out = (dv, kept[1], torch.empty(blocks, B, H, T, dtype=torch.float32, device=dv.device))
    _walk_back("values", asked, tokens, do, exit_gradient, exit_gradient, out, segments, scale)
    return dv, out[2].sum(0).transpose(1, 2) if gated else dv


def _walk(
    role: str, asked: tuple[Tensor, Tensor], tokens: Tokens, S: Tensor, A: Tensor, out: tuple[Tensor, ...],
    segments: Segments, scale: float,
) -> None:  # fmt: skip
    x, bounds = solved(tokens), segments.bounds(tokens.k.device)
    B, T, H, K = x.k.shape
    launch = _correct(B, T, H, K, x.v.shape[-1], len(segments), x.k.dtype, x.kind, role, len(out) > 1, scale)
    q, P = asked
    written = (*out, S, S)[:2]
    launch(q, x.starts, x.v, x.W, x.g, x.G, S, A, *written, x.ends, P, x.M, bounds)


def _walk_back(
    role: str, asked: tuple[Tensor, Tensor], tokens: Tokens, do: Tensor, dS: Tensor, A: Tensor, out: tuple[Tensor, ...],
    segments: Segments, scale: float,
) -> None:  # fmt: skip
    """`out`: dv, and where the gates' gradients are wanted what values lack, and dbeta."""
    x, bounds = solved(tokens), segments.bounds(tokens.k.device)
    B, T, H, K = x.k.shape
    launch = _correct_back(B, T, H, K, do.shape[-1], len(segments), do.dtype, x.kind, role, len(out) > 1, scale)
    q, P = asked
    dv, lacks, dbeta = (*out, *(do, do, dS)[len(out) :])
    launch(q, x.starts, do, x.W, x.g, x.G, dS, A, lacks, dv, dbeta, x.ends, P, x.M, bounds)


def inner(dtype: torch.dtype) -> torch.dtype:
    """In what tokens of a dtype are computed."""
    return dtype if dtype == torch.bfloat16 else torch.float32


def as_computed(x: Tensor) -> Tensor:
    """x in the dtype that it is computed in, as kernels take it."""
    return ready(x.to(inner(x.dtype)))


def _unwritten(tokens: Tokens, segments: Segments) -> Summary:
    B, _, H, K = tokens.k.shape
    A, S = (
        torch.empty(B, len(segments), H, K, width, dtype=torch.float32, device=tokens.k.device)
        for width in (K, tokens.v.shape[-1])
    )
    return Summary(A, S)


# -- what the launches of the kernels depend on -----------------------------------------------------------------------


_once = lru_cache(maxsize=4096)


def precision(dtype: torch.dtype) -> str:
    """How products of tokens of a dtype are computed."""
    return "bf16" if dtype == torch.bfloat16 else "tf32x3"


@_once
def _invert(B: int, T: int, H: int, K: int, n: int, size: int, tile: Tiles, dtype: torch.dtype, kind: int) -> Launch:
    return invert.launch(
        (B * H, n, -(-size // tile.C)), T, H,
        K=K, BK=tile.BA, C=tile.C, SOLVED=SOLVED, LEVELS=(tile.C // SOLVED).bit_length() - 1,
        DECAY=kind, EXACT=dtype == torch.float32, PRECISION=precision(dtype), warps=4,
    )  # fmt: skip


@_once
def _correct(
    B: int, T: int, H: int, K: int, V: int, n: int, dtype: torch.dtype, kind: int, role: str,
    gated: bool, scale: float,
) -> Launch:  # fmt: skip
    tile = delta_tiles(K, K if role == "transition" else V, dtype)
    return correct.launch(
        (B * H, n, tile.blocks), scale, T, H, n,
        K=K, V=V, BK=tile.BA, BC=tile.BC, C=tile.C, DECAY=kind, ROLE=role, GATED=gated, EXACT=dtype == torch.float32,
        STAGES=tile.stages, PRECISION=precision(dtype), warps=tile.warps,
    )  # fmt: skip


@_once
def _correct_back(
    B: int, T: int, H: int, K: int, V: int, n: int, dtype: torch.dtype, kind: int, role: str,
    gated: bool, scale: float,
) -> Launch:  # fmt: skip
    tile = delta_tiles(K, K if role == "transition" else V, dtype)
    return correct_back.launch(
        (B * H, n, tile.blocks), scale, 1 / scale, T, H, n,
        K=K, V=V, BK=tile.BA, BC=tile.BC, C=tile.C, DECAY=kind, ROLE=role, GATED=gated, EXACT=dtype == torch.float32,
        STAGES=tile.stages, PRECISION=precision(dtype), warps=tile.warps,
    )  # fmt: skip


def _attend_tiles(DA: int, DC: int, dtype: torch.dtype, gated: bool) -> Tiles:
    return replace((gated_tiles if gated else tiles)(DA, DC, dtype), C=delta_tiles(DA, DC, dtype).C)


@_once
def _attend(
    B: int, T: int, H: int, DA: int, DC: int, n: int, dtype: torch.dtype, kind: int, strict: bool, gated: bool, scale: float
) -> Launch:  # fmt: skip
    tile = _attend_tiles(DA, DC, dtype, gated)
    return attend.launch(
        (B * H, n, tile.blocks), scale, T, H, n,
        DA=DA, DC=DC, BA=tile.BA, BC=tile.BC, C=tile.C, DECAY=kind, ACROSS=True, STRICT=strict,
        EXACT=dtype == torch.float32, GATED=gated, STAGES=tile.stages, PRECISION=precision(dtype), warps=tile.warps,
    )  # fmt: skip


@_once
def _key_gradient(
    B: int, T: int, H: int, K: int, V: int, n: int, dtype: torch.dtype, kind: int, gated: bool, scale: float
) -> Launch:
    tile = delta_tiles(V, K, dtype)
    return key_gradient.launch(
        (B * H, n, tile.blocks), scale, 1 / scale, T, H, n,
        K=K, V=V, BV=tile.BA, BC=tile.BC, C=tile.C, DECAY=kind, GATED=gated, EXACT=dtype == torch.float32,
        STAGES=min(tile.stages, 2), PRECISION=precision(dtype), warps=tile.warps,
    )  # fmt: skip
