"""The one idea of the library: a run of tokens acts on a memory state as an affine map, and maps compose.

A linear layer keeps a state ``S: [K, V]`` a head. Whatever the recurrence, a run of tokens takes the state that enters it
to the state that leaves it by ``S_out = A · S_in + B``. `Summary` holds ``(A, B)`` for many runs at once. Segments of one
device, ranks of one node and nodes of a cluster are all such runs, and `lasp.kernels.course` composes those that follow one
another (LASP-2, https://arxiv.org/abs/2502.07563, is the case A = 1; LASP, https://arxiv.org/abs/2404.02882, has A = λ^C).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lasp.kernels import triton


def act(A: Tensor, S: Tensor) -> Tensor:
    """``A · S`` for a transition of any family.

    A: ``[B, n, H]`` (a number a head; 1 for identity recurrences), ``[B, n, H, K]`` (a number a row of the state) or
    ``[B, n, H, K, K]`` (a matrix). S: ``[B, n, H, K, V]``. Axes of size 1 broadcast.
    """
    missing = S.dim() - A.dim()
    if missing == 0:
        return A @ S
    return A[(...,) + (None,) * missing] * S


@dataclass(frozen=True)
class Summary:
    """What n runs of tokens do to the state: ``S_out = A · S_in + B``.

    Attributes:
        A: the transition: ``[B, n, H]`` for the identity and scalar families, ``[B, n, H, K]`` for the diagonal one,
            ``[B, n, H, K, K]`` for the dense one. float32, or float64 for float64 inputs. The family is read off its rank.
        B: ``[B, n, H, K, V]``: the state that the run alone would leave, starting from zero. Same dtype.
        rows: what `pack` gives, where A and B were made as views of it.

    A run in which a document starts has ``A = 0``: nothing from before it survives.
    """

    A: Tensor
    B: Tensor
    rows: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not 3 <= self.A.dim() <= 5 or self.B.dim() != 5:
            raise ValueError(
                "a Summary holds A: [B, n, H], [B, n, H, K] or [B, n, H, K, K] and B: [B, n, H, K, V], "
                f"given A: {list(self.A.shape)} and B: {list(self.B.shape)}"
            )

    @property
    def count(self) -> int:
        """How many runs it summarises."""
        return self.B.shape[1]

    @property
    def numbers(self) -> int:
        """How many numbers a run has: the length of its row in `pack`."""
        return _row_size(self.A) + _row_size(self.B)

    def compose(self, then: Summary) -> Summary:
        """The summary of each run here followed by the same run of `then`: ``(A₂A₁, A₂B₁ + B₂)``. Associative."""
        kernels = dense_kernels(then)
        if kernels is not None:
            composed: Summary = kernels.compose(self, then)
            return composed
        A = then.A @ self.A if self.A.dim() == 5 else then.A * self.A
        return Summary(A, act(then.A, self.B) + then.B)

    def apply(self, state: Tensor) -> Tensor:
        """The state that leaves each run when `state` ``[B, n, H, K, V]`` enters it."""
        kernels = dense_kernels(self)
        if kernels is not None:
            leaving: Tensor = kernels.apply(self, state)
            return leaving
        return act(self.A, state) + self.B

    def select(self, runs: Tensor) -> Summary:
        """The runs at the given indices ``[m]``, in that order."""
        return Summary(self.A.index_select(1, runs), self.B.index_select(1, runs))

    def pack(self) -> Tensor:
        """All numbers of a run in one row, ``[n, numbers]``: what an exchange sends."""
        if self.rows is not None:
            return self.rows
        # The row's size is spelt out: a rank without a run has n = 0 and still agrees with the others on it.
        return torch.cat([x.movedim(1, 0).reshape(x.shape[1], _row_size(x)) for x in (self.A, self.B)], dim=1)

    def unpack(self, rows: Tensor) -> Summary:
        """The inverse of `pack` for any number of rows ``[m, numbers]``, with this summary as the pattern of shapes.

        Its tensors are views of the rows.
        """
        rows = rows.contiguous()
        parts = []
        offset = rows.storage_offset()
        for pattern in (self.A, self.B):
            batch, _, *rest = pattern.shape
            steps = [1]
            for size in reversed(rest):
                steps.append(steps[-1] * size)
            batch_step, *inner = reversed(steps)
            # One view, where slicing, shaping and turning would be four: this is done for every layer.
            parts.append(rows.as_strided((batch, len(rows), *rest), (batch_step, rows.shape[1], *inner), offset))
            offset += batch * batch_step
        return Summary(parts[0], parts[1], rows)

    def empty(self, count: int) -> Summary:
        """Unwritten summaries of `count` runs, of the same shapes, that are packed already."""
        return self.unpack(self.B.new_empty(count, self.numbers))


def dense_kernels(maps: Summary) -> Any:
    """The module whose kernels compose dense maps, where it serves these."""
    if maps.A.dim() < 5 or not triton.serves(maps.B):
        return None
    from lasp.kernels.triton import dense_scan

    return dense_scan if maps.A.shape[-1] <= dense_scan.WIDEST else None


def _row_size(x: Tensor) -> int:
    return math.prod(x.shape[:1] + x.shape[2:])
