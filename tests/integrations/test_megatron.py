"""Megatron-Core with the plug-in's layers: what one rank computes, for every split of four."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lasp import SequenceLayout
from lasp.models import LinearLlama3, LinearLlama3Config
from tests.support import relative_error

pytest.importorskip("megatron.core")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core import dist_checkpointing, parallel_state

    from lasp.integrations.megatron import LaspOptions, from_megatron, load_whole, to_megatron
    from lasp.integrations.megatron.options import CORES
    from lasp.launch.megatron_cpu import megatron_on_cpu
    from tests.integrations.megatron_run import (
        HEADS,
        HIDDEN,
        LAYERS,
        STEPS,
        TOKENS,
        VOCABULARY,
        Run,
        Split,
        Training,
        alone,
        batch,
        chunks,
        megatron,
        tokens_of,
        train,
    )  # fmt: skip

pytestmark = [
    pytest.mark.mpi(min_size=4),
    pytest.mark.usefixtures("world", "on_cpu"),
    pytest.mark.filterwarnings("ignore"),
]

SPLITS = {
    "tp2": Split(tp=2),
    "tp2 sequence-parallel": Split(tp=2, sequence_parallel=True),
    "cp2": Split(cp=2),
    "cp4": Split(cp=4),
    "pp2": Split(pp=2),
    "cp2 tp2": Split(cp=2, tp=2),
    "cp2 tp2 sequence-parallel": Split(cp=2, tp=2, sequence_parallel=True),
    "cp2 pp2": Split(cp=2, pp=2),
    "tp2 pp2": Split(tp=2, pp=2),
}

FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE_RECOMPUTE = {"recompute_granularity": "selective"}
#: Each a multiple of twice the ranks long, as Megatron pads them.
DOCUMENTS = (0, 8, 32, 40, 64)

#: What is tried of each mixer where time is short, and which mixers in all.
OF_ALL, IN_ALL = ("cp2 tp2 sequence-parallel", "cp2 pp2"), ("mom",)


@pytest.fixture(scope="module")
def on_cpu() -> Iterator[None]:
    with megatron_on_cpu():
        yield


_runs: dict[object, Run] = {}


def reference(pattern: str, options: LaspOptions, split: Split) -> Run:
    key = pattern, options, split.documents, split.rows
    if key not in _runs:
        _runs[key] = alone(pattern, options, split)
    return _runs[key]


def check(pattern: str, options: LaspOptions, split: Split) -> None:
    """The losses and the norms of the gradients are those of one rank."""
    want = reference(pattern, replace(options, exchange="auto", softmax_sp="auto"), split)
    given = train(split, pattern, options, want.begun)
    assert want.losses[-1] < want.losses[0]
    assert given.losses == pytest.approx(want.losses, rel=1e-5)
    assert given.norms == pytest.approx(want.norms, rel=1e-5)


@pytest.mark.parametrize(
    ("mixer", "split"),
    [
        pytest.param(mixer, split, marks=[] if mixer in IN_ALL or split in OF_ALL else [pytest.mark.slow])
        for mixer in ("basic", "lightning", "gla", "gated_delta_net", "kda", "mom")
        for split in SPLITS
    ],
)
def test_losses_and_gradients_are_those_of_one_rank(mixer: str, split: str) -> None:
    check("LLLN", LaspOptions(mixer=mixer), SPLITS[split])


@pytest.mark.parametrize("mixer", ["retention", "simple_gla", "hgrn2", "delta_net"])
def test_every_mixer(mixer: str) -> None:
    check("LN", LaspOptions(mixer=mixer), SPLITS["cp2 tp2 sequence-parallel"])


@pytest.mark.parametrize("mixer", ["lightning", "gated_delta_net"])
def test_one_head_a_rank(mixer: str) -> None:
    """A norm of each head by itself stays one, and a norm of all heads is over all ranks."""
    check("LN", LaspOptions(mixer=mixer), Split(tp=4))


def test_keys_that_all_heads_share() -> None:
    """Fewer heads of keys than tensor-parallel ranks: each has them all, and the gradients of all are summed."""
    check("LN", LaspOptions(mixer="gated_delta_net", key_heads=1), SPLITS["cp2 tp2"])


@pytest.mark.parametrize("mixer", [pytest.param("gated_delta_net", marks=pytest.mark.slow), "mom"])
@pytest.mark.parametrize(
    "split",
    [
        Split(cp=2, distributed=True),
        Split(cp=2, tp=2, sequence_parallel=True, distributed=True),
        Split(cp=2, pp=2, vpp=2),
        Split(cp=2, tp=2, config=FULL_RECOMPUTE),
        Split(tp=2, pp=2, config=SELECTIVE_RECOMPUTE),
        Split(tp=2, cp=2, rows=2),
        Split(tp=2, pp=2, rows=2, sequence_parallel=True),
        Split(cp=2, documents=DOCUMENTS),
        Split(cp=4, documents=DOCUMENTS),
        Split(cp=2, tp=2, sequence_parallel=True, documents=DOCUMENTS),
    ],
    ids=[
        "distributed optimizer", "distributed optimizer, sequence-parallel", "virtual pipeline", "full recompute",
        "selective recompute", "rows", "rows sequence-parallel", "packed cp2", "packed cp4", "packed cp2 tp2 sequence-parallel",
    ],
)  # fmt: skip
def test_with_what_else_there_is(mixer: str, split: Split) -> None:
    check("LLLN", LaspOptions(mixer=mixer), split)


@pytest.mark.parametrize("exchange", ["all-gather", "ring", "pipelined", "scan", "two-level"])
def test_every_exchange(exchange: str) -> None:
    check("LLLN", LaspOptions(exchange=exchange), Split(cp=4))


@pytest.mark.parametrize("softmax_sp", ["all-gather", "ring", "ulysses"])
def test_every_way_of_softmax(softmax_sp: str) -> None:
    check("LLLN", LaspOptions(softmax_sp=softmax_sp), Split(cp=4))


@pytest.mark.parametrize(
    "mixer",
    ["mom", *(pytest.param(mixer, marks=pytest.mark.slow) for mixer in ("lightning", "gated_delta_net", "kda"))],
)
def test_a_checkpoint_goes_on_under_another_split(mixer: str, tmp_path: Path) -> None:
    options, written, steps = LaspOptions(mixer=mixer), Split(tp=2, cp=2), 2
    folder = broadcast(str(tmp_path))
    want = reference("LLLN", options, written)
    with megatron(written):
        training = Training(written, "LLLN", options, want.begun)
        for step in range(steps):
            training.step(step)
        dist_checkpointing.save(training.sharded_state(False), folder)
    for split in (Split(pp=2), Split()):
        with megatron(split):
            training = Training(split, "LLLN", options)
            training.restore(dist_checkpointing.load(training.sharded_state(True), folder))
            losses, norms = zip(*(training.step(step) for step in range(steps, STEPS)), strict=True)
        assert losses == pytest.approx(want.losses[steps:], rel=1e-5)
        assert norms == pytest.approx(want.norms[steps:], rel=1e-5)


@pytest.mark.parametrize("mixer", ["basic", "lightning", "retention", "gla", "gated_delta_net", "kda", "mamba2", "mom"])
def test_weights_go_to_this_project_s_model_and_back(mixer: str) -> None:
    """The same logits, of one rank and of two that share the sequence."""
    theta = 10000.0  # Megatron's own
    config = LinearLlama3Config(
        vocabulary=VOCABULARY, hidden=HIDDEN, layers=LAYERS, heads=HEADS, intermediate=48, mixer=mixer, rope_theta=theta,
        gated=False if mixer in CORES else None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LinearLlama3(config)
    weights = to_megatron(model.state_dict(), config)
    back = from_megatron(weights, config)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[name], value) for name, value in model.state_dict().items())
    want = model(tokens_of(0, 0)[:, :-1])
    for split in (Split(), Split(cp=2)):
        with megatron(split):
            here = chunks(split, "LLLN", LaspOptions(mixer=mixer))[0]
            load_whole(here, weights)
            given = batch(0, 0, split)
            logits = here(given["input_ids"], given["position_ids"], None)
            parts = [torch.empty_like(logits) for _ in range(split.cp)]
            dist.all_gather(parts, logits, group=parallel_state.get_context_parallel_group())
            assert relative_error(SequenceLayout.zigzag(TOKENS, split.cp).unshard(parts), want) < 1e-5


def broadcast(value: str) -> str:
    """Rank 0's, on all ranks."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
