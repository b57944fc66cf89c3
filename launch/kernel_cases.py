"""The linear ops as they are measured: inputs, peers, and what float64 makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lasp import SequenceLayout, SequenceParallel
from lasp.kernels import ChunkedDecay, ChunkedDelta, Tokens
from lasp.ops import delta_rule, gated_delta_rule, gla, kda, lightning_attn, linear_attn, retention, simple_gla
from lasp.ops.linear import retention_log_decay
from lasp.parallel import start_linear

Op = Callable[..., Any]


@dataclass(frozen=True)
class Shape:
    """B sequences of T tokens, H heads, K = V = D."""

    B: int
    T: int
    H: int
    D: int = 128

    def __str__(self) -> str:
        return f"B={self.B} T={self.T} H={self.H} D={self.D}"


#: Where accuracy is looked at: its heads fill the chip, so that segments are long and errors have room to grow.
ACCURACY = Shape(4, 8192, 16)


def lightning_decay(H: int, device: torch.device) -> Tensor:
    """flash-linear-attention's, of the first of many layers: from 0 to nearly −8 a token."""
    return -8 / H * torch.arange(H, dtype=torch.float32, device=device)


def by_token(*axes: str) -> Callable[..., Tensor]:
    """A log-decay as models have it at the start: logsigmoid of noise, divided by 16 as in GLA."""

    def make(shape: Shape, device: torch.device, strength: float) -> Tensor:
        sizes = {"B": shape.B, "T": shape.T, "H": shape.H, "K": shape.D}
        noise = torch.randn(*(sizes[a] for a in axes), device=device)
        return F.logsigmoid(noise) * strength

    return make


@dataclass(frozen=True)
class Case:
    """An op, its gates, and its peer by name in flash-linear-attention.

    Attributes:
        ours: takes q, k, v and the gates that there are.
        gate: makes the log-decay, if there is one.
        peer: the module and the function.
        learnt: whether the gates have gradients.
        corrected: whether the state is corrected, by the delta rule, as far as a beta says.
        peer_splits: whether the peer can split a sequence among ranks.
    """

    ours: Op
    gate: Callable[..., Tensor] | None
    peer: str
    learnt: bool = False
    corrected: bool = False
    peer_splits: bool = False

    def floor_bytes(self, shape: Shape, gates: Sequence[Tensor | None]) -> tuple[int, int]:
        """The bytes of forward, and of both passes, when inputs are read once in each and outputs written once."""
        tokens = shape.B * shape.T * shape.H * shape.D * 2
        g = sum(gate.nbytes for gate in gates if gate is not None and gate.dim() > 1)
        return 4 * tokens + g, 11 * tokens + 3 * g

    def floor_operations(self, shape: Shape) -> tuple[int, int]:
        """Operations of forward, and of both passes: the products with a K × V state, two a token forward and four backward.

        By the delta rule a key's is a third, and backward there are two more.
        """
        product = 2 * shape.B * shape.T * shape.H * shape.D**2
        return (3 * product, 9 * product) if self.corrected else (2 * product, 6 * product)


OPS: dict[str, Case] = {
    "linear_attn": Case(linear_attn, None, "linear_attn.chunk_linear_attn"),
    "lightning_attn": Case(
        lightning_attn, lambda s, d, _strength: lightning_decay(s.H, d), "lightning_attn.chunk_lightning_attn"
    ),
    "retention": Case(retention, lambda s, d, _strength: retention_log_decay(s.H, d), "retention.chunk_retention"),
    "simple_gla": Case(simple_gla, by_token("B", "T", "H"), "simple_gla.chunk_simple_gla", learnt=True),
    "gla": Case(gla, by_token("B", "T", "H", "K"), "gla.chunk_gla", learnt=True),
    "delta_rule": Case(delta_rule, None, "delta_rule.chunk_delta_rule", learnt=True, corrected=True),
    "gated_delta_rule": Case(
        gated_delta_rule,
        by_token("B", "T", "H"),
        "gated_delta_rule.chunk_gated_delta_rule",
        learnt=True,
        corrected=True,
        peer_splits=True,
    ),
    "kda": Case(kda, by_token("B", "T", "H", "K"), "kda.chunk_kda", learnt=True, corrected=True, peer_splits=True),
}


def peer_of(name: str) -> Op | None:
    """flash-linear-attention's op with the signature of ours, or None where it is not installed."""
    try:
        import fla.ops.common.chunk_o
        import fla.ops.delta_rule
        import fla.ops.gated_delta_rule
        import fla.ops.gla
        import fla.ops.kda
        import fla.ops.lightning_attn
        import fla.ops.linear_attn
        import fla.ops.retention
        import fla.ops.simple_gla
    except ImportError:
        return None
    # Before Triton 3.7.1 it refuses its gated backward on Hopper. At K = 128, which is measured here, it is right.
    fla.ops.common.chunk_o.TRITON_ABOVE_3_7_1 = True
    op = _peer_function(name)
    if name == "linear_attn":
        return lambda q, k, v, _g, _beta: op(q, k, v, normalize=False)
    if name == "lightning_attn":
        return lambda q, k, v, _g, _beta: op(q, k, v, layer_idx=0, num_layers=10**9)
    if name == "retention":
        return lambda q, k, v, _g, _beta: op(q, k, v)
    return lambda q, k, v, *gates: op(q, k, v, *(gate for gate in gates if gate is not None))


def _peer_function(name: str) -> Op:
    import fla.ops

    module, function = OPS[name].peer.split(".")
    return getattr(getattr(fla.ops, module), function)


def peer_split(name: str, group: dist.ProcessGroup, tokens: int) -> Op | None:
    """flash-linear-attention's op as one of the ranks of a group that share `tokens`, where it can be that."""
    if not OPS[name].peer_splits or peer_of(name) is None:
        return None
    from fla.ops.cp import build_cp_context

    context = build_cp_context(torch.tensor([0, tokens], device="cuda"), group)
    op = _peer_function(name)
    return lambda q, k, v, *gates: op(q, k, v, *(gate for gate in gates if gate is not None), cp_context=context)


def ours(name: str, sp: SequenceParallel | None = None) -> Op:
    case = OPS[name]
    return lambda q, k, v, *gates: case.ours(q, k, v, *(gate for gate in gates if gate is not None), sp=sp)


def inputs(name: str, shape: Shape, strength: float, dtype: torch.dtype = torch.bfloat16) -> list[Tensor | None]:
    """q, k, v, g, beta and do, fresh; by the delta rule queries and keys are of length 1."""
    device, case = torch.device("cuda"), OPS[name]
    q, k, v, do = (torch.randn(shape.B, shape.T, shape.H, shape.D, device=device, dtype=dtype) for _ in range(4))
    g = None if case.gate is None else case.gate(shape, device, strength)
    if not case.corrected:
        return [q, k, v, g, None, do]
    beta = torch.rand(shape.B, shape.T, shape.H, device=device).to(dtype)
    return [F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, g, beta, do]


def results(op: Op, tensors: list[Tensor | None], learnt: bool) -> dict[str, Tensor]:
    """The output and every gradient."""
    *leaves, do = tensors
    fresh = [None if x is None else x.detach().clone() for x in leaves]
    named = {name: x for name, x in zip(("q", "k", "v", "g", "beta"), fresh, strict=True) if x is not None}
    wanted = {name: x for name, x in named.items() if name in "qkv" or learnt}
    for x in wanted.values():
        x.requires_grad_()
    o = op(*fresh)
    o = o[0] if isinstance(o, tuple) else o
    o.backward(do)
    found = {"o": o.detach()}
    for name, x in wanted.items():
        assert x.grad is not None
        found[f"d{name}"] = x.grad
    return found


def exact(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None) -> Tensor:
    """The PyTorch form in float64, itself held to the token-by-token definition by the tests."""
    tokens = Tokens(k, v, tuple(gate for gate in (g, beta) if gate is not None))
    sp = SequenceParallel.single(SequenceLayout.contiguous(q.shape[1], 1))
    return start_linear(ChunkedDecay() if beta is None else ChunkedDelta(), tokens, None, sp).finish(
        q, q.shape[-1] ** -0.5
    )[0]


def errors(name: str, peer: Op | None, strength: float) -> dict[str, dict[str, float]]:
    """Relative errors against float64, of ours and the peer's, on the same inputs."""
    learnt = OPS[name].learnt
    tensors = inputs(name, ACCURACY, strength)
    want = results(exact, [None if x is None else x.double() for x in tensors], learnt)
    torch.cuda.empty_cache()
    found = {}
    for who, op in (("lasp", ours(name)), ("fla", peer)):
        if op is not None:
            got = results(op, tensors, learnt)
            found[who] = {key: ((got[key].double() - x).norm() / x.norm()).item() for key, x in want.items()}
    return found


def passes(op: Op, tensors: list[Tensor | None], learnt: bool) -> tuple[Callable[[], Tensor], Callable[[], None]]:
    """The forward, and forward and backward, of an op."""
    *leaves, do = tensors
    wanted = [x for x in (leaves if learnt else leaves[:3]) if x is not None]

    def forward() -> Tensor:
        o = op(*leaves)
        return o[0] if isinstance(o, tuple) else o

    def both() -> None:
        for x in wanted:
            x.requires_grad_()
            x.grad = None
        forward().backward(do)

    return forward, both
