"""One token: what a recurrence does to its state and reads from it, without segments to cut and compose."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class OneToken:
    """A token of each sequence that waits for its query; the definition is `lasp.kernels.reference.recurrent`'s.

    Attributes:
        k: ``[B, 1, H, K]``.
        v: ``[B, 1, H, V]``.
        g: the log-decay: None, ``[H]``, ``[B, 1, H]`` or ``[B, 1, H, K]``.
        beta: ``[B, 1, H]``, or None.
        state: before the token ``[B, 1, H, K, V]``; zero when None.
    """

    k: Tensor
    v: Tensor
    g: Tensor | None
    beta: Tensor | None
    state: Tensor | None

    def finish(self, q: Tensor, scale: float, final_state: bool = False) -> tuple[Tensor, Tensor | None]:
        """The output ``[B, 1, H, V]``, and the state after the token if it is asked for."""
        dtype = torch.promote_types(self.v.dtype, torch.float32)
        q, k, u = (x.squeeze(1).to(dtype) for x in (q, self.k, self.v))
        state = u.new_zeros(*k.shape, u.shape[-1]) if self.state is None else self.state.squeeze(1).to(dtype)
        if self.g is not None:
            g = self.g.to(dtype) if self.g.dim() == 1 else self.g.squeeze(1).to(dtype)
            decay = g.exp().unsqueeze(-1)
            state = state * (decay if g.dim() == 3 else decay.unsqueeze(-1))
        if self.beta is not None:
            u = self.beta.squeeze(1).to(dtype).unsqueeze(-1) * (u - _read(state, k))
        state = state + k.unsqueeze(-1) * u.unsqueeze(-2)
        o = scale * _read(state, q)
        return o.unsqueeze(1).to(self.v.dtype), state.unsqueeze(1) if final_state else None


def _read(state: Tensor, x: Tensor) -> Tensor:
    """``Sᵀ x`` of states ``[B, H, K, V]``. No matrix product, which might be computed in tf32."""
    return (state * x.unsqueeze(-1)).sum(-2)
