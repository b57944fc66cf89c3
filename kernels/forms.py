"""Which form of a recurrence runs where."""

from __future__ import annotations

from lasp.kernels import triton
from lasp.kernels.chunked import ChunkedDecay
from lasp.kernels.delta import ChunkedDelta
from lasp.kernels.recurrence import Recurrence, Tokens


def elementwise_decay(tokens: Tokens) -> Recurrence:
    """The recurrence with an elementwise transition for such tokens: Triton's kernels on a GPU, PyTorch elsewhere."""
    if triton.serves(tokens.k):
        from lasp.kernels.triton.recurrences import triton_decay

        return triton_decay(tokens)
    return ChunkedDecay()


def delta_rule(tokens: Tokens) -> Recurrence:
    """The delta rule for such tokens, whose last gate is beta: likewise."""
    if triton.serves(tokens.k):
        from lasp.kernels.triton.key_corrected import triton_delta

        return triton_delta(tokens)
    return ChunkedDelta()
