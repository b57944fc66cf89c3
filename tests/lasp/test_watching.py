"""What a person who watches a run sees: progress, utilisation, waits, dashboards, plot, summary, a trace, and its end."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lasp.models.flops import outline, training_flops
from lasp.parallel.mesh import build_mesh, processes
from lasp.training import Options, Trainer, checkpoint, plot, read_options, read_rows
from lasp.training.metrics import History, Row
from lasp.training.progress import Bar, Lines, figures, progress
from lasp.training.trace import steps_of
from tests.lasp.test_options import launch

TEXT = Path(__file__)
CACHE = Path(__file__).parents[2] / "runs/tokens"
ROW = Row(1, 5.5, 0.5, 100, 12345.0, 1e-3)


@pytest.fixture
def alone() -> Iterator[None]:
    """This process as the only rank."""
    with processes("cpu"):
        yield


def options(**given) -> Options:
    small: dict[str, Any] = {"hidden": 16, "heads": 2, "intermediate": 24, "layers": 1, "pattern": "L", "steps": 6}
    small |= {"seq_len": 33, "data": (TEXT,), "warmup": 2, "validation": 0.1, "eval_steps": 1, "data_cache": CACHE}
    return Options(**(small | given))


def trainer(given: Options) -> Trainer:
    return Trainer(given, build_mesh("cpu", 1))


def rows_of(count: int) -> list[Row]:
    return [
        replace(ROW, step=step, tokens=100 * step, loss=5 / step, grad_norm=1 / step) for step in range(1, count + 1)
    ]


# -- progress ------------------------------------------------------------------------------------------------------


def test_a_file_gets_a_line_each_reading(capsys: pytest.CaptureFixture[str]) -> None:
    watcher = progress(2, 10)
    assert isinstance(watcher, Lines)
    watcher.began -= 6  # six seconds for three steps
    for _ in range(3):
        watcher.tick()
    watcher.write([replace(ROW, step=4), replace(ROW, step=5, loss=2.0, mfu=0.41, exposed_exchange=0.0012)])
    watcher.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert err == ("step 5/10: loss 2.000, 12.3k tokens/s, 41% MFU, 1.2 ms waiting, gradient 0.5, 00:10 left\n")


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    watcher = progress(2, 10)
    assert isinstance(watcher, Bar)
    watcher.bar.mininterval = 0
    watcher.tick()
    watcher.write([replace(ROW, eval_loss=3.25, accuracy=0.5)])
    watcher.close()
    shown = terminal.getvalue()
    assert "3/10" in shown
    assert "loss 5.500, unseen 3.250, 50% right, 12.3k tokens/s" in shown


# -- utilisation ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("alone")
def test_utilisation_is_of_the_peak_that_is_given_and_else_unknown(tmp_path: Path) -> None:
    given = options(out=tmp_path / "given", peak_tflops=0.25)
    trainer(given).train()
    work = training_flops(outline(given.model()), [given.seq_len]) / given.seq_len
    for row in read_rows(given.out / "metrics.jsonl"):
        assert row.mfu == pytest.approx(work * row.tokens_per_second / 0.25e12)
        assert row.exposed_exchange is None
    trainer(options(out=tmp_path / "unknown")).train()
    assert all(row.mfu is None for row in read_rows(tmp_path / "unknown/metrics.jsonl"))
    assert "MFU" in (tmp_path / "given/summary.md").read_text()
    assert "MFU" not in (tmp_path / "unknown/summary.md").read_text()
    assert "MFU" not in figures(ROW)


@pytest.mark.usefixtures("alone")
def test_utilisation_counts_what_documents_see_of_themselves_alone(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": "a" * length}) + "\n" for length in (3, 90, 1, 400, 17) * 20))
    told = options(data=(text,), data_cache=tmp_path, layers=2, pattern="LN", peak_tflops=0.25, steps=3, log_interval=3)
    model = outline(told.model())
    done = {}
    for apart in (True, False):
        run = trainer(replace(told, out=tmp_path / str(apart), document_mask=apart))
        run.train()
        row = read_rows(run.options.out / "metrics.jsonl")[-1]
        done[apart] = row.mfu / row.tokens_per_second * 3 * told.batch_size * told.seq_len * 0.25e12
    bounds = [trainer(told).source.documents(step, 0, told.batch_size) for step in range(3)]
    assert done[True] == pytest.approx(training_flops(model, np.concatenate([np.diff(b) for b in bounds])))
    assert done[False] == pytest.approx(training_flops(model, [told.seq_len] * 3 * told.batch_size))
    assert done[True] < done[False]


def test_the_utilisation_of_a_run_is_of_its_time_and_not_of_its_steps(tmp_path: Path) -> None:
    history = History(tmp_path, 0)
    assert history.mfu is None
    history.write([replace(row, mfu=mfu, tokens_per_second=speed) for row, mfu, speed in zip(
        rows_of(3), (None, 0.5, 0.1), (1.0, 100.0, 25.0), strict=True)])  # fmt: skip
    assert history.mfu == pytest.approx((0.5 * 1 + 0.1 * 4) / 5)


# -- dashboards ----------------------------------------------------------------------------------------------------


class FakeWriter:
    """As torch.utils.tensorboard has it."""

    made: list[FakeWriter]

    def __init__(self, log_dir: str, purge_step: int | None = None):
        self.log_dir, self.purge_step, self.closed = log_dir, purge_step, False
        self.scalars: list[tuple[str, float, int]] = []
        FakeWriter.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def module(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    """A package in another's place."""
    fake = ModuleType(name)
    vars(fake).update(members)
    monkeypatch.setitem(sys.modules, name, fake)


@pytest.mark.usefixtures("alone")
def test_tensorboard_gets_every_row_and_a_resumed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeWriter.made = []
    module(monkeypatch, "torch.utils.tensorboard", SummaryWriter=FakeWriter)
    given = options(out=tmp_path, tensorboard=True, mixer="mom", checkpoint_interval=3)
    given.check(1)
    trainer(given).train()
    trainer(replace(given, steps=8, resume="auto")).train()
    first, second = FakeWriter.made
    assert first.log_dir == second.log_dir == str(tmp_path / "tensorboard")
    assert (first.purge_step, second.purge_step) == (None, 7)
    assert first.closed
    assert second.closed
    rows = read_rows(tmp_path / "metrics.jsonl")
    written = first.scalars + second.scalars
    assert [(value, step) for name, value, step in written if name == "loss"] == [(row.loss, row.step) for row in rows]
    assert [value for name, value, _ in written if name == "memory_load/1"] == [row.memory_load[1] for row in rows]


@pytest.mark.usefixtures("alone")
def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    """Where it is installed."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer(options(out=tmp_path, tensorboard=True)).train()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    read = [(event.step, event.value) for event in events.Scalars("loss")]
    assert read == [(row.step, pytest.approx(row.loss)) for row in read_rows(tmp_path / "metrics.jsonl")]


@pytest.mark.usefixtures("alone")
def test_weights_and_biases_go_on_under_one_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[dict[str, Any]] = []
    logged: list[tuple[dict[str, float], int]] = []
    ended: list[bool] = []

    def init(**given: Any) -> SimpleNamespace:
        begun.append(given)
        return SimpleNamespace(
            log=lambda figures, step: logged.append((figures, step)), finish=lambda: ended.append(True)
        )

    module(monkeypatch, "wandb", init=init)
    given = options(out=tmp_path / "my-run", wandb="lasp-runs", checkpoint_interval=3)
    given.check(1)
    trainer(given).train()
    trainer(replace(given, steps=8, resume="auto")).train()
    trainer(given).train()  # from the start again: another run
    assert [run["project"] for run in begun] == ["lasp-runs"] * 3
    assert [run["name"] for run in begun] == ["my-run"] * 3
    assert begun[0]["id"] == begun[1]["id"] != begun[2]["id"]
    assert begun[0]["config"]["seq_len"] == 33
    assert [step for _, step in logged] == [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6]
    assert {"loss", "grad_norm", "tokens", "lr"} <= logged[0][0].keys()
    assert "bits_per_byte" in logged[7][0]
    assert ended == [True] * 3


@pytest.mark.parametrize(
    ("arguments", "missing", "message"),
    [
        ("--tensorboard", "torch.utils.tensorboard", "--tensorboard: needs the package tensorboard, .* pip install"),
        ("--wandb x", "wandb", "--wandb: needs the package wandb, .* pip install wandb"),
        ("--peak-tflops 0", "", "--peak-tflops 0.0: must be above 0"),
        ("--profile 3:x", "", "--profile 3:x: expected a step, from 1, or the first and the last of some"),
        ("--profile 5:301", "", "--profile 5:301: the last step is --steps 300"),
    ],
)
def test_bad_options(arguments: str, missing: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=message) as error:
        read_options(arguments.split())
    assert "\n" not in str(error.value)


# -- the plot ------------------------------------------------------------------------------------------------------


def test_of_many_steps_the_plot_has_medians_within_their_extremes() -> None:
    drawn: dict[str, Any] = {}
    axes = SimpleNamespace(
        plot=lambda x, y, **_: drawn.update(x=x, y=y),
        fill_between=lambda x, low, high, **_: drawn.update(band=(x, low, high)),
    )
    tokens = np.arange(1, 100_001)
    values = np.where(tokens == 55_555, 1000.0, tokens)  # a spike
    plot._curve(axes, tokens, values, "C0")
    assert len(drawn["x"]) == len(drawn["y"]) == plot.POINTS
    assert drawn["x"][-1] == 100_000
    assert np.abs(drawn["y"] - drawn["x"]).max() <= 100
    assert drawn["band"][1].min() == 1
    assert (drawn["band"][2] >= drawn["y"]).all()
    assert drawn["band"][1][555] == 1000
    few = tokens[: 2 * plot.POINTS]
    plot._curve(axes, few, few, "C0")
    assert (drawn["y"] == few).all()


def test_the_plot_is_drawn_where_unseen_text_was_measured_and_at_the_end(tmp_path: Path) -> None:
    history = History(tmp_path, 0)
    watcher = plot.Plot(history)
    watcher.close()
    assert not watcher.path.exists()
    history.write(rows_of(3))
    watcher.write(history.rows)
    assert not watcher.path.exists()
    history.write([replace(ROW, step=4, tokens=400, eval_loss=3.0, loss=math.nan, grad_norm=math.inf)])
    watcher.write(history.rows[-1:])
    before = watcher.path.read_bytes()
    history.write([replace(ROW, step=5, tokens=500, eval_loss=2.5)])
    watcher.close()
    assert watcher.path.read_bytes() != before


# -- the summary ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("alone")
def test_the_summary_tells_what_was_trained_on_what_and_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--lr", "0.01", "--resume", "elsewhere"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    given = options(out=tmp_path / "run", lr=0.01, eval_interval=3)
    trainer(given).train()
    text, rows = (given.out / "summary.md").read_text(), read_rows(given.out / "metrics.jsonl")
    for line in (
        "# run",
        f"| loss | {rows[0].loss:.3f} → {rows[-1].loss:.3f} |",
        f"| loss of unseen text | {rows[-1].eval_loss:.3f}, at step 6 |",
        f"| bits a byte of it | {rows[-1].bits_per_byte:.3f} |",
        "| tokens | 792 |",
        "| mixer of L | gla |",
        f"| data | {TEXT} |",
        "| tokenizer | bytes |",
        "| ranks | 1, DP 1 × SP 1 |",
        "| `--lr` | `0.01` |",
        "![loss, gradient norm and speed](loss.png)",
        "python pretrain.py --lr 0.01 --resume auto",
        f"python -m lasp.generate --checkpoint {given.out} --prompt 'def '",
    ):
        assert line in text.splitlines(), f"{line}\n{text}"
    assert f"torch {torch.__version__}" in text
    assert "`--seed`" not in text


def test_the_time_of_the_steps_is_the_whole_run_s(tmp_path: Path) -> None:
    history = History(tmp_path, 0)
    history.write([replace(ROW, step=i, tokens=100 * i, tokens_per_second=50.0 * i) for i in (1, 2, 4)])
    assert history.seconds == pytest.approx(100 / 50 + 100 / 100 + 200 / 200)
    later = History(tmp_path / "..", 0)
    later.rows = [replace(ROW, step=3, tokens=300, tokens_per_second=50.0)]
    assert later.seconds == pytest.approx(2.0)


# -- a trace -------------------------------------------------------------------------------------------------------


def test_the_steps_of_a_trace() -> None:
    assert steps_of("20") == (20, 20)
    assert steps_of("20:24") == (20, 24)
    for bad in ("", "x", "0", "5:4", ":5", "3:", "1:2:3"):
        with pytest.raises(ValueError, match=f"--profile {bad}: expected"):
            steps_of(bad)


# -- the end of a run that cannot be saved ---------------------------------------------------------------------------


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("figure", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_written_and_ends_the_run(
    figure: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer.step

    def step(self: Trainer) -> dict[str, Tensor]:
        figures = original(self)
        return figures | {figure: torch.tensor(value)} if self.done == 5 else figures

    monkeypatch.setattr(Trainer, "step", step)
    given = options(out=tmp_path, steps=9, log_interval=2, checkpoint_interval=3, eval_interval=6)
    with pytest.raises(ValueError, match=rf"^step 5: the loss is .*{value}.*--resume.*--lr") as error:
        trainer(given).train()
    assert "\n" not in str(error.value)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row.step for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row.finite for row in rows] == [True] * 4 + [False, True]
    last = checkpoint.latest(tmp_path / checkpoint.FOLDER)
    assert last is not None
    assert checkpoint.read_marker(last)["step"] == 3
    assert rows[-1].eval_loss is None
    assert "stands at step 6 of 9" in (tmp_path / "summary.md").read_text()


@pytest.mark.usefixtures("alone")
def test_an_op_that_refuses_what_the_last_steps_made_names_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows before are written; and where the figures tell already, they do."""
    original, broken = Trainer.step, False

    def step(self: Trainer) -> dict[str, Tensor]:
        if self.done == 4:
            raise ValueError("gla: g is nan")
        return original(self) | ({"loss": torch.tensor(math.nan)} if broken and self.done == 2 else {})

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(ValueError, match=r"^step 5: gla: g is nan$"):
        trainer(options(out=tmp_path)).train()
    assert [row.step for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    broken = True
    with pytest.raises(ValueError, match=r"^step 2: the loss is nan"):
        trainer(options(out=tmp_path)).train()


def test_a_launch_whose_loss_is_not_finite_ends_on_all_ranks(tmp_path: Path) -> None:
    run, seconds = launch(
        2,
        "--steps",
        "30",
        "--lr",
        "1e38",
        "--warmup",
        "0",
        "--clip",
        "inf",
        "--pattern",
        "N",
        "--log-interval",
        "5",
        "--out",
        str(tmp_path),
    )
    assert run.returncode != 0
    said = [line for line in run.stderr.splitlines() if line.startswith("pretrain.py: error: step ")]
    assert len(said) == 1, run.stderr
    assert checkpoint.latest(tmp_path / checkpoint.FOLDER) is None
    assert not read_rows(tmp_path / "metrics.jsonl")[-1].finite
    assert seconds < 60


# -- on two ranks --------------------------------------------------------------------------------------------------


def test_a_launch_tells_of_its_waits_and_traces_its_steps(tmp_path: Path) -> None:
    run, _ = launch(2, "--steps", "4", "--log-interval", "2", "--profile", "3:4", "--out", str(tmp_path))
    assert run.returncode == 0, run.stderr
    assert all(0 < row.exposed_exchange < 60 for row in read_rows(tmp_path / "metrics.jsonl"))
    assert run.stderr.count("step 2/4: loss") == run.stderr.count("step 4/4: loss") == 1
    assert "| ranks | 2, DP 1 × SP 2 |" in (tmp_path / "summary.md").read_text()
    assert f"--profile: steps 3 to 4 are in {tmp_path / 'trace_rank0.json'}" in run.stdout
    for rank in (0, 1):
        events = json.loads((tmp_path / f"trace_rank{rank}.json").read_text())["traceEvents"]
        names = {event["name"] for event in events if event.get("ph") == "X"}
        assert {"step 3", "step 4", "lasp waiting", "lasp gradients", "gloo:all_gather", "gloo:all_reduce"} <= names
        assert "step 2" not in names
