"""Routed tokens against memories kept one by one: outputs and every gradient, on every rank, for every layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lasp import SequenceParallel
from lasp.kernels import ChunkedDecay, ChunkedDelta
from lasp.ops.pending import start
from lasp.parallel.routed import Routed
from lasp.parallel.routed_convolution import routed_convolution
from tests.support import DOCUMENTS, LAYOUTS, TOKENS, Inputs, assert_close, poisoned_memory

WORLDS = [1, 2, 4]
Groups = dict[int, dist.ProcessGroup]
H, K, V, CHOICES = 2, 4, 3, 2
#: Which log-decay and whether there is a beta, by op.
OPS = {
    "linear_attn": (None, False),
    "retention": ("H", False),
    "simple_gla": ("T H", False),
    "gla": ("T H K", False),
    "delta_rule": (None, True),
    "gated_delta_rule": ("T H", True),
    "kda": ("T H K", True),
}

pytestmark = pytest.mark.mpi(min_size=4)


def chosen(case: str, batch: int) -> tuple[Tensor, int]:
    """The memories that tokens chose ``[B, T, k]``, and how many there are."""
    if case == "one memory":
        return torch.zeros(batch, TOKENS, 1, dtype=torch.long), 1
    if case == "all to one":
        return torch.full((batch, TOKENS, 1), 2), 4
    scores = Inputs(5, torch.float64).uniform(batch, TOKENS, 4)
    # One memory gets no token but the last but one.
    scores[:, :, 1] = -1.0
    scores[:, -2, 1] = 2.0
    return scores.topk(CHOICES, dim=-1).indices, 4


def inputs(op: str, batch: int, choices: int) -> dict[str, Tensor]:
    """Of each token, and of each of its choices: keys, values, gates and weights differ from memory to memory."""
    x = Inputs(len(op), torch.float64)
    axes, corrected = OPS[op]
    tensors = {
        "q": x.normal(batch, TOKENS, H, K),
        "k": F.normalize(x.normal(batch, TOKENS, choices, H, K), dim=-1),
        "v": x.normal(batch, TOKENS, choices, H, V),
        "weights": x.uniform(batch, TOKENS, choices),
    }
    if axes is not None:
        sizes = {"T": (batch, TOKENS, choices), "H": (H,), "K": (K,)}
        tensors["g"] = -0.3 * x.uniform(*(n for axis in axes.split() for n in sizes[axis]))
        if axes != "H":
            tensors["g"][:, ::5] = -20.0
    if corrected:
        tensors["beta"] = 2 * x.uniform(batch, TOKENS, choices, H)
    return tensors


def memories_one_by_one(tensors: dict[str, Tensor], memories: Tensor, count: int, bounds: tuple[int, ...]) -> Tensor:
    """``o: [B, T, H, V]``, token by token, in as many states as there are memories."""
    q, k, v, weights = (tensors[name] for name in ("q", "k", "v", "weights"))
    rows = []
    for b in range(q.shape[0]):
        out = []
        for t in range(TOKENS):
            if t == 0 or t in bounds:
                states = [q.new_zeros(H, K, V) for _ in range(count)]
            o = q.new_zeros(H, V)
            for j, m in enumerate(memories[b, t].tolist()):
                S = states[m]
                if "g" in tensors:
                    g = tensors["g"]
                    g = g if g.dim() == 1 else g[b, t, j]
                    S = S * g.exp().reshape(H, -1, 1)
                add = v[b, t, j]
                if "beta" in tensors:
                    add = tensors["beta"][b, t, j, :, None] * (add - torch.einsum("hkv,hk->hv", S, k[b, t, j]))
                states[m] = S + k[b, t, j].unsqueeze(-1) * add.unsqueeze(-2)
                o = o + weights[b, t, j] * torch.einsum("hkv,hk->hv", states[m], q[b, t]) * K**-0.5
            out.append(o)
        rows.append(torch.stack(out))
    return torch.stack(rows)


@cache
def expected(op: str, documents: str, case: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The outputs, the cotangents, and with them the gradients of all inputs."""
    cu_seqlens = DOCUMENTS[documents]
    batch = 1 if cu_seqlens else 2
    memories, count = chosen(case, batch)
    leaves = {key: x.requires_grad_() for key, x in inputs(op, batch, memories.shape[-1]).items()}
    want = memories_one_by_one(leaves, memories, count, cu_seqlens or ())
    do = Inputs(9, torch.float64).normal(*want.shape)
    return want.detach(), do, dict(zip(leaves, torch.autograd.grad(want, list(leaves.values()), do), strict=True))


def routed_output(tensors: dict[str, Tensor], memories: Tensor, count: int, sp: SequenceParallel) -> Tensor:
    """The same of a rank's tokens."""
    routed = Routed.of(memories, count, sp)
    send = routed.dispatch.send
    sent = {name: send_choices(tensors[name], routed) for name in ("k", "v", "beta") if name in tensors}
    g = tensors.get("g")
    sent["g"] = g if g is None or g.dim() == 1 else send_choices(g, routed)  # type: ignore[assignment]
    pending = start(**sent, sp=sp, routed=routed)
    q = send(tensors["q"].flatten(0, 1)).unsqueeze(0)
    o, _ = pending.finish(q.expand(1, *q.shape[1:]))
    together = routed.dispatch.collect(o.squeeze(0), tensors["weights"].flatten(0, 1))
    return together.view(*memories.shape[:2], H, V)


def send_choices(x: Tensor, routed: Routed) -> Tensor:
    """What differs from choice to choice ``[B, T, k, ...]``, in the order of the routed tokens ``[1, N, ...]``."""
    return x.flatten(0, 2).index_select(0, routed.dispatch.choice).unsqueeze(0)


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memories of several segments."""
    monkeypatch.setattr("lasp.kernels.forms.ChunkedDecay", partial(ChunkedDecay, 4))
    monkeypatch.setattr("lasp.kernels.forms.ChunkedDelta", partial(ChunkedDelta, 4))


@contextmanager
def all_gathers(calls: int) -> Iterator[None]:
    """So many, and no more."""
    seen = 0
    original = dist.all_gather_into_tensor

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal seen
        seen += 1
        return original(*args, **kwargs)  # type: ignore[arg-type]

    dist.all_gather_into_tensor = counted
    try:
        yield
    finally:
        dist.all_gather_into_tensor = original
    assert seen == calls, f"{seen} collectives"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("case", ["two of four", "all to one", "one memory"])
def test_equals_memories_kept_one_by_one(groups: Groups, op: str, name: str, documents: str, case: str) -> None:
    check(groups, op, name, documents, case, WORLDS)


@pytest.mark.parametrize("op", ["gla", "gated_delta_rule", "kda"])
def test_triton(groups: Groups, monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    """Triton's kernels, in the interpreter, on every rank, with memories that nothing chose."""
    pytest.importorskip("triton")
    monkeypatch.setattr("lasp.kernels.triton.serves", lambda x: x.dtype != torch.float64)
    monkeypatch.setattr("lasp.kernels.segments._may_be_read", lambda _: False)
    check(groups, op, "table", "packed", "two of four", [4], torch.float32)


@pytest.mark.parametrize("op", ["gla", "gated_delta_rule"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_counts_that_only_a_device_knows(groups: Groups, monkeypatch: pytest.MonkeyPatch, op: str, name: str) -> None:
    """There are more segments than are filled."""
    monkeypatch.setattr("lasp.kernels.segments._may_be_read", lambda _: False)
    check(groups, op, name, "packed", "all to one", WORLDS)


def check(
    groups: Groups, op: str, name: str, documents: str, case: str, worlds: list[int], dtype: torch.dtype = torch.float64
) -> None:
    cu_seqlens = DOCUMENTS[documents]
    batch = 1 if cu_seqlens else 2
    memories, count = chosen(case, batch)
    whole = inputs(op, batch, memories.shape[-1])
    want, do, gradients = expected(op, documents, case)
    for world in worlds:
        sp = SequenceParallel(groups[world], LAYOUTS[name](TOKENS, world, cu_seqlens), exchange="all-gather")
        local = {
            key: (x.clone() if x.dim() == 1 else sp.layout.shard(x, sp.rank)).to(dtype).requires_grad_()
            for key, x in whole.items()
        }
        with poisoned_memory(), all_gathers(0 if world == 1 else 2):
            o = routed_output(local, sp.layout.shard(memories, sp.rank), count, sp)
            o.backward(sp.layout.shard(do, sp.rank).to(dtype))
        given, wanted = {"o": o}, {"o": sp.layout.shard(want, sp.rank)}
        for key, x in local.items():
            assert x.grad is not None
            if x.dim() == 1:
                dist.all_reduce(x.grad, group=groups[world])
                given[key], wanted[key] = x.grad, gradients[key]
            else:
                given[key], wanted[key] = x.grad, sp.layout.shard(gradients[key], sp.rank)
        assert_close(given, wanted, 1e-10 if dtype == torch.float64 else 1e-4)


def convolved_one_by_one(
    x: Tensor, weight: Tensor, bias: Tensor, memories: Tensor, bounds: tuple[int, ...]
) -> dict[tuple[int, int, int], Tensor]:
    """The convolution at each row, token and choice, over what was sent to the same memory of the document."""
    out = {}
    for b in range(x.shape[0]):
        seen: dict[int, list[Tensor]] = {}
        for t in range(TOKENS):
            if t in bounds:
                seen = {}
            for j, m in enumerate(memories[b, t].tolist()):
                before = seen.setdefault(m, [])
                before.append(x[b, t, j])
                taps = before[-weight.shape[1] :][::-1]
                out[b, t, j] = F.silu(bias + sum(weight[:, -1 - i] * tap for i, tap in enumerate(taps)))
    return out


@cache
def convolved(documents: str, case: str, taps: int) -> tuple[dict[str, Tensor], Tensor, Tensor, dict[str, Tensor]]:
    """The inputs, the outputs, the cotangents, and with them the gradients of all inputs."""
    cu_seqlens, random, D = DOCUMENTS[documents], Inputs(3, torch.float64), 5
    batch = 1 if cu_seqlens else 2
    memories, _ = chosen(case, batch)
    whole = {
        "x": random.normal(batch, TOKENS, memories.shape[-1], D),
        "weight": random.normal(D, taps),
        "bias": random.normal(D),
    }
    leaves = {key: x.clone().requires_grad_() for key, x in whole.items()}
    parts = convolved_one_by_one(**leaves, memories=memories, bounds=cu_seqlens or ())
    want = torch.stack([parts[key] for key in sorted(parts)]).view(whole["x"].shape)
    dy = random.normal(*want.shape)
    gradients = dict(zip(leaves, torch.autograd.grad(want, list(leaves.values()), dy), strict=True))
    return whole, want.detach(), dy, gradients


@pytest.mark.parametrize("taps", [1, 4, 19])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("case", ["two of four", "all to one"])
def test_convolution_follows_a_memory(groups: Groups, name: str, documents: str, case: str, taps: int) -> None:
    cu_seqlens = DOCUMENTS[documents]
    batch = 1 if cu_seqlens else 2
    memories, count = chosen(case, batch)
    whole, want, dy, gradients = convolved(documents, case, taps)
    for world in WORLDS:
        sp = SequenceParallel(groups[world], LAYOUTS[name](TOKENS, world, cu_seqlens))
        routed = Routed.of(sp.layout.shard(memories, sp.rank), count, sp)
        local = {
            key: (sp.layout.shard(x, sp.rank) if key == "x" else x.clone()).requires_grad_() for key, x in whole.items()
        }
        with poisoned_memory():
            y = routed_convolution(send_choices(local["x"], routed), local["weight"], local["bias"], "silu", routed)
            y = y.squeeze(0).index_select(0, routed.dispatch.place.flatten()).view(local["x"].shape)
            y.backward(sp.layout.shard(dy, sp.rank))
        given = {"y": y, "x": local["x"].grad}
        for key in ("weight", "bias"):
            given[key] = local[key].grad
            dist.all_reduce(given[key], group=groups[world])
        wanted = {"y": sp.layout.shard(want, sp.rank), "x": sp.layout.shard(gradients["x"], sp.rank)}
        assert_close(given, wanted | {key: gradients[key] for key in ("weight", "bias")}, 1e-10)  # type: ignore[arg-type]
