"""A checkpoint is read by ranks that share sequences and weights otherwise, and the run goes on as it would have."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from lasp.launch.interrupt import Interrupt, interrupted
from lasp.launch.parity import Split
from lasp.parallel.mesh import build_mesh
from lasp.training import Options, Trainer

OUT = Path(__file__).parents[2] / "runs/test_resume"
BEGUN, STEPS = 3, 6


def trainer(split: Split, **given) -> Trainer:
    small = {"hidden": 32, "heads": 4, "intermediate": 48, "mixer": "gated_delta_net", "seq_len": 61, "batch_size": 4}
    run = {"data": (Path(__file__),), "validation": 0.0, "steps": STEPS, "out": OUT}
    return Trainer(split.of(Options(**(small | run | given))), build_mesh("cpu", split.sp))


def figures(run: Trainer, steps: int) -> torch.Tensor:
    found = [run.step() for _ in range(steps)]
    return torch.stack([torch.stack([step["loss"], step["grad_norm"]]) for step in found])


@pytest.fixture(scope="module")
def begun(world: int) -> Iterator[torch.Tensor]:
    """What the steps after the checkpoint would have given; of a run on shared weights that goes on."""
    assert world == 4
    if dist.get_rank() == 0:
        shutil.rmtree(OUT, ignore_errors=True)
    run = trainer(Split(2, 2, "zigzag"), fsdp=True)
    for _ in range(BEGUN):
        run.step()
    run.save()
    rest = figures(run, STEPS - BEGUN)  # while it is written
    run.wait()
    dist.barrier()
    yield rest
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(OUT)


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("fsdp", [False, True], ids=["whole weights", "shared weights"])
@pytest.mark.parametrize("split", [Split(4, 1), Split(2, 2, "zigzag"), Split(1, 4, "contiguous", "ring")], ids=str)
def test_other_ranks_go_on(split: Split, fsdp: bool, begun: torch.Tensor) -> None:
    run = trainer(split, fsdp=fsdp, resume="auto")
    assert run.done == BEGUN
    rest = figures(run, STEPS - BEGUN)
    assert torch.allclose(rest, begun, rtol=1e-5, atol=0)
    if fsdp and split.sp == 2:
        assert torch.equal(rest, begun)


@pytest.mark.mpi(min_size=4)
@pytest.mark.usefixtures("world")
def test_a_rank_keeps_its_part_of_weights_gradients_and_optimizer() -> None:
    run = trainer(Split(2, 2), fsdp=True)
    run.step()
    parameters = list(run.model.parameters())
    shared = [p for p in parameters if isinstance(p, DTensor)]
    of_them = [p.to_local() for p in shared] + [p.grad.to_local() for p in shared]
    of_them += [run.optimizer.state[p]["exp_avg"].to_local() for p in shared]
    whole = 3 * sum(p.numel() for p in shared)
    assert sum(x.numel() for x in of_them) <= 0.27 * whole
    assert sum(p.numel() for p in shared) > 0.95 * sum(p.numel() for p in parameters)


@pytest.mark.mpi(min_size=4)
def test_a_checkpoint_that_is_damaged_is_told_on_all_ranks(begun: torch.Tensor) -> None:
    """Each rank looks at some of the files."""
    assert len(begun)
    file = OUT / "checkpoints/step_0000003/__2_0.distcp"
    if dist.get_rank() == 0:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    dist.barrier()
    with pytest.raises(
        ValueError, match=r"the checkpoint is damaged: __2_0\.distcp is not what was written; there is no"
    ):
        trainer(Split(1, 4), resume="auto")


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_run_that_is_killed_goes_on(tmp_path: Path) -> None:
    given = Interrupt(kills=3, ranks=2, folder=tmp_path)
    kills, loss, norm = interrupted(given)
    assert len(kills) == 3
    assert any(kill.writing for kill in kills)
    assert max(loss, norm) < 1e-5
    kills, loss, norm = interrupted(replace(given, kills=2, same=True))
    assert (loss, norm) == (0, 0)
