"""Linear attention without the causal mask: every token reads the state after its document's last token.

LASP-2, https://arxiv.org/abs/2502.07563, Algorithm 1: the documents' states are summed over all ranks, forward and backward.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import assume_constant_result

from lasp.kernels import Recurrence, Tokens
from lasp.kernels.segments import Tables, gather, scatter
from lasp.parallel.linear import start_linear, sum_over_ranks
from lasp.parallel.operators import keep
from lasp.parallel.plan import Plan
from lasp.parallel.sequence_parallel import SequenceParallel

# Tokens are multiplied with their document's state in chunks of so many.
_CHUNK = 64


def unmasked_linear(
    recurrence: Recurrence | str,
    q: Tensor,
    tokens: Tokens,
    initial_state: Tensor | None,
    sp: SequenceParallel,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """``o_t = scale · S_Nᵀ q_t`` with S_N the state after the last token of t's document.

    Args:
        recurrence: what the tokens do to the state, or its name, as `start_linear` takes it.
        q: this rank's queries ``[B, T_local, H, K]``.
        tokens: its keys, values and gates.
        initial_state: ``[B, N, H, K, V]``, the same on every rank; zero when None.
        sp: the ranks and the layout.
        scale: the factor of the queries.

    Returns:
        ``o: [B, T_local, H, V]`` and the documents' final states ``[B, N, H, K, V]``.
    """
    compiling = torch.compiler.is_compiling()
    document, opened, tables = _traced(keep(sp.name), q.device) if compiling else _chunks(sp, q.device)
    if tokens.gates:
        _, final = start_linear(recurrence, tokens, initial_state, sp).finish(q, scale, final_state=True)
        assert final is not None
    else:
        # Nothing decays, so the order of the tokens is of no account and the exchange would be idle: a sum is all.
        k, v = (gather(x, _CHUNK, tables).to(tokens.state_dtype).transpose(2, 3) for x in (tokens.k, tokens.v))
        final = k.new_zeros(k.shape[0], sp.num_documents, *tokens.state_shape)
        final = final.index_add(1, document, k.transpose(-1, -2) @ v)
        if initial_state is not None:
            # Counted once, where the document starts.
            final = final.index_add(1, opened, initial_state.to(final.dtype).index_select(1, opened))
        final = sum_over_ranks(final, sp)
    queries = gather(q, _CHUNK, tables).to(tokens.state_dtype).transpose(2, 3) * scale
    o = queries @ final.index_select(1, document)
    return scatter(o.transpose(2, 3), tables).to(tokens.v.dtype), final


def _chunks(sp: SequenceParallel, device: torch.device) -> tuple[Tensor, Tensor, Tables | None]:
    """The document of each chunk, the documents that open on this rank, and the chunks' tables."""
    plan = Plan.of(sp.layout, sp.rank, _CHUNK)
    at, segments = plan.tables(device), plan.segments
    return at.document, at.opened, None if segments.regular else segments.tables(device)


@assume_constant_result
def _traced(name: str, device: torch.device) -> tuple[Tensor, Tensor, Tables | None]:
    return _chunks(SequenceParallel.named(name), device)
