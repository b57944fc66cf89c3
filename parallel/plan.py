"""How one rank's tokens are cut into segments, and how segments compose into runs: made once for a layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lasp.kernels import Chain, Course, Segments, Summary
from lasp.parallel.layout import Piece, SequenceLayout


@dataclass(frozen=True)
class Tables:
    """The plan's indices on one device, int64.

    Attributes:
        document: the document of each segment ``[n]``.
        opening: the segments that open a document, and
        opened: the documents that they open.
        closing: the segments that close a document, and
        closed: the documents that they close.
    """

    document: Tensor
    opening: Tensor
    opened: Tensor
    closing: Tensor
    closed: Tensor


class Plan:
    """A rank's tokens as segments of at most `segment_size` tokens, none across a run's or a document's boundary.

    Attributes:
        segments: the segments.
        forward: how the states go through them, from the start of each run or document.
        backward: how the states' gradients go through them, from the end of each run or document.
    """

    def __init__(self, pieces: tuple[Piece, ...], num_runs: int, segment_size: int, num_documents: int):
        self.num_documents = num_documents
        lengths: list[int] = []
        # The segments of each piece.
        members: list[list[int]] = []
        for piece in pieces:
            count = -(-piece.length // segment_size)
            members.append(list(range(len(lengths), len(lengths) + count)))
            lengths += [min(segment_size, piece.length - i * segment_size) for i in range(count)]
        self.segments = Segments(lengths, segment_size)
        self.forward = Course(
            [
                Chain(tuple(own), piece.run, piece.document if piece.opens else None)
                for piece, own in zip(pieces, members, strict=True)
            ],
            num_runs,
            range(len(lengths)),
        )
        self.backward = Course(
            [
                Chain(tuple(reversed(own)), piece.run, piece.document if piece.closes else None)
                for piece, own in reversed(list(zip(pieces, members, strict=True)))
            ],
            num_runs,
            range(len(lengths)),
        )
        pairs = list(zip(pieces, members, strict=True))
        self._host = Tables(
            document=_index([piece.document for piece, own in pairs for _ in own]),
            opening=_index([own[0] for piece, own in pairs if piece.opens]),
            opened=_index([piece.document for piece in pieces if piece.opens]),
            closing=_index([own[-1] for piece, own in pairs if piece.closes]),
            closed=_index([piece.document for piece in pieces if piece.closes]),
        )
        self._tables: dict[torch.device, Tables] = {}

    @classmethod
    def of(cls, layout: SequenceLayout, rank: int, segment_size: int) -> Plan:
        """The plan of one rank, made once and kept with the layout."""
        return layout.cached(
            ("plan", rank, segment_size),
            lambda: cls(layout.pieces(rank), len(layout.runs_of(rank)), segment_size, layout.num_documents),
        )

    def sent(self, leaving: Summary) -> Summary:
        """What the runs' maps travel as."""
        return leaving

    def received(self, states: Tensor) -> Tensor:
        """What the states are that came back."""
        return states

    def final_states(self, maps: Summary, seeds: Tensor | None, entering: Tensor) -> Tensor:
        """The documents' final states ``[B, N, H, K, V]``: each where its document ends, elsewhere zero.

        Args:
            maps: the map over each segment.
            seeds: the states before the documents.
            entering: the states that entered the segments.
        """
        at = self.tables(entering.device)
        return self._of_documents(maps, entering, at.closing, at.closed)

    def initial_gradient(self, maps: Summary, dfinal: Tensor | None, leaving: Tensor) -> Tensor:
        """The gradients of the states before the documents, likewise: of the adjoint maps, from the end to the start."""
        at = self.tables(leaving.device)
        return self._of_documents(maps, leaving, at.opening, at.opened)

    def _of_documents(self, maps: Summary, states: Tensor, segments: Tensor, documents: Tensor) -> Tensor:
        """What those segments leave, each at its document's place."""
        found = states.new_zeros(states.shape[0], self.num_documents, *states.shape[2:])
        return found.index_copy_(1, documents, maps.select(segments).apply(states.index_select(1, segments)))

    def tables(self, device: torch.device) -> Tables:
        """The indices on `device`, copied there once."""
        if device not in self._tables:
            self._tables[device] = Tables(**{name: x.to(device) for name, x in vars(self._host).items()})
        return self._tables[device]


def _index(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.long)
