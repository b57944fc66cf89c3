"""The delta mixers and Mamba-2 against their definitions, their initial values and options; decoding by every mixer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from lasp.kernels.reference import recurrent
from lasp.layers import HGRN2, MIXERS, DeltaNet, GateFirstRMSNorm, Mamba2, MixerState, ShortConvolution, mixer_type
from lasp.layers.mamba import decay_parameters
from lasp.layers.mixer import LinearMixer
from lasp.models import LinearLlama3, LinearLlama3Config
from tests.references import causal_convolution
from tests.support import Inputs, decoded, relative_error

HIDDEN, HEADS, TOKENS = 16, 4, 13
#: Fewer heads of queries and keys than of values, and widths that differ.
GROUPED = {"key_heads": 2, "key_width": 6, "value_width": 5}
DECAYED = ("gated_delta_net", "kda", "mamba2")


def mixer(name: str, **options) -> LinearMixer:
    torch.manual_seed(0)
    return mixer_type(name)(HIDDEN, HEADS, **options).double()


def tokens(batch: int = 1) -> Tensor:
    return Inputs(7, torch.float64).normal(batch, TOKENS, HIDDEN)


def by_head(x: Tensor, conv: ShortConvolution | None, heads: int) -> Tensor:
    assert conv is not None
    return causal_convolution(x, conv.weight, conv.bias, "silu").unflatten(-1, (heads, -1))


def normed(x: Tensor, eps: float = 1e-5) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("options", [{}, GROUPED, {"allow_neg_eigval": True}], ids=["plain", "grouped", "negative"])
@pytest.mark.parametrize("name", ["delta_net", "gated_delta_net", "kda"])
def test_delta_mixers_are_their_definition(name: str, options: dict) -> None:
    module, x = mixer(name, **options), tokens()
    assert isinstance(module, DeltaNet)
    q, k, v = (
        by_head(proj(x), conv, heads)
        for proj, conv, heads in (
            (module.q_proj, module.q_conv, module.key_heads),
            (module.k_proj, module.k_conv, module.key_heads),
            (module.v_proj, module.v_conv, HEADS),
        )
    )
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    beta = (2 if options.get("allow_neg_eigval") else 1) / (1 + (-module.beta_proj(x)).exp())
    g = None
    if name != "delta_net":
        logits, bias, rate = module.decay_proj(x), module.dt_bias.double(), module.A_log.double().exp()
        if name == "kda":
            g = -rate[:, None] * (1 + (logits + bias).exp()).log().unflatten(-1, (HEADS, -1))
        else:
            g = -rate * (1 + (logits + bias).exp()).log()
    o, _ = recurrent(q, k, v, g, beta)
    o = (normed(o) * module.norm.weight).flatten(-2)
    if name == "delta_net":
        assert module.gate_proj is None
    else:
        assert module.gate_proj is not None
        gate = module.gate_proj(x)
        o = o * (torch.sigmoid(gate) if name == "kda" else F.silu(gate))
    assert relative_error(module(x), module.o_proj(o)) < 1e-10


@pytest.mark.parametrize("options", [{}, GROUPED], ids=["plain", "grouped"])
def test_mamba2_is_its_definition(options: dict) -> None:
    module, x = mixer("mamba2", **options), tokens()
    assert isinstance(module, Mamba2)
    with torch.no_grad():
        module.D.copy_(torch.arange(HEADS))
        module.norm.weight.copy_(1 + torch.arange(module.norm.weight.numel()) / 7)
    groups = module.key_heads
    values = by_head(module.v_proj(x), module.v_conv, HEADS)
    C, B = (
        by_head(proj(x), conv, groups)
        for proj, conv in ((module.q_proj, module.q_conv), (module.k_proj, module.k_conv))
    )
    dt = (1 + (module.dt_proj(x) + module.dt_bias).exp()).log()
    y, _ = recurrent(C, B, values * dt[..., None], -module.A_log.exp() * dt, scale=1.0)
    y = (y + module.D[:, None] * values).flatten(-2)
    assert module.gate_proj is not None
    y = normed((y * F.silu(module.gate_proj(x))).unflatten(-1, (groups, -1))).flatten(-2)
    assert relative_error(module(x), module.o_proj(y * module.norm.weight)) < 1e-10


def test_initial_values_are_as_published_and_outlive_the_models() -> None:
    torch.manual_seed(0)
    for name in DECAYED:
        module = LinearLlama3(LinearLlama3Config(mixer=name, heads=8)).blocks[0].mixer
        steps, rates = F.softplus(module.dt_bias), module.A_log.exp()
        assert 0.99e-3 < steps.min() < 1e-2 < steps.max() < 1.01e-1
        assert 1 <= rates.min() < 8 < rates.max() <= 16
        assert {module.dt_bias.dim(), module.A_log.dim()} == {1}  # matrices alone decay in training
        if name == "mamba2":
            assert torch.equal(module.D, torch.ones(8))
            assert module.v_conv.bias.abs().max() > 0


def test_time_steps_and_rates_fill_their_ranges() -> None:
    torch.manual_seed(0)
    a_log, dt_bias = decay_parameters(100_000, 100_000)
    steps, rates = F.softplus(dt_bias.double()), a_log.double().exp()
    assert [steps.min().item(), steps.median().item(), steps.max().item()] == pytest.approx(
        [1e-3, 1e-2, 1e-1], rel=0.02
    )
    assert [rates.min().item(), rates.median().item(), rates.max().item()] == pytest.approx([1, 8.5, 16], rel=0.02)


def test_options_of_the_mixers() -> None:
    for name, kind in MIXERS.items():
        own, none, given = (kind(HIDDEN, HEADS, conv_size=size) for size in (None, 0, 3))
        published = name in ("delta_net", *DECAYED)
        assert (own.k_conv is None) == (not published)
        assert own.k_conv is None or own.k_conv.weight.shape[1] == 4
        assert none.q_conv is None
        assert given.v_conv is not None
        assert given.v_conv.weight.shape[1] == 3
        for gated in (False, True):
            assert (kind(HIDDEN, HEADS, gated=gated).gate_proj is not None) == gated
        if name != "hgrn2":
            y = kind(HIDDEN, HEADS, **GROUPED)(tokens().float())
            assert y.shape == (1, TOKENS, HIDDEN)
    assert Mamba2(HIDDEN, HEADS).o_proj.in_features == 2 * HIDDEN
    with pytest.raises(ValueError, match="key_heads=3 does not divide heads=4"):
        DeltaNet(HIDDEN, HEADS, key_heads=3)
    with pytest.raises(ValueError, match="hgrn2: its keys follow from the decay, of which there is one a head"):
        HGRN2(HIDDEN, HEADS, key_heads=2)
    with pytest.raises(ValueError, match="groups=3 of a norm do not divide its width=16"):
        GateFirstRMSNorm(16, 3)


@pytest.mark.parametrize("pieces", [(1,) * TOKENS, (5, 1, 3, 4), (TOKENS,)], ids=["by token", "uneven", "whole"])
@pytest.mark.parametrize("conv_size", [None, 1, 6])
@pytest.mark.parametrize("name", MIXERS)
def test_decoding_is_the_forward(name: str, conv_size: int | None, pieces: tuple[int, ...]) -> None:
    module, x = mixer(name, layer_idx=1, num_layers=4, conv_size=conv_size), tokens(2)
    y, state = decoded(module, x, pieces)
    assert state.position.tolist() == [TOKENS] * 2
    assert relative_error(y, module(x)) < 1e-10


@pytest.mark.parametrize("name", ["retention", "kda", "mamba2"])
def test_prompts_of_different_lengths_go_on_side_by_side(name: str) -> None:
    module, x = mixer(name), tokens(2)
    states = [
        module.step(x[row : row + 1, :length], module.initial_state(1))[1] for row, length in enumerate((5, TOKENS - 3))
    ]
    more = x[:, :2].flip(0)
    y, _ = module.step(more, MixerState.joined(states))
    for row, length in enumerate((5, TOKENS - 3)):
        alone = module(torch.cat([x[row, :length], more[row]]).unsqueeze(0))
        assert relative_error(y[row], alone[0, length:]) < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("name", ["retention", "kda"])
def test_decoding_compiles_to_one_graph(name: str) -> None:
    """The position is a tensor: no graph is made for each token."""
    torch._dynamo.reset()
    module, made = mixer(name), CompileCounter()
    step, state = torch.compile(module.step, fullgraph=True, backend=made), module.initial_state(2)
    outputs = []
    for token in tokens(2).split(1, dim=1):
        y, state = step(token, state)
        outputs.append(y)
    assert made.frame_count == 1
    assert relative_error(torch.cat(outputs, dim=1), module(tokens(2))) < 1e-10


def test_gradients_pass_through_decoding() -> None:
    module, found = mixer("gated_delta_net"), []
    for pieces in ((TOKENS,), (2, 7, 4)):
        x, state, loss = tokens().requires_grad_(), module.initial_state(1), torch.zeros((), dtype=torch.float64)
        for piece in x.split(pieces, dim=1):
            y, state = module.step(piece, state)
            loss = loss + y.square().sum()
        (dx,) = torch.autograd.grad(loss, x)
        found.append(dx)
    assert relative_error(found[1], found[0]) < 1e-10


@pytest.mark.parametrize("name", MIXERS)
def test_mixed_precision(name: str) -> None:
    """Under autocast, as training in bfloat16 computes."""
    module, x = mixer_type(name)(HIDDEN, HEADS), tokens().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in (x, *module.parameters()))
    assert relative_error(y, module(x)) < 3e-2


def test_the_state_of_decoding() -> None:
    module = mixer_type("mamba2")(HIDDEN, HEADS).bfloat16()
    y, state = module.step(tokens(3).bfloat16(), module.initial_state(3))
    assert (y.dtype, state.memory.dtype) == (torch.bfloat16, torch.float32)
    assert [tail.dtype for tail in state.tails] == [torch.bfloat16] * 3
    with pytest.raises(ValueError, match="step: x holds 1 sequences and the state 3"):
        module.step(tokens().bfloat16(), state)
