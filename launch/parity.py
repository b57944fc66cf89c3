"""Training parity: the same losses and gradient norms however a step is split over ranks.

``torchrun --nproc-per-node 4 -m lasp.launch.parity`` trains a hybrid on one rank, then again under every split that the ranks
allow: sequence parallelism alone, with data parallelism, and data parallelism alone, on several layouts, with both softmax
attentions. It prints how far each run strays from the first, and ends with exit code 1 where that is beyond the tolerance.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from tqdm import tqdm

from lasp.launch.record import command_of, record
from lasp.layers import MIXERS
from lasp.parallel.mesh import launched_ranks, processes
from lasp.training import Options, Trainer, errors_in_one_line


@dataclass(frozen=True)
class Split:
    """How a step is dealt out over the first ``dp · sp`` ranks.

    Attributes:
        dp: how many groups of ranks take different sequences.
        sp: how many ranks share a sequence.
        layout: who holds which tokens, as `Options.layout`.
        softmax_sp: how keys and values travel, as `Options.softmax_sp`.
        method: of sequence parallelism, as `Options.sp`.
    """

    dp: int
    sp: int
    layout: str = "contiguous"
    softmax_sp: str = "all-gather"
    method: str = "lasp2"

    def of(self, run: Options) -> Options:
        """The run, split in this way.

        Raises:
            ValueError: naming the option that does not allow it.
        """
        method = "none" if self.sp == 1 else self.method
        options = replace(run, sp=method, sp_size=self.sp, layout=self.layout, softmax_sp=self.softmax_sp)
        options.check(self.dp * self.sp)
        return options

    def __str__(self) -> str:
        name = f"DP {self.dp} × SP {self.sp}"
        if self.sp == 1:
            return name
        return f"{name}, {self.layout}, {self.softmax_sp}" + ("" if self.method == "lasp2" else f", {self.method}")


#: One rank, without sequence parallelism: what the others must give.
ALONE = Split(1, 1)


def splits(world_size: int) -> Iterator[Split]:
    """What to compare on that many ranks: every SP size that divides them, alone and with DP over the rest."""
    sizes = [sp for sp in range(1, world_size + 1) if world_size % sp == 0]
    shapes = [(1, sp) for sp in sizes] + [(world_size // sp, sp) for sp in sizes if sp < world_size]
    for dp, sp in dict.fromkeys(shapes):
        if (dp, sp) == (1, 1):
            continue
        yield Split(dp, sp)
        if sp > 1:
            yield Split(dp, sp, "zigzag", "ring")


def train(options: Options, split: Split) -> Tensor | None:
    """Loss and gradient norm of every step, float64 ``[steps, 2]``. All ranks call it; None on those that the split leaves out.

    Args:
        options: the run; the split replaces its layout and method.
        split: of the job's first ranks, in order.
    """
    mesh = DeviceMesh(
        options.device_type(), torch.arange(split.dp * split.sp).view(split.dp, split.sp), mesh_dim_names=("dp", "sp")
    )
    if mesh.get_coordinate() is None:
        return None
    trainer = Trainer(split.of(options), mesh)
    steps = [trainer.step() for _ in range(options.steps)]
    return torch.stack([torch.stack([step["loss"], step["grad_norm"]]) for step in steps]).double().cpu()


@dataclass(frozen=True)
class Deviation:
    """How far a run strays from the one on one rank: the largest relative deviation of any step.

    Attributes:
        mixer: of its linear layers.
        split: how its steps were dealt out.
        loss: of the losses.
        grad_norm: of the gradient norms.
    """

    mixer: str
    split: str
    loss: float
    grad_norm: float

    @classmethod
    def between(cls, given: Tensor, expected: Tensor, mixer: str, split: Split) -> Deviation:
        """Of two results of `train`."""
        loss, norm = ((given - expected).abs() / expected.abs()).amax(0).tolist()
        return cls(mixer, str(split), loss, norm)

    def within(self, tolerance: float) -> bool:
        """Whether both are; NaN is not."""
        return self.loss <= tolerance and self.grad_norm <= tolerance

    def __str__(self) -> str:
        return f"{self.mixer:12} {self.split:40} loss {self.loss:.1e}   gradient norm {self.grad_norm:.1e}"


@dataclass(frozen=True)
class Parity:
    """Train under every split of the ranks and compare with one rank.

    torchrun --nproc-per-node 4 -m lasp.launch.parity
    """

    mixers: tuple[str, ...] = tuple(MIXERS)
    """The linear mixers of the hybrids."""
    run: Options = field(default_factory=lambda: Options(pattern="LLLN", steps=20, seq_len=512, lr=1e-3))
    """What to train."""
    tolerance: float = 1e-5
    """The largest relative deviation, of any step's loss or gradient norm."""
    result: Path = Path("launch/results/parity.json")
    """Where the figures go."""


def main() -> None:
    """Compare, tell and record."""
    with errors_in_one_line("lasp.launch.parity"):
        parity = tyro.cli(Parity, prog="lasp.launch.parity", console_outputs=os.environ.get("RANK", "0") == "0")
        for mixer in parity.mixers:
            for split in splits(launched_ranks()):
                split.of(replace(parity.run, mixer=mixer))
    with processes(parity.run.device_type()):
        deviations = compare(parity)
        if dist.get_rank() == 0:
            figures = {"steps": parity.run.steps, "tolerance": parity.tolerance, "deviations": deviations}
            record(parity.result, command_of("lasp.launch.parity"), figures)
            worst = max(max(d.loss, d.grad_norm) for d in deviations)
            print(f"largest deviation {worst:.1e}, recorded in {parity.result}")
    if not all(d.within(parity.tolerance) for d in deviations):
        raise SystemExit(1)


def compare(parity: Parity) -> list[Deviation]:
    """One for each mixer and split; on rank 0, which speaks."""
    found: list[Deviation] = []
    todo = [ALONE, *splits(dist.get_world_size())]
    speaks = dist.get_rank() == 0
    with tqdm(total=len(parity.mixers) * len(todo), unit="run", disable=not speaks) as bar:
        for mixer in parity.mixers:
            run = replace(parity.run, mixer=mixer)
            alone, *others = [_one_after_another(run, split, bar) for split in todo]
            for split, given in zip(todo[1:], others, strict=True):
                if speaks and alone is not None and given is not None:
                    found.append(Deviation.between(given, alone, mixer, split))
                    bar.write(str(found[-1]))
    return found


def _one_after_another(run: Options, split: Split, bar: tqdm) -> Tensor | None:
    """`train`, with all ranks waiting until it is done."""
    given = train(run, split)
    dist.barrier()
    bar.update()
    return given


if __name__ == "__main__":
    main()
