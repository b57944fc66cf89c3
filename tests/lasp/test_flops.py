"""What a model computes for its tokens, held to torch's own count of products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lasp.kernels.reference import recurrent
from lasp.layers.linear import MIXERS, mixer_type
from lasp.models import PRESETS, LinearLlama3, LinearLlama3Config
from lasp.models.flops import forward_flops, outline, peak_flops, training_flops

TOKENS = 24
aten = torch.ops.aten


def config(**given) -> LinearLlama3Config:
    small = {"hidden": 16, "heads": 2, "intermediate": 24, "layers": 2, "pattern": "L", "vocabulary": 40}
    return LinearLlama3Config(**(small | given))


def of_a_token(shape: LinearLlama3Config) -> float:
    """What is claimed, of one document."""
    return forward_flops(outline(shape), [TOKENS]) / TOKENS


def products(shape: LinearLlama3Config, backward: bool = False) -> float:
    """Of a token with the weights, by the counter: recurrences and attention make batched products, which are left out."""
    model = LinearLlama3(shape)
    with FlopCounterMode(display=False) as counter:
        y = model(torch.arange(TOKENS).view(1, TOKENS))
        if backward:
            y.sum().backward()
    found = counter.get_flop_counts()["Global"]
    return (found[aten.mm] + found.get(aten.addmm, 0)) / TOKENS


def state_products(name: str, shape: LinearLlama3Config) -> float:
    """Of a token with one state: those of the definition, by the counter, and ``k vᵀ``, two for each number."""
    mixer = mixer_type(name)(shape.hidden, shape.heads)
    q, k = (torch.zeros(1, TOKENS, mixer.key_heads, mixer.features_width) for _ in range(2))
    v = torch.zeros(1, TOKENS, mixer.heads, mixer.value_width)
    beta = torch.zeros(v.shape[:3]) if "beta_proj" in mixer.writers else None
    with FlopCounterMode(display=False) as counter:
        _, state = recurrent(q, k, v, beta=beta)
    return counter.get_total_flops() / TOKENS + 2 * state.numel()


@pytest.mark.parametrize("name", MIXERS)
def test_linear_layers(name: str) -> None:
    shape = config(mixer=name)
    want = products(shape) + shape.layers * state_products(name, shape)
    assert of_a_token(shape) == pytest.approx(want)


@pytest.mark.parametrize("shared", [False, True])
def test_of_a_mixture_only_the_chosen_memories_work(shared: bool) -> None:
    shape = config(mixer="mom", mom_recurrence="kda", num_memories=5, top_k=2, shared_memory=shared)
    want = products(shape) + shape.layers * (2 + shared) * state_products("kda", shape)
    assert of_a_token(shape) == pytest.approx(want)


@pytest.mark.parametrize("window", [None, 1, 7, TOKENS, 99])
def test_softmax_layers(window: int | None) -> None:
    """Attention query by query, each with the keys that it sees."""
    shape = config(pattern="N", kv_heads=1, window=window)
    width = shape.hidden // shape.heads

    def attention(q: Tensor, keys: Tensor) -> None:
        for t in range(TOKENS):
            seen = keys[:, max(0, t + 1 - (window or TOKENS)) : t + 1]
            _ = (q[:, t : t + 1] @ seen.mT) @ seen

    with FlopCounterMode(display=False) as counter:
        attention(*torch.zeros(2, shape.heads, TOKENS, width))
    want = products(shape) + shape.layers * counter.get_total_flops() / TOKENS
    assert of_a_token(shape) == pytest.approx(want)


def test_training_takes_three_times_the_forward() -> None:
    shape = config(mixer="mamba2", pattern="LN")
    assert products(shape, backward=True) == pytest.approx(3 * products(shape))
    model = outline(shape)
    assert training_flops(model, [TOKENS]) == 3 * forward_flops(model, [TOKENS])


@pytest.mark.parametrize("window", [None, 5])
def test_documents_that_are_told_apart_cost_what_each_costs_alone(window: int | None) -> None:
    model = outline(config(mixer="gla", pattern="LN", window=window))
    alone = [forward_flops(model, [length]) for length in (1, 4, 19)]
    assert forward_flops(model, [1, 4, 19]) == pytest.approx(sum(alone))
    assert sum(alone) < forward_flops(model, [TOKENS])


def test_of_the_paper_s_model_it_is_near_six_times_the_parameters() -> None:
    """PaLM's rule, which leaves the sequence out; tied, so that the one table counts once, as the head."""
    model = outline(PRESETS["linear-llama3-1b"])
    six = 6 * sum(p.numel() for p in model.parameters())
    assert six < training_flops(model, [1024]) / 1024 < 1.05 * six


@pytest.mark.parametrize(
    ("device", "dtype", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989),
        ("NVIDIA H200", "bfloat16", 989),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA H100 NVL", "bfloat16", 835),
        ("NVIDIA H20", "bfloat16", 148),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA A100-SXM4-80GB", "float32", 19.5),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),
        ("CPU, 2 threads", "bfloat16", None),
    ],
)
def test_peaks(device: str, dtype: str, tflops: float | None) -> None:
    peak = peak_flops(device, dtype)
    assert peak is None if tflops is None else peak == pytest.approx(1e12 * tflops)
