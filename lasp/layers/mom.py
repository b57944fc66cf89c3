"""Mixture of Memories: any linear mixer with several states, of which each token writes to and reads a few."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lasp.layers.convolution import ShortConvolution
from lasp.layers.linear import mixer_type
from lasp.layers.passage import MixerState, Passage
from lasp.layers.rotary import RopeScaling, rotate
from lasp.layers.router import Router, Routing
from lasp.ops.grouped import grouped_linear
from lasp.ops.inputs import CuSeqlens, sequence_of
from lasp.parallel import SequenceParallel
from lasp.parallel.routed import Routed
from lasp.parallel.routed_convolution import routed_convolution, tails_of


class PerMemory(nn.Module):
    """A linear projection of each memory's own.

    Args:
        like: what each is like.
        memories: M.

    Attributes:
        weight: ``[M, out, in]``.
        bias: ``[M, out]``, or None.
    """

    def __init__(self, like: nn.Linear, memories: int):
        super().__init__()
        drawn = []
        for _ in range(memories):
            like.reset_parameters()
            drawn.append([p.detach().clone() for p in like.parameters()])
        weight, *bias = (nn.Parameter(torch.stack(each)) for each in zip(*drawn, strict=True))
        self.weight = weight
        self.bias = bias[0] if bias else None

    @classmethod
    def of(cls, projection: nn.Module, memories: int) -> nn.Module:
        """The projection with all that is linear in it a memory's own."""
        if isinstance(projection, nn.Linear):
            return cls(projection, memories)
        for name, part in projection.named_children():
            setattr(projection, name, cls.of(part, memories))
        return projection

    def forward(self, x: Tensor, routed: Routed) -> Tensor:
        """``[1, N, in]`` to ``[1, N, out]``, of routed tokens: work for as many products as they have choices."""
        return grouped_linear(x.squeeze(0), self.weight, self.bias, routed.of_memories).unsqueeze(0)


@dataclass
class RoutedPassage(Passage):
    """Tokens on their way to the memories that they chose, and what these give on its way back.

    Attributes:
        weights: how much each token has of what its memories give ``[B · T, k]``.
    """

    weights: Tensor | None = None

    def sent(self, x: Tensor) -> Tensor:
        return self._routed.dispatch.send(x.flatten(0, 1)).unsqueeze(0)

    def projected(self, x: Tensor, projection: nn.Module) -> Tensor:
        if isinstance(projection, nn.Sequential):
            for part in projection:
                x = self.projected(x, part)
            return x
        y: Tensor = projection(x, self._routed) if isinstance(projection, PerMemory) else projection(x)
        return y

    def asked(self, x: Tensor, projection: nn.Module) -> Tensor:
        return self.sent(projection(x))

    def convolved(self, x: Tensor, conv: ShortConvolution | None) -> Tensor:
        if conv is None:
            return x
        tails = None
        if self.before is not None:
            tails = self.before.tails[len(self.tails)].to(x.dtype).transpose(0, 1).flatten(0, 1)
            self.tails.append(tails_of(x, tails, self._routed))
        return routed_convolution(x, conv.weight, conv.bias, conv.activation, self._routed, tails)

    def rotated(self, x: Tensor, theta: float, scaling: RopeScaling | None) -> Tensor:
        positions = self.sp.layout.document_positions(self.sp.rank).to(x.device).expand(self._routed.batch, -1)
        if self.before is not None:
            positions = positions + self.before.position[:, None]
        positions = positions.flatten().index_select(0, self._routed.dispatch.token)
        return rotate(x, self.sp, theta, positions, scaling)

    def collected(self, o: Tensor) -> Tensor:
        assert self.weights is not None
        o = self._routed.dispatch.collect(o.squeeze(0), self.weights)
        B = self._routed.batch
        return o.view(B, o.shape[0] // B, *o.shape[1:])

    @property
    def _routed(self) -> Routed:
        assert self.routed is not None
        return self.routed


class MixtureOfMemories(nn.Module):
    """M states instead of one: a token writes to the k that its router chose, and reads their mixture.

    MoM, https://arxiv.org/abs/2502.13685, section 3: ``o = Σ_m w_m q_t M_m`` over the chosen memories, and beside them the
    shared one, which all tokens choose with weight 1; then the mixer's norm, output gate and output projection. A memory that a
    token did not choose neither decays nor changes. Keys, values and gates are projected for each memory by itself, queries
    once; the short convolutions see the tokens that chose the same memory.

    Args:
        hidden: width of the model.
        heads: H, of each memory.
        recurrence: the mixer that each memory is, a name in `MIXERS`.
        num_memories: M, without the shared one.
        top_k: k.
        shared_memory: whether there is one more memory, for all tokens.
        single_kv_proj: whether the memories share one projection of keys, values and gates.
        options: of the mixer.

    Raises:
        ValueError: where k is above M, M below 1, the recurrence unknown, or the mixer refuses its options.
    """

    def __init__(
        self,
        hidden: int,
        heads: int,
        *,
        recurrence: str = "gated_delta_net",
        num_memories: int = 4,
        top_k: int = 2,
        shared_memory: bool = True,
        single_kv_proj: bool = False,
        **options: Any,
    ):
        super().__init__()
        self.router = Router(hidden, num_memories, top_k)
        self.num_memories, self.shared_memory = num_memories, shared_memory
        #: What was chosen in the last forward, for `lasp.layers.router.balance`.
        self.routing: Routing | None = None
        self.mixer = mixer_type(recurrence)(hidden, heads, **options)
        if not single_kv_proj:
            for name in self.mixer.writers:
                setattr(self.mixer, name, PerMemory.of(getattr(self.mixer, name), self.memories))

    def forward(self, x: Tensor, sp: SequenceParallel | None = None, cu_seqlens: CuSeqlens = None) -> Tensor:
        """Mix the tokens.

        Args:
            x: ``[B, T, hidden]``, this rank's tokens.
            sp: the ranks that share the sequence, and its documents.
            cu_seqlens: the boundaries of packed documents, where there is no `sp`.
        """
        return self.mixer.mix(x, self._passage(x, sequence_of(x, cu_seqlens, sp)))[0]

    def initial_state(self, batch: int) -> MixerState:
        """The memories before any token, for `step`.

        Args:
            batch: how many sequences are decoded at once.
        """
        one = self.mixer.initial_state(batch)
        memory, *tails = (
            x.unsqueeze(1).expand(-1, self.memories, *x.shape[1:]).contiguous() for x in (one.memory, *one.tails)
        )
        return MixerState(memory, tuple(tails), one.position)

    def step(self, x: Tensor, state: MixerState) -> tuple[Tensor, MixerState]:
        """Mix the tokens that follow on those that made the state: see `LinearMixer.step`."""
        if state.memory.shape[0] != x.shape[0]:
            raise ValueError(f"step: x holds {x.shape[0]} sequences and the state {state.memory.shape[0]}")
        passage = self._passage(x, sequence_of(x, None, None))
        passage.before = replace(state, memory=state.memory.flatten(0, 1))
        y, memory = self.mixer.mix(x, passage)
        assert memory is not None
        tails = tuple(new.unflatten(0, (self.memories, -1)).transpose(0, 1).contiguous() for new in passage.tails)
        # A copy: a view would keep what was computed beside the memories.
        return y, MixerState(memory.view_as(state.memory).clone(), tails, state.position + x.shape[1])

    @property
    def memories(self) -> int:
        """How many there are, with the shared one."""
        return self.num_memories + self.shared_memory

    def _passage(self, x: Tensor, seq: SequenceParallel) -> RoutedPassage:
        routing = self.router(x)
        memories, weights = self._chosen(routing)
        routed = Routed.of(memories, self.memories, seq)
        self.routing = routing._replace(dropped=memories.numel() - routed.dispatch.counts.sum())
        return RoutedPassage(seq, routed=routed, weights=weights.flatten(0, 1))

    def _chosen(self, routing: Routing) -> tuple[Tensor, Tensor]:
        """The memories and their weights, the shared one's too, which stands after all others."""
        if not self.shared_memory:
            return routing.memories, routing.weights

        def beside(x: Tensor, value: float) -> Tensor:
            return torch.cat([x, torch.full_like(x[..., :1], value)], dim=-1)

        return beside(routing.memories, self.num_memories), beside(routing.weights, 1.0)
