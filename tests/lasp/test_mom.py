"""Mixture of Memories against memories that are sequences of their own: outputs, every gradient, every rank, every layout."""

from __future__ import annotations

from copy import deepcopy
from functools import cache, partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lasp import SequenceParallel
from lasp.layers import MIXERS, MixerState, MixtureOfMemories, RopeScaling, Router, balance, rotate
from lasp.layers.mom import PerMemory
from lasp.layers.passage import Passage
from lasp.ops.inputs import sequence_of
from lasp.ops.pending import start
from lasp.parallel.routed import Routed
from tests.support import DOCUMENTS, LAYOUTS, TOKENS, Inputs, assert_close, decoded, poisoned_memory

Groups = dict[int, dist.ProcessGroup]
WORLDS = [1, 2, 4]
HIDDEN, HEADS = 8, 2
#: Those that are looked at on all layouts: the paper's, and one of each other family.
RECURRENCES = ("basic", "lightning", "gla", "gated_delta_net", "kda")


def layer(recurrence: str, **options: object) -> MixtureOfMemories:
    torch.manual_seed(0)
    return MixtureOfMemories(HIDDEN, HEADS, recurrence=recurrence, **options).double()  # type: ignore[arg-type]


class Placed(Passage):
    """Tokens at places of a document, between which others chose other memories."""

    places: Tensor

    def rotated(self, x: Tensor, theta: float, scaling: RopeScaling | None) -> Tensor:
        return rotate(x, self.sp, theta, self.places, scaling)


def one_by_one(mom: MixtureOfMemories, x: Tensor, bounds: tuple[int, ...] | None) -> Tensor:
    """Each memory as a layer of its own over the tokens that it gets, row by row and document by document."""
    mixer = mom.mixer
    memories, weights = mom._chosen(mom.router(x))
    rows = []
    for b in range(x.shape[0]):
        o = x.new_zeros(TOKENS, HEADS, mixer.value_width)
        for begin, end in zip((bounds or (0, TOKENS))[:-1], (bounds or (0, TOKENS))[1:], strict=True):
            for m in range(int(memories.max()) + 1):
                token, choice = (memories[b, begin:end] == m).nonzero(as_tuple=True)
                if not len(token):
                    continue
                own = plain(mixer, m)
                here = x[b, begin + token].unsqueeze(0)
                passage = Placed(sequence_of(here, None, None))
                passage.places = token
                writes = own.writes(here, passage)
                pending = start(
                    writes.k, writes.v, writes.g, writes.beta, use_qk_l2norm_in_kernel=own.of_length_one, op=own.op
                )
                given, _ = pending.finish(own.queries(here, passage), own.scale)
                given = given if writes.skip is None else given + writes.skip
                weight = weights[b, begin + token, choice]
                o = o.index_add(0, begin + token, given[0] * weight[:, None, None])
        rows.append(o)
    gate = None if mixer.gate_proj is None else mixer.gate_proj(x)
    return mixer.o_proj(mixer.norm(torch.stack(rows).flatten(-2), gate))


def plain(mixer: nn.Module, memory: int) -> nn.Module:
    """The mixer with that memory's projections, which are the same parameters."""
    own = deepcopy(mixer, {id(p): p for p in mixer.parameters()})
    for name in mixer.writers:
        setattr(own, name, alone(getattr(own, name), memory))
    return own


def alone(projection: nn.Module, memory: int) -> nn.Module:
    if isinstance(projection, PerMemory):
        one = nn.Module()
        one.forward = lambda x: nn.functional.linear(  # type: ignore[method-assign]
            x, projection.weight[memory], None if projection.bias is None else projection.bias[memory]
        )
        return one
    for name, part in projection.named_children():
        setattr(projection, name, alone(part, memory))
    return projection


def gradients(mom: nn.Module, y: Tensor, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of x and of every parameter."""
    named = dict(mom.named_parameters())
    found = torch.autograd.grad(y, [x, *named.values()], dy, allow_unused=True)
    return {"y": y, "x": found[0]} | {
        name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found[1:], strict=True)
    }


def inputs(documents: str) -> tuple[Tensor, Tensor]:
    """The whole sequence and the cotangents of its outputs, alike on every rank."""
    random = Inputs(1, torch.float64)
    x, dy = (random.normal(1 if DOCUMENTS[documents] else 2, TOKENS, HIDDEN) for _ in range(2))
    return x, dy


@cache
def expected(recurrence: str, documents: str, **options: object) -> dict[str, Tensor]:
    mom, (x, dy) = layer(recurrence, **options), inputs(documents)
    x.requires_grad_()
    return {key: g.detach() for key, g in gradients(mom, one_by_one(mom, x, DOCUMENTS[documents]), x, dy).items()}


def check(groups: Groups, recurrence: str, name: str, documents: str, worlds: list[int], **options: object) -> None:
    cu_seqlens, mom, (x, dy) = DOCUMENTS[documents], layer(recurrence, **options), inputs(documents)
    want = expected(recurrence, documents, **options)  # type: ignore[arg-type]
    for world in worlds:
        sp = SequenceParallel(groups[world], LAYOUTS[name](TOKENS, world, cu_seqlens))
        local = sp.layout.shard(x, sp.rank).requires_grad_()
        with poisoned_memory():
            given = gradients(mom, mom(local, sp=sp), local, sp.layout.shard(dy, sp.rank))
        for key, g in given.items():
            if key not in ("x", "y"):
                dist.all_reduce(g, group=groups[world])
        wanted = {key: sp.layout.shard(g, sp.rank) if key in ("x", "y") else g for key, g in want.items()}
        assert_close(given, wanted, 1e-9)


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("recurrence", RECURRENCES)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_equals_layers_of_each_memory(groups: Groups, recurrence: str, name: str, documents: str) -> None:
    check(groups, recurrence, name, documents, WORLDS, conv_size=4)


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("recurrence", [name for name in MIXERS if name not in RECURRENCES])
def test_every_mixer_is_a_memory(groups: Groups, recurrence: str) -> None:
    check(groups, recurrence, "zigzag", "packed", [4])


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize(
    "options",
    [
        {"shared_memory": False},
        {"single_kv_proj": True},
        {"num_memories": 7, "top_k": 3},
        {"num_memories": 1, "top_k": 1},
    ],
    ids=str,
)
def test_options(groups: Groups, options: dict[str, object]) -> None:
    check(groups, "gated_delta_net", "table", "packed", [1, 4], **options)


@pytest.mark.mpi(min_size=4)
def test_a_changed_future_token_moves_nothing_earlier(groups: Groups) -> None:
    mom, x = layer("gated_delta_net"), Inputs(1, torch.float64).normal(1, TOKENS, HIDDEN)
    for world in WORLDS:
        sp = SequenceParallel(groups[world], LAYOUTS["zigzag"](TOKENS, world, DOCUMENTS["packed"]))
        positions = sp.layout.positions(sp.rank)
        before = mom(sp.layout.shard(x, sp.rank), sp=sp)
        for changed in (10, 16, 30):
            moved = x.clone()
            moved[:, changed] = moved[:, changed] * 2 - 1
            after = mom(sp.layout.shard(moved, sp.rank), sp=sp)
            # What is sorted stands elsewhere: sums may be in another order.
            torch.testing.assert_close(
                after[:, positions < changed], before[:, positions < changed], rtol=1e-12, atol=1e-12
            )


@pytest.mark.parametrize("recurrence", MIXERS)
def test_one_memory_is_the_plain_layer(recurrence: str) -> None:
    mom = layer(recurrence, num_memories=1, top_k=1, shared_memory=False)
    x = Inputs(1, torch.float64).normal(2, TOKENS, HIDDEN)
    assert_close({"y": mom(x)}, {"y": plain(mom.mixer, 0)(x)}, 1e-14)


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize(("memories", "taps"), [(2, 0), (7, 0), (7, 4)])
def test_traffic(groups: Groups, monkeypatch: pytest.MonkeyPatch, memories: int, taps: int) -> None:
    """One collective each way for the states of all memories, however many; and one each way for each convolution."""
    calls = []
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "all_reduce"):
        counted = partial(
            lambda original, name, *args, **kw: calls.append(name) or original(*args, **kw), getattr(dist, name), name
        )
        monkeypatch.setattr(dist, name, counted)
    sp = SequenceParallel(groups[4], LAYOUTS["zigzag"](TOKENS, 4, None), exchange="all-gather")
    mom = layer("gated_delta_net", num_memories=memories, conv_size=taps)
    x = sp.layout.shard(Inputs(1, torch.float64).normal(1, TOKENS, HIDDEN), sp.rank).requires_grad_()
    convolutions = 3 if taps else 0
    y = mom(x, sp=sp)
    assert calls == ["all_gather_into_tensor"] * (1 + convolutions)
    y.sum().backward()
    assert sorted(calls[1 + convolutions :]) == ["all_gather_into_tensor"] + ["reduce_scatter_tensor"] * convolutions


@pytest.mark.mpi(min_size=4)
def test_balance_is_that_of_all_tokens(groups: Groups) -> None:
    """Shares of the loss, of the entropy and of the gradients add up to those of one rank."""
    torch.manual_seed(0)
    routers = [Router(HIDDEN, 4, 2).double() for _ in range(3)]
    x = Inputs(2, torch.float64).normal(2, TOKENS, HIDDEN)
    probabilities = [router.proj(x).softmax(-1) for router in routers]
    chosen = [torch.nn.functional.one_hot(p.topk(2).indices, 4).sum(2).double() for p in probabilities]
    pairs = list(zip(chosen, probabilities, strict=True))
    loss = sum(4 * (c.mean((0, 1)) / 2 * p.mean((0, 1))).sum() for c, p in pairs) / 3
    entropy = sum(-(p * p.log()).sum(-1).mean() for p in probabilities) / 3
    z_loss = sum(router.proj(x).exp().sum(-1).log().square().mean() for router in routers) / 3
    want = torch.autograd.grad(loss + z_loss, [router.proj.weight for router in routers])
    for world in WORLDS:
        sp = SequenceParallel(groups[world], LAYOUTS["table"](TOKENS, world, None))
        given = balance([router(sp.layout.shard(x, sp.rank)) for router in routers], groups[world])
        grads = torch.autograd.grad(given.loss + given.z_loss, [router.proj.weight for router in routers])
        totals = [given.loss.detach(), given.entropy, given.z_loss.detach(), *grads]
        for total in totals:
            dist.all_reduce(total, group=groups[world])
        named = dict(zip(("loss", "entropy", "z_loss", "0", "1", "2"), totals, strict=True))
        wanted = dict(zip(named, (loss, entropy, z_loss, *want), strict=True))
        assert_close(
            {**named, "load": given.load}, {**wanted, "load": sum(c.mean((0, 1)) / 2 for c in chosen) / 3}, 1e-12
        )


@pytest.mark.parametrize(
    "pieces", [(1,) * TOKENS, (20, 1, 3, TOKENS - 24), (TOKENS,)], ids=["by token", "uneven", "whole"]
)
@pytest.mark.parametrize("recurrence", MIXERS)
def test_decoding_is_the_forward(recurrence: str, pieces: tuple[int, ...]) -> None:
    mom, x = layer(recurrence, conv_size=4), Inputs(1, torch.float64).normal(2, TOKENS, HIDDEN)
    assert_close({"y": decoded(mom, x, pieces)[0]}, {"y": mom(x)}, 1e-10)


def test_prompts_of_different_lengths_go_on_side_by_side() -> None:
    mom, x = layer("retention", conv_size=4), Inputs(1, torch.float64).normal(2, TOKENS, HIDDEN)
    lengths, more = (3, 30), x[:, :5].flip(0)
    states = [mom.step(x[row : row + 1, :length], mom.initial_state(1))[1] for row, length in enumerate(lengths)]
    y, _ = mom.step(more, MixerState.joined(states))
    for row, length in enumerate(lengths):
        alone = mom(torch.cat([x[row, :length], more[row]]).unsqueeze(0))
        assert_close({"y": y[row]}, {"y": alone[0, length:]}, 1e-10)


def test_gradients_pass_through_decoding() -> None:
    mom, found = layer("gated_delta_net"), []
    for pieces in ((TOKENS,), (10, 1, TOKENS - 11)):
        x, state = Inputs(1, torch.float64).normal(1, TOKENS, HIDDEN).requires_grad_(), mom.initial_state(1)
        outputs = []
        for piece in x.split(pieces, dim=1):
            y, state = mom.step(piece, state)
            outputs.append(y)
        (dx,) = torch.autograd.grad(torch.cat(outputs, dim=1).square().sum(), x)
        found.append({"x": dx})
    assert_close(*found, 1e-10)


@pytest.mark.mpi(min_size=4)
def test_no_final_states_of_memories_that_are_shared(groups: Groups) -> None:
    sp = SequenceParallel(groups[4], LAYOUTS["zigzag"](TOKENS, 4, None))
    routed = Routed.of(torch.zeros(1, sp.local_tokens, 1, dtype=torch.long), 1, sp)
    x = torch.randn(1, sp.local_tokens, HEADS, 4)
    with pytest.raises(ValueError, match="memories have final states on one rank, in rows of one document"):
        start(x, x, sp=sp, routed=routed).finish(x, output_final_state=True)
    with pytest.raises(ValueError, match="memories start from states on one rank, in rows of one document"):
        start(x, x, initial_state=torch.zeros(1, HEADS, 4, 4), sp=sp, routed=routed)


def test_of_two_alike_the_first_is_chosen() -> None:
    router = Router(HIDDEN, 4, 2)
    nn.init.zeros_(router.proj.weight)
    routing = router(torch.randn(1, 5, HIDDEN))
    assert torch.equal(routing.memories, torch.tensor([0, 1]).expand(1, 5, 2))
    assert torch.equal(routing.weights, torch.full((1, 5, 2), 0.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_memories": 0}, "num_memories=0: expected at least 1"),
        ({"num_memories": 2, "top_k": 3}, "top_k=3: expected from 1 to num_memories=2"),
        ({"recurrence": "lstm"}, "unknown mixer='lstm': expected one of basic"),
    ],
)
def test_errors(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixtureOfMemories(HIDDEN, HEADS, **options)
