"""How the sequences of a step are dealt out over data-parallel and sequence-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lasp.data import Windows
from lasp.parallel import SequenceLayout, SequenceParallel
from lasp.training.choices import LAYOUTS
from lasp.training.options import Options
from lasp.training.recall import Recall


@dataclass(frozen=True)
class Batch:
    """A rank's tokens of some sequences.

    Attributes:
        inputs: ``[rows, T_local]``, int64.
        targets: likewise; those below 0 are none.
        sp: the ranks that share the rows, and their documents; None where each rank has its own rows.
        cu_seqlens: the documents, where there is no `sp`.
    """

    inputs: Tensor
    targets: Tensor
    sp: SequenceParallel | None
    cu_seqlens: tuple[int, ...] | None


class Batches:
    """This rank's tokens of every step.

    Args:
        options: the layout, the method, and how many sequences there are.
        mesh: the ranks, axes ("dp", "sp").

    Attributes:
        layout: who holds which tokens of a sequence.
        sp: the ranks that share one, with the layout that was used last; None where each has its own.
        rows: how many sequences of a step this rank has a part of, `at_once` of them in a batch.
        number: of batches, so.
    """

    def __init__(self, options: Options, mesh: DeviceMesh):
        self.options, self.device = options, torch.device(mesh.device_type)
        self.layout = LAYOUTS[options.layout](options.seq_len, mesh["sp"].size())
        self.sp_rank = mesh.get_local_rank("sp")
        self.sp: SequenceParallel | None = None
        self._group = None if options.sp == "none" else mesh["sp"].get_group()
        self.sp = self._shared(self.layout)
        self.rows = options.batch_size // mesh["dp"].size()
        self.first_row = self.rows * mesh.get_local_rank("dp")
        self.at_once = options.micro_batch_size or self.rows
        self.number = self.rows // self.at_once

    def of(self, source: Windows | Recall, step: int) -> Iterator[Batch]:
        """The batches of a source's step."""
        for first in range(self.first_row, self.first_row + self.rows, self.at_once):
            yield self._batch(source, step, first)

    def _batch(self, source: Windows | Recall, step: int, first: int) -> Batch:
        """Some rows, which are one sequence where documents are told apart."""
        rows, length = self.at_once, self.options.seq_len
        documents = source.documents(step, first, rows)
        layout, sp, sequences = self.layout, self.sp, rows
        if documents is not None:
            layout = LAYOUTS[self.options.layout](rows * length, layout.world_size, documents)
            # Kept: what travelled is explained by those that it travelled among.
            self.sp = sp = self._shared(layout)
            length, sequences = rows * length, 1
        runs = layout.runs_of(self.sp_rank)
        ranges = [(row * length + start, row * length + end) for row in range(sequences) for start, end in runs]
        # The targets are shifted in the whole window: at the end of a rank's run the target is another rank's input.
        inputs, targets = (
            x.view(sequences, layout.local_tokens(self.sp_rank)).to(self.device, non_blocking=True)
            for x in source.take(step, first, ranges)
        )
        return Batch(inputs, targets, sp, documents if sp is None else None)

    def _shared(self, layout: SequenceLayout) -> SequenceParallel | None:
        """The ranks of a sequence of that layout; None where each has its own."""
        if self._group is None:
            return None
        options = self.options
        return SequenceParallel(
            self._group, layout, method=options.sp, exchange=options.exchange, softmax=options.softmax_sp,
            # Later layouts are made alike on all ranks, of the same data, as the first was.
            check=self.sp is None,
        )  # fmt: skip
