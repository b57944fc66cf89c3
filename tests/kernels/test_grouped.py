"""A projection that differs from group to group: products of each group by itself, in every form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lasp.kernels import Groups
from lasp.ops.grouped import grouped_linear
from tests.support import Inputs, assert_close, poisoned_memory

ROWS, GROUPS, INTO = 150, 4, 64
COUNTS = {"all": (37, 1, 80, 32), "some": (0, 51, 0, 99), "one": (0, 0, 150, 0)}


def leaves(out: int) -> list[Tensor]:
    random = Inputs(out, torch.float64)
    shapes = (ROWS, INTO), (GROUPS, out, INTO), (GROUPS, out), (ROWS, out)
    return [random.normal(*shape).to(torch.bfloat16).double() for shape in shapes]


def results(tensors: list[Tensor], counts: tuple[int, ...], biased: bool) -> dict[str, Tensor]:
    *given, dy = tensors
    x, weight, bias = (leaf.requires_grad_() for leaf in given)
    y = grouped_linear(x, weight, bias if biased else None, Groups(torch.tensor(counts, device=x.device), len(x)))
    wanted = {"x": x, "weight": weight} | ({"bias": bias} if biased else {})
    found = torch.autograd.grad(y, list(wanted.values()), dy)
    return {"y": y.detach().cpu()} | {name: g.cpu() for name, g in zip(wanted, found, strict=True)}


@pytest.mark.parametrize("counts", COUNTS)
def test_each_group_by_itself(counts: str) -> None:
    x, weight, bias, dy = leaves(5)
    given = results([x.clone(), weight, bias, dy], COUNTS[counts], True)
    group = torch.repeat_interleave(torch.arange(GROUPS), torch.tensor(COUNTS[counts]))
    assert_close({"y": given["y"]}, {"y": torch.einsum("ni,noi->no", x, weight[group]) + bias[group]}, 1e-12)
    outer = torch.einsum("no,ni->noi", dy, x)
    want = {"x": torch.einsum("no,noi->ni", dy, weight[group])} | {
        name: torch.stack([each[group == g].sum(0) for g in range(GROUPS)])
        for name, each in (("weight", outer), ("bias", dy))
    }
    assert_close({name: given[name] for name in want}, want, 1e-12)


@pytest.mark.parametrize("out", [24, 130, 264])
@pytest.mark.parametrize("counts", COUNTS)
def test_weight_gradient_in_triton(out: int, counts: str) -> None:
    pytest.importorskip("triton")
    from lasp.kernels.triton.grouped import weight_gradient

    device = "cuda" if torch.cuda.is_available() else "cpu"
    out -= out % 8
    x, _, _, dy = leaves(out)
    group = torch.repeat_interleave(torch.arange(GROUPS), torch.tensor(COUNTS[counts]))
    want = torch.stack([dy[group == g].t() @ x[group == g] for g in range(GROUPS)])
    with poisoned_memory():
        groups = Groups(torch.tensor(COUNTS[counts], device=device), len(x))
        given = weight_gradient(*(y.to(device, torch.bfloat16) for y in (dy, x)), groups.bounds)
    assert_close({"weight": given.cpu()}, {"weight": want}, 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("out", [2, 20, 64, 100, 136])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
def test_on_a_gpu(out: int, counts: str, biased: bool, dtype: torch.dtype, tolerance: float) -> None:
    """Narrow ones, wide ones, and those that no tile has."""
    tensors = leaves(out)
    given = results([x.to("cuda", dtype) for x in tensors], COUNTS[counts], biased)
    assert_close(given, results(tensors, COUNTS[counts], biased), tolerance)
