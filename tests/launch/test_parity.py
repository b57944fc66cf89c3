"""Training parity: twenty steps of a hybrid have the same losses and gradient norms under every split of four ranks."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lasp import SequenceLayout
from lasp.launch.parity import ALONE, Deviation, Parity, Split, compare, splits, train
from lasp.layers import MIXERS
from lasp.parallel.sequence_parallel import METHODS
from lasp.training import Options
from lasp.training.choices import LAYOUTS

pytestmark = pytest.mark.mpi(min_size=4)
STEPS, TOLERANCE = 20, 1e-5
#: A decay a key dimension, and a transition that is a matrix.
THOROUGH = ("gla", "gated_delta_net")


def options(**given) -> Options:
    """A hybrid whose sequence no number of ranks divides."""
    small = {"hidden": 32, "heads": 4, "kv_heads": 2, "intermediate": 48, "conv_size": 3, "window": 40}
    run = {"seq_len": 61, "batch_size": 4, "data": (Path(__file__),), "steps": STEPS, "lr": 1e-3}
    return Options(**(small | run | given))


@cache
def alone(run: Options) -> torch.Tensor | None:
    return train(run, ALONE)


def check(run: Options, *ways: Split, **changed) -> None:
    want = alone(run)
    for split in ways:
        given = train(replace(run, **changed), split)
        if given is not None and want is not None:
            found = Deviation.between(given, want, run.mixer or "", split)
            assert found.within(TOLERANCE), str(found)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("mixer", [mixer for mixer in MIXERS if mixer not in THOROUGH])
def test_the_same_training(mixer: str) -> None:
    check(options(mixer=mixer), Split(1, 4, "zigzag", "ring"), Split(2, 2, "zigzag-per-document"))


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(
    "mixer", [mixer if mixer in THOROUGH else pytest.param(mixer, marks=pytest.mark.slow) for mixer in MIXERS]
)
def test_the_same_training_under_every_split(mixer: str) -> None:
    ways = [*splits(4), Split(1, 4, "zigzag-per-document")]
    assert {(s.dp, s.sp) for s in ways} == {(1, 2), (1, 4), (2, 2), (4, 1)}
    check(options(mixer=mixer), *ways)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(
    ("mixer", "changed"),
    [
        ("gated_delta_net", {"fsdp": True}),
        ("gated_delta_net", {"fsdp": True, "recompute": "full", "micro_batch_size": 1}),
        ("gated_delta_net", {"recompute": "selective", "micro_batch_size": 1}),
        ("mom", {"fsdp": True, "recompute": "full"}),
        pytest.param("mom", {"recompute": "selective", "micro_batch_size": 1}, marks=pytest.mark.slow),
        pytest.param("mamba2", {"fsdp": True, "recompute": "selective"}, marks=pytest.mark.slow),
    ],
)
def test_the_same_training_whoever_keeps_what(mixer: str, changed: dict) -> None:
    """Weights shared by ranks, gradients added up batch by batch, activations computed again."""
    # What is balanced batch by batch is another balance.
    run = options(steps=5, mixer=mixer, z_loss=1e-3, balance=0.0 if "micro_batch_size" in changed else 0.01)
    check(run, Split(1, 4, "zigzag", "ring"), Split(2, 2), **changed)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("split", [Split(1, 4), Split(4, 1)], ids=str)
def test_shared_weights_in_bfloat16_are_those_that_are_not_shared(split: Split) -> None:
    """Weights travel as they are computed with, and gradients add up in float32."""
    run = options(steps=3, dtype="bfloat16", mixer="mamba2")
    whole, shared = train(run, split), train(replace(run, fsdp=True), split)
    assert whole is not None
    assert shared is not None
    assert torch.allclose(whole, shared, rtol=1e-5)


@pytest.mark.usefixtures("world")
def test_the_same_training_with_uneven_and_empty_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def table(total: int, _world: int, documents: tuple[int, ...] | None = None) -> SequenceLayout:
        ranges = [[(0, 1), (50, total)], [], [(30, 50), (1, 3)], [(3, 30)]]
        return SequenceLayout.from_ranges(ranges, total, documents)

    monkeypatch.setitem(LAYOUTS, "table", table)
    check(options(), Split(1, 4, "table"), Split(1, 4, "table", "ring"))


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("method", [method for method in METHODS if method != "lasp2"])
@pytest.mark.parametrize("masked", [True, False], ids=["documents", "stream"])
def test_the_same_training_by_every_method(method: str, masked: bool) -> None:
    run = options(mixer="simple_gla", steps=8, document_mask=masked)
    check(run, Split(1, 4, "contiguous", "auto", method), Split(2, 2, "zigzag", "auto", method))


@pytest.mark.usefixtures("world")
def test_a_share_that_is_counted_twice_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: a loss divided by a rank's own targets is not the mean over all."""
    from lasp.training import trainer
    from lasp.training.loss import Sums

    exact = trainer.sums_of_losses
    run = options(steps=2)
    want = train(run, ALONE)
    monkeypatch.setattr(
        trainer, "sums_of_losses", lambda *given, **how: Sums(exact(*given, **how).cross_entropy * 1.001, None)
    )
    given = train(run, Split(1, 4))
    assert given is not None
    if want is not None:
        found = Deviation.between(given, want, "", Split(1, 4))
        assert min(found.loss, found.grad_norm) > TOLERANCE


@pytest.mark.usefixtures("world")
def test_the_command_compares_all_splits() -> None:
    found = compare(Parity(mixers=("lightning",), run=options(steps=2)))
    if dist.get_rank() == 0:
        assert [d.split for d in found] == [str(split) for split in splits(4)]
        assert all(d.within(TOLERANCE) for d in found)
    else:
        assert found == []
