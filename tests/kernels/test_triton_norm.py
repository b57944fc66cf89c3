"""The fused norm against PyTorch in float64: in Triton's interpreter where there is no GPU, compiled where there is one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lasp.kernels import triton
from lasp.layers.norm import GatedRMSNorm, RMSNorm
from lasp.ops.norm import l2_norm, rms_norm
from tests.support import Inputs, assert_close, poisoned_memory

pytest.importorskip("triton")
from lasp.kernels.triton import norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels for all tensors but float64 ones, in the interpreter where there is no GPU."""
    monkeypatch.setattr(triton, "serves", lambda x: x.dtype != torch.float64)


def inputs(dtype: torch.dtype, gated: bool, *shape: int, width: int) -> dict[str, Tensor]:
    x = Inputs(0, dtype)
    # Rows of every size, one that eps outweighs and one that is zero.
    rows = x.normal(*shape)
    rows.flatten(0, -2)[:2] *= torch.tensor([[1e-4], [0.0]], dtype=dtype)
    given = {"x": rows, "weight": 1 + Inputs(1, torch.float32).normal(width)}
    return given | ({"gate": 3 * x.normal(*shape)} if gated else {})


def results(given: dict[str, Tensor], groups: int, dy: Tensor, activation: str = "silu") -> dict[str, Tensor]:
    leaves = {name: x.detach().to(dy.device).requires_grad_() for name, x in given.items()}
    y = rms_norm(leaves["x"], leaves.get("gate"), leaves["weight"], 1e-5, groups, activation)
    assert y.dtype == leaves["x"].dtype
    y.backward(dy)
    grads = {f"d{name}": x.grad for name, x in leaves.items() if x.grad is not None}
    assert len(grads) == len(given)
    return {"y": y, **grads}


def check(dtype: torch.dtype, gated: bool, *shape: int, width: int, activation: str = "silu") -> None:
    given, dy = inputs(dtype, gated, *shape, width=width), Inputs(2, dtype).normal(*shape)
    groups = shape[-1] // width
    with poisoned_memory():
        found = results(given, groups, dy.to(DEVICE), activation)
    wanted = results({name: x.double() for name, x in given.items()}, groups, dy.double(), activation)
    assert found["dx"].dtype == dtype
    assert found["dweight"].dtype == torch.float32
    assert_close(found, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_sigmoid_for_gate(dtype: torch.dtype) -> None:
    check(dtype, True, 2, 9, 120, width=40, activation="sigmoid")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_vectors_of_length_one(dtype: torch.dtype) -> None:
    x, dy = (Inputs(seed, dtype).normal(2, 9, 3, 40) for seed in (0, 1))
    x[0, 0] = 0
    leaf, wide = x.clone().to(DEVICE).requires_grad_(), x.double().requires_grad_()
    y, expected = l2_norm(leaf), wide / (wide.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    y.backward(dy.to(DEVICE))
    expected.backward(dy.double())
    assert leaf.grad is not None
    assert wide.grad is not None
    assert_close({"y": y, "dx": leaf.grad}, {"y": expected, "dx": wide.grad}, TOLERANCE[dtype])


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "alone"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("shape", "width"), [((2, 9, 120), 40), ((2, 3, 129), 129), ((600, 7), 7)], ids=str)
def test_equals_the_definition(dtype: torch.dtype, gated: bool, shape: tuple[int, ...], width: int) -> None:
    check(dtype, gated, *shape, width=width)


@pytest.mark.parametrize("width", [1, 2, 128, 5120, 8192])
def test_widths(width: int) -> None:
    # More rows than programs hold at once, so that each takes several.
    check(torch.float32, True, 9 if width > 128 else 150, width, width=width)


def test_wider_rows_than_a_program_holds() -> None:
    check(torch.float32, True, 3, norm.WIDEST + 1, width=norm.WIDEST + 1)


@pytest.mark.parametrize("module", [RMSNorm(16), GatedRMSNorm(16, groups=2)], ids=["alone", "gated"])
def test_no_tokens(module: RMSNorm) -> None:
    module = module.to(DEVICE)
    module.weight.grad = None
    y = module(torch.zeros(1, 0, 16, device=DEVICE))
    y.sum().backward()
    assert y.shape == (1, 0, 16)
    assert module.weight.grad is not None
    assert not module.weight.grad.any()


def test_strides_and_addresses_do_not_matter() -> None:
    x, gate = (Inputs(seed, torch.float32).normal(10, 33).to(DEVICE) for seed in (0, 1))
    weight = Inputs(2, torch.float32).normal(17).to(DEVICE)[1:]
    views = x[:, 1:].t().contiguous().t()[:, :16], gate[:, 1:17]
    assert_close(
        {"y": rms_norm(*views, weight, 1e-5)},
        {"y": rms_norm(*(v.double() for v in views), weight.double(), 1e-5)},
        1e-6,
    )


def test_the_gate_may_be_the_input() -> None:
    x, weight = Inputs(0, torch.float32).normal(5, 8).to(DEVICE).requires_grad_(), torch.ones(8, device=DEVICE)
    y = rms_norm(x, x, weight, 1e-5)
    (dx,) = torch.autograd.grad(y.sum(), x)
    wide = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(rms_norm(wide, wide, weight.double(), 1e-5).sum(), wide)
    assert_close({"dx": dx}, {"dx": expected}, 1e-6)


def test_the_same_bits_again() -> None:
    given, dy = inputs(torch.float32, True, 500, 40, width=40), Inputs(2, torch.float32).normal(500, 40).to(DEVICE)
    first, second = (results(given, 1, dy) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "alone"])
def test_the_operators_are_what_torch_asks_of_them(gated: bool) -> None:
    given = inputs(torch.float32, gated, 3, 16, width=8)
    leaves = [x.to(DEVICE).requires_grad_() for x in (given["x"], given["weight"])]
    gate = given["gate"].to(DEVICE).requires_grad_() if gated else None
    torch.library.opcheck(torch.ops.lasp.rms_norm, (leaves[0], gate, leaves[1], 1e-5, "silu"))
    plain = [x.detach() for x in leaves]
    gate = None if gate is None else gate.detach()
    torch.library.opcheck(torch.ops.lasp.rms_norm_backward, (plain[0], plain[0], gate, plain[1], 1e-5, "silu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiler_takes_it_whole(dtype: torch.dtype) -> None:
    x, gate, dy = (Inputs(seed, dtype).normal(4, 32).to(DEVICE) for seed in range(3))
    module = GatedRMSNorm(32, groups=2).to(DEVICE)
    found = []
    for form in (module, torch.compile(module, backend="aot_eager", fullgraph=True)):
        leaves = [x.clone().requires_grad_(), gate.clone().requires_grad_()]
        module.weight.grad = None
        y = form(*leaves)
        y.backward(dy)
        found.append([y, *(leaf.grad for leaf in leaves), module.weight.grad])
    assert all(torch.equal(eager, compiled) for eager, compiled in zip(*found, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("width", [64, 128, 1000, 2048, 8192])
def test_many_rows_on_a_gpu(dtype: torch.dtype, width: int) -> None:
    check(dtype, True, 4096, width * (2 if width < 1000 else 1), width=width)


def test_shapes_that_do_not_fit() -> None:
    x, weight = torch.ones(2, 6, device=DEVICE), torch.ones(4, device=DEVICE)
    with pytest.raises(ValueError, match=r"expected x \[\.\.\., 4\]"):
        rms_norm(x, None, weight, 1e-5)
    with pytest.raises(ValueError, match="gate alike"):
        rms_norm(x[:, :4], x, weight, 1e-5)
