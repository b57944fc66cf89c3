"""Bad input is one clear line on every rank, even where only one rank has it, and nobody hangs."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from lasp import SequenceLayout, SequenceParallel
from lasp.ops import causal_conv1d, delta_rule, gla, kda, linear_attn, simple_gla, softmax_attn

pytestmark = [pytest.mark.mpi(min_size=4), pytest.mark.timeout(60)]
Groups = dict[int, dist.ProcessGroup]
T, H, K, V = 16, 2, 4, 3


def local(sp: SequenceParallel, heads: int = H) -> dict[str, torch.Tensor]:
    n = sp.local_tokens
    return {"q": torch.zeros(1, n, heads, K), "k": torch.zeros(1, n, heads, K), "v": torch.zeros(1, n, heads, V)}


def still_works(sp: SequenceParallel) -> None:
    """After the error the ranks are still together."""
    o, _ = linear_attn(**local(sp), sp=sp)
    assert o.shape == (1, sp.local_tokens, H, V)


@pytest.fixture
def sp(groups: Groups) -> SequenceParallel:
    return SequenceParallel(groups[4], SequenceLayout.contiguous(T, 4))


def test_ranks_that_disagree_on_shapes(sp: SequenceParallel) -> None:
    still_works(sp)
    message = r"the ranks disagree: rank \d: linear_attn\(k=float32\[1, .*; the others: linear_attn\(k=float32\[1, "
    with pytest.raises(ValueError, match=message):
        linear_attn(**local(sp, heads=3 if sp.rank == 2 else 2), sp=sp)
    still_works(sp)


def test_ranks_that_disagree_on_whether_gradients_are_needed(sp: SequenceParallel) -> None:
    x = local(sp)
    x["k"].requires_grad_(sp.rank == 1)
    with pytest.raises(ValueError, match=r"the ranks disagree.*gradient=True"):
        linear_attn(**x, sp=sp)
    still_works(sp)


def test_ranks_that_disagree_on_the_queries(sp: SequenceParallel) -> None:
    for name, change in (("output_final_state", True), ("scale", 2.0)):
        with pytest.raises(ValueError, match=f"the ranks disagree.*{name}={change}"):
            linear_attn(**local(sp), sp=sp, **({name: change} if sp.rank == 0 else {}))
    x = local(sp)
    x["q"].requires_grad_(sp.rank == 1)
    with pytest.raises(ValueError, match=r"the ranks disagree.*gradient=True"):
        linear_attn(**x, sp=sp)
    still_works(sp)


def test_ranks_with_different_layouts(groups: Groups) -> None:
    layout = SequenceLayout.zigzag(T, 4) if dist.get_rank() == 3 else SequenceLayout.contiguous(T, 4)
    with pytest.raises(ValueError, match=r"the ranks disagree: rank \d: SequenceParallel\(method=lasp2"):
        SequenceParallel(groups[4], layout)


def test_one_rank_with_too_many_tokens(sp: SequenceParallel) -> None:
    x = local(sp)
    if sp.rank == 1:
        x = {name: torch.cat([y, y], dim=1) for name, y in x.items()}
    with pytest.raises(ValueError, match=r"linear_attn: rank 1 was given 8 tokens, its layout of 16 tokens gives it 4"):
        linear_attn(**x, sp=sp)
    still_works(sp)


def test_a_positive_log_decay_on_one_rank(sp: SequenceParallel) -> None:
    g = torch.zeros(1, sp.local_tokens, H)
    g[0, -1, 0] = 0.5 if sp.rank == 2 else -1
    with pytest.raises(
        ValueError, match=r"simple_gla: g must be a log-decay, at most 0 everywhere; its largest .* 0.5"
    ):
        simple_gla(**local(sp), g=g, sp=sp)
    g[0, -1, 0] = float("nan") if sp.rank == 2 else -1
    with pytest.raises(ValueError, match="simple_gla: g must be a log-decay"):
        simple_gla(**local(sp), g=g, sp=sp)
    still_works(sp)


def test_a_layout_for_another_number_of_ranks(groups: Groups) -> None:
    with pytest.raises(ValueError, match="the layout is for 2 ranks, the group has 4"):
        SequenceParallel(groups[4], SequenceLayout.contiguous(T, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lasp3"}, "unknown method='lasp3': expected one of lasp2"),
        ({"exchange": "pigeon"}, "unknown exchange='pigeon': expected one of auto, all-gather"),
        ({"softmax": "flash"}, "unknown softmax='flash': expected one of auto, all-gather, ring"),
    ],
)
def test_unknown_names(groups: Groups, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceParallel(groups[4], SequenceLayout.contiguous(T, 4), **options)


def test_wrong_shapes_everywhere(sp: SequenceParallel) -> None:
    x = local(sp)
    g = -torch.ones(1, sp.local_tokens, H, K)
    cases = [
        (
            lambda: gla(**x, g=g[..., :-1], sp=sp),
            r"gla: g must be \[B, T, H, K\] = \[1, 4, 2, 4\], given \[1, 4, 2, 3\]",
        ),
        (lambda: gla(**x, g=g[..., 0], sp=sp), r"gla: g must be \[B, T, H, K\], given \[1, 4, 2\]"),
        (lambda: linear_attn(x["q"], x["k"], x["v"][:, 1:], sp=sp), r"linear_attn: v must be \[B, T, H, V\]"),
        (
            lambda: linear_attn(x["q"], x["k"], x["v"][:, :, :1], sp=sp),
            "linear_attn: v must have as many heads as q and k, or a multiple",
        ),
        (
            lambda: delta_rule(**x, beta=g[..., 0, 0], sp=sp),
            r"delta_rule: beta must be \[B, T, H\] = \[1, 4, 2\], given \[1, 4\]",
        ),
        (lambda: kda(**x, g=g[..., 0], beta=-g[..., 0], sp=sp), r"kda: g must be \[B, T, H, K\], given \[1, 4, 2\]"),
        (
            lambda: kda(**x, g=g, beta=-g[..., 0], use_gate_in_kernel=True, sp=sp),
            "kda: use_gate_in_kernel=True needs A_log",
        ),
        (lambda: linear_attn(x["q"][..., :2], x["k"], x["v"], sp=sp), "linear_attn: q and k must be alike"),
        (lambda: linear_attn(**x, cu_seqlens=[0, 4], sp=sp), "cu_seqlens= was given beside sp="),
        (lambda: linear_attn(**x, initial_state=torch.zeros(2, H, K, V), sp=sp), "linear_attn: initial_state must be"),
        (
            lambda: linear_attn(x["q"], x["k"].half(), x["v"], sp=sp),
            "linear_attn: k and v must have one floating-point",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    still_works(sp)


def test_wrong_inputs_of_softmax_attention(sp: SequenceParallel) -> None:
    n = sp.local_tokens
    q, k = torch.zeros(1, n, 4, K), torch.zeros(1, n, 2, K)
    three = torch.zeros(1, n, 3, K)
    cases = [
        (
            lambda: softmax_attn(q, three, three, sp=sp),
            r"softmax_attn: the 3 heads of k and v must divide the 4 heads of q \(q \[1, 4, 4, 4\], k \[1, 4, 3, 4\]\)",
        ),
        (lambda: softmax_attn(q, k, three, sp=sp), r"softmax_attn: v must be \[B, T, Hk, D\] = \[1, 4, 2, 4\], given"),
        (lambda: softmax_attn(q, k[..., :2], k, sp=sp), r"softmax_attn: k must be \[B, T, Hk, D\]"),
        (lambda: softmax_attn(q, k, k, window=0, sp=sp), "softmax_attn: window must be at least 1.*given 0"),
        (lambda: softmax_attn(q, k.double(), k, sp=sp), "softmax_attn: q, k and v must have one floating-point dtype"),
        (lambda: softmax_attn(q[0], k, k, sp=sp), r"softmax_attn: q must be \[B, T, H, D\]"),
        (
            lambda: softmax_attn(q, k, k, window=3 if sp.rank else 4, sp=sp),
            "the ranks disagree: rank .*softmax_attn.*window=[34]",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    still_works(sp)


def test_wrong_inputs_of_the_convolution(sp: SequenceParallel) -> None:
    x, weight = torch.zeros(1, sp.local_tokens, 6), torch.zeros(6, 4)
    cases = [
        (
            lambda: causal_conv1d(x, weight[:5], sp=sp),
            r"causal_conv1d: weight must be \[D, W\] = \[6, W\], given \[5, 4\]",
        ),
        (lambda: causal_conv1d(x, weight[:, :0], sp=sp), "causal_conv1d: weight must have at least one tap"),
        (lambda: causal_conv1d(x, weight, torch.zeros(5), sp=sp), r"causal_conv1d: bias must be \[D\] = \[6\]"),
        (lambda: causal_conv1d(x, weight, activation="gelu", sp=sp), "unknown activation='gelu': expected None, silu"),
        (lambda: causal_conv1d(x[:, 1:], weight, sp=sp), "causal_conv1d: rank . was given 3 tokens"),
        (lambda: causal_conv1d(x, weight[:, : 3 + (sp.rank == 2)], sp=sp), "the ranks disagree.*weight=\\[6, [34]\\]"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    still_works(sp)


def test_a_rank_that_does_not_come(groups: Groups) -> None:
    from datetime import timedelta

    from lasp.parallel.agreement import Agreement

    agreement = Agreement(groups[4], longest=timedelta(seconds=2))
    rank = dist.get_rank(groups[4])
    if rank != 3:
        with pytest.raises(RuntimeError, match="3 of 4 sequence-parallel ranks came to: step 7"):
            agreement.settle("step 7")
    dist.barrier(groups[4])
