"""What one device computes: the definition of each recurrence, its fast forms, and the algebra of their summaries."""

from lasp.kernels.chunked import ChunkedDecay
from lasp.kernels.course import Ahead, Chain, Course, Itinerary
from lasp.kernels.delta import ChunkedDelta
from lasp.kernels.dispatch import Dispatch, Groups
from lasp.kernels.forms import delta_rule, elementwise_decay
from lasp.kernels.recurrence import Recurrence, Tokens
from lasp.kernels.segments import Cut, Segments
from lasp.kernels.summary import Summary, act

__all__ = [
    "Ahead",
    "Chain",
    "ChunkedDecay",
    "ChunkedDelta",
    "Course",
    "Cut",
    "Dispatch",
    "Groups",
    "Itinerary",
    "Recurrence",
    "Segments",
    "Summary",
    "Tokens",
    "act",
    "delta_rule",
    "elementwise_decay",
]
