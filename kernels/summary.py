"""The one idea of the library: a run of tokens acts on a memory state as an affine map, and maps compose.

A linear layer keeps a state ``S: [K, V]`` a head. Whatever the recurrence, a run of tokens takes the state that enters it
to the state that leaves it by ``S_out = A · S_in + B``. `Summary` holds ``(A, B)`` for many runs at once; `Chain` composes
those that follow one another. Segments of one device, ranks of one node and nodes of a cluster are all composed here
(LASP-2, https://arxiv.org/abs/2502.07563, is the case A = 1; LASP, https://arxiv.org/abs/2404.02882, has A = λ^C).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain as concatenate

import torch
from torch import Tensor


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

    A run in which a document starts has ``A = 0``: nothing from before it survives.
    """

    A: Tensor
    B: Tensor

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

    def compose(self, then: Summary) -> Summary:
        """The summary of each run here followed by the same run of `then`: ``(A₂A₁, A₂B₁ + B₂)``. Associative."""
        A = then.A @ self.A if self.A.dim() == 5 else then.A * self.A
        return Summary(A, act(then.A, self.B) + then.B)

    def apply(self, state: Tensor) -> Tensor:
        """The state that leaves each run when `state` ``[B, n, H, K, V]`` enters it."""
        return act(self.A, state) + self.B

    def reset(self, where: Tensor) -> Summary:
        """The same runs, with nothing from before surviving where the mask `where` ``[n]`` is true: ``A = 0`` there."""
        return Summary(self.A.masked_fill(_along_runs(where, self.A), 0), self.B)

    def void(self, where: Tensor) -> Summary:
        """The same runs, with those where the mask `where` ``[n]`` is true turned into the map to zero: ``A = B = 0``."""
        return Summary(self.reset(where).A, self.B.masked_fill(_along_runs(where, self.B), 0))

    def select(self, runs: Tensor) -> Summary:
        """The runs at the given indices ``[m]``, in that order."""
        return Summary(self.A.index_select(1, runs), self.B.index_select(1, runs))

    def pack(self) -> Tensor:
        """All numbers of a run in one row, ``[n, numbers]``: what an exchange sends."""
        # The row's size is spelt out: a rank without a run has n = 0 and still agrees with the others on it.
        return torch.cat([x.movedim(1, 0).reshape(x.shape[1], _row_size(x)) for x in (self.A, self.B)], dim=1)

    def unpack(self, rows: Tensor) -> Summary:
        """The inverse of `pack` for any number of rows ``[m, numbers]``, with this summary as the pattern of shapes."""
        size = _row_size(self.A)
        parts = []
        for pattern, flat in ((self.A, rows[:, :size]), (self.B, rows[:, size:])):
            batch, _, *rest = pattern.shape
            parts.append(flat.reshape(rows.shape[0], batch, *rest).movedim(0, 1))
        return Summary(*parts)


def _row_size(x: Tensor) -> int:
    return math.prod(x.shape[:1] + x.shape[2:])


def _along_runs(mask: Tensor, like: Tensor) -> Tensor:
    return mask.view(1, -1, *([1] * (like.dim() - 2)))


class Chain:
    """Which runs of a `Summary` follow one another, and their composition by doubling (log₂ n steps).

    Args:
        lengths: the runs lie along axis 1 chain after chain; each chain is a number of consecutive runs. Empty ones count.
    """

    def __init__(self, lengths: Sequence[int]):
        self.longest = max(lengths, default=0)
        # How many runs of the same chain stand before each one, and how many after it.
        self._before = torch.tensor(list(concatenate.from_iterable(range(n) for n in lengths)), dtype=torch.long)
        self._after = torch.tensor(
            list(concatenate.from_iterable(range(n - 1, -1, -1) for n in lengths)), dtype=torch.long
        )
        self._reach: dict[tuple[torch.device, bool], list[Tensor]] = {}

    def scan(self, runs: Summary, reverse: bool = False) -> Summary:
        """The composition of each run with all that precede it in its chain (inclusive).

        With `reverse`, the chains run from their last run to their first: the order of the backward pass.
        """
        count = runs.count
        for reach, step in zip(self._reaches(runs.B.device, reverse), self._steps(), strict=True):
            near, far = (slice(0, count - step), slice(step, count))
            earlier, later = (far, near) if reverse else (near, far)
            A, B = runs.A, runs.B
            joined = Summary(A[:, earlier], B[:, earlier]).compose(Summary(A[:, later], B[:, later]).reset(~reach))
            new_A = torch.where(_along_runs(reach, A), joined.A, A[:, later])
            runs = Summary(
                torch.cat([new_A, A[:, count - step :]] if reverse else [A[:, :step], new_A], dim=1),
                torch.cat([joined.B, B[:, count - step :]] if reverse else [B[:, :step], joined.B], dim=1),
            )
        return runs

    def _steps(self) -> list[int]:
        return [1 << i for i in range(max(self.longest - 1, 0).bit_length())]

    def _reaches(self, device: torch.device, reverse: bool) -> list[Tensor]:
        """For each step, the mask of the runs that have one of their own chain that far back."""
        key = (device, reverse)
        if key not in self._reach:
            masks = [
                (self._after[: len(self._after) - step] if reverse else self._before[step:]) >= step
                for step in self._steps()
            ]
            self._reach[key] = [mask.to(device) for mask in masks]
        return self._reach[key]
