"""The trainer: the same losses and gradients for every split of a step over data-parallel and sequence-parallel ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lasp.data import Windows
from lasp.layers import balance
from lasp.models import LinearLlama3
from lasp.parallel import SequenceLayout, SequenceParallel
from lasp.parallel.mesh import all_ranks
from lasp.training import checkpoint
from lasp.training.gradients import Gradients
from lasp.training.loop import Loop, learning_rate
from lasp.training.loss import right_answers, sum_of_cross_entropies
from lasp.training.metrics import LOAD
from lasp.training.options import DTYPES, LAYOUTS, Options
from lasp.training.recall import Recall


@dataclass(frozen=True)
class Batch:
    """A rank's tokens of a step.

    Attributes:
        inputs: ``[rows, T_local]``, int64.
        targets: likewise; those below 0 are none.
        sp: the ranks that share the rows, and their documents; None where each rank has its own rows.
        cu_seqlens: the documents, where there is no `sp`.
    """

    inputs: Tensor
    targets: Tensor
    sp: SequenceParallel | None
    cu_seqlens: tuple[int, ...] | None


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
        self.sp: SequenceParallel | None = None
        self.group = None if options.sp == "none" else mesh["sp"].get_group()
        self.sp = self._shared(self.layout)
        self.rows_here = options.batch_size // mesh["dp"].size()
        self.first_row = self.rows_here * mesh.get_local_rank("dp")
        self.source, self.unseen = options.source(), options.unseen()

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

    def measured(self) -> dict[str, Tensor]:
        """See `Loop.measured`: the loss on text that is not trained on, always the same."""
        if self.unseen is None:
            return {}
        windows = sum(part.count for part in self.unseen.parts)
        steps = min(self.options.eval_steps, max(1, windows // self.unseen.batch_size))
        loss = self.evaluate(self.unseen, range(steps))["loss"]
        return {"eval_loss": loss, "bits_per_byte": loss * self.unseen.tokens_per_byte / math.log(2)}

    def _shares(self, source: Windows | Recall, step: int) -> dict[str, Tensor]:
        """This rank's shares of the means over all ranks' targets: shares of loss and gradient add up, however it is split."""
        batch = self.batch(source, step)
        targets, count = batch.targets, max(1, source.targets(step))
        with torch.autocast(self.device.type, DTYPES[self.options.dtype], enabled=self.options.dtype != "float32"):
            features = self.model.features(batch.inputs, sp=batch.sp, cu_seqlens=batch.cu_seqlens)
            shares = {"loss": sum_of_cross_entropies(self.model, features, targets) / count}
        if self.options.task == "mqar":
            shares["accuracy"] = right_answers(self.model, features, targets) / count
        return shares

    def batch(self, source: Windows | Recall, step: int) -> Batch:
        """This rank's tokens of a source's step: of its rows, which are one sequence where documents are told apart."""
        first, rows, length = self.first_row, self.rows_here, self.options.seq_len
        documents = source.documents(step, first, rows)
        layout, sp, sequences = self.layout, self.sp, rows
        if documents is not None:
            layout = LAYOUTS[self.options.layout](rows * length, layout.world_size, documents)
            # Kept: what travelled is explained by those that it travelled among.
            self.sp = sp = self._shared(layout)
            length, sequences = rows * length, 1
        runs = layout.runs_of(self.sp_rank)
        ranges = [(row * length + start, row * length + end) for row in range(sequences) for start, end in runs]
        # The targets are shifted in the whole window: at the end of a rank's run the target is another rank's input.
        inputs, targets = (
            x.view(sequences, layout.local_tokens(self.sp_rank)).to(self.device, non_blocking=True)
            for x in source.take(step, first, ranges)
        )
        return Batch(inputs, targets, sp, documents if sp is None else None)

    def _shared(self, layout: SequenceLayout) -> SequenceParallel | None:
        """The ranks of a sequence of that layout; None where each has its own."""
        if self.group is None:
            return None
        options = self.options
        return SequenceParallel(
            self.group, layout, method=options.sp, exchange=options.exchange, softmax=options.softmax_sp,
            # Later layouts are made alike on all ranks, of the same data, as the first was.
            check=self.sp is None,
        )  # fmt: skip

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the checkpoint, on rank 0: all have the same."""
        if dist.get_rank() > 0:
            return
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.done,
            "data": self._position(),
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
        self._go_on(path, state)

    def _position(self) -> dict[str, Any] | None:
        """Where the next step reads, and in what."""
        if isinstance(self.source, Recall):
            return None
        return {"position": self.source.position(self.done), "windows": self.source.digest}

    def _go_on(self, path: Path, state: dict[str, Any]) -> None:
        """Let the next step read where the last run would have."""
        place = state.get("data")
        if isinstance(self.source, Recall) or place is None:
            return
        if place["windows"] != self.source.digest:
            names = ("data", "data_weights", "tokenizer", "seq_len", "validation")
            was = ", ".join(f"--{name.replace('_', '-')} {state['options'].get(name)}" for name in names)
            raise ValueError(f"--resume {path}: its place is in other data; use the same text and {was}")
        self.source.go_on(place["position"], self.done)
