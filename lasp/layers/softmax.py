"""Softmax attention with rotary positions and grouped queries: the `N` of a layer pattern."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.layers.cache import AttentionState, Room
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
        q, k, v = self._projected(x, seq)
        return self.o_proj(softmax_attn(q, k, v, window=self.window, sp=seq).flatten(-2))

    def initial_state(self, batch: int) -> AttentionState:
        """The state before any token, for `step`.

        Args:
            batch: how many sequences are decoded at once.
        """
        like = self.k_proj.weight
        places = like.new_empty(2, batch, like.shape[0] // self.width, 0, self.width)
        return AttentionState(Room(places, 0), 0, like.new_zeros(batch, dtype=torch.int64))

    def step(self, x: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        """Mix the tokens that follow on those that made the state: see `LinearMixer.step`."""
        batch, tokens = x.shape[:2]
        if state.position.shape[0] != batch:
            raise ValueError(f"step: x holds {batch} sequences and the state {state.position.shape[0]}")
        positions = state.position[:, None] + torch.arange(tokens, device=x.device)
        q, k, v = self._projected(x, sequence_of(x, None, None), positions)
        seen, after = state.followed_by(k, v, self.window)
        mask = state.mask(tokens, seen.shape[3], self.window)
        groups = q.shape[2] // k.shape[2]
        if groups > 1 and mask is not None:
            # On a GPU no kernel takes both a mask and shared heads: without one all scores would be held at once.
            seen, groups = seen.repeat_interleave(groups, dim=2), 1
        o = F.scaled_dot_product_attention(q.transpose(1, 2), seen[0], seen[1], mask, enable_gqa=groups > 1)
        return self.o_proj(o.transpose(1, 2).flatten(-2)), after

    def _projected(
        self, x: Tensor, seq: SequenceParallel, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, the first two rotated by the positions given or those of the layout."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.width)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (rotate(x, seq, self.rope_theta, positions, self.rope_scaling) for x in (q, k))
        return q, k, v
