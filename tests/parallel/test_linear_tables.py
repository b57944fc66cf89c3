"""Random tables of token ranges and documents on four ranks: hypothesis draws the same ones on all of them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lasp import SequenceLayout, SequenceParallel
from lasp.kernels.reference import recurrent
from lasp.ops.linear import start
from tests.parallel.test_layout import tables
from tests.support import Inputs, relative_error, sum_over_ranks

pytestmark = pytest.mark.mpi(min_size=4)
WORLD, H, K, V = 4, 2, 3, 2


@given(
    layout=tables(world=WORLD),
    decay=st.sampled_from(["none", "H", "B T H", "B T H K"]),
    strength=st.sampled_from([0.1, 1.0, 20.0]),
)
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_any_table_on_four_ranks(
    groups: dict[int, dist.ProcessGroup], layout: SequenceLayout, decay: str, strength: float
) -> None:
    sp = SequenceParallel(groups[WORLD], layout)
    x, T = Inputs(0, torch.float64), layout.total_tokens
    whole = {"q": x.normal(1, T, H, K), "k": x.normal(1, T, H, K), "v": x.normal(1, T, H, V)}
    if decay != "none":
        sizes = {"B": 1, "T": T, "H": H, "K": K}
        whole["g"] = -strength * x.uniform(*(sizes[axis] for axis in decay.split()))
    whole["initial_state"] = x.normal(layout.num_documents, H, K, V)
    do, dfinal = x.normal(1, T, H, V), x.normal(layout.num_documents, H, K, V)

    def leaf(name: str, tensor: torch.Tensor, local: bool) -> torch.Tensor:
        shared = name == "initial_state" or tensor.dim() == 1
        return (tensor.clone() if shared or not local else layout.shard(tensor, sp.rank)).requires_grad_()

    there = {name: leaf(name, y, local=False) for name, y in whole.items()}
    want_o, want_final = recurrent(
        there["q"],
        there["k"],
        there["v"],
        there.get("g"),
        initial_state=there["initial_state"].unsqueeze(0),
        cu_seqlens=layout.cu_seqlens,
    )
    torch.autograd.backward([want_o, want_final], [do, dfinal.unsqueeze(0)])

    here = {name: leaf(name, y, local=True) for name, y in whole.items()}
    pending = start(here["k"], here["v"], here.get("g"), initial_state=here["initial_state"], sp=sp)
    o, final = pending.finish(here["q"], output_final_state=True)
    assert final is not None
    torch.autograd.backward([o, final], [layout.shard(do, sp.rank), dfinal / WORLD])

    errors = [relative_error(o, layout.shard(want_o, sp.rank)), relative_error(final, want_final.squeeze(0))]
    for name, y in here.items():
        assert y.grad is not None
        expected = there[name].grad
        assert expected is not None
        if y.shape == expected.shape and (name == "initial_state" or y.dim() == 1):
            errors.append(relative_error(sum_over_ranks(y.grad, sp.group), expected))
        else:
            # Against the whole gradient's size: a rank may hold one token whose own gradient is zero.
            error = (y.grad - layout.shard(expected, sp.rank)).norm() / expected.norm().clamp_min(1e-300)
            errors.append(error.item())
    # All ranks fail together, so that hypothesis goes on to the same next example on all of them.
    worst = torch.tensor(max(errors))
    dist.all_reduce(worst, dist.ReduceOp.MAX, group=sp.group)
    assert worst.item() < 1e-10, errors
