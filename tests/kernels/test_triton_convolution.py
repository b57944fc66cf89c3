"""The fused convolution: in Triton's interpreter where there is no GPU, compiled where there is one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lasp import SequenceLayout, SequenceParallel
from lasp.kernels import convolution as pytorch
from lasp.kernels import triton
from lasp.kernels.convolution import Pieces
from lasp.ops import causal_conv1d
from tests.references import causal_convolution
from tests.support import Inputs, assert_close, poisoned_memory

pytest.importorskip("triton")
from lasp.kernels.triton import convolution as fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
#: Two blocks, a single token, fewer tokens than taps.
LENGTHS = (fused.BLOCK + 2, 1, 2, 3)
#: How many rows stand before each, at most.
BEFORE = (9, 0, 9, 1)


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels for all tensors but float64 ones, in the interpreter where there is no GPU."""
    monkeypatch.setattr(triton, "serves", lambda x: x.dtype != torch.float64)


def results(form, tensors: dict[str, Tensor], silu: bool, pieces: Pieces, dy: Tensor) -> dict[str, Tensor]:
    y = form.forward(**tensors, silu=silu, pieces=pieces)
    grads = form.backward(dy, **tensors, silu=silu, pieces=pieces)
    found = dict(zip(("dx", "dhalo", "dweight", "dbias"), grads, strict=True))
    return {"y": y, **{name: x for name, x in found.items() if x is not None}}


def check(
    dtype: torch.dtype,
    taps: int,
    width: int,
    silu: bool = True,
    biased: bool = True,
    lengths: tuple[int, ...] = LENGTHS,
    before: tuple[int, ...] = BEFORE,
    batch: int = 2,
) -> None:
    pieces = Pieces(lengths, [min(rows, taps - 1) for rows in before], taps - 1)
    x = Inputs(0, dtype)
    tensors = {
        "x": x.normal(batch, sum(lengths), width),
        "halo": x.normal(batch, pieces.halo, width),
        "weight": x.normal(width, taps),
        "bias": x.normal(width) if biased else None,
    }
    dy = x.normal(*tensors["x"].shape)
    here = {name: None if y is None else y.to(DEVICE) for name, y in tensors.items()}
    with poisoned_memory():
        given = results(fused, here, silu, pieces, dy.to(DEVICE))
    wide = {name: None if y is None else y.double() for name, y in tensors.items()}
    want = results(pytorch, wide, silu, pieces, dy.double())
    assert all(y.dtype == dtype for y in given.values())
    assert len(given) == 4 + biased
    assert_close(given, want, TOLERANCE[dtype])


@pytest.mark.parametrize("silu", [True, False], ids=["silu", "none"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("taps", [1, 4])
def test_equals_pytorch(dtype: torch.dtype, taps: int, silu: bool) -> None:
    check(dtype, taps, 19, silu, biased=silu)


@pytest.mark.parametrize(("taps", "width"), [(2, 128), (3, 129), (5, 600), (9, 33), (fused.MOST_TAPS, 3)])
def test_taps_and_widths(taps: int, width: int) -> None:
    check(torch.float32, taps, width, biased=taps != 3, lengths=(35, 1, 6), before=(taps, 0, taps), batch=1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 5, 8, fused.MOST_TAPS])
@pytest.mark.parametrize("width", [5, 256, 2048])
def test_many_tokens_on_a_gpu(dtype: torch.dtype, taps: int, width: int) -> None:
    check(dtype, taps, width, lengths=(4097, 1, 300, *[7] * 50), before=(taps,) * 53)
    check(dtype, taps, width, silu=False, biased=False, lengths=(3000,), before=(0,))


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(("cu_seqlens", "batch"), [(None, 2), ((0, 1, 30, 33, 70), 1)], ids=["one", "packed"])
@pytest.mark.parametrize("taps", [4, fused.MOST_TAPS + 1])
def test_the_op_equals_the_definition(
    activation: str | None, cu_seqlens: tuple[int, ...] | None, batch: int, taps: int
) -> None:
    x = Inputs(0, torch.float32)
    tensors = {"x": x.normal(batch, 70, 6), "weight": x.normal(6, taps), "bias": x.normal(6)}
    dy = x.normal(batch, 70, 6)

    def run(op, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        leaves = {name: y.to(device, dtype).clone().requires_grad_() for name, y in tensors.items()}
        y = op(**leaves, activation=activation, cu_seqlens=cu_seqlens)
        y.backward(dy.to(y))
        return {"y": y} | {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    with poisoned_memory():
        given = run(causal_conv1d, torch.float32, DEVICE)
    assert_close(given, run(causal_convolution, torch.float64, "cpu"), 1e-6)


@pytest.mark.usefixtures("everywhere")
def test_strides_and_addresses_do_not_matter() -> None:
    x = Inputs(0, torch.float32)
    padded, weight, bias = x.normal(1, 12, 33).to(DEVICE), x.normal(33).to(DEVICE)[1:], x.normal(17).to(DEVICE)[1:]
    views = padded[..., 1:17], weight.view(2, 16).t(), bias
    wide = [y.double() for y in views]
    assert_close({"y": causal_conv1d(*views)}, {"y": causal_conv1d(*wide)}, 1e-6)


@pytest.mark.usefixtures("everywhere")
def test_no_tokens() -> None:
    sp = SequenceParallel(None, SequenceLayout.from_ranges([[]]), check=False)
    x, weight = torch.zeros(1, 0, 3, device=DEVICE), torch.ones(3, 4, device=DEVICE, requires_grad=True)
    y = causal_conv1d(x, weight, sp=sp)
    y.sum().backward()
    assert y.shape == x.shape
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fused", "PyTorch"])
def test_a_compiler_takes_it_whole(dtype: torch.dtype) -> None:
    x = Inputs(0, dtype)
    tensors = [y.to(DEVICE) for y in (x.normal(1, 40, 6), x.normal(6, 4), x.normal(6))]
    dy = x.normal(1, 40, 6).to(DEVICE)

    def op(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return causal_conv1d(x, weight, bias, "silu", cu_seqlens=(0, 1, 17, 40)) * 2

    found = []
    for form in (op, torch.compile(op, backend="aot_eager", fullgraph=True)):
        leaves = [y.clone().requires_grad_() for y in tensors]
        y = form(*leaves)
        y.backward(dy)
        found.append([y, *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(eager, compiled) for eager, compiled in zip(*found, strict=True))


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("biased", [True, False])
def test_the_operators_are_what_torch_asks_of_them(biased: bool) -> None:
    sp = SequenceParallel(None, SequenceLayout.contiguous(9, 1, (0, 2, 9)))
    x = Inputs(0, torch.float32)
    inputs = [x.normal(1, 9, 3), x.normal(3, 4), x.normal(3) if biased else None]
    given = [y if y is None else y.to(DEVICE).requires_grad_() for y in inputs]
    torch.library.opcheck(torch.ops.lasp.causal_conv1d, (*given, True, sp.name))
    plain = [y if y is None else y.detach() for y in given]
    halo = plain[0][:, :0].contiguous()
    args = (plain[0], plain[0], halo, *plain[1:], True, sp.name)
    torch.library.opcheck(torch.ops.lasp.causal_conv1d_backward, args)


def test_the_same_bits_again() -> None:
    x, pieces = Inputs(0, torch.float32), Pieces((70,), (0,), 3)
    tensors = {"x": x.normal(1, 70, 6), "halo": x.normal(1, 0, 6), "weight": x.normal(6, 4), "bias": x.normal(6)}
    tensors = {name: y.to(DEVICE) for name, y in tensors.items()}
    first, second = (results(fused, tensors, True, pieces, tensors["x"]) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
