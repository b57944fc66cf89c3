"""Every recurrence × every layout × documents × 1, 2 and 4 ranks, on every rank, against the token-by-token definition."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lasp import SequenceLayout, SequenceParallel
from lasp.kernels.reference import recurrent
from lasp.ops import delta_rule, gated_delta_rule, gla, kda, lightning_attn, linear_attn, retention, simple_gla
from lasp.ops.linear import start
from tests.support import (
    DOCUMENTS,
    LAYOUTS,
    TOKENS,
    Inputs,
    assert_close,
    dealt,
    poisoned_memory,
    sum_over_ranks,
)

H, K, V = 4, 4, 3
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
OPS = {
    "linear_attn": (linear_attn, None),
    "lightning_attn": (lightning_attn, "H"),
    "retention": (retention, "H"),
    "simple_gla": (simple_gla, "B T H"),
    "gla": (gla, "B T H K"),
    "delta_rule": (delta_rule, None),
    "gated_delta_rule": (gated_delta_rule, "B T H"),
    "kda": (kda, "B T H K"),
}
#: Those that correct the state, by the delta rule.
CORRECTED = ("delta_rule", "gated_delta_rule", "kda")
WORLDS = [1, 2, 4]
Groups = dict[int, dist.ProcessGroup]

pytestmark = pytest.mark.mpi(min_size=4)


def inputs(op: str, documents: str, dtype: torch.dtype, initial: bool, heads: int = H) -> dict[str, Tensor]:
    """The whole sequence, alike on every rank. Two rows where nothing is packed; every seventh token decays strongly."""
    x = Inputs(len(op), dtype)
    B = 2 if documents == "one" else 1
    N = B if documents == "one" else len(DOCUMENTS[documents]) - 1
    tensors = {name: x.normal(B, TOKENS, heads, width) for name, width in (("q", K), ("k", K), ("v", V))}
    axes = OPS[op][1]
    if axes is not None:
        sizes = {"B": B, "T": TOKENS, "H": heads, "K": K}
        g = -0.3 * x.uniform(*(sizes[axis] for axis in axes.split()))
        if g.dim() > 1:
            g[:, ::7] = -20
        tensors["g"] = g
    if op in CORRECTED:
        # Keys of length 1 and beta up to 2: some eigenvalues are negative, none is above 1.
        tensors["k"] = torch.nn.functional.normalize(tensors["k"], dim=-1)
        tensors["beta"] = 2 * x.uniform(B, TOKENS, heads)
    if initial:
        tensors["initial_state"] = x.normal(N, heads, K, V)
    return tensors


@cache
def expected(
    op: str, documents: str, dtype: torch.dtype, initial: bool, causal: bool, heads: int = H
) -> dict[str, Tensor]:
    tensors = inputs(op, documents, dtype, initial, heads)
    leaves = {name: x.double().requires_grad_() for name, x in tensors.items()}
    state = leaves["initial_state"].unflatten(0, (leaves["q"].shape[0], -1)) if initial else None
    o, final = recurrent(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        leaves.get("g"),
        leaves.get("beta"),
        initial_state=state,
        cu_seqlens=DOCUMENTS[documents],
        causal=causal,
    )
    do, dfinal = cotangents(o.shape, final.flatten(0, 1).shape, dtype)
    torch.autograd.backward([o, final.flatten(0, 1)], [do.double(), dfinal.double()])
    grads = {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"o": o.detach(), "final_state": final.flatten(0, 1).detach(), **grads}


def cotangents(output: torch.Size, state: torch.Size, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = Inputs(99, dtype)
    return x.normal(*output), x.normal(*state)


def run(
    op: str,
    sp: SequenceParallel,
    documents: str,
    dtype: torch.dtype,
    initial: bool,
    causal: bool,
    device: str = "cpu",
    heads: int = H,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """This rank's results by name, and what they should be."""
    layout, group = sp.layout, sp.group
    whole = inputs(op, documents, dtype, initial, heads)
    replicated = {"initial_state"} | ({"g"} if OPS[op][1] == "H" else set())
    local = {
        name: (x.clone() if name in replicated else layout.shard(x, sp.rank)).to(device).requires_grad_()
        for name, x in whole.items()
    }
    o, final = OPS[op][0](**local, output_final_state=True, sp=sp, causal=causal)
    want = expected(op, documents, dtype, initial, causal, heads)
    do, dfinal = cotangents(want["o"].shape, want["final_state"].shape, dtype)
    # The ranks' gradients of the final state add up: each gives another share.
    share = (sp.rank + 1) / (sp.world_size * (sp.world_size + 1) / 2)
    torch.autograd.backward([o, final], [layout.shard(do, sp.rank).to(device), (dfinal * share).to(device)])
    given = {"o": o, "final_state": final}
    for name, x in local.items():
        assert x.grad is not None
        given[f"d{name}"] = sum_over_ranks(x.grad, group) if name in replicated else x.grad
    wanted = {
        name: x if name == "final_state" or name[1:] in replicated else layout.shard(x, sp.rank)
        for name, x in want.items()
    }
    return given, wanted


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_the_definition_on_every_rank(
    groups: Groups, op: str, name: str, documents: str, dtype: torch.dtype
) -> None:
    for world in WORLDS:
        sp = SequenceParallel(groups[world], LAYOUTS[name](TOKENS, world, DOCUMENTS[documents]))
        for initial in dealt((False, True), world):
            with poisoned_memory():
                given, wanted = run(op, sp, documents, dtype, initial, causal=True)
            assert_close(given, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize(("name", "documents"), [("zigzag", "one"), ("table", "packed")])
@pytest.mark.parametrize("op", ["gla", *CORRECTED])
def test_triton(groups: Groups, monkeypatch: pytest.MonkeyPatch, op: str, name: str, documents: str) -> None:
    """Triton's kernels, in the interpreter, on every rank. A program is a head: two of them are enough."""
    pytest.importorskip("triton")
    monkeypatch.setattr("lasp.kernels.triton.serves", lambda x: x.dtype != torch.float64)
    sp = SequenceParallel(groups[4], LAYOUTS[name](TOKENS, 4, DOCUMENTS[documents]))
    with poisoned_memory():
        given, wanted = run(op, sp, documents, torch.float32, True, causal=True, heads=2)
    assert_close(given, wanted, TOLERANCE[torch.float32])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_unmasked_equals_the_definition_on_every_rank(groups: Groups, op: str, name: str, documents: str) -> None:
    for world in WORLDS:
        sp = SequenceParallel(groups[world], LAYOUTS[name](TOKENS, world, DOCUMENTS[documents]))
        given, wanted = run(op, sp, documents, torch.float64, True, causal=False)
        assert_close(given, wanted, TOLERANCE[torch.float64])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_a_changed_future_token_moves_nothing_earlier(groups: Groups, op: str, name: str, documents: str) -> None:
    for world in WORLDS:
        sp = SequenceParallel(groups[world], LAYOUTS[name](TOKENS, world, DOCUMENTS[documents]))
        layout, positions = sp.layout, sp.layout.positions(sp.rank)

        def output(whole: dict[str, Tensor], sp: SequenceParallel = sp) -> Tensor:
            local = {name: x if x.dim() == 1 else sp.layout.shard(x, sp.rank) for name, x in whole.items()}
            return OPS[op][0](**local, sp=sp)[0]

        whole = inputs(op, documents, torch.float64, initial=False)
        before = output(whole)
        for changed in dealt((10, 16, 30), world):
            moved = {name: x.clone() for name, x in whole.items()}
            for x in moved.values():
                if x.dim() > 1:
                    x[:, changed] = x[:, changed] * 2 - 1
            after = output(moved)
            earlier = positions < changed
            assert torch.equal(before[:, earlier], after[:, earlier])
            bounds = layout.cu_seqlens
            end = next(c for c in bounds if c > changed)
            itself = positions == changed
            assert not itself.any() or not torch.equal(before[:, itself], after[:, itself])
            # Nor does it reach into the next document.
            beyond = positions >= end
            assert torch.equal(before[:, beyond], after[:, beyond])


def test_queries_may_come_after_the_exchange_has_started(groups: Groups) -> None:
    """The two-phase form is the op: same results, same gradients, and the queries are not needed to start."""
    for world in WORLDS:
        layout = SequenceLayout.zigzag(TOKENS, world)
        sp = SequenceParallel(groups[world], layout)
        whole = inputs("gla", "one", torch.float64, initial=False)
        leaves = {name: layout.shard(x, sp.rank).requires_grad_() for name, x in whole.items()}
        pending = start(leaves["k"], leaves["v"], leaves["g"], sp=sp)
        weight = torch.full((), 3.0, dtype=torch.float64, requires_grad=True)
        o, _ = pending.finish(leaves["q"] * weight)
        o.square().sum().backward()
        again = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
        o2, _ = gla(again["q"] * 3.0, again["k"], again["v"], again["g"], sp=sp)
        o2.square().sum().backward()
        assert torch.equal(o, o2)
        for name, x in leaves.items():
            assert torch.equal(x.grad, again[name].grad)  # type: ignore[arg-type]
        assert weight.grad is not None


def test_batches_with_checkpointing(groups: Groups) -> None:
    """Activation checkpointing repeats the exchange in the backward pass, on all ranks alike."""
    from torch.utils.checkpoint import checkpoint

    for world in WORLDS:
        layout = SequenceLayout.contiguous(TOKENS, world)
        sp = SequenceParallel(groups[world], layout)
        q, k, v = (layout.shard(x, sp.rank) for x in list(inputs("linear_attn", "one", torch.float64, False).values()))
        grads = []
        for wrap in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=False)):
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            wrap(lambda q, k, v, sp=sp: linear_attn(q, k, v, sp=sp)[0], *leaves).square().sum().backward()
            grads.append([x.grad for x in leaves])
        for plain, again in zip(*grads, strict=True):
            assert torch.equal(plain, again)
