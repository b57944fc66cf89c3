"""A few steps under torch's profiler, with the exchange beside the computation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function


def steps_of(text: str) -> tuple[int, int]:
    """The first and the last step of ``"20:24"``, or of ``"20"``.

    Raises:
        ValueError: where it is neither.
    """
    first, colon, last = text.partition(":")
    try:
        steps = int(first), int(last if colon else first)
    except ValueError:
        steps = (0, 0)
    if not 1 <= steps[0] <= steps[1]:
        raise ValueError(f"--profile {text}: expected a step, from 1, or the first and the last of some, as in 20:24")
    return steps


class Trace:
    """What the profiler saw of some steps of this rank, as a file for https://ui.perfetto.dev.

    Args:
        steps: as of `steps_of`.
        path: the file.
        device: where is computed.
    """

    def __init__(self, steps: tuple[int, int], path: Path, device: torch.device):
        self.first, self.last = steps
        self.path, self.device = path, device
        self.profile: profile | None = None

    @classmethod
    def of(cls, steps: str | None, directory: Path, device: torch.device) -> Trace | None:
        """This rank's of a run; None where none is asked for."""
        return None if steps is None else cls(steps_of(steps), directory / f"trace_rank{dist.get_rank()}.json", device)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a step."""
        if self.first <= number <= self.last and self.profile is None:
            cuda = [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
            # Exchanges have threads of their own on CPUs, and the backward on GPUs.
            threads = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
            self.profile = profile(activities=[ProfilerActivity.CPU, *cuda], experimental_config=threads)
            self.profile.start()
        with record_function(f"step {number}"):
            yield
        if number == self.last and self.profile is not None:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.profile.stop()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.profile.export_chrome_trace(str(self.path))
            self.profile = None

    def told(self) -> str:
        """Where it is, and how to look at it."""
        where = f"{self.path}, those of other ranks beside it"
        return f"--profile: steps {self.first} to {self.last} are in {where}; open it at https://ui.perfetto.dev"
