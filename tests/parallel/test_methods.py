"""Linear layers shared by heads (ulysses) and by keys and values (ring), against the token-by-token definition."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lasp import SequenceLayout, SequenceParallel
from lasp.ops import delta_rule, gla, linear_attn, retention, simple_gla
from lasp.parallel import quadratic
from lasp.parallel.quadratic import running_sum
from tests.parallel.test_linear import CORRECTED, OPS, TOLERANCE, inputs, run
from tests.support import DOCUMENTS, LAYOUTS, TOKENS, Inputs, assert_close, dealt, poisoned_memory, relative_error

WORLDS = [1, 2, 4]
Groups = dict[int, dist.ProcessGroup]

pytestmark = pytest.mark.mpi(min_size=4)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_heads_dealt_out(groups: Groups, name: str, documents: str, dtype: torch.dtype) -> None:
    for world in WORLDS:
        layout = LAYOUTS[name](TOKENS, world, DOCUMENTS[documents])
        sp = SequenceParallel(groups[world], layout, method="ulysses")
        for op, initial in dealt(product(OPS, (False, True)), world):
            # A gradient through all decays is smaller than float32's numbers, and than what corrections round to.
            for causal in (True, False) if dtype == torch.float64 and op not in CORRECTED else (True,):
                with poisoned_memory():
                    given, wanted = run(op, sp, documents, dtype, initial, causal)
                assert_close(given, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("tile", [2048, 5])
def test_keys_and_values_round_a_ring(
    groups: Groups, monkeypatch: pytest.MonkeyPatch, name: str, documents: str, tile: int
) -> None:
    """The same as by states, for decays that are one number a head."""
    monkeypatch.setattr(quadratic, "TILE", tile)
    for world in (2, 4):
        layout = LAYOUTS[name](TOKENS, world, DOCUMENTS[documents])
        by_states, by_tokens = (SequenceParallel(groups[world], layout, method=m) for m in ("lasp2", "ring"))
        for op in dealt(("linear_attn", "lightning_attn", "retention", "simple_gla"), world):
            for causal in (True, False) if op == "linear_attn" else (True,):
                given, wanted = ({}, {})
                for sp, found in ((by_tokens, given), (by_states, wanted)):
                    with poisoned_memory():
                        found.update(without_states(op, sp, documents, causal))
                assert_close(given, wanted, 1e-10)


def without_states(
    op: str, sp: SequenceParallel, documents: str, causal: bool, device: str = "cpu"
) -> dict[str, Tensor]:
    """Outputs and gradients of this rank's tokens, or of its share of what all ranks hold alike."""
    local = {
        name: (x.clone() if x.dim() == 1 else sp.layout.shard(x, sp.rank)).to(device).requires_grad_()
        for name, x in inputs(op, documents, torch.float64, False).items()
    }
    o, final = OPS[op][0](**local, sp=sp, causal=causal)
    assert final is None
    do = Inputs(99, torch.float64).normal(o.shape[0], TOKENS, *o.shape[2:])
    o.backward(sp.layout.shard(do, sp.rank).to(device))
    grads = {f"d{name}": x.grad for name, x in local.items() if x.grad is not None}
    if "dg" in grads and grads["dg"].dim() == 1:
        dist.all_reduce(grads["dg"], group=sp.group)
    return {"o": o.detach(), **grads}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("reverse", [False, True])
def test_running_sums(groups: Groups, name: str, reverse: bool) -> None:
    for world in (2, 4):
        layout = LAYOUTS[name](TOKENS, world, None)
        sp = SequenceParallel(groups[world], layout, method="ring")
        whole = Inputs(1, torch.float64).normal(2, TOKENS, 3)
        want = whole.flip(1).cumsum(1).flip(1) if reverse else whole.cumsum(1)
        given = running_sum(layout.shard(whole, sp.rank), sp, reverse)
        assert relative_error(given, layout.shard(want, sp.rank)) < 1e-14


@pytest.mark.parametrize("method", ["ulysses", "ring"])
def test_a_changed_future_token_moves_nothing_earlier(groups: Groups, method: str) -> None:
    for world in (2, 4):
        sp = SequenceParallel(groups[world], SequenceLayout.zigzag(TOKENS, world), method=method)
        positions = sp.layout.positions(sp.rank)
        whole = inputs("simple_gla", "one", torch.float64, False)
        before, _ = simple_gla(**{n: sp.layout.shard(x, sp.rank) for n, x in whole.items()}, sp=sp)
        for x in whole.values():
            x[:, 20] = x[:, 20] * 2 - 1
        after, _ = simple_gla(**{n: sp.layout.shard(x, sp.rank) for n, x in whole.items()}, sp=sp)
        earlier, itself = positions < 20, positions == 20
        assert relative_error(after[:, earlier], before[:, earlier]) < 1e-13
        assert not itself.any() or relative_error(after[:, itself], before[:, itself]) > 1e-3


def test_what_a_method_does_not_do_is_said_on_every_rank(groups: Groups) -> None:
    group, layout = groups[4], SequenceLayout.contiguous(16, 4)
    q, g = torch.ones(1, 4, 4, 2), -torch.ones(1, 4, 4, 2)
    ring, ulysses = (SequenceParallel(group, layout, method=m) for m in ("ring", "ulysses"))
    with pytest.raises(ValueError, match=r"gla: .*cannot have a decay of each key dimension: choose the method lasp2"):
        gla(q, q, q, g, sp=ring)
    with pytest.raises(ValueError, match=r"retention: .*cannot have a decay without the causal mask: choose"):
        retention(q, q, q, causal=False, sp=ring)
    with pytest.raises(ValueError, match=r"linear_attn: .*cannot have states: choose the method lasp2"):
        linear_attn(q, q, q, output_final_state=True, sp=ring)
    with pytest.raises(ValueError, match=r"delta_rule: .*cannot have the delta rule: choose the method lasp2"):
        delta_rule(q, q, q, q[..., 0], sp=ring)
    q = q[:, :, :3]
    with pytest.raises(
        ValueError, match=r"linear_attn: .*3 heads do not divide among 4 ranks: choose the method lasp2"
    ):
        linear_attn(q, q, q, sp=ulysses)
    with pytest.raises(ValueError, match="exchange='scan': the method ring sends no states"):
        SequenceParallel(group, layout, method="ring", exchange="scan")
