"""A compiled graph without breaks computes what eager does: ops, layers, models, with activation checkpointing too."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lasp import SequenceLayout, SequenceParallel
from lasp.kernels import ChunkedDecay, Tokens
from lasp.layers.linear import MIXERS
from lasp.models import LinearLlama3
from lasp.models.config import LinearLlama3Config
from lasp.ops import softmax_attn
from lasp.ops.linear import linear_attn, retention, simple_gla
from lasp.parallel import operators
from tests.parallel.test_linear import OPS, inputs
from tests.support import DOCUMENTS, TOKENS, Inputs, assert_close

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
#: The documents, whether they start from a state, whether they are masked.
CASES = {
    "from nothing": ("one", False, True),
    "from a state": ("one", True, True),
    "packed": ("packed", True, True),
    "unmasked": ("packed", True, False),
}


@pytest.fixture(autouse=True)
def afresh() -> None:
    torch._dynamo.reset()


def compiled(function: Callable, backend: str = "aot_eager") -> Callable:
    return torch.compile(function, fullgraph=True, backend=backend)


def results(function: Callable, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs and the gradients of all inputs, for cotangents that are not all alike."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    outputs = [o for o in function(**leaves) if o is not None]
    x = Inputs(7, torch.float64)
    torch.autograd.backward(outputs, [x.normal(*o.shape).to(o) for o in outputs])
    assert all(leaf.grad is not None for leaf in leaves.values())
    return {str(i): o.detach() for i, o in enumerate(outputs)} | {f"d{n}": leaf.grad for n, leaf in leaves.items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("op", OPS)
def test_ops(op: str, case: str) -> None:
    documents, initial, causal = CASES[case]
    options = {"causal": causal, "output_final_state": initial, "cu_seqlens": DOCUMENTS[documents]}
    function = partial(OPS[op][0], **options)
    tensors = inputs(op, documents, torch.float64, initial)
    assert_close(results(compiled(function), tensors), results(function, tensors), TOLERANCE[torch.float64])


def test_the_same_call_twice() -> None:
    """A compiler that finds two starts alike must not make them one: each is finished once."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return linear_attn(q, k, v)[0], linear_attn(q * 2, k, v)[0]

    tensors = inputs("linear_attn", "one", torch.float64, initial=False)
    assert_close(results(compiled(function), tensors), results(function, tensors), 1e-12)
    assert not operators._started


def test_another_length_and_other_ranks_are_another_graph() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, sp: SequenceParallel | None = None) -> tuple[Tensor, ...]:
        return (retention(q, k, v, sp=sp)[0],)

    graph = compiled(function)
    for tokens in (5, 9, 5, 70):
        x = Inputs(0, torch.float64)
        tensors = {name: x.normal(2, tokens, 2, 4) for name in "qkv"}
        assert_close(results(graph, tensors), results(function, tensors), 1e-12)
    tensors = inputs("retention", "packed", torch.float64, initial=False)
    tensors.pop("g")
    for cu_seqlens in ((0, TOKENS), (0, 4, TOKENS), (0, 30, TOKENS)):
        for _ in range(2):  # equal ranks made anew need no other graph
            sp = SequenceParallel(None, SequenceLayout.contiguous(TOKENS, 1, cu_seqlens))
            given, want = (results(partial(f, sp=sp), tensors) for f in (graph, function))
            assert_close(given, want, 1e-12)


def test_names() -> None:
    """Equal ranks share a name, which finds one of them for as long as any is alive; a kept one stays."""
    layouts = [SequenceLayout.contiguous(17, 1, (0, n, 17)) for n in (5, 5, 6)]
    first, second, other = (SequenceParallel(None, layout) for layout in layouts)
    assert first.name == second.name != other.name
    assert SequenceParallel.named(first.name) is first
    name = second.name
    del first
    assert SequenceParallel.named(name).layout == second.layout
    operators.keep(name)
    del second
    assert SequenceParallel.named(name).layout == layouts[0]
    with pytest.raises(KeyError):
        SequenceParallel.named("nobody")


def test_documents_given_as_a_tensor() -> None:
    q, k, v = inputs("linear_attn", "packed", torch.float64, initial=False).values()
    with pytest.raises(Exception, match="pass a tuple of integers, or a layout under sp="):
        compiled(linear_attn)(q, k, v, cu_seqlens=torch.tensor(DOCUMENTS["packed"]))


@pytest.mark.parametrize("options", [{}, {"window": 5}, {"causal": False}], ids=str)
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_softmax(documents: str, options: dict) -> None:
    x = Inputs(0, torch.float64)
    tensors = {name: x.normal(1, TOKENS, heads, 4) for name, heads in (("q", 4), ("k", 2), ("v", 2))}

    def function(**tensors: Tensor) -> tuple[Tensor, ...]:
        return (softmax_attn(**tensors, cu_seqlens=DOCUMENTS[documents], **options),)

    assert_close(results(compiled(function), tensors), results(function, tensors), 1e-12)


@pytest.mark.parametrize("gates", [None, "B T H K"])
def test_operators(gates: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own checks: the schemas, the shapes of fakes, the registration of gradients."""
    op = "linear_attn" if gates is None else "gla"
    tensors = inputs(op, "packed", torch.float32, initial=True)
    q, k, v, *g, state = (x.requires_grad_() for x in tensors.values())
    state = state.unflatten(0, (1, -1)).detach().requires_grad_()
    sp = SequenceParallel(None, SequenceLayout.contiguous(TOKENS, 1, DOCUMENTS["packed"]))
    lasp = torch.ops.lasp
    for size in (8, 64):
        recurrence = operators.name_of(ChunkedDecay(size))
        begin = (k.detach(), v.detach(), [x.detach() for x in g], state.detach(), recurrence, sp.name, "0")
        schema_and_shapes = ("test_schema", "test_faketensor")
        torch.library.opcheck(lasp.linear_start.default, begin, test_utils=schema_and_shapes)
        ticket = lasp.linear_start(*begin)

        class Again(dict):
            """A ticket is for one finish; here there are many."""

            def pop(self, _ticket: int, begin: tuple = begin) -> tuple:
                lasp.linear_start(*begin)
                return self.popitem()[1]

        monkeypatch.setattr(operators, "_started", Again())
        end = (ticket, q, k, v, g, state, recurrence, sp.name, 0.3, True)
        torch.library.opcheck(lasp.linear_finish.default, end)
        with torch.no_grad():
            o, final, states = lasp.linear_finish(*end)
            back = (q, k, v, g, state, states, o, final, recurrence, sp.name, 0.3, bool(g))
            torch.library.opcheck(lasp.linear_backward.default, back, test_utils=schema_and_shapes)
    torch.library.opcheck(lasp.sum_over_ranks.default, (q, sp.name))
    torch.library.opcheck(lasp.softmax.default, (q, k, q, sp.name, 0, 7, 0.3))


def test_a_copy_of_what_was_started_is_looked_at_again() -> None:
    """Between start and finish a compiler may use the memory of start's arguments for something else."""
    tensors = inputs("gla", "packed", torch.float64, initial=False)
    q, k, v, g = tensors.values()
    sp = SequenceParallel(None, SequenceLayout.contiguous(TOKENS, 1, DOCUMENTS["packed"]))
    recurrence = operators.name_of(ChunkedDecay())
    copies = k.clone(), v.clone(), [g.clone()]
    ticket = torch.ops.lasp.linear_start(*copies, None, recurrence, sp.name, "0")
    for x in (copies[0], copies[1], *copies[2]):
        x.fill_(torch.nan)
    o, _, _ = torch.ops.lasp.linear_finish(ticket, q, k, v, [g], None, recurrence, sp.name, 1.0, False)
    want, _ = operators.passes.forward(
        operators.passes.start(ChunkedDecay(), Tokens(k, v, (g,)), None, sp), q, 1.0, False
    )[:2]
    assert torch.equal(o, want)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_the_form_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels in its interpreter, with widths that must be padded."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: tests/parallel/test_compile_gpu.py")
    monkeypatch.setattr("lasp.kernels.triton.serves", lambda x: x.dtype != torch.float64)
    tensors = inputs("simple_gla", "packed", torch.float32, initial=True)
    function = partial(simple_gla, output_final_state=True, cu_seqlens=DOCUMENTS["packed"])
    assert_close(results(compiled(function), tensors), results(function, tensors), TOLERANCE[torch.float32])


# -- models ----------------------------------------------------------------------------------------------------------


def model(mixer: str, pattern: str = "L", conv_size: int = 0, layers: int = 2) -> LinearLlama3:
    """Alike wherever it is made."""
    torch.manual_seed(0)
    config = LinearLlama3Config(
        vocabulary=31,
        hidden=16,
        layers=layers,
        heads=2,
        intermediate=24,
        mixer=mixer,
        pattern=pattern,
        conv_size=conv_size,
    )
    return LinearLlama3(config).double()


def step(net: LinearLlama3, tokens: Tensor, targets: Tensor, again: bool, sp: SequenceParallel | None = None) -> Tensor:
    """The sum of the cross entropies; with activation checkpointing of each block if `again`."""
    x = net.embedding(tokens)
    for block in net.blocks:
        x = checkpoint(block, x, sp, use_reentrant=False) if again else block(x, sp=sp)
    return F.cross_entropy(net.head(net.norm(x)).flatten(0, 1), targets.flatten(), reduction="sum")


def check_model(
    net: LinearLlama3,
    sp: SequenceParallel | None,
    tokens: Tensor,
    backend: str = "aot_eager",
    tolerance: float = 1e-10,
    plain: bool = True,
) -> None:
    """Loss and gradients: eager, checkpointed, compiled with checkpointing, and if `plain` without."""
    targets = tokens.roll(-1, 1)
    if sp is not None:
        tokens, targets = (sp.layout.shard(x, sp.rank) for x in (tokens, targets))
    found = []
    for wrap in (lambda f: f, partial(compiled, backend=backend)):
        for again in (False, True) if plain or not found else (True,):
            torch._dynamo.reset()
            net.zero_grad()
            loss = wrap(step)(net, tokens, targets, again, sp)
            loss.backward()
            grads = {name: p.grad for name, p in net.named_parameters()}
            assert all(grad is not None for grad in grads.values())
            found.append({"loss": loss.detach()} | {n: g.clone() for n, g in grads.items() if g is not None})
    for other in found[1:]:
        assert_close(other, found[0], tolerance)


@pytest.mark.parametrize("mixer", MIXERS)
def test_models(mixer: str) -> None:
    net = model(mixer, "LN" if mixer == "gla" else "L", conv_size=4 if mixer == "simple_gla" else 0)
    check_model(net, None, torch.arange(2 * TOKENS).view(2, TOKENS) * 7 % 31, plain=mixer == "gla")
