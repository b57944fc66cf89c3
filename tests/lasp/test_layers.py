"""The layers: feature maps, norms, positions, and every mixer on 1, 2 and 4 ranks against one."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lasp import SequenceLayout, SequenceParallel
from lasp.kernels.reference import recurrent
from lasp.layers import (
    FEATURE_MAPS,
    HGRN2,
    MIXERS,
    GatedLinearAttention,
    GatedRMSNorm,
    RMSNorm,
    SoftmaxAttention,
    feature_map,
    mixer_type,
    rotate,
)
from lasp.layers.passage import Passage
from lasp.parallel.exchange import EXCHANGES
from tests.support import DOCUMENTS, LAYOUTS, TOKENS, Inputs, assert_close, dealt, relative_error, sum_over_ranks

HIDDEN, HEADS = 16, 2
LAYERS = {**MIXERS, "softmax": SoftmaxAttention}


def layer(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    if name != "softmax":
        options |= {"layer_idx": 1, "num_layers": 4, "conv_size": 4}
    return LAYERS[name](HIDDEN, HEADS, **options).double()


def results(module: nn.Module, x: Tensor, dy: Tensor, **sequence) -> dict[str, Tensor]:
    """The output, the gradient of the input, and those of all parameters."""
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = module(x, **sequence)
    y.backward(dy)
    assert x.grad is not None
    grads = {f"d{name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert len(grads) == len(list(module.parameters()))
    return {"y": y.detach(), "dx": x.grad} | {name: g.clone() for name, g in grads.items()}


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("name", LAYERS)
def test_the_same_on_all_ranks(groups: dict[int, dist.ProcessGroup], name: str, documents: str) -> None:
    module = layer(name)
    x = Inputs(0, torch.float64)
    whole, dy = x.normal(1, TOKENS, HIDDEN), x.normal(1, TOKENS, HIDDEN)
    want = results(module, whole, dy, cu_seqlens=DOCUMENTS[documents])
    for world in (1, 2, 4):
        for build in dealt(LAYOUTS.values(), world):
            sp = SequenceParallel(groups[world], build(TOKENS, world, DOCUMENTS[documents]))
            given = results(module, sp.layout.shard(whole, sp.rank), sp.layout.shard(dy, sp.rank), sp=sp)
            for key in given:
                if key not in ("y", "dx"):
                    given[key] = sum_over_ranks(given[key], sp.group)
            expected = {key: sp.layout.shard(y, sp.rank) if key in ("y", "dx") else y for key, y in want.items()}
            assert_close(given, expected, 1e-9)


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("name", MIXERS)
def test_queries_and_gate_are_projected_while_the_states_travel(
    groups: dict[int, dist.ProcessGroup], monkeypatch: pytest.MonkeyPatch, name: str, exchange: str
) -> None:
    module, told = layer(name), []
    sp = SequenceParallel(groups[4], SequenceLayout.contiguous(TOKENS, 4), exchange=exchange, nodes=(0, 0, 1, 1))
    start = sp.exchange.start

    def started(*given):
        told.append("start")
        running = start(*given)
        wait = running.wait
        monkeypatch.setattr(running, "wait", lambda: (told.append("wait"), wait())[1], raising=False)
        return running

    monkeypatch.setattr(sp.exchange, "start", started)
    module.q_proj.register_forward_hook(lambda *_: told.append("queries"))
    if module.gate_proj is not None:
        module.gate_proj.register_forward_hook(lambda *_: told.append("gate"))
    module(torch.ones(1, sp.local_tokens, HIDDEN, dtype=torch.float64), sp=sp)
    gate = [] if module.gate_proj is None else ["gate"]
    assert told == ["start", "queries", *gate, "wait"]


@pytest.mark.parametrize("name", LAYERS)
def test_future_and_other_documents_do_not_matter(name: str) -> None:
    module, bounds = layer(name), (0, 9, 20)
    whole = Inputs(1, torch.float64).normal(1, 20, HIDDEN)
    before = module(whole, cu_seqlens=bounds)
    for changed in (4, 9, 15):
        moved = whole.clone()
        moved[:, changed] *= -1
        after = module(moved, cu_seqlens=bounds)
        end = next(c for c in bounds if c > changed)
        assert torch.equal(before[:, :changed], after[:, :changed])
        assert torch.equal(before[:, end:], after[:, end:])
        assert not torch.equal(before[:, changed], after[:, changed])


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_every_mixer_takes_every_feature_map(name: str) -> None:
    x = Inputs(2, torch.float32).normal(2, 11, HIDDEN)
    for mixer in MIXERS:
        if (mixer, name) == ("hgrn2", "taylor"):
            with pytest.raises(ValueError, match="hgrn2: its keys follow from the decay"):
                HGRN2(HIDDEN, HEADS, feature_map=name)
        else:
            y = mixer_type(mixer)(HIDDEN, HEADS, feature_map=name)(x)
            assert y.shape == x.shape
            assert torch.isfinite(y).all()


def test_taylor_is_exp_to_the_second_order() -> None:
    x = Inputs(3, torch.float64)
    q, k = 0.1 * x.normal(50, 16), 0.1 * x.normal(50, 16)
    s = (q * k).sum(-1) / math.sqrt(16)
    given = (feature_map("taylor")(q) * feature_map("taylor")(k)).sum(-1)
    assert torch.allclose(given, 1 + s + s**2 / 2, rtol=0, atol=1e-14)
    assert (given - s.exp()).abs().max() < s.abs().max() ** 3


def test_feature_maps_are_what_their_names_say() -> None:
    x = torch.tensor([[-1.0, 0.0, 2.0]], dtype=torch.float64)
    expected = {
        "identity": x,
        "elu": torch.tensor([[math.exp(-1), 1.0, 3.0]]),
        "relu": torch.tensor([[0.0, 0.0, 2.0]]),
        "silu": x / (1 + (-x).exp()),
        "softmax": x.exp() / x.exp().sum(),
    }
    for name, y in expected.items():
        assert torch.allclose(feature_map(name)(x), y.double()), name


def test_rotation_depends_on_the_distance_within_a_document_alone() -> None:
    x = Inputs(4, torch.float64)
    q, k = x.normal(1, 1, 1, 8).expand(1, 12, 1, 8), x.normal(1, 1, 1, 8).expand(1, 12, 1, 8)
    layout = SequenceLayout.contiguous(12, 1, [0, 5, 12])
    sp = SequenceParallel.single(layout)
    scores = torch.einsum("bihd,bjhd->ij", rotate(q, sp, 100.0), rotate(k, sp, 100.0))
    assert torch.allclose(scores[4, 1], scores[3, 0])
    assert torch.allclose(scores[4, 1], scores[5 + 4, 5 + 1])
    assert not torch.allclose(scores[4, 1], scores[4, 2])
    # Pair i of D/2 turns by position · theta^(−2i/D).
    turned = rotate(torch.eye(8, dtype=torch.float64)[1].expand(1, 12, 1, 8), sp, 100.0)
    assert turned[0, 3, 0, 1] == pytest.approx(math.cos(3 * 100 ** (-2 / 8)))
    assert turned[0, 3, 0, 5] == pytest.approx(math.sin(3 * 100 ** (-2 / 8)))


def test_hgrn2_keys_and_decay_keep_their_digits() -> None:
    """``k = 1 − f`` and ``g = log f`` for logits at which f is 0 or 1 in float32."""
    for layer_idx in (0, 3):
        mixer = HGRN2(2, 1, layer_idx=layer_idx, num_layers=4)
        nn.init.eye_(mixer.k_proj.weight)
        logits = torch.tensor([[[-60.0, 60.0], [-3.0, 0.5], [0.0, 20.0]]])
        sp = SequenceParallel.single(SequenceLayout.contiguous(3, 1))
        k, g = mixer.keys_and_decay(logits, Passage(sp))
        bound, wide = layer_idx / 4, logits.double()
        assert relative_error(k.squeeze(2), (1 - bound) * torch.sigmoid(-wide)) < 1e-6
        assert g is not None
        forgotten = -torch.log1p(-(1 - bound) * torch.sigmoid(-wide))
        forgotten[0, 0, 0] = 60.0 if bound == 0 else -math.log(bound)
        assert torch.allclose(-g.squeeze(2).double(), forgotten, rtol=1e-5, atol=1e-12)


def test_gla_is_its_definition() -> None:
    """From the parameters to the output, with the recurrence token by token."""
    mixer = layer("gla")
    assert isinstance(mixer, GatedLinearAttention)
    x = Inputs(5, torch.float64).normal(1, 13, HIDDEN)
    passage = Passage(SequenceParallel.single(SequenceLayout.contiguous(13, 1)))
    k, v, g, *_ = mixer.writes(x, passage)
    o, _ = recurrent(mixer.queries(x, passage), k, v, g)
    assert mixer.gate_proj is not None
    normed = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
    gate = mixer.gate_proj(x).unflatten(-1, (HEADS, -1))
    want = mixer.o_proj((normed * gate * torch.sigmoid(gate)).flatten(-2))
    assert relative_error(mixer(x), want) < 1e-10


def test_a_head_that_says_nothing_does_not_shake_hgrn2() -> None:
    """A head's output that passes through 0 is normed with the other heads' and jumps nowhere; GLA's norm is by head."""
    o = torch.tensor([[1e-4, 2e-4, 3.0, 4.0], [-1e-4, -2e-4, 3.0, 4.0]], dtype=torch.float64)
    for name, jumps in (("hgrn2", False), ("lightning", False), ("gla", True), ("retention", True)):
        mixer = LAYERS[name](4, 2, norm_eps=1e-12)
        first, second = mixer.norm.double()(o)
        assert ((first - second).norm() > 1) == jumps, name


def test_norms() -> None:
    x, gate = torch.tensor([[3.0, 4.0]], dtype=torch.bfloat16), torch.tensor([[0.0, 1.0]], dtype=torch.bfloat16)
    normed = RMSNorm(2, eps=0)(x)
    assert normed.dtype == torch.bfloat16
    assert torch.allclose(normed.float(), torch.tensor([[3.0, 4.0]]) / math.sqrt(12.5), rtol=1e-2)
    by_two = GatedRMSNorm(4, groups=2, eps=0)(torch.cat([x, 9 * x], dim=-1))
    assert torch.allclose(by_two, torch.cat([normed, normed], dim=-1), rtol=1e-2)
    gated = GatedRMSNorm(2, eps=0)(x, gate)
    assert torch.allclose(gated.float(), torch.tensor([[0.0, 4 / math.sqrt(12.5) / (1 + math.exp(-1))]]), rtol=1e-2)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: mixer_type("mamba9"), "unknown mixer='mamba9': expected one of basic, lightning"),
        (lambda: feature_map("cube"), "unknown feature_map='cube': expected one of identity"),
        (lambda: GatedLinearAttention(16, 3), "heads=3 does not divide hidden=16"),
        (lambda: SoftmaxAttention(16, 4, kv_heads=3), "kv_heads=3 does not divide heads=4"),
        (lambda: SoftmaxAttention(9, 3)(torch.zeros(1, 2, 9)), "rotary positions need heads of even width, given 3"),
    ],
)
def test_bad_options(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
