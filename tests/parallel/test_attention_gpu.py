"""FlexAttention doing the local work: parts of the keys merge to the whole, for every layout, without a table of T × T."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lasp import SequenceLayout
from lasp.ops import softmax_attn
from lasp.parallel.attention.local import attend, attend_backward, merge
from lasp.parallel.attention.mask import Mask, Reach, Span
from tests.parallel.test_attention import SEEN
from tests.references import softmax_attention
from tests.support import Inputs, assert_close

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
T, H, KV, D, WORLD = 300, 4, 2, 32, 2
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}
DOCUMENTS = {"one": None, "packed": (0, 1, 140, 161, T)}
LAYOUTS = {
    "contiguous": SequenceLayout.contiguous,
    "zigzag": SequenceLayout.zigzag,
    "table": lambda total, _, cu: SequenceLayout.from_ranges(
        [[(200, 201), (0, 40)], [(201, total), (40, 200)]], None, cu
    ),
}
SLOTS = 270  # as many tokens as a rank holds at most, and some padding


@pytest.fixture(scope="module")
def whole() -> dict[str, Tensor]:
    x = Inputs(0, torch.float64)
    return {
        "q": x.normal(1, T, H, D),
        "k": x.normal(1, T, KV, D),
        "v": x.normal(1, T, KV, D),
        "do": x.normal(1, T, H, D),
    }


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_parts_make_the_whole(whole: dict[str, Tensor], dtype: torch.dtype, documents: str) -> None:
    for seen, options in SEEN.items():
        rounded = {name: x.to(dtype) for name, x in whole.items()}
        leaves = {name: x.double().clone().requires_grad_() for name, x in rounded.items() if name != "do"}
        want = softmax_attention(**leaves, **options, cu_seqlens=DOCUMENTS[documents])
        want.backward(rounded["do"].double())
        scale = D**-0.5
        for name, build in LAYOUTS.items():
            layout = build(T, WORLD, DOCUMENTS[documents])
            here = [{n: layout.shard(x, r).cuda() for n, x in rounded.items()} for r in range(WORLD)]
            totals = [
                {f"d{n}": torch.zeros_like(x, dtype=torch.float64) for n, x in h.items() if n != "do"} for h in here
            ]
            outputs = []
            for rank in range(WORLD):
                q, do = here[rank]["q"], here[rank]["do"]
                reach = Reach.of(options["causal"], options.get("window"))
                masks = [
                    Mask(Span.of(layout, rank), Span.of(layout, source, padded=SLOTS), reach) for source in range(WORLD)
                ]
                keys = [_filled(h["k"], SLOTS) for h in here]
                values = [_filled(h["v"], SLOTS) for h in here]
                parts = [attend(q, keys[s], values[s], masks[s], scale) for s in range(WORLD)]
                o, lse = (x.double() for x in parts[0])
                for part, part_lse in parts[1:]:
                    o, lse = merge(o, lse, part.double(), part_lse.double())
                outputs.append(o)
                for s in range(WORLD):
                    dq, dk, dv = attend_backward(do, o.to(dtype), lse, q, keys[s], values[s], masks[s], scale)
                    n = here[s]["k"].shape[1]
                    assert not dk[:, n:].any()
                    totals[rank]["dq"] += dq
                    totals[s]["dk"] += dk[:, :n]
                    totals[s]["dv"] += dv[:, :n]
            given = {"o": layout.unshard([o.cpu() for o in outputs])}
            for n in ("dq", "dk", "dv"):
                given[n] = layout.unshard([t[n].cpu() for t in totals])
            expected = {"o": want, **{f"d{n}": x.grad for n, x in leaves.items()}}
            try:
                assert_close(given, expected, TOLERANCE[dtype])
            except AssertionError as error:
                raise AssertionError(f"{seen}, {name}: {error}") from None


def _filled(x: Tensor, tokens: int) -> Tensor:
    """Followed by padding that must not be seen: a NaN would show. Gathered rows are filled up with zeros."""
    return torch.cat([x, x.new_full((x.shape[0], tokens - x.shape[1], *x.shape[2:]), 1e3)], dim=1)


def test_memory_grows_with_the_tokens_alone() -> None:
    tokens = 65536
    q = torch.randn(1, tokens, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    softmax_attn(q, q, q, cu_seqlens=[0, 1000, tokens]).sum().backward()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    softmax_attn(q, q, q, cu_seqlens=[0, 1000, tokens]).sum().backward()
    assert torch.cuda.max_memory_allocated() - held < 16 * q.nbytes


def test_narrow_heads() -> None:
    x = Inputs(0, torch.float32)
    q, k, v = (x.normal(1, 50, 2, 6) for _ in range(3))
    want = softmax_attention(q.double(), k.double(), v.double())
    assert_close({"o": softmax_attn(q.cuda(), k.cuda(), v.cuda())}, {"o": want}, 1e-5)
