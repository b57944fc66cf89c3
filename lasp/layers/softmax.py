"""Softmax attention with rotary positions and grouped queries: the `N` of a layer pattern."""

from __future__ import annotations

from torch import Tensor, nn

from lasp.layers.mixer import head_width
from lasp.layers.rotary import RopeScaling, rotate
from lasp.ops.inputs import CuSeqlens, sequence_of
from lasp.ops.softmax import softmax_attn
from lasp.parallel import SequenceParallel


class SoftmaxAttention(nn.Module):
    """Causal softmax attention as in Llama 3, https://arxiv.org/abs/2407.21783, ``[B, T, hidden] → [B, T, hidden]``.

    Args:
        hidden: width of the model.
        heads: H of the queries.
        kv_heads: H of the keys and values, a divisor of `heads`; as many when None.
        window: how many tokens a token sees, itself included; all before it when None.
        rope_theta: base of the rotation.
        rope_scaling: of its frequencies; none when None.
    """

    def __init__(
        self,
        hidden: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        window: int | None = None,
        rope_theta: float = 500000.0,
        rope_scaling: RopeScaling | None = None,
    ):
        super().__init__()
        width = head_width(hidden, heads)
        kv_heads = heads if kv_heads is None else kv_heads
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"kv_heads={kv_heads} does not divide heads={heads}")
        self.width, self.window = width, window
        self.rope_theta, self.rope_scaling = rope_theta, rope_scaling
        self.q_proj = nn.Linear(hidden, hidden, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * width, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * width, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor, sp: SequenceParallel | None = None, cu_seqlens: CuSeqlens = None) -> Tensor:
        """x: ``[B, T, hidden]``; the arguments are those of `LinearMixer.forward`."""
        seq = sequence_of(x, cu_seqlens, sp)
        q, k, v = (proj(x).unflatten(-1, (-1, self.width)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (rotate(x, seq, self.rope_theta, scaling=self.rope_scaling) for x in (q, k))
        return self.o_proj(softmax_attn(q, k, v, window=self.window, sp=seq).flatten(-2))
