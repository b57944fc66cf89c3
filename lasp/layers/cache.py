"""What softmax attention keeps of the tokens before: their keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Room:
    """Places for keys and values, which a state shares with those that follow on it: each is the beginning of the next.

    Attributes:
        places: keys and values ``[2, B, Hk, places, D]``.
        filled: how many places are taken, from the first, by the state that has most.
    """

    places: Tensor
    filled: int


@dataclass(frozen=True)
class AttentionState:
    """The keys and values of all tokens before, or of those in the window: then as many after a million tokens as after few.

    Where the room is full there is made twice as much as is taken, so that each token is copied a few times in all, however
    many follow. With a window that is room for 2 · (window − 1) tokens.

    Attributes:
        room: where they stand, the last token of every row at the same place.
        filled: how many of its places are this state's.
        position: how many tokens there were, integers ``[B]``, on the layer's device.
        padded: whether some rows have fewer tokens than places: theirs are the last, and zeros stand before them.
    """

    room: Room
    filled: int
    position: Tensor
    padded: bool = False

    @property
    def nbytes(self) -> int:
        """The memory that it takes, in bytes."""
        return self.room.places.nbytes + self.position.nbytes

    @staticmethod
    def joined(states: Sequence[AttentionState]) -> AttentionState:
        """The states of several batches as one batch: see `MixerState.joined`."""
        filled = max(state.filled for state in states)
        rows = [F.pad(state.room.places[..., : state.filled, :], (0, 0, filled - state.filled, 0)) for state in states]
        padded = any(state.padded or state.filled < filled for state in states)
        position = torch.cat([state.position for state in states])
        return AttentionState(Room(torch.cat(rows, dim=1), filled), filled, position, padded)

    def followed_by(self, k: Tensor, v: Tensor, window: int | None) -> tuple[Tensor, AttentionState]:
        """Add the keys and values of the tokens that come next.

        Args:
            k: ``[B, T, Hk, D]``.
            v: alike.
            window: how many tokens a token sees, itself included; all before it when None.

        Returns:
            The keys and values that these tokens may see, their own the last, ``[2, B, Hk, N, D]``, and the state after them.
        """
        new = torch.stack([k, v]).transpose(2, 3)
        places, count = self.room.places, new.shape[3]
        before = self.filled if window is None else min(self.filled, window - 1)
        position = self.position + count
        end = self.filled + count
        if self._has_room_for(new):
            places[..., self.filled : end, :] = new
            self.room.filled = end
            return places[..., self.filled - before : end, :], AttentionState(self.room, end, position, self.padded)
        seen = before + count
        kept = seen if window is None else min(seen, window - 1)
        spare = new.new_empty(*new.shape[:3], kept, new.shape[4])
        places = torch.cat([places[..., self.filled - before : self.filled, :].to(new.dtype), new, spare], dim=3)
        # A copy of what is kept: a view would keep all that was seen.
        room = Room(places if kept == seen else places[..., seen - kept :, :].clone(), kept)
        return places[..., :seen, :], AttentionState(room, kept, position, self.padded)

    def mask(self, tokens: int, places: int, window: int | None) -> Tensor | None:
        """Which of the places that `followed_by` gave each of the tokens sees; None where each sees all.

        Returns:
            True where seen, ``[T, N]``, or ``[B, 1, T, N]`` where the rows differ.
        """
        if tokens == 1 and not self.padded:
            return None
        keys = torch.arange(tokens - places, tokens, device=self.position.device)
        queries = keys[places - tokens :, None]
        seen = keys <= queries
        if window is not None:
            seen = seen & (keys > queries - window)
        return seen & (self.position[:, None, None, None] + keys >= 0) if self.padded else seen

    def _has_room_for(self, new: Tensor) -> bool:
        """Whether `new` may be written behind this state: not over another that followed on it, nor where gradients go."""
        places = self.room.places
        return (
            self.room.filled == self.filled
            and self.filled + new.shape[3] <= places.shape[3]
            and new.dtype == places.dtype
            and not (new.requires_grad or places.requires_grad)
        )
