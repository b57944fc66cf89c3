"""The tokens that a mixer is given: a sequence, which ranks may share, or what follows on tokens that it has seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lasp.layers.convolution import ShortConvolution
from lasp.layers.rotary import RopeScaling, rotate
from lasp.parallel import SequenceParallel
from lasp.parallel.routed import Routed


@dataclass(frozen=True)
class MixerState:
    """All that a mixer keeps of the tokens before: as much after a million tokens as after one.

    Attributes:
        memory: the recurrent state ``[B, H, K, V]``, float32 (float64 for float64 layers).
        tails: of each short convolution, in the order in which the layer comes to them, the last inputs ``[B, size - 1, D]``.
        position: how many tokens there were, integers ``[B]``, on the layer's device.

    Where there are M memories, memory and tails have an axis for them after B.
    """

    memory: Tensor
    tails: tuple[Tensor, ...]
    position: Tensor

    @property
    def nbytes(self) -> int:
        """The memory that it takes, in bytes."""
        return sum(x.nbytes for x in (self.memory, *self.tails, self.position))

    @staticmethod
    def joined(states: Sequence[MixerState]) -> MixerState:
        """The states of several batches as one batch: of prompts of different lengths, to be continued side by side."""
        tails = zip(*(state.tails for state in states), strict=True)
        return MixerState(
            torch.cat([state.memory for state in states]),
            tuple(torch.cat(tail) for tail in tails),
            torch.cat([state.position for state in states]),
        )


@dataclass
class Passage:
    """Some tokens and what came before them: what knows of other tokens asks here.

    Attributes:
        sp: the ranks and the layout of these tokens.
        before: the state that they follow on; None for a sequence from its beginning.
        tails: what the short convolutions must keep for the tokens that follow; filled where there is a state.
        routed: how they are routed to memories, if they are.
    """

    sp: SequenceParallel
    before: MixerState | None = None
    tails: list[Tensor] = field(default_factory=list)
    routed: Routed | None = None

    def sent(self, x: Tensor) -> Tensor:
        """The tokens as they write to the state."""
        return x

    def collected(self, o: Tensor) -> Tensor:
        """The output of each token, of what the state gave ``[B, T, H, V]``."""
        return o

    def projected(self, x: Tensor, projection: nn.Module) -> Tensor:
        """What is made of tokens x for the state: of all of them by the same projection."""
        y: Tensor = projection(x)
        return y

    def asked(self, x: Tensor, projection: nn.Module) -> Tensor:
        """What is made of tokens x to ask the state."""
        y: Tensor = projection(x)
        return y

    def convolved(self, x: Tensor, conv: ShortConvolution | None) -> Tensor:
        """x ``[B, T, D]`` through the short convolution, if there is one."""
        if conv is None:
            return x
        if self.before is None:
            return conv(x, sp=self.sp)
        tail = self.before.tails[len(self.tails)].to(x.dtype)
        x = torch.cat([tail, x], dim=1)
        kept = tail.shape[1]
        # A copy: a view would keep all of x.
        self.tails.append(x[:, x.shape[1] - kept :].clone(memory_format=torch.contiguous_format))
        return conv(x)[:, kept:]

    def rotated(self, x: Tensor, theta: float, scaling: RopeScaling | None) -> Tensor:
        """x ``[B, T, H, D]``, its pairs rotated by the tokens' positions."""
        if self.before is None:
            return rotate(x, self.sp, theta, scaling=scaling)
        positions = self.before.position[:, None] + torch.arange(x.shape[1], device=x.device)
        return rotate(x, self.sp, theta, positions, scaling)
