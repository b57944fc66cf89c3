"""The contract of a recurrence: functions of a table of segments, each segment treated alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lasp.kernels.segments import Segments
from lasp.kernels.summary import Summary


@dataclass(frozen=True)
class Tokens:
    """What the tokens bring to a recurrence besides their queries.

    Attributes:
        k: keys ``[B, T, H, K]``.
        v: values ``[B, T, H, V]``.
        gates: what else the recurrence asks for, in its own order: a log-decay ``g``, at most 0: ``[H]``, ``[B, T, H]``
            or ``[B, T, H, K]``; ``beta`` ``[B, T, H]``.
    """

    k: Tensor
    v: Tensor
    gates: tuple[Tensor, ...] = ()

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """``(H, K, V)`` of the state."""
        return (self.k.shape[2], self.k.shape[3], self.v.shape[3])

    @property
    def state_dtype(self) -> torch.dtype:
        """States and summaries are float32, and float64 for float64 tokens."""
        return torch.float64 if self.k.dtype == torch.float64 else torch.float32


class Recurrence(ABC):
    """``S_t = A_t S_{t-1} + B_t``, ``o_t = scale · S_tᵀ q_t``, computed on a table of segments.

    The functions know segments, never documents, runs or ranks: those are composed outside, from the summaries. All
    take contiguous or strided tensors of float16, bfloat16, float32 or float64, accumulate in float32 (float64 for
    float64), return gradients in their input's dtype, and states ``[B, n, H, K, V]`` in `Tokens.state_dtype`. Two
    recurrences that compare equal compute the same.
    """

    #: The longest segment that this recurrence wants, in tokens.
    segment_size: int
    #: Of which K and V must be multiples.
    width_multiple: int = 1

    def prepare(self, tokens: Tokens, segments: Segments) -> Tokens:
        """What the functions below take: the tokens as they compute with them, made once for a pass in each direction.

        The gates may be followed by what was derived from them.
        """
        return tokens

    def prepare_backward(self, q: Tensor, tokens: Tokens, segments: Segments) -> Tokens:
        """The same for the backward, which knows the queries from the start."""
        return self.prepare(tokens, segments)

    @abstractmethod
    def summary(self, tokens: Tokens, segments: Segments) -> Summary:
        """The map of the state over each segment: ``S_out = A · S_in + B``."""

    @abstractmethod
    def output(self, q: Tensor, tokens: Tokens, entry: Tensor, segments: Segments, scale: float) -> Tensor:
        """``o: [B, T, H, V]`` in v's dtype, when the state `entry` ``[B, n, H, K, V]`` enters each segment."""

    @abstractmethod
    def adjoint_summary(self, q: Tensor, tokens: Tokens, do: Tensor, segments: Segments, scale: float) -> Summary:
        """The map of the state's gradient over each segment: ``dS_in = A · dS_out + B``.

        Its ``A`` is the transpose of `summary`'s, its ``B`` the decayed ``Σ scale · q doᵀ``.
        """

    @abstractmethod
    def query_gradient(
        self, q: Tensor, tokens: Tokens, entry: Tensor, do: Tensor, segments: Segments, scale: float, gated: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """``dq``, and what `token_gradients` can use of the computation.

        It needs no gradient of a state, so it is computed while the adjoint summaries travel. `gated` says whether the
        gradients of the gates will be wanted.
        """

    @abstractmethod
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
        """``dk``, ``dv`` and, if `gated`, the gates' gradients, when `exit_gradient` ``[B, n, H, K, V]`` reaches each end.

        `kept` is what `query_gradient` returned beside dq.
        """
