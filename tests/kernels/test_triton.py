"""Triton's kernels against PyTorch in float64: in Triton's interpreter where there is no GPU, compiled where there is one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from lasp.kernels import Chain, ChunkedDecay, ChunkedDelta, Course, Recurrence, Segments, Summary, Tokens
from lasp.ops.linear import start
from tests.kernels import test_linear_single
from tests.kernels.test_summary import FAMILIES, courses, random_summary
from tests.support import Inputs, assert_close, poisoned_memory, relative_error

pytest.importorskip("triton")
from lasp.kernels.triton import dense_scan, scan
from lasp.kernels.triton.corrected import TritonDelta
from lasp.kernels.triton.key_corrected import TritonKeyDelta
from lasp.kernels.triton.recurrences import TritonHeadDecay, TritonKeyDecay

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
#: Of the gates' gradients, which are float32 as the gates are: nothing on the way to them is rounded to bfloat16.
GATES_TOLERANCE = {**TOLERANCE, torch.bfloat16: 2e-3}
#: By the delta rule.
DELTA_TOLERANCE = {**TOLERANCE, torch.float32: 1e-5, torch.bfloat16: 3e-2}
#: The axes of the log-decays.
DECAYS = {"none": None, "constant": "H", "by token": "B T H", "by key": "B T H K"}
#: The forms of the delta rule, by decay.
DELTAS = {"none": TritonDelta, "by token": TritonDelta, "by key": TritonKeyDelta}

pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    # The decays of pairs that are masked overflow, and are not looked at.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


def results(
    recurrence: Recurrence,
    names: tuple[str, ...],
    segments: Segments,
    q: Tensor,
    tokens: Tokens,
    do: Tensor,
    entry: Tensor,
    exit: Tensor,
) -> dict[str, Tensor]:
    """Everything that a recurrence computes, gates' gradients by name. Transitions are seen beside 1: strong ones underflow."""
    scale, gated = 0.3, bool(tokens.gates)
    given = recurrence.prepare(tokens, segments)
    maps = recurrence.summary(given, segments)
    adjoint = recurrence.adjoint_summary(q, given, do, segments, scale)
    dq, kept = recurrence.query_gradient(q, given, entry, do, segments, scale, gated)
    grads = recurrence.token_gradients(q, given, entry, do, exit, segments, scale, gated, kept)
    found = {
        "A": 1 + maps.A.expand(maps.B.shape[:3] + maps.A.shape[3:]),
        "B": maps.B,
        "adjoint A": 1 + adjoint.A.expand(maps.B.shape[:3] + maps.A.shape[3:]),
        "adjoint B": adjoint.B,
        "o": recurrence.output(q, given, entry, segments, scale),
        "dq": dq,
        "dk": grads.k,
        "dv": grads.v,
    }
    for name, gate, given_gate in zip(names, grads.gates, tokens.gates, strict=True):
        found[name] = gate.sum_to_size(given_gate.shape)
    return found


def check(
    form: type[TritonHeadDecay] | type[TritonKeyDecay] | type[TritonDelta],
    decay: str,
    dtype: torch.dtype,
    lengths: tuple[int, ...],
    strength: float = 0.3,
    gates_tolerance: float | None = None,
    **sizes: int,
) -> None:
    """Every function of a form, on segments of the given lengths, against PyTorch's in float64."""
    x = Inputs(0, dtype)
    B, H, K, V = (sizes[axis] for axis in "BHKV")
    T, n = sum(lengths), len(lengths)
    q, k, v, do = (y.to(DEVICE) for y in (x.normal(B, T, H, w) for w in (K, K, V, V)))
    gates: tuple[Tensor, ...] = ()
    if DECAYS[decay] is not None:
        axes = {"B": B, "T": T, "H": H, "K": K}
        g = -strength * Inputs(1, torch.float32).uniform(*(axes[a] for a in DECAYS[decay].split()))
        if g.dim() > 1:
            # Strong and weak by turns.
            g[:, ::3] *= 1e-3
        gates = (g.to(DEVICE),)
    names = ("dg",) * len(gates)
    tolerance = TOLERANCE
    if issubclass(form, TritonDelta):
        # Keys of length 1 and beta up to 2: some eigenvalues are negative, none is above 1. One token corrects nothing.
        beta = 2 * Inputs(3, torch.float32).uniform(B, T, H)
        beta[:, 3] = 0
        k, gates, names = torch.nn.functional.normalize(k, dim=-1), (*gates, beta.to(DEVICE)), (*names, "dbeta")
        # Corrections are made of one another: with eigenvalues near −1 nothing that was rounded is forgotten.
        tolerance = DELTA_TOLERANCE
    given_states = Inputs(2, torch.float32)
    entry, exit = (given_states.normal(B, n, H, K, V).to(DEVICE) for _ in range(2))
    longest = max(lengths)
    with poisoned_memory():
        given = results(form(longest), names, Segments(lengths, longest), q, Tokens(k, v, gates), do, entry, exit)
    wide = [y.double() for y in (q, k, v, do, entry, exit)]
    size = 1 << (longest - 1).bit_length()
    want = results(
        ChunkedDelta(size) if issubclass(form, TritonDelta) else ChunkedDecay(size),
        names,
        Segments(lengths, size),
        wide[0],
        Tokens(wide[1], wide[2], tuple(g.double() for g in gates)),
        *wide[3:],
    )
    if not issubclass(form, TritonDelta) and gates:
        assert relative_error(given.pop("dg"), want.pop("dg")) <= (gates_tolerance or GATES_TOLERANCE[dtype])
    assert_close(given, want, tolerance[dtype])


@pytest.mark.parametrize("decay", ["none", "constant", "by token"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_one_number_a_head(decay: str, dtype: torch.dtype) -> None:
    check(TritonHeadDecay, decay, dtype, (40, 1, 23), B=2, H=3, K=16, V=24)


@pytest.mark.parametrize("decay", ["constant", "by token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_strong_number_a_head(decay: str, dtype: torch.dtype) -> None:
    # A constant decay's gradient is a sum over all tokens of what little a strong one lets through.
    tolerance = 2e-5 if decay == "constant" and dtype == torch.float32 else None
    check(TritonHeadDecay, decay, dtype, (35, 20), 30, tolerance, B=1, H=2, K=16, V=16)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("strength", [0.3, 30])
def test_one_number_a_key(dtype: torch.dtype, strength: float) -> None:
    check(TritonKeyDecay, "by key", dtype, (40, 1, 23), strength, B=2, H=3, K=16, V=24)


@pytest.mark.parametrize("decay", ["by token", "by key"])
@pytest.mark.parametrize(("K", "V"), [(16, 16), (20, 72), (128, 16), (16, 256), (256, 256)])
def test_widths(K: int, V: int, decay: str) -> None:
    form = TritonKeyDecay if decay == "by key" else TritonHeadDecay
    check(form, decay, torch.float32, (33,), B=1, H=1, K=K, V=V)


@pytest.mark.parametrize("decay", ["constant", "by token", "by key"])
@pytest.mark.parametrize(("K", "V"), [(32, 256), (256, 64)])
def test_wide_bfloat16(K: int, V: int, decay: str) -> None:
    form = TritonKeyDecay if decay == "by key" else TritonHeadDecay
    check(form, decay, torch.bfloat16, (150,), B=1, H=1, K=K, V=V)


@pytest.mark.parametrize("decay", DELTAS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("strength", [0.3, 30])
def test_delta_rule(decay: str, dtype: torch.dtype, strength: float) -> None:
    check(DELTAS[decay], decay, dtype, (70, 1, 23), strength, B=1, H=2, K=16, V=24)


@pytest.mark.parametrize(("K", "V"), [(20, 72), (128, 16), (16, 256), (256, 256)])
@pytest.mark.parametrize("decay", ["by token", "by key"])
def test_delta_rule_widths(K: int, V: int, decay: str) -> None:
    check(DELTAS[decay], decay, torch.float32, (33,), B=1, H=1, K=K, V=V)


@pytest.mark.parametrize(("K", "V"), [(128, 128), (256, 64), (64, 256)])
@pytest.mark.parametrize("decay", DELTAS)
def test_delta_rule_wide_bfloat16(K: int, V: int, decay: str) -> None:
    check(DELTAS[decay], decay, torch.bfloat16, (150,), B=1, H=1, K=K, V=V)


def test_delta_rule_of_keys_all_alike() -> None:
    """What powers of the chunk's system would make of it is thousands of times the result."""
    k = torch.nn.functional.normalize(torch.ones(1, 64, 1, 16), dim=-1).to(DEVICE)
    v, entry = Inputs(0, torch.float32).normal(1, 64, 1, 16).to(DEVICE), torch.zeros(1, 1, 1, 16, 16, device=DEVICE)
    beta = torch.full((1, 64, 1), 1.99, device=DEVICE)
    segments = Segments((64,), 64)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
        tokens = Tokens(k.to(dtype), v.to(dtype), (beta,))
        form, want = TritonDelta(64), ChunkedDelta(64)
        given = form.output(tokens.k, form.prepare(tokens, segments), entry, segments, 1.0)
        wide = Tokens(tokens.k.double(), tokens.v.double(), (beta.double(),))
        assert relative_error(given, want.output(wide.k, wide, entry.double(), segments, 1.0)) < tolerance


@given(course=courses())
@settings(max_examples=20, deadline=None)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seeded", [True, False])
def test_courses(family: str, seeded: bool, course: tuple) -> None:
    chains, runs, wanted = course
    maps = random_summary(family, sum(len(chain.members) for chain in chains), dtype=torch.float32)
    maps = Summary(maps.A.to(DEVICE), maps.B.to(DEVICE))
    seeds = Inputs(1, torch.float32).normal(maps.B.shape[0], 3, *maps.B.shape[2:]).to(DEVICE) if seeded else None
    built, form = Course(chains, runs, wanted), dense_scan if family == "dense" else scan
    host = Summary(maps.A.double().cpu(), maps.B.double().cpu())
    wide = None if seeds is None else seeds.double().cpu()
    entering = Inputs(2, torch.float32).normal(maps.B.shape[0], runs, *maps.B.shape[2:])
    with poisoned_memory():
        ours = form.leaving(built, maps, seeds)
        entered = form.states(built, maps, seeds, entering.to(DEVICE))
        from_nothing = form.states(built, maps, seeds, None)
        begun = dense_scan.ahead(built, maps, seeds) if family == "dense" else built.ahead(maps, seeds)
        later = begun.states(entering.to(DEVICE))
    theirs = built.leaving(host, wide)
    assert relative_error(ours.A, theirs.A) < 1e-6
    assert relative_error(ours.B, theirs.B) < 1e-6
    assert relative_error(ours.pack(), theirs.pack()) < 1e-6
    assert relative_error(entered, built.states(host, wide, entering.double())) < 1e-6
    assert relative_error(later, built.states(host, wide, entering.double())) < 1e-6
    assert relative_error(from_nothing, built.states(host, wide, None)) < 1e-6


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("count", [1, 3, 9])
def test_dense_maps_compose(count: int) -> None:
    """Packed or not, and in the same bits whatever a program allows products of float32 to be."""
    first, then = (random_summary("dense", count, seed=seed, dtype=torch.float32) for seed in (0, 1))
    packed = first.empty(count)
    packed.A.copy_(first.A)
    packed.B.copy_(first.B)
    wide = Summary(first.A.double(), first.B.double()), Summary(then.A.double(), then.B.double())
    want = wide[0].compose(wide[1])
    first, packed, then = (Summary(x.A.to(DEVICE), x.B.to(DEVICE)) for x in (first, packed, then))
    for before in (first, packed):
        with poisoned_memory():
            given = before.compose(then)
            left = then.apply(before.B)
        assert relative_error(given.A, want.A) < 1e-6
        assert relative_error(given.B, want.B) < 1e-6
        assert relative_error(given.pack(), want.pack()) < 1e-6
        assert relative_error(left, wide[1].apply(wide[0].B)) < 1e-6


def test_a_long_chain_of_dense_maps_loses_nothing() -> None:
    """256 transitions with eigenvalues between −1 and 1, as of keys of length 1 and beta up to 2."""
    x, n, K = Inputs(0, torch.float64), 256, 32
    k = torch.nn.functional.normalize(x.normal(1, n, 2, K), dim=-1)
    A = torch.eye(K, dtype=torch.float64) - (2 * x.uniform(1, n, 2, 1, 1)) * k.unsqueeze(-1) * k.unsqueeze(-2)
    maps = Summary(A, x.normal(1, n, 2, K, 16))
    course = Course([Chain(tuple(range(n)))], 1)
    narrow = Summary(maps.A.float().to(DEVICE), maps.B.float().to(DEVICE))
    want, entering = course.leaving(maps, None), x.normal(1, 1, 2, K, 16)
    given = dense_scan.leaving(course, narrow, None)
    assert relative_error(given.A, want.A) < 1e-5
    assert relative_error(given.B, want.B) < 1e-5
    states = dense_scan.states(course, narrow, None, entering.float().to(DEVICE))
    assert relative_error(states, course.states(maps, None, entering)) < 1e-5
    pairs = narrow
    while pairs.count > 1:
        first, then = (Summary(pairs.A[:, i::2], pairs.B[:, i::2]) for i in (0, 1))
        pairs = dense_scan.compose(first, then)
    assert relative_error(pairs.A, want.A) < 1e-5
    assert relative_error(pairs.B, want.B) < 1e-5
    on_cpu = course.leaving(Summary(maps.A.float(), maps.B.float()), None)
    assert relative_error(on_cpu.B, want.B) < 1e-5


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels for all tensors but float64 ones, in the interpreter where there is no GPU."""
    monkeypatch.setattr("lasp.kernels.triton.serves", lambda x: x.dtype != torch.float64)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("decay", test_linear_single.DECAYS)
@pytest.mark.parametrize("causal", [True, False], ids=["masked", "unmasked"])
@pytest.mark.parametrize(("cu_seqlens", "batch"), [(None, 2), ((0, 1, 30, 70), 1)], ids=["one", "packed"])
@pytest.mark.parametrize("corrected", test_linear_single.RULES, ids=["sum", "delta"])
def test_the_ops_equal_the_definition(
    decay: str, causal: bool, cu_seqlens: tuple[int, ...] | None, batch: int, corrected: bool
) -> None:
    """Segments composed, documents, initial and final states, padded widths, grouped heads."""
    sizes = {"B": batch, "T": 70, "H": 2, "K": 5, "V": 7, "groups": 2 if corrected else 1}
    test_linear_single.check(decay, "mixed", torch.float32, cu_seqlens, causal, DEVICE, corrected=corrected, **sizes)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("decay", test_linear_single.DECAYS)
def test_one_document_from_nothing(decay: str) -> None:
    """Nothing enters the run: its states are read as they were composed."""
    x = Inputs(0, torch.float32)
    q, k, v = (x.normal(1, 70, 2, 8).to(DEVICE) for _ in range(3))
    g = test_linear_single.log_decay(x, decay, "mixed", {"B": 1, "T": 70, "H": 2, "K": 8})
    g = None if g is None else g.to(DEVICE)
    o, _ = start(k, v, g).finish(q)
    wide = [None if y is None else y.double() for y in (k, v, g)]
    expected, _ = start(*wide).finish(q.double())
    assert_close({"o": o}, {"o": expected}, 2e-6)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("decay", test_linear_single.DECAYS)
def test_nothing_derived_from_the_gates_is_kept(decay: str) -> None:
    """Running sums of a decay a key dimension would be twice the keys and values in bfloat16."""
    x = Inputs(0, torch.float32)
    q, k, v = (x.normal(1, 70, 2, 8).to(DEVICE).requires_grad_() for _ in range(3))
    g = test_linear_single.log_decay(x, decay, "weak", {"B": 1, "T": 70, "H": 2, "K": 8})
    inputs = [q, k, v] if g is None else [q, k, v, g.to(DEVICE).requires_grad_()]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        start(*inputs[1:]).finish(q)
    kept_states = [t for t in kept if t.dim() == 5]
    assert sorted(t.numel() for t in kept if t.dim() < 5) == sorted(t.numel() for t in inputs)
    assert len(kept_states) <= 1
