"""How one rank's tokens are cut into segments, and how segments compose into runs: made once for a layout."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from lasp.kernels import Chain, Segments
from lasp.parallel.layout import Piece, SequenceLayout


@dataclass(frozen=True)
class Tables:
    """The plan's indices on one device; n segments, R runs, N documents. Masks are ``[n]``, indices as said.

    Attributes:
        opens: segments in which a document starts.
        run: the run of each segment.
        document: the document of each segment.
        first: the first segment of each run ``[R]``.
        last: the last segment of each run ``[R]``.
        entry: where each segment's entry state stands in (R run entries, n segment exits, N initial states).
        exit: where the gradient at each segment's exit stands in (R run exits, n segment entries).
        closing: the segments that close a document, and
        closed: the documents that they close.
        opening: the segments that open a document, and
        opened: the documents that they open.
    """

    opens: Tensor
    run: Tensor
    document: Tensor
    first: Tensor
    last: Tensor
    entry: Tensor
    exit: Tensor
    closing: Tensor
    closed: Tensor
    opening: Tensor
    opened: Tensor


class Plan:
    """A rank's tokens as segments of at most `segment_size` tokens, none across a run's or a document's boundary."""

    def __init__(self, pieces: tuple[Piece, ...], num_runs: int, segment_size: int):
        # One row a segment: its piece, and whether it is the piece's first and last.
        rows = [
            (piece, min(segment_size, piece.length - at), at == 0, at + segment_size >= piece.length)
            for piece in pieces
            for at in range(0, piece.length, segment_size)
        ]
        self.num_runs = num_runs
        self.segments = Segments([length for _, length, _, _ in rows], segment_size)
        in_run = [len(list(group)) for _, group in groupby(rows, key=lambda row: row[0].run)]
        self.chain = Chain(in_run)
        self._tables: dict[torch.device, Tables] = {}

        count = len(rows)
        opens = [piece.opens and first for piece, _, first, _ in rows]
        closes = [piece.closes and last for piece, _, _, last in rows]
        document = [piece.document for piece, *_ in rows]
        run = [piece.run for piece, *_ in rows]
        ends = torch.tensor(in_run, dtype=torch.long).cumsum(0).tolist()
        first = [end - length for end, length in zip(ends, in_run, strict=True)]
        last = [end - 1 for end in ends]
        entry = [
            num_runs + count + document[s] if opens[s] else run[s] if s == first[run[s]] else num_runs + s - 1
            for s in range(count)
        ]
        exit = [run[s] if s == last[run[s]] else num_runs + s + 1 for s in range(count)]
        closing = [s for s in range(count) if closes[s]]
        opening = [s for s in range(count) if opens[s]]
        self._host = Tables(
            opens=torch.tensor(opens, dtype=torch.bool),
            **{
                name: torch.tensor(rows, dtype=torch.long)
                for name, rows in {
                    "run": run,
                    "document": document,
                    "first": first,
                    "last": last,
                    "entry": entry,
                    "exit": exit,
                    "closing": closing,
                    "closed": [document[s] for s in closing],
                    "opening": opening,
                    "opened": [document[s] for s in opening],
                }.items()
            },
        )

    @classmethod
    def of(cls, layout: SequenceLayout, rank: int, segment_size: int) -> Plan:
        """The plan of one rank, made once and kept with the layout."""
        return layout.cached(
            ("plan", rank, segment_size),
            lambda: cls(layout.pieces(rank), len(layout.runs_of(rank)), segment_size),
        )

    def tables(self, device: torch.device) -> Tables:
        """The indices on `device`, copied there once."""
        if device not in self._tables:
            self._tables[device] = Tables(**{name: x.to(device) for name, x in vars(self._host).items()})
        return self._tables[device]
