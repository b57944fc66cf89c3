"""The chunked form on one rank: every family against the token-by-token definition, gradients included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lasp.kernels import ChunkedDecay
from lasp.kernels.reference import recurrent
from lasp.ops.linear import start
from tests.support import Inputs, assert_close, poisoned_memory

DECAYS = ("none", "H", "B T H", "B T H K")
#: Whether the state is corrected, by the delta rule.
RULES = (False, True)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def log_decay(x: Inputs, decay: str, strength: str, sizes: dict[str, int]) -> Tensor | None:
    """A log-decay with the named axes: weak, strong (−20 a token), or strong and weak by turns."""
    if decay == "none":
        return None
    shape = [sizes[axis] for axis in decay.split()]
    weak, turns = -0.3 * x.uniform(*shape), x.uniform(*shape) < 0.5
    strong = torch.full_like(weak, -20.0)
    return {"weak": weak, "strong": strong, "mixed": torch.where(turns, strong, weak)}[strength]


def results(fast: bool, tensors: dict[str, Tensor], cotangents: tuple[Tensor, Tensor], **options) -> dict[str, Tensor]:
    """Output, final state and every gradient, by the fast form or by the definition."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    q, k, v = leaves["q"], leaves["k"], leaves["v"]
    g, beta, initial = leaves.get("g"), leaves.get("beta"), leaves.get("initial_state")
    if fast:
        pending = start(
            k, v, g, beta, initial_state=initial, cu_seqlens=options["cu_seqlens"], causal=options["causal"]
        )
        o, final = pending.finish(q, output_final_state=True)
        assert final is not None
    else:
        if initial is not None:
            initial = initial.unflatten(0, (k.shape[0], -1))
        o, final = recurrent(q, k, v, g, beta, initial_state=initial, **options)
        final = final.flatten(0, 1)
    ((o * cotangents[0]).sum() + (final * cotangents[1]).sum()).backward()
    gradients = {f"d{name}": x.grad for name, x in leaves.items() if x.grad is not None}
    assert len(gradients) == len(leaves)
    return {"o": o, "final_state": final, **gradients}


def check(
    decay: str,
    strength: str,
    dtype: torch.dtype,
    cu_seqlens: tuple[int, ...] | None,
    causal: bool,
    device: str = "cpu",
    cancelling: bool = False,
    corrected: bool = False,
    groups: int = 1,
    **sizes: int,
) -> None:
    """`cancelling`: what the tokens give to the gradient of a decay that they share may sum to nothing.

    `corrected`: by the delta rule. `groups`: how many heads of the values there are to one of the queries and keys.
    """
    x = Inputs(0, dtype)
    B, T, H, K, V = (sizes[axis] for axis in "BTHKV")
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    tensors = {"q": x.normal(B, T, H // groups, K), "k": x.normal(B, T, H // groups, K), "v": x.normal(B, T, H, V)}
    if corrected:
        # Keys of length 1 and beta up to 2: some eigenvalues are negative, none is above 1.
        tensors["k"] = torch.nn.functional.normalize(tensors["k"], dim=-1)
        tensors["beta"] = 2 * x.uniform(B, T, H)
    g = log_decay(x, decay, strength, sizes)
    if g is not None:
        tensors["g"] = g
    tensors["initial_state"] = x.normal(N, H, K, V)
    cotangents = x.normal(B, T, H, V), x.normal(N, H, K, V)
    options = {"cu_seqlens": cu_seqlens, "causal": causal}
    with poisoned_memory():
        there = {name: y.to(device) for name, y in tensors.items()}
        given = results(True, there, (cotangents[0].to(device), cotangents[1].to(device)), **options)
    expected = results(False, tensors, cotangents, **options)
    if cancelling and decay == "H":
        assert g is not None
        by_token = results(False, tensors | {"g": g.expand(B, T, H)}, cotangents, **options)["dg"]
        # The error is seen beside all that was summed.
        summed = by_token.abs().sum((0, 1))
        given["dg"], expected["dg"] = (torch.cat([d.cpu(), summed]) for d in (given["dg"], expected["dg"]))
    if corrected:
        # What a state has forgotten is seen beside what it was.
        given["dinitial_state"], expected["dinitial_state"] = (
            torch.cat([x["dinitial_state"].cpu(), cotangents[1]]) for x in (given, expected)
        )
    assert_close(given, expected, TOLERANCE[dtype] * (10 if corrected else 1))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("strength", ["weak", "strong", "mixed"])
@pytest.mark.parametrize("causal", [True, False], ids=["masked", "unmasked"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("corrected", RULES, ids=["sum", "delta"])
def test_equals_the_definition(decay: str, strength: str, causal: bool, dtype: torch.dtype, corrected: bool) -> None:
    if decay == "none" and strength != "weak":
        return
    for cu_seqlens, batch in ((None, 2), ((0, 1, 66, 140), 1)):
        check(decay, strength, dtype, cu_seqlens, causal, corrected=corrected, B=batch, T=140, H=2, K=5, V=7)
    check(decay, strength, dtype, None, causal, corrected=corrected, groups=3, B=2, T=70, H=6, K=5, V=3)


@pytest.mark.parametrize("decay", DECAYS)
@given(
    length=st.integers(1, 70),
    cuts=st.sets(st.integers(1, 69), max_size=5),
    heads=st.integers(1, 3),
    widths=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    causal=st.booleans(),
    corrected=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_any_lengths_and_widths(
    decay: str, length: int, cuts: set[int], heads: int, widths: tuple[int, int], causal: bool, corrected: bool
) -> None:
    cu_seqlens = (0, *sorted(c for c in cuts if c < length), length)
    K, V = widths
    sizes = {"B": 1, "T": length, "H": heads, "K": K, "V": V}
    check(decay, "weak", torch.float64, cu_seqlens, causal, cancelling=True, corrected=corrected, **sizes)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("corrected", RULES, ids=["sum", "delta"])
def test_a_changed_future_token_moves_nothing_earlier(decay: str, corrected: bool) -> None:
    T, changed = 140, 77
    x = Inputs(0, torch.float64)
    sizes = {"B": 1, "T": T, "H": 2, "K": 4}
    q, k, v = (x.normal(1, T, 2, 4) for _ in range(3))
    g = log_decay(x, decay, "weak", sizes)
    beta = x.uniform(1, T, 2) if corrected else None
    before, _ = start(k, v, g, beta, use_qk_l2norm_in_kernel=True).finish(q)
    k, v, q = (y.index_fill(1, torch.tensor([changed]), 9.0) for y in (k, v, q))
    if g is not None and g.dim() > 1:
        g = g.index_fill(1, torch.tensor([changed]), -3.0)
    beta = None if beta is None else beta.index_fill(1, torch.tensor([changed]), 1.5)
    after, _ = start(k, v, g, beta, use_qk_l2norm_in_kernel=True).finish(q)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.equal(before[:, changed:], after[:, changed:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_inputs_accumulate_in_float32(dtype: torch.dtype) -> None:
    x = Inputs(0, dtype)
    q, k, v = (x.normal(1, 300, 2, 8) for _ in range(3))
    g = -0.1 * x.uniform(1, 300, 2, 8)
    o, final = start(k, v, g).finish(q, output_final_state=True)
    expected, expected_final = recurrent(q, k, v, g)
    assert o.dtype == dtype
    assert final is not None
    assert final.dtype == torch.float32
    # The state sees no rounding but the inputs' own; the output is rounded once.
    assert_close({"final_state": final}, {"final_state": expected_final.flatten(0, 1)}, 1e-5)
    assert_close({"o": o}, {"o": expected}, {torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype])


@pytest.mark.parametrize("decay", DECAYS)
def test_autocast_rounds_no_state(decay: str) -> None:
    x = Inputs(0, torch.bfloat16)
    q, k, v = (x.normal(1, 300, 2, 8).requires_grad_() for _ in range(3))
    g = log_decay(x, decay, "weak", {"B": 1, "T": 300, "H": 2, "K": 8})
    both = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            o, final = start(k, v, g).finish(q, output_final_state=True)
        assert final is not None
        both.append((o, final, *torch.autograd.grad(o.float().sum() + final.sum(), (q, k, v))))
    for without, within in zip(*both, strict=True):
        assert torch.equal(without, within)


@pytest.mark.parametrize(("K", "V", "states"), [(8, 8, True), (128, 256, False)])
def test_the_states_kept_are_never_more_than_keys_and_values(K: int, V: int, states: bool) -> None:
    """Besides the inputs only states wait for the backward pass, and not if they are the larger part."""
    kept: list[int] = []
    x = Inputs(0, torch.float32)
    q, k, v = (x.normal(1, 1024, 2, width).requires_grad_() for width in (K, K, V))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        start(k, v).finish(q)
    inputs = [x.numel() for x in (q, k, v)]
    assert sorted(kept) == sorted([*inputs, *([1024 // ChunkedDecay().segment_size * 2 * K * V] if states else [])])


@pytest.mark.parametrize("corrected", RULES)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_one_token(decay: str, corrected: bool, causal: bool, groups: int) -> None:
    """As one is decoded: nothing is cut into segments."""
    sizes = {"B": 3, "T": 1, "H": 4, "K": 5, "V": 7}
    for dtype in TOLERANCE:
        check(decay, "mixed", dtype, None, causal, corrected=corrected, groups=groups, **sizes)
