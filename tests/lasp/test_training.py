"""Training on one process: the step, its data, its gradients, and runs that stop and go on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp import SequenceLayout
from lasp.models import LinearLlama3, LinearLlama3Config
from lasp.parallel.mesh import build_mesh, processes
from lasp.training import Options, Trainer, checkpoint, data, gradients, loss, read_rows
from lasp.training.loop import learning_rate

TEXT = Path(__file__)


@pytest.fixture
def alone() -> Iterator[None]:
    """This process as the only rank."""
    with processes("cpu"):
        yield


def options(**given) -> Options:
    small = {"hidden": 16, "heads": 2, "intermediate": 24, "seq_len": 33, "data": TEXT, "warmup": 2, "steps": 6}
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
        inputs, targets = data.Windows(data.read_corpus(TEXT), 33, 4, 0).rows(step, 0, 4)
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


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_falls(dtype: str) -> None:
    run = trainer(options(hidden=32, steps=40, lr=1e-2, dtype=dtype))
    losses = [run.step()["loss"].item() for _ in range(40)]
    assert losses[0] == pytest.approx(5.55, abs=0.1)  # log 256: nothing is known
    assert losses[-1] < 3.5
    assert all(p.dtype == torch.float32 for p in run.model.parameters())


# -- its data ------------------------------------------------------------------------------------------------------


def test_the_windows_of_a_step_do_not_depend_on_how_it_is_split() -> None:
    corpus = torch.arange(250, dtype=torch.uint8)
    whole = data.Windows(corpus, 20, 6, seed=3)
    inputs, targets = whole.rows(7, 0, 6)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(targets, inputs + 1)
    for first in (0, 2, 4):
        part, _ = whole.rows(7, first, 2)
        assert torch.equal(part, inputs[first : first + 2])
    assert not torch.equal(whole.rows(8, 0, 6)[0], inputs)
    assert not torch.equal(data.Windows(corpus, 20, 6, seed=4).rows(7, 0, 6)[0], inputs)


def test_every_window_of_a_corpus_can_be_drawn() -> None:
    windows = data.Windows(torch.arange(12, dtype=torch.uint8), 10, 8, seed=0)
    starts = {int(row[0]) for step in range(10) for row in windows.rows(step, 0, 8)[0]}
    assert starts == {0, 1}


def test_a_corpus_is_its_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.txt").write_text("first")
    assert bytes(data.read_corpus(tmp_path).numpy()) == b"firstsecond"
    assert bytes(data.read_corpus(tmp_path / "b.txt").numpy()) == b"second"


def test_the_default_corpus_is_a_few_megabytes_of_python() -> None:
    corpus = data.read_corpus(None)
    assert 3e6 < len(corpus) < 60e6
    assert b"def __init__(self" in bytes(corpus.numpy())


def test_a_corpus_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--data /nowhere: no such file or directory"):
        data.read_corpus(Path("/nowhere"))
    with pytest.raises(ValueError, match="no text there"):
        data.read_corpus(tmp_path)
    with pytest.raises(
        ValueError, match="--data holds 33 tokens: a window of --seq-len 33 and its last target need 34"
    ):
        data.Windows(torch.zeros(33, dtype=torch.uint8), 33, 1, 0)


# -- its gradients -------------------------------------------------------------------------------------------------


def test_gradients_are_views_of_flat_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "BUCKET", 10)
    parameters = [nn.Parameter(torch.randn(n)) for n in (4, 6, 3, 25, 2)]
    flat = gradients.Gradients(parameters)
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
        total = loss.sum_of_cross_entropies(model, x.cumsum(1), targets)
        total.backward()
        return total.detach(), x.grad, model.head.weight.grad.clone()

    whole = results()
    monkeypatch.setattr(loss, "LOGITS", 4 * 256)  # four tokens at once
    for a, b in zip(results(), whole, strict=True):
        assert torch.allclose(a, b, rtol=1e-12)
    nothing = loss.sum_of_cross_entropies(model, torch.zeros(2, 0, 16, dtype=torch.float64), torch.zeros(2, 0).long())
    assert nothing.item() == 0


# -- runs that stop and go on --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("alone")
def test_a_run_writes_its_metrics_and_goes_on_from_a_checkpoint_exactly(tmp_path: Path) -> None:
    through = options(out=tmp_path / "through", log_interval=4)
    closing = trainer(through).train()
    assert closing is not None
    assert closing.startswith("loss 5.5")
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
    # What was written after the checkpoint is written again.
    lost = [replace(row, loss=9.0) for row in rows[:5]]
    (stopped.out / "metrics.jsonl").write_text("".join(json.dumps(vars(row)) + "\n" for row in lost))
    second = trainer(stopped)
    assert second.done == 3
    second.train()
    again = read_rows(stopped.out / "metrics.jsonl")
    assert [row.loss for row in again] == [9.0] * 3 + [row.loss for row in rows[3:]]
    assert [row.grad_norm for row in again[3:]] == [row.grad_norm for row in rows[3:]]
    ends = [checkpoint.load(run.out)["model"] for run in (through, stopped)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])

    closing = trainer(stopped).train()
    assert closing == "nothing to train: the checkpoint has done 6 of --steps 6"


@pytest.mark.usefixtures("alone")
def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--resume /nowhere: no checkpoint there"):
        trainer(options(resume="/nowhere"))
    trainer(options(out=tmp_path, steps=1)).train()
    with pytest.raises(ValueError, match=r"holds another model than the options describe .* --preset tiny"):
        trainer(options(out=tmp_path, resume="auto", hidden=32))


def test_an_interrupted_checkpoint_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, {"step": 1})

    def crash(_state: dict[str, int], path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError):
        checkpoint.save(tmp_path, {"step": 2})
    assert checkpoint.load(tmp_path) == {"step": 1}


@pytest.mark.usefixtures("alone")
def test_a_rank_takes_its_tokens_of_the_whole_windows() -> None:
    """Targets are shifted before they are dealt out: at the end of a run the target is another rank's input."""
    run = trainer(options())
    inputs, targets = run.source.rows(0, 0, 4)
    run.layout = SequenceLayout.zigzag(33, 2)
    for rank in (0, 1):
        run.sp_rank = rank
        mine = run.layout.positions(rank)
        assert torch.equal(run.batch(run.source, 0)[0], inputs[:, mine])
        assert torch.equal(run.batch(run.source, 0)[1], targets[:, mine])


def test_the_norm_of_many_gradients_is_exact() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4_000_000))
    flat = gradients.Gradients([parameter])
    values = torch.randn(4_000_000, generator=torch.Generator().manual_seed(0))
    flat.buffers[0].copy_(values)
    norm = flat.clip(1.0)
    assert norm.item() == pytest.approx(values.double().norm().item(), rel=1e-6)
    assert parameter.grad is not None
    assert parameter.grad.double().norm().item() == pytest.approx(1.0, rel=1e-6)
