"""What a rank sends is counted as it is sent."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from lasp.launch.traffic import counted

pytestmark = pytest.mark.mpi(min_size=4)


def test_every_collective_is_counted(groups: dict[int, dist.ProcessGroup]) -> None:
    group = groups[2]
    rank = dist.get_rank(group)
    x, both = torch.ones(6, dtype=torch.float64), torch.ones(12, dtype=torch.float64)
    with counted() as traffic:
        dist.all_gather_into_tensor(both, x, group=group)
        assert traffic.sent == 48  # all of it, to the other
        dist.all_reduce(x, group=group)
        assert traffic.sent == 48 + 48  # half of it to be summed, and half of the sum
        dist.reduce_scatter_tensor(x, both, group=group)
        assert traffic.sent == 96 + 48
        dist.all_to_all_single(x, x.clone(), group=group)
        assert traffic.sent == 144 + 24
        # The first keeps two of its six rows, the second gives away all four.
        given = [[2, 4], [4, 0]][rank]
        came = x.new_empty(6 if rank == 0 else 4)
        dist.all_to_all_single(
            came, x.new_ones(sum(given)), [row[rank] for row in ([2, 4], [4, 0])], given, group=group
        )
        assert traffic.sent == 168 + 32
        other = 1 - rank
        ways = [dist.P2POp(dist.isend, x, group=group, group_peer=other)]
        ways += [dist.P2POp(dist.irecv, came.new_empty(6), group=group, group_peer=other)]
        for work in dist.batch_isend_irecv(ways):
            work.wait()
        assert traffic.sent == 200 + 48
    assert traffic.calls == {
        "all_gather_into_tensor": 1, "all_reduce": 1, "reduce_scatter_tensor": 1, "all_to_all_single": 2,
        "batch_isend_irecv": 1,
    }  # fmt: skip
    dist.all_reduce(x, group=group)
    assert traffic.calls["all_reduce"] == 1
