"""What the tests share: relative error, the layouts that everything must work on, and inputs alike on all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lasp import SequenceLayout
from lasp.layers import MixerState

TOKENS = 43
Case = TypeVar("Case")
#: Documents by name: one sequence, and packed ones of which one has a single token and most cross ranks.
DOCUMENTS = {"one": None, "packed": (0, 1, 17, 24, TOKENS)}


def _table(total: int, world: int, cu_seqlens: tuple[int, ...] | None) -> SequenceLayout:
    """Uneven, out of order, runs of a single token, and with four ranks one rank that holds nothing."""
    ranges = {
        1: [[(20, total), (0, 20)]],
        2: [[(30, 31), (0, 7)], [(7, 30), (31, total)]],
        4: [[(0, 1), (40, total)], [], [(25, 40), (1, 3)], [(3, 25)]],
    }[world]
    return SequenceLayout.from_ranges(ranges, total, cu_seqlens)


#: Layouts by name, each built from (total_tokens, world_size, cu_seqlens).
LAYOUTS = {
    "contiguous": SequenceLayout.contiguous,
    "zigzag": SequenceLayout.zigzag,
    "zigzag per document": SequenceLayout.zigzag_per_document,
    "table": _table,
}


def relative_error(given: Tensor, expected: Tensor) -> float:
    """``‖given − expected‖ / ‖expected‖`` in float64; NaN counts as infinite."""
    if given.shape != expected.shape:
        raise AssertionError(f"shape {list(given.shape)}, expected {list(expected.shape)}")
    given, expected = given.detach().double().cpu(), expected.detach().double().cpu()
    error, size = (given - expected).norm().item(), expected.norm().item()
    if error != error:
        return float("inf")
    return error / size if size > 0 else error


def assert_close(given: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Every tensor within a relative error of `tolerance`, by name."""
    assert given.keys() == expected.keys()
    errors = {name: relative_error(given[name], expected[name]) for name in expected}
    wrong = {name: f"{error:.1e}" for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"relative error above {tolerance:.0e}: {wrong}"


def decoded(layer: Any, x: Tensor, pieces: tuple[int, ...]) -> tuple[Tensor, MixerState]:
    """What a layer's `step` makes of x piece by piece, in a memory that does not grow, and the last state."""
    state, outputs = layer.initial_state(x.shape[0]), []
    shapes = [state.memory.shape, *(tail.shape for tail in state.tails)]
    for piece in x.split(pieces, dim=1):
        y, state = layer.step(piece, state)
        outputs.append(y)
        assert [state.memory.shape, *(tail.shape for tail in state.tails)] == shapes
        assert all(tail.untyped_storage().nbytes() == tail.nbytes for tail in state.tails)
    return torch.cat(outputs, dim=1), state


def dealt(cases: Iterable[Case], world: int) -> list[Case]:
    """Those of the cases that this rank's group of `world` ranks tries: each is tried by some group, and none is idle."""
    cases, groups, group = list(cases), dist.get_world_size() // world, dist.get_rank() // world
    return cases[group % len(cases) :: groups]


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The gradient of an input that all ranks hold alike: the sum of the ranks' shares."""
    x = x.detach().clone()
    if group is not None:
        dist.all_reduce(x, group=group)
    return x


class Inputs:
    """Random tensors that are the same on every rank: a seed fixes them all, in order."""

    def __init__(self, seed: int, dtype: torch.dtype):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64).to(self.dtype)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN inside, so what is read before it is written shows."""
    was = torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = was[0]
        torch.use_deterministic_algorithms(was[1])
