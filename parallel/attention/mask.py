"""Which keys each query sees, from the position and the document of every token: for any layout, window and packing."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from lasp.parallel.layout import SequenceLayout

#: FlexAttention's block: queries and keys are looked at, and skipped, this many at a time.
BLOCK = 128
#: The CPU looks at documents together up to so many tokens.
TOGETHER = 512


@dataclass(frozen=True)
class Span:
    """Tokens as a mask sees them.

    Attributes:
        position: of each token in the packed sequence, int64 ``[T]``, on the CPU.
        document: of each token; -1 for padding, which nobody sees.
    """

    position: Tensor
    document: Tensor

    @classmethod
    def of(cls, layout: SequenceLayout, rank: int, padded: int | None = None) -> Span:
        """The tokens of one rank, followed by padding up to `padded`."""
        position, document = layout.positions(rank), layout.documents(rank)
        missing = 0 if padded is None else padded - len(position)
        return cls(
            torch.cat([position, position.new_zeros(missing)]), torch.cat([document, document.new_full((missing,), -1)])
        )

    @classmethod
    def join(cls, spans: list[Span]) -> Span:
        """The tokens of several spans, one after the other."""
        return cls(torch.cat([s.position for s in spans]), torch.cat([s.document for s in spans]))

    def __len__(self) -> int:
        return len(self.position)

    def __getitem__(self, tokens: slice) -> Span:
        return Span(self.position[tokens], self.document[tokens])

    def stretches(self) -> list[int]:
        """How many tokens follow one another in the sequence and in one document, again and again."""
        breaks = (self.position.diff() != 1) | (self.document.diff() != 0)
        ends = [*(breaks.nonzero().flatten() + 1).tolist(), len(self)]
        return [end - start for start, end in zip([0, *ends], ends, strict=False) if end > start]


@dataclass(frozen=True)
class Reach:
    """How far a query sees: keys at a distance (its position less theirs) of at least `low` and less than `high`."""

    low: int
    high: int

    @classmethod
    def of(cls, causal: bool, window: int | None) -> Reach:
        """Up to the query itself if causal; less than `window` tokens away if there is one."""
        far = 2**62 if window is None else window
        return cls(0 if causal else 1 - far, far)


@dataclass(frozen=True, eq=False)
class Mask:
    """A query sees the keys of its document that are in reach.

    Attributes:
        queries: the queries' tokens.
        keys: the keys' tokens.
        reach: how far a query sees.
    """

    queries: Span
    keys: Span
    reach: Reach
    _on: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def _visible(self) -> tuple[Tensor, Tensor]:
        """Of each block of queries × each block of keys ``[Nq, Nk]``: whether some pair may be seen, whether all are."""
        (q_low, q_high), (k_low, k_high) = _bounds(self.queries.position), _bounds(self.keys.position)
        (qd_low, qd_high), (kd_low, kd_high) = _bounds(self.queries.document), _bounds(self.keys.document)
        some = (kd_low <= qd_high[:, None]) & (kd_high >= qd_low[:, None])
        every = (kd_low == kd_high) & (kd_low == qd_low[:, None]) & (kd_high == qd_high[:, None])
        nearest, furthest = q_low[:, None] - k_high, q_high[:, None] - k_low
        some &= (nearest < self.reach.high) & (furthest >= self.reach.low)
        every &= (nearest >= self.reach.low) & (furthest < self.reach.high)
        return some, every

    @cached_property
    def nothing(self) -> bool:
        """Whether no query may see a key: there is nothing to compute."""
        return not bool(self._visible[0].any())

    @cached_property
    def everything(self) -> bool:
        """Whether every query sees every key: there is nothing to mask."""
        return len(self.queries) > 0 and len(self.keys) > 0 and bool(self._visible[1].all())

    @cached_property
    def triangular(self) -> bool:
        """Whether query i sees keys 0 to i, as where one rank holds one document whole."""
        return (
            self.reach == Reach.of(causal=True, window=None)
            and len(self.queries) == len(self.keys)
            and bool((self.queries.document == self.queries.document[:1]).all())
            and torch.equal(self.queries.document, self.keys.document)
            and torch.equal(self.queries.position, self.keys.position)
            and bool((self.queries.position.diff() > 0).all())
        )

    @cached_property
    def parts(self) -> list[tuple[slice, slice, Mask]]:
        """Some queries after others, with the keys from the first to the last that any of them may see.

        Documents are parts of their own, but for short ones, of which several are one: together they cost what a document of
        `TOGETHER` tokens does, and not a call each.
        """
        if self.everything or self.triangular:
            return [(slice(None), slice(None), self)]
        sizes = [0]
        for size in self.queries.stretches():
            if sizes[-1] and sizes[-1] + size > TOGETHER:
                sizes.append(0)
            sizes[-1] += size
        found, start = [], 0
        for size in sizes:
            rows = slice(start, start + size)
            queries = self.queries[rows]
            columns = self._columns(queries)
            found.append((rows, columns, Mask(queries, self.keys[columns], self.reach)))
            start += size
        return found

    def _columns(self, queries: Span) -> slice:
        """The keys from the first to the last that some of these queries may see."""
        position, document = self.keys.position, self.keys.document
        (first, last), (low, high) = queries.position.aminmax(), queries.document.aminmax()
        some = (document >= low) & (document <= high)
        some &= (first - position < self.reach.high) & (last - position >= self.reach.low)
        seen = some.nonzero()
        return slice(int(seen[0]), int(seen[-1]) + 1) if len(seen) else slice(0, 0)

    def seen(self, device: torch.device) -> Tensor:
        """Which keys each query sees: bool ``[Tq, Tk]``, made once and kept."""
        key = ("seen", device)
        if key not in self._on:
            (q, q_document), (k, k_document) = (
                (s.position.to(device), s.document.to(device)) for s in (self.queries, self.keys)
            )
            distance = q[:, None] - k
            near = (distance >= self.reach.low) & (distance < self.reach.high)
            self._on[key] = (q_document[:, None] == k_document) & near
        seen: Tensor = self._on[key]
        return seen

    def additive(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """0 where a query sees a key and −∞ where not ``[Tq, Tk]``; and the queries that see no key ``[Tq]``. On the CPU."""
        if dtype not in self._on:
            seen = self.seen(torch.device("cpu"))
            bias = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)
            self._on[dtype] = bias, ~seen.any(dim=1)
        bias, blind = self._on[dtype]
        return bias, blind

    def blocks(self, device: torch.device) -> BlockMask:
        """For FlexAttention. Which blocks are computed follows from their bounds: never a table of tokens × tokens."""
        if device not in self._on:
            some, every = (x.to(device, copy=True) for x in self._visible)
            # A block that the tokens do not fill is masked like one that is seen in part.
            if len(self.queries) % BLOCK:
                every[-1] = False
            if len(self.keys) % BLOCK:
                every[:, -1] = False
            partial = some & ~every
            (q, q_document), (k, k_document) = (
                (s.position.to(device), s.document.to(device)) for s in (self.queries, self.keys)
            )
            # Tensors, not numbers: one compiled kernel serves every reach.
            low, high = torch.tensor([self.reach.low, self.reach.high], device=device)

            def mask_mod(_batch: Tensor, _head: Tensor, i: Tensor, j: Tensor) -> Tensor:
                distance = q[i] - k[j]
                return (q_document[i] == k_document[j]) & (distance >= low) & (distance < high)

            # Both ways made here: `BlockMask.from_kv_blocks` maps a function over batches, which fails inside an operator while
            # torch looks at what it aliases.
            self._on[device] = BlockMask(
                (len(self.queries), len(self.keys)),
                *_rows_of_blocks(partial),
                *_rows_of_blocks(every),
                *_rows_of_blocks(partial.t()),
                *_rows_of_blocks(every.t()),
                BLOCK_SIZE=(BLOCK, BLOCK),
                mask_mod=mask_mod,
            )
        blocks: BlockMask = self._on[device]
        return blocks


def _bounds(x: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest of each block of x ``[T]``."""
    filled = torch.cat([x, x[-1:].expand(-len(x) % BLOCK)]).view(-1, BLOCK)
    return filled.amin(1), filled.amax(1)


def _rows_of_blocks(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many are chosen of each row of blocks ``[N, M]``, and which come first: int32 ``[1, 1, N]``, ``[1, 1, N, M]``."""
    counts = chosen.sum(1, dtype=torch.int32)
    order = chosen.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return counts[None, None].contiguous(), order[None, None].contiguous()
