"""The trainer: the same losses and gradients for every split of a step over data-parallel and sequence-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lasp.layers import balance
from lasp.models import LinearLlama3
from lasp.parallel import SequenceParallel
from lasp.parallel.mesh import all_ranks
from lasp.training import checkpoint
from lasp.training.data import Windows
from lasp.training.gradients import Gradients
from lasp.training.loop import Loop, learning_rate
from lasp.training.loss import right_answers, sum_of_cross_entropies
from lasp.training.metrics import LOAD
from lasp.training.options import DTYPES, LAYOUTS, Options
from lasp.training.recall import Recall


class Trainer(Loop):
    """A model, its data, and how a step is dealt out.

    Args:
        options: what to train.
        mesh: the ranks, axes ("dp", "sp"), all of one device type: see `lasp.parallel.mesh.build_mesh`.

    Raises:
        ValueError: where the data or the checkpoint is missing or does not fit.
    """

    def __init__(self, options: Options, mesh: DeviceMesh):
        self.options = options
        self.device = torch.device(mesh.device_type)
        self.everyone = all_ranks(mesh)

        sp_size = mesh["sp"].size()
        self.layout = LAYOUTS[options.layout](options.seq_len, sp_size)
        self.sp_rank = mesh.get_local_rank("sp")
        self.sp = None
        if options.sp != "none":
            self.sp = SequenceParallel(
                mesh["sp"], self.layout, method=options.sp, exchange=options.exchange, softmax=options.softmax_sp
            )
        self.rows_here = options.batch_size // mesh["dp"].size()
        self.first_row = self.rows_here * mesh.get_local_rank("dp")
        self.source = options.source()

        torch.manual_seed(options.seed)  # every rank draws the same weights
        self.model = LinearLlama3(options.model()).to(self.device)
        self.gradients = Gradients(self.model.parameters())
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        others = [p for p in self.model.parameters() if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=options.lr,
            betas=(0.9, 0.95),
            fused=True,
        )
        self.done = 0
        self._resume()

    # -- one step ---------------------------------------------------------------------------------------------------

    def step(self) -> dict[str, Tensor]:
        """See `Loop.step`."""
        shares = self._shares(self.source, self.done)
        loss = shares["loss"]
        routings = self.model.routings
        balanced = balance(routings, self.everyone) if routings else None
        self.gradients.zero()
        whole = loss
        if balanced is not None:
            whole = loss + self.options.balance * balanced.loss + self.options.z_loss * balanced.z_loss
        whole.backward()
        self.gradients.sum_over(self.everyone)
        norm = self.gradients.clip(self.options.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.options, self.done)
        self.optimizer.step()
        self.done += 1

        shares["loss"] = loss.detach()
        if balanced is not None:
            shares |= {"balance_loss": balanced.loss.detach(), "router_entropy": balanced.entropy}
            shares |= {"router_z_loss": balanced.z_loss.detach(), "dropped": balanced.dropped}
        total = torch.stack(list(shares.values()))
        dist.all_reduce(total, group=self.everyone)
        figures = dict(zip(shares, total, strict=True)) | {"grad_norm": norm}
        if balanced is not None:
            figures |= {f"{LOAD}{memory}": load for memory, load in enumerate(balanced.load)}
        return figures

    def explain(self) -> str:
        """Why states travel as they do, after a step."""
        return "one rank a sequence: nothing travels" if self.sp is None else self.sp.explain()

    @torch.no_grad()
    def evaluate(self, source: Windows | Recall, steps: Iterable[int]) -> dict[str, Tensor]:
        """The loss, and what else a task has, of a source's steps, their mean; nothing is learnt. Alike on all ranks.

        Args:
            source: like the one that is trained on, as long and of as many sequences a step.
            steps: which of its steps, at least one.
        """
        taken = [self._shares(source, step) for step in steps]
        total = torch.stack([torch.stack(list(shares.values())) for shares in taken]).mean(0)
        dist.all_reduce(total, group=self.everyone)
        return dict(zip(taken[0], total, strict=True))

    def _shares(self, source: Windows | Recall, step: int) -> dict[str, Tensor]:
        """This rank's shares of the means over all ranks' targets: shares of loss and gradient add up, however it is split."""
        inputs, targets = self.batch(source, step)
        count = self.options.batch_size * source.targets(step)
        with torch.autocast(self.device.type, DTYPES[self.options.dtype], enabled=self.options.dtype != "float32"):
            features = self.model.features(inputs, sp=self.sp)
            shares = {"loss": sum_of_cross_entropies(self.model, features, targets) / count}
        if self.options.task == "mqar":
            shares["accuracy"] = right_answers(self.model, features, targets) / count
        return shares

    def batch(self, source: Windows | Recall, step: int) -> tuple[Tensor, Tensor]:
        """This rank's inputs and targets ``[rows, T_local]`` of a source's step: its rows, and of those its tokens."""
        whole = source.rows(step, self.first_row, self.rows_here)
        # The targets were shifted in the whole window: at the end of a rank's run the target is another rank's input.
        inputs, targets = (self.layout.shard(x, self.sp_rank).to(self.device, non_blocking=True) for x in whole)
        return inputs, targets

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint, on rank 0: all have the same."""
        if dist.get_rank() > 0:
            return
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.done,
            "options": self.options.saved(),
        }
        checkpoint.save(self.options.out, state)

    def _resume(self) -> None:
        resume, out = self.options.resume, self.options.out
        if resume is None or (resume == "auto" and not (out / checkpoint.NAME).is_file()):
            return
        path = out if resume == "auto" else Path(resume)
        state = checkpoint.load(path)
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (KeyError, RuntimeError, ValueError) as error:
            was = state.get("options", {})
            raise ValueError(
                f"--resume {path}: holds another model than the options describe (it was trained with --preset "
                f"{was.get('preset')}, --mixer {was.get('mixer')}, --pattern {was.get('pattern')})"
            ) from error
        self.done = state["step"]
