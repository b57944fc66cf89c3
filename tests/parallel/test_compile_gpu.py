"""On a GPU: inductor's graphs compute what eager does, and no layer waits for the device, forward or backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from lasp import SequenceLayout, SequenceParallel
from lasp.ops import softmax_attn
from lasp.ops.linear import start
from tests.lasp.test_compile import afresh, check_model, compiled, model, results, step
from tests.parallel.test_linear import CORRECTED, OPS, inputs
from tests.parallel.test_nccl import _port, _rank
from tests.support import DOCUMENTS, TOKENS, Inputs, assert_close

__all__ = ["afresh"]  # a fixture that all tests here use
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
#: The same kernels on the same numbers; around them inductor sums in another order.
TOLERANCE = 2e-5


def on_gpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.cuda() for name, x in tensors.items()}


@contextmanager
def fake_ranks(layout: SequenceLayout, **options: str) -> Iterator[SequenceParallel]:
    """The first of several ranks of which the others are made up: their collectives do nothing, and wait for nobody."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=layout.world_size, store=FakeStore())
    try:
        yield SequenceParallel(dist.group.WORLD, layout, **options)
    finally:
        dist.destroy_process_group()


@contextmanager
def ranks(world: int) -> Iterator[SequenceParallel]:
    layout = SequenceLayout.zigzag(64 * world, world)
    if world == 1:
        yield SequenceParallel(None, layout)
    else:
        with fake_ranks(layout) as sp:
            yield sp


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever waits for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_waiting_is_seen() -> None:
    x = torch.ones(3, device="cuda")
    with no_waiting(), pytest.raises(RuntimeError, match="synchronizing"):
        x.sum().item()


# -- inductor --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_ops(op: str) -> None:
    function = partial(OPS[op][0], output_final_state=True, cu_seqlens=DOCUMENTS["packed"])
    tensors = on_gpu(inputs(op, "packed", torch.float32, initial=True))
    assert_close(results(compiled(function, "inductor"), tensors), results(function, tensors), TOLERANCE)


def test_unmasked() -> None:
    function = partial(OPS["linear_attn"][0], output_final_state=True, causal=False)
    tensors = on_gpu(inputs("linear_attn", "one", torch.float32, initial=True))
    assert_close(results(compiled(function, "inductor"), tensors), results(function, tensors), TOLERANCE)


def test_the_memory_of_what_was_started() -> None:
    """Inductor's plan of memory knows nothing of what a start keeps: keys that only the graph holds, strided, and busy."""
    x = Inputs(0, torch.float32)
    tensors = on_gpu({name: x.normal(1, 300, 2, 16) for name in "qkv"})

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        k, v = ((y * 2).transpose(1, 2).contiguous().transpose(1, 2) for y in (k, v))
        pending = start(k, v, -(k[..., 0].sigmoid()))
        for _ in range(3):
            q = torch.tanh(q @ q.transpose(-1, -2)) @ q
        o, _ = pending.finish(q)
        return (o.relu(),)

    assert_close(results(compiled(function, "inductor"), tensors), results(function, tensors), TOLERANCE)


@pytest.mark.parametrize("mixer", ["retention", "gla", "gated_delta_net", "kda", "mamba2"])
def test_models(mixer: str) -> None:
    tokens = torch.arange(2 * TOKENS, device="cuda").view(2, TOKENS) * 7 % 31
    net = model(mixer, "LN").float().cuda()
    check_model(net, None, tokens, "inductor", tolerance=1e-4)


def _model_of_two_ranks(world: int) -> None:
    sp = SequenceParallel(dist.group.WORLD, SequenceLayout.zigzag(TOKENS, world, DOCUMENTS["packed"]))
    tokens = torch.arange(TOKENS, device="cuda").view(1, TOKENS) * 7 % 31
    check_model(model("gla", "LN").float().cuda(), sp, tokens, "inductor", tolerance=1e-4)


def test_a_model_of_two_ranks() -> None:
    mp.spawn(_rank, (2, _port(), _model_of_two_ranks), nprocs=2)


# -- no layer waits --------------------------------------------------------------------------------------------------


def op_step(function: Callable, tensors: dict[str, Tensor]) -> Callable[[], None]:
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}

    def run() -> None:
        outputs = function(**leaves)
        outputs = [outputs] if isinstance(outputs, Tensor) else [o for o in outputs if o is not None]
        torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])

    return run


def check_no_waiting(run: Callable[[], None]) -> None:
    """After the first calls, which compile, copy tables and look at decays, nothing waits."""
    for _ in range(2):
        run()
    with no_waiting():
        for _ in range(2):
            run()


@pytest.mark.parametrize("backend", [None, "inductor"])
@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("op", [*OPS, "softmax_attn"])
def test_ops_do_not_wait(op: str, world: int, backend: str | None) -> None:
    with ranks(world) as sp:
        x = Inputs(0, torch.float32)
        tensors = on_gpu({name: x.normal(1, sp.local_tokens, 2, 16).to(torch.bfloat16) for name in "qkv"})
        axes = OPS[op][1] if op in OPS else None
        if axes is not None and op != "retention":  # which has its own
            sizes = {"B": 1, "T": sp.local_tokens, "H": 2, "K": 16}
            tensors["g"] = -x.uniform(*(sizes[axis] for axis in axes.split())).cuda()
        if op in CORRECTED:
            tensors["k"] = torch.nn.functional.normalize(tensors["k"], dim=-1)
            tensors["beta"] = x.uniform(1, sp.local_tokens, 2).cuda()
        if op == "softmax_attn":
            function = partial(softmax_attn, sp=sp)
        else:
            tensors["initial_state"] = x.normal(1, 2, 16, 16).cuda()
            function = partial(OPS[op][0], sp=sp, output_final_state=True)
        check_no_waiting(op_step(function if backend is None else compiled(function, backend), tensors))


@pytest.mark.parametrize("backend", [None, "inductor"])
@pytest.mark.parametrize("again", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("mixer", ["gla", "kda"])
def test_models_do_not_wait(mixer: str, world: int, again: bool, backend: str | None) -> None:
    net = model(mixer, "LLLN", layers=4).float().cuda()
    with ranks(world) as sp:
        tokens = torch.arange(sp.local_tokens, device="cuda").view(1, -1) % 31
        function = step if backend is None else compiled(step, backend)

        def run() -> None:
            with torch.autocast("cuda", torch.bfloat16):
                loss = function(net, tokens, tokens, again, sp)
            loss.backward()

        check_no_waiting(run)
