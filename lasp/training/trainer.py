"""The trainer: the same losses and gradients for every split of a step over data-parallel and sequence-parallel ranks."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.utils.deterministic
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lasp.data import Windows, tokenizer_of
from lasp.layers import balance
from lasp.models import LinearLlama3, import_pretrained
from lasp.models.huggingface import CONFIG, described
from lasp.models.weights import write_json
from lasp.parallel.mesh import all_ranks, all_ranks_apart
from lasp.training import checkpoint, sharding
from lasp.training.batches import Batch, Batches
from lasp.training.choices import DTYPES
from lasp.training.gradients import Gradients
from lasp.training.loop import Loop
from lasp.training.loss import right_answers, sums_of_losses
from lasp.training.metrics import LOAD
from lasp.training.options import Options
from lasp.training.recall import Recall
from lasp.training.schedule import learning_rate

#: What AdamW keeps of a parameter, beside how many steps it made.
MOMENTS = ("exp_avg", "exp_avg_sq")


class Trainer(Loop):
    """A model, its data, and what a step does to it.

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
        if options.deterministic:
            _make_deterministic()
        self.batches = Batches(options, mesh)
        self.source, self.unseen = options.source(), options.unseen()

        torch.manual_seed(options.seed)  # every rank draws the same weights
        self.model = LinearLlama3(options.model(), options.recompute)
        if options.init_from is not None:
            import_pretrained(self.model, options.init_from)
        if options.fsdp:
            sharding.share(self.model, all_ranks_apart(mesh), DTYPES[options.dtype])
        self.model.to(self.device)
        self.gradients = Gradients(self.model.parameters(), self.everyone)
        self.optimizer = _adamw(self.model, options)
        self.checkpoints = checkpoint.Checkpoints(options.out, options.keep_checkpoints)
        self.done = 0
        self._resume()

    # -- one step ---------------------------------------------------------------------------------------------------

    def step(self) -> dict[str, Tensor]:
        """See `Loop.step`."""
        options, targets = self.options, max(1, self.source.targets(self.done))
        self.gradients.zero()
        shares: dict[str, Tensor] = {}
        known: dict[str, Tensor] = {}
        for batch in self.batches.of(self.source, self.done):
            objective, found = self._shares(batch, targets)
            if routings := self.model.routings:
                # A step's balance is the mean of its batches': what is even in each is even in all.
                balanced, own = balance(routings, self.everyone), 1 / self.batches.number
                objective = (
                    objective + own * options.balance * balanced.loss + own * options.router_z_loss * balanced.z_loss
                )
                found |= {"balance_loss": own * balanced.loss, "router_entropy": own * balanced.entropy}
                found |= {"router_z_loss": own * balanced.z_loss, "dropped": balanced.dropped}
                _add(known, {f"{LOAD}{memory}": own * load for memory, load in enumerate(balanced.load)})
            objective.backward()
            _add(shares, found)
        self.gradients.sum()
        norm = self.gradients.clip(options.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(options, self.done)
        self.optimizer.step()
        self.done += 1
        return self._summed(shares) | {"grad_norm": norm} | known

    def explain(self) -> str:
        """Why states travel as they do, after a step."""
        sp = self.batches.sp
        return "one rank a sequence: nothing travels" if sp is None else sp.explain()

    @torch.no_grad()
    def evaluate(self, source: Windows | Recall, steps: Iterable[int]) -> dict[str, Tensor]:
        """The loss, and what else a task has, of a source's steps, their mean; nothing is learnt. Alike on all ranks.

        Args:
            source: like the one that is trained on, as long and of as many sequences a step.
            steps: which of its steps, at least one.
        """
        shares: dict[str, Tensor] = {}
        taken = list(steps)
        for step in taken:
            for batch in self.batches.of(source, step):
                _add(shares, self._shares(batch, max(1, source.targets(step)) * len(taken))[1])
        sharding.part(self.model)
        return self._summed(shares)

    def measured(self) -> dict[str, Tensor]:
        """See `Loop.measured`: the loss on text that is not trained on, always the same."""
        if self.unseen is None:
            return {}
        windows = sum(part.count for part in self.unseen.parts)
        steps = min(self.options.eval_steps, max(1, windows // self.unseen.batch_size))
        loss = self.evaluate(self.unseen, range(steps))["loss"]
        return {"eval_loss": loss, "bits_per_byte": loss * self.unseen.tokens_per_byte / math.log(2)}

    def _shares(self, batch: Batch, targets: int) -> tuple[Tensor, dict[str, Tensor]]:
        """This rank's share of what is made small, and of figures: shares add up, however a step is split.

        Args:
            batch: some of this rank's tokens.
            targets: how many targets all ranks have, in all batches, over which the means are taken.
        """
        options = self.options
        with torch.autocast(self.device.type, DTYPES[options.dtype], enabled=options.dtype != "float32"):
            features = self.model.features(batch.inputs, sp=batch.sp, cu_seqlens=batch.cu_seqlens)
            sums = sums_of_losses(self.model, features, batch.targets, z_loss=options.z_loss > 0)
        objective = sums.cross_entropy / targets
        found = {"loss": objective.detach()}
        if sums.z_loss is not None:
            found["z_loss"] = sums.z_loss.detach() / targets
            objective = objective + options.z_loss * sums.z_loss / targets
        if options.task == "mqar":
            found["accuracy"] = right_answers(self.model, features, batch.targets) / targets
        return objective, found

    def _summed(self, shares: dict[str, Tensor]) -> dict[str, Tensor]:
        """Over all ranks, by one collective."""
        total = torch.stack(list(shares.values()))
        dist.all_reduce(total, group=self.everyone)
        return dict(zip(shares, total, strict=True))

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """See `Loop.save`: written while the run goes on, the last one at once."""
        tokenizer = None if isinstance(self.source, Recall) else self.options.tokenizer
        told = {
            "model": self.model.config.plain(),
            "tokenizer": tokenizer,
            "tokenizer_digest": tokenizer and tokenizer_of(tokenizer).digest,
            "data": self._position(),
            "options": self.options.saved(),
        }
        config = described(self.model.config)
        self.checkpoints.save(self.done, self._state(), told, lambda folder: write_json(folder / CONFIG, config))
        if self.done == self.options.steps:
            self.checkpoints.wait()

    def wait(self) -> None:
        """See `Loop.wait`."""
        self.checkpoints.wait()

    def _state(self) -> checkpoint.State:
        """All that a step changes, by the names of the model's parameters: of this rank."""
        optimizer: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            kept = self.optimizer.state[parameter]
            if not kept:  # before the first step
                kept |= {key: torch.zeros_like(parameter) for key in MOMENTS}
                kept["step"] = torch.zeros((), device=parameter.device)
            optimizer |= {f"{name}.{key}": kept[key] for key in (*MOMENTS, "step")}
        return {"model": dict(self.model.named_parameters()), "optimizer": optimizer}

    def _resume(self) -> None:
        resume, out = self.options.resume, self.options.out
        if resume is None or (resume == "auto" and checkpoint.latest(out / checkpoint.FOLDER) is None):
            return
        try:
            path = checkpoint.find(out if resume == "auto" else Path(resume))
            told = checkpoint.read_marker(path)
            self._go_on(path, told)
            with torch.no_grad():
                checkpoint.load(path, self._state(), told)
        except ValueError as error:
            raise ValueError(f"--resume {error}") from None
        self.done = told["step"]

    def _position(self) -> dict[str, Any] | None:
        """Where the next step reads, and in what."""
        if isinstance(self.source, Recall):
            return None
        return {"position": self.source.position(self.done), "windows": self.source.digest}

    def _go_on(self, path: Path, told: dict[str, Any]) -> None:
        """Let the next step read where the last run would have.

        Raises:
            ValueError: where that was another model, or other data.
        """
        ours, theirs = self.model.config.plain(), told["model"]
        if other := [name for name in ours if ours[name] != theirs.get(name)]:
            was = ", ".join(f"{name}={theirs.get(name)!r} (here {ours[name]!r})" for name in other)
            raise ValueError(f"{path}: holds another model than the options describe: {was}")
        place, options = told["data"], self.options
        if isinstance(self.source, Recall) or place is None:
            return
        if told["tokenizer_digest"] != tokenizer_of(options.tokenizer).digest:
            raise ValueError(f"{path}: trained with --tokenizer {told['tokenizer']}, which {options.tokenizer} is not")
        if place["windows"] != self.source.digest:
            names = ("data", "data_weights", "tokenizer", "seq_len", "validation")
            was = ", ".join(f"--{name.replace('_', '-')} {told['options'].get(name)}" for name in names)
            raise ValueError(f"{path}: its place is in other data; use the same text and {was}")
        self.source.go_on(tuple(place["position"]), told["step"])
        self.tokens_before = self.source.before * options.seq_len


def _make_deterministic() -> None:
    """Of torch's operations on GPUs: the gradients of embeddings and of softmax attention add up in any order otherwise."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _adamw(model: LinearLlama3, options: Options) -> torch.optim.AdamW:
    """Only what multiplies decays: neither norms nor biases, nor the recurrences' own decays."""
    alike: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for p in model.parameters():
        # Its kernel takes weights that ranks share and others, but not together.
        alike.setdefault((p.dim() >= 2, isinstance(p, DTensor)), []).append(p)
    groups = [
        {"params": of_a_kind, "weight_decay": options.weight_decay if matrices else 0.0}
        for (matrices, _), of_a_kind in alike.items()
    ]
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=True)


def _add(total: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Add figures to those of the same names."""
    for name, x in found.items():
        total[name] = total[name] + x.detach() if name in total else x.detach()
