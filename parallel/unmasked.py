"""Linear attention without the causal mask: every token reads the state after its document's last token.

LASP-2, https://arxiv.org/abs/2502.07563, Algorithm 1: the documents' states are summed over all ranks, forward and backward.
"""

from __future__ import annotations

from torch import Tensor

from lasp.kernels import Recurrence, Tokens
from lasp.parallel.linear import start_linear, sum_over_ranks
from lasp.parallel.plan import Plan
from lasp.parallel.sequence_parallel import SequenceParallel

# Tokens are multiplied with their document's state in chunks of so many.
_CHUNK = 64


def unmasked_linear(
    recurrence: Recurrence,
    q: Tensor,
    tokens: Tokens,
    initial_state: Tensor | None,
    sp: SequenceParallel,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """``o_t = scale · S_Nᵀ q_t`` with S_N the state after the last token of t's document.

    Args:
        recurrence: what the tokens do to the state.
        q: this rank's queries ``[B, T_local, H, K]``.
        tokens: its keys, values and gates.
        initial_state: ``[B, N, H, K, V]``, the same on every rank; zero when None.
        sp: the ranks and the layout.
        scale: the factor of the queries.

    Returns:
        ``o: [B, T_local, H, V]`` and the documents' final states ``[B, N, H, K, V]``.
    """
    plan = Plan.of(sp.layout, sp.rank, _CHUNK)
    document = plan.tables(q.device).document
    if tokens.gates:
        _, final = start_linear(recurrence, tokens, initial_state, sp).finish(q, scale, final_state=True)
        assert final is not None
    else:
        # Nothing decays, so the order of the tokens is of no account and the exchange would be idle: a sum is all.
        k, v = (plan.segments.gather(x).to(tokens.state_dtype).transpose(2, 3) for x in (tokens.k, tokens.v))
        final = k.new_zeros(k.shape[0], sp.layout.num_documents, *tokens.state_shape)
        final = final.index_add(1, document, k.transpose(-1, -2) @ v)
        if initial_state is not None:
            # Counted once, where the document starts.
            at = plan.tables(q.device)
            final = final.index_add(1, at.opened, initial_state.to(final.dtype).index_select(1, at.opened))
        final = sum_over_ranks(final, sp)
    queries = plan.segments.gather(q).to(tokens.state_dtype).transpose(2, 3) * scale
    o = queries @ final.index_select(1, document)
    return plan.segments.scatter(o.transpose(2, 3)).to(tokens.v.dtype), final
