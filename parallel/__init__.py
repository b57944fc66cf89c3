"""Who holds which tokens, and how states, keys and halo tokens travel between ranks."""

from lasp.parallel.layout import SequenceLayout
from lasp.parallel.linear import PendingLinear, start_linear
from lasp.parallel.sequence_parallel import SequenceParallel

__all__ = ["PendingLinear", "SequenceLayout", "SequenceParallel", "start_linear"]
