"""Training on a GPU: two runs that are told to be deterministic are the same to the last bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lasp.parallel.mesh import build_mesh, processes
from lasp.training import Options, Trainer

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """This process as the only rank; what one run asks of torch is not asked of the next."""
    with processes("cuda"):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "given",
    [{"pattern": "N", "document_mask": False}, {"pattern": "LN", "mixer": "mom"}, {"pattern": "L", "mixer": "gla"}],
    ids=str,
)
def test_two_runs_are_the_same_to_the_last_bit(given: dict, tmp_path: Path) -> None:
    def gradients() -> list[Tensor]:
        options = Options(
            sp="none", device="cuda", hidden=256, heads=4, seq_len=2048, validation=0.0, data_cache=tmp_path,
            data=(Path(torch.__file__).parent / "nn",), deterministic=True, **given,
        )  # fmt: skip
        run = Trainer(options, build_mesh("cuda", 1))
        for _ in range(2):
            run.step()
        return [p.detach().clone() for p in run.model.parameters()]

    first = gradients()
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))
