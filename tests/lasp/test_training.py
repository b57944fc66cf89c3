"""Training on one process: the step, its data, its gradients, and runs that stop and go on."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lasp import SequenceLayout
from lasp.models import LinearLlama3, LinearLlama3Config
from lasp.parallel.mesh import build_mesh, processes
from lasp.training import Options, Trainer, checkpoint, gradients, loss, read_rows
from lasp.training.schedule import learning_rate

TEXT = Path(__file__)
CACHE = Path(__file__).parents[2] / "runs/tokens"


@pytest.fixture
def alone() -> Iterator[None]:
    """This process as the only rank."""
    with processes("cpu"):
        yield


def options(**given) -> Options:
    small = {"hidden": 16, "heads": 2, "intermediate": 24, "seq_len": 33, "data": (TEXT,), "warmup": 2, "steps": 6}
    small |= {"data_cache": CACHE, "validation": 0.1, "eval_steps": 2}
    return Options(**(small | given))


def trainer(given: Options) -> Trainer:
    return Trainer(given, build_mesh("cpu", 1))


# -- the step ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("alone")
def test_a_step_is_the_mean_of_its_targets_and_adamw(tmp_path: Path) -> None:
    """Against the same step written with torch alone."""
    given = options(out=tmp_path, clip=0.5)
    ours = trainer(given)
    plain = LinearLlama3(given.model())
    plain.load_state_dict(ours.model.state_dict())
    decayed = [p for p in plain.parameters() if p.dim() > 1]
    rest = [p for p in plain.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95))
    for step in range(3):
        inputs, targets = given.source().rows(step, 0, 4)
        mean = F.cross_entropy(plain(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        mean.backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(given, step)
        optimizer.step()
        figures = ours.step()
        assert torch.allclose(
            torch.stack([figures["loss"], figures["grad_norm"]]), torch.stack([mean, norm]), rtol=1e-5
        )
    for mine, theirs in zip(ours.model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("alone")
def test_the_learning_rate_rises_and_falls_along_a_cosine() -> None:
    run = trainer(options(lr=1.0, warmup=4, steps=12))
    rates = [learning_rate(run.options, step) for step in range(13)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[8] == pytest.approx(0.55)
    assert rates[12] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_the_learning_rate_stays_and_falls_at_the_end() -> None:
    given = options(lr=1.0, warmup=4, steps=24, schedule="wsd", decay=1 / 3, min_lr=0.2)
    rates = [learning_rate(given, step) for step in range(25)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:17] == [1.0] * 13
    assert rates[18] == pytest.approx(0.2 + 0.8 * (1 - math.sqrt(2 / 8)))
    assert rates[24] == pytest.approx(0.2)
    assert rates[16:] == sorted(rates[16:], reverse=True)
    # A decay longer than what the warm-up leaves begins after it.
    assert learning_rate(replace(given, decay=1.0), 4) == 1.0


@pytest.mark.usefixtures("alone")
def test_the_logits_normaliser_is_kept_near_1(tmp_path: Path) -> None:
    """The gradient of both losses, against their definition by torch alone."""
    run = trainer(options(out=tmp_path, z_loss=0.5, clip=1e9, document_mask=False))
    plain = LinearLlama3(run.options.model())
    plain.load_state_dict(run.model.state_dict())
    inputs, targets = run.source.rows(0, 0, 4)
    logits = plain(inputs)
    z_loss = logits.exp().sum(-1).log().square().mean()
    mean = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    (mean + 0.5 * z_loss).backward()
    figures = run.step()
    assert figures["loss"].item() == pytest.approx(mean.item(), rel=1e-5)
    assert figures["z_loss"].item() == pytest.approx(z_loss.item(), rel=1e-5)
    for (name, mine), theirs in zip(run.model.named_parameters(), plain.parameters(), strict=True):
        assert (mine.grad - theirs.grad).norm() <= 1e-4 * theirs.grad.norm() + 1e-7, name


@pytest.mark.usefixtures("alone")
def test_what_is_computed_again_is_not_kept(tmp_path: Path) -> None:
    def kept(recompute: str) -> int:
        run, sizes = trainer(options(out=tmp_path, recompute=recompute, sp="none", seq_len=128)), {}

        def pack(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            (batch,) = run.batches.of(run.source, 0)
            run.model.features(batch.inputs, cu_seqlens=batch.cu_seqlens)
        return sum(sizes.values())

    nothing, selective, full = (kept(recompute) for recompute in ("none", "selective", "full"))
    assert full < 0.4 * selective
    assert selective < 0.9 * nothing


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_falls(dtype: str) -> None:
    run = trainer(options(hidden=32, steps=40, lr=1e-2, dtype=dtype))
    losses = [run.step()["loss"].item() for _ in range(40)]
    assert losses[0] == pytest.approx(5.55, abs=0.1)  # log 256: nothing is known
    assert losses[-1] < 3.5
    assert all(p.dtype == torch.float32 for p in run.model.parameters())


# -- its gradients -------------------------------------------------------------------------------------------------


def test_gradients_are_views_of_flat_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "BUCKET", 10)
    parameters = [nn.Parameter(torch.randn(n)) for n in (4, 6, 3, 25, 2)]
    flat = gradients.Gradients(parameters, dist.group.WORLD)
    assert [len(buffer) for buffer in flat.buffers] == [10, 3, 25, 2]
    sum((p * p).sum() for p in parameters).backward()
    assert all(torch.equal(p.grad, 2 * p) for p in parameters)
    assert torch.equal(torch.cat(flat.buffers), torch.cat([2 * p.detach() for p in parameters]))
    norm = torch.cat(flat.buffers).norm()
    assert flat.clip(1e9).item() == pytest.approx(norm.item())
    assert torch.cat(flat.buffers).norm().item() == pytest.approx(norm.item())
    assert flat.clip(0.5).item() == pytest.approx(norm.item())
    assert torch.cat(flat.buffers).norm().item() == pytest.approx(0.5)
    flat.zero()
    assert all(not p.grad.any() for p in parameters)


def test_the_loss_in_pieces_is_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LinearLlama3(LinearLlama3Config(hidden=16, heads=2, layers=1)).double()
    targets = torch.randint(256, (2, 9))

    def results() -> tuple[Tensor, Tensor, Tensor]:
        x = torch.ones(2, 9, 16, dtype=torch.float64, requires_grad=True)
        model.zero_grad()
        total = loss.sums_of_losses(model, x.cumsum(1), targets).cross_entropy
        total.backward()
        return total.detach(), x.grad, model.head.weight.grad.clone()

    whole = results()
    monkeypatch.setattr(loss, "LOGITS", 4 * 256)  # four tokens at once
    for a, b in zip(results(), whole, strict=True):
        assert torch.allclose(a, b, rtol=1e-12)
    nothing = loss.sums_of_losses(model, torch.zeros(2, 0, 16, dtype=torch.float64), torch.zeros(2, 0).long())
    assert nothing.cross_entropy.item() == 0


# -- runs that stop and go on --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("alone")
def test_a_run_writes_its_metrics_and_goes_on_from_a_checkpoint_exactly(tmp_path: Path) -> None:
    through = options(out=tmp_path / "through", log_interval=4)
    closing = trainer(through).train()
    assert closing is not None
    assert closing.startswith("loss 5.5")
    assert "bits a byte" in closing
    rows = read_rows(through.out / "metrics.jsonl")
    assert [row.step for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row.tokens for row in rows] == [4 * 33 * step for step in range(1, 7)]
    assert {"step", "loss", "grad_norm", "tokens", "tokens_per_second"} <= json.loads(
        (through.out / "metrics.jsonl").read_text().splitlines()[0]
    ).keys()
    assert (through.out / "loss.png").stat().st_size > 1000

    stopped = replace(through, out=tmp_path / "stopped", resume="auto", checkpoint_interval=3)
    first = trainer(stopped)
    for _ in range(3):
        first.step()
    stopped.out.mkdir()
    first.save()
    first.checkpoints.wait()
    # What was written after the checkpoint is written again.
    lost = [replace(row, loss=9.0) for row in rows[:5]]
    torn = '{"step": 6, "loss": 9.'
    (stopped.out / "metrics.jsonl").write_text("".join(json.dumps(vars(row)) + "\n" for row in lost) + torn)
    second = trainer(stopped)
    assert second.done == 3
    second.train()
    again = read_rows(stopped.out / "metrics.jsonl")
    assert [row.loss for row in again] == [9.0] * 3 + [row.loss for row in rows[3:]]
    assert [row.grad_norm for row in again[3:]] == [row.grad_norm for row in rows[3:]]
    ends = [checkpoint.read_model(run.out)[0].state_dict() for run in (through, stopped)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])

    assert again[-1].eval_loss == rows[-1].eval_loss
    assert rows[-1].bits_per_byte == pytest.approx(rows[-1].eval_loss / math.log(2))
    assert rows[-2].eval_loss is None

    closing = trainer(stopped).train()
    assert closing == "nothing to train: the checkpoint has done 6 of --steps 6"


@pytest.mark.usefixtures("alone")
def test_what_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file/run: Not a directory; whole checkpoints stay"):
        trainer(options(out=tmp_path / "file/run")).train()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("lasp.training.metrics.History.write", full)
    with pytest.raises(ValueError, match="/run: No space left on device; whole checkpoints stay"):
        trainer(options(out=tmp_path / "run")).train()


@pytest.mark.usefixtures("alone")
def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="/nowhere: no checkpoint there"):
        trainer(options(resume="/nowhere"))
    trainer(options(out=tmp_path, steps=1)).train()
    with pytest.raises(ValueError, match=r"holds another model than the options describe: hidden=16 \(here 32\)"):
        trainer(options(out=tmp_path, resume="auto", hidden=32))
    for other in ({"seq_len": 32}, {"validation": 0.2}, {"data": (TEXT.with_name("test_options.py"),)}):
        with pytest.raises(ValueError, match=r"its place is in other data; .* --seq-len 33, --validation 0\.1"):
            trainer(options(out=tmp_path, resume="auto", **other))
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    other_bytes = tokenizers.Tokenizer(tokenizers.models.BPE({sign: i for i, sign in enumerate(sorted(alphabet))}, []))
    other_bytes.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    other_bytes.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"--resume .*: trained with --tokenizer bytes, which .* is not"):
        trainer(options(out=tmp_path, resume="auto", tokenizer=str(tmp_path)))


def test_of_little_text_nothing_is_kept_back() -> None:
    """A hundredth of this file is less than ten sequences."""
    tokens = len(TEXT.read_bytes())
    for seq_len, kept in ((20, True), (tokens // 100 + 1, False)):
        given = options(seq_len=seq_len, validation=0.01)
        assert (given.unseen() is not None) == kept
        assert given.source().parts[0].count == (round(tokens * (0.99 if kept else 1)) - 1) // seq_len


def test_of_several_texts_those_that_are_long_enough_are_measured(tmp_path: Path) -> None:
    names, sizes = ("a", "b", "c"), (3000, 200, 1000)
    for name, size in zip(names, sizes, strict=True):
        (tmp_path / name).write_text(name * size)
    several = {"data": tuple(tmp_path / name for name in names), "data_cache": tmp_path / "cache"}
    given = options(**several, data_weights=(0.5, 0.2, 0.3), seq_len=50, validation=0.1)
    unseen, source = given.unseen(), given.source()
    assert [part.start for part in unseen.parts] == [2700, 900]
    assert [share / unseen.round for share in unseen.shares] == pytest.approx([0.625, 0.375], abs=1e-3)
    assert [part.count for part in source.parts] == [53, 3, 17]
    assert replace(given, data_weights=()).unseen().shares[0] > unseen.shares[0]
    assert replace(given, validation=0.01).unseen() is None


@pytest.mark.usefixtures("alone")
def test_a_run_goes_on_where_it_was_in_the_data_with_another_batch(tmp_path: Path) -> None:
    trainer(options(out=tmp_path, steps=3)).train()
    larger = trainer(options(out=tmp_path, resume="auto", batch_size=5))
    one_by_one = options(batch_size=1).source()
    for row in range(5):
        assert torch.equal(larger.source.rows(3, row, 1)[0], one_by_one.rows(12 + row, 0, 1)[0])
    assert larger.source.position(4)[2] == 17
    larger.train()
    assert [row.tokens // 33 for row in read_rows(tmp_path / "metrics.jsonl")] == [4, 8, 12, 17, 22, 27]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("sp", ["none", "lasp2"])
@pytest.mark.parametrize("mixer", ["gated_delta_net", "lightning", "mom"])
def test_packed_documents_train_as_each_by_itself(
    mixer: str, sp: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is the mean over all targets, and no gradient passes from one document to another."""
    monkeypatch.setattr("lasp.parallel.attention.mask.TOGETHER", 20)  # several documents are looked at by themselves
    (tmp_path / "text").mkdir()
    for name, size in {"a": 20, "b": 5, "c": 1, "d": 47, "e": 60}.items():
        (tmp_path / "text" / f"{name}.txt").write_text((name * size)[:-1] + "\n" if size > 1 else name)
    given = options(
        data=(tmp_path / "text",), data_cache=tmp_path / "cache", validation=0.0, mixer=mixer, batch_size=3, balance=0.0,
        pattern="LN", layers=2, sp=sp,
    )  # fmt: skip
    run = trainer(given)
    total = run.step()["loss"].item()
    found = {name: p.grad.clone() for name, p in run.model.named_parameters()}
    source, model = run.source, trainer(given).model
    bounds = source.documents(0, 0, 3)
    inputs, targets = (x.flatten() for x in source.rows(0, 0, 3))
    model.zero_grad()
    count, summed = 0, 0.0
    for start, end in itertools.pairwise(bounds):
        features = model.features(inputs[None, start:end])
        nats = loss.sums_of_losses(model, features, targets[None, start:end]).cross_entropy
        (nats / source.targets(0)).backward()
        count, summed = count + int((targets[start:end] >= 0).sum()), summed + nats.item()
    assert count == source.targets(0) < 99
    assert total == pytest.approx(summed / count, rel=1e-6)
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
    scale = min(1.0, given.clip / norm)  # the step clipped its own
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert (found[name] - scale * p.grad).norm() <= 2e-5 * scale * norm, name


@pytest.mark.usefixtures("alone")
def test_a_rank_takes_its_tokens_of_the_whole_windows() -> None:
    """Targets are shifted before they are dealt out: at the end of a run the target is another rank's input."""
    run = trainer(options(document_mask=False))
    inputs, targets = run.source.rows(0, 0, 4)
    batches = run.batches
    batches.layout = SequenceLayout.zigzag(33, 2)
    for rank in (0, 1):
        batches.sp_rank = rank
        mine = batches.layout.positions(rank)
        (batch,) = batches.of(run.source, 0)
        assert torch.equal(batch.inputs, inputs[:, mine])
        assert torch.equal(batch.targets, targets[:, mine])


def test_the_norm_of_many_gradients_is_exact() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4_000_000))
    flat = gradients.Gradients([parameter], dist.group.WORLD)
    values = torch.randn(4_000_000, generator=torch.Generator().manual_seed(0))
    flat.buffers[0].copy_(values)
    norm = flat.clip(1.0)
    assert norm.item() == pytest.approx(values.double().norm().item(), rel=1e-6)
    assert parameter.grad is not None
    assert parameter.grad.double().norm().item() == pytest.approx(1.0, rel=1e-6)
