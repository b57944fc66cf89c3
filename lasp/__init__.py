"""lasp: sequence parallelism for linear attention and its softmax hybrids."""

from lasp.parallel import SequenceLayout, SequenceParallel

__all__ = ["SequenceLayout", "SequenceParallel"]
__version__ = "0.1.0"
