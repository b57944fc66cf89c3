"""Softmax attention on one device, by PyTorch's own kernels: SDPA's on the CPU, FlexAttention on a GPU.

Attention over a part of the keys gives a part of the output and the log-sum-exp of its scores; `merge` joins parts, and the
gradients of a part follow from the output and the log-sum-exp of the whole. That is all that ranks need to share a sequence
(Ring Attention, https://arxiv.org/abs/2310.01889; the arithmetic is FlashAttention-2's, https://arxiv.org/abs/2307.08691).

q is ``[B, Tq, H, D]``; k and v are ``[B, Tk, Hk, D]``, where Hk divides H; log-sum-exps are ``[B, H, Tq]``, natural.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from lasp.parallel.attention.mask import Mask

#: The narrowest head that FlexAttention's kernels take; narrower ones are filled up with zeros.
NARROWEST = 16

_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
    """The output ``[B, Tq, H, D]`` and the log-sum-exp. A query that sees no key gets 0 and −∞. Records no gradient."""
    if mask.nothing:
        return torch.zeros_like(q), q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=wide(q.dtype))
    if q.is_cuda:
        with torch.no_grad():
            return _flex(q, k, v, mask, scale)
    if len(mask.parts) == 1:
        return _attend_on_cpu(q, k, v, mask, scale)
    o = torch.zeros_like(q)
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=wide(q.dtype))
    for rows, columns, part in mask.parts:
        if not part.nothing:
            given = q[:, rows], k[:, columns], v[:, columns]
            o[:, rows], lse[:, :, rows] = _attend_on_cpu(*given, part, scale)
    return o, lse


def _attend_on_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
    options, blind = _cpu_mask(mask, q.dtype)
    o, lse = _cpu(*(_heads_first(x, q.shape[2]) for x in (q, k, v)), 0.0, scale=scale, **options)
    if blind is not None:
        lse = lse.masked_fill(blind, -torch.inf)
    return o.transpose(1, 2), lse


def attend_backward(
    do: Tensor, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v that go through these keys, when `o` and `lse` are those over all keys.

    Args:
        do: the gradient of the output.
        o: the output over all keys that the queries see, in other parts too.
        lse: the log-sum-exp over all those keys.
        q: see the module.
        k: see the module.
        v: see the module.
        mask: as in `attend`.
        scale: as in `attend`.
    """
    if mask.nothing:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    if q.is_cuda:
        return _flex_backward(do, o, lse, q, k, v, mask, scale)
    if len(mask.parts) == 1:
        return _backward_on_cpu(do, o, lse, q, k, v, mask, scale)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows, columns, part in mask.parts:
        if not part.nothing:
            given = do[:, rows], o[:, rows], lse[:, :, rows], q[:, rows], k[:, columns], v[:, columns]
            dq[:, rows], dk_part, dv_part = _backward_on_cpu(*given, part, scale)
            dk[:, columns] += dk_part
            dv[:, columns] += dv_part
    return dq, dk, dv


def _backward_on_cpu(
    do: Tensor, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    options, _ = _cpu_mask(mask, q.dtype)
    heads, kv_heads = q.shape[2], k.shape[2]
    given = (_heads_first(x, heads) for x in (do, q, k, v, o))
    # A query that sees no key at all has no gradient, whatever stands in for its log-sum-exp.
    finite = lse.masked_fill(lse == -torch.inf, 0)
    dq, dk, dv = (x.transpose(1, 2) for x in _cpu_backward(*given, finite, 0.0, scale=scale, **options))
    if heads != kv_heads:
        dk, dv = (x.unflatten(2, (kv_heads, -1)).sum(3) for x in (dk, dv))
    return dq, dk, dv


def triangular_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The output where query i sees keys 0 to i, with gradients."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped).transpose(1, 2)


def flex_attention_with_gradients(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
    """The output for any mask on a GPU, with FlexAttention's own gradients."""
    return _flex(q, k, v, mask, scale)[0]


def merge(o: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Join the outputs over two disjoint parts of the keys; in `o`'s dtype, float32 at least if no digits shall be lost."""
    both = torch.logaddexp(lse, other_lse)
    # Where neither part sees a key, both is −∞ and the weights are those of exp(−∞).
    base = both.masked_fill(both == -torch.inf, 0)
    weight, other_weight = ((x - base).exp().transpose(1, 2).unsqueeze(-1) for x in (lse, other_lse))
    return o * weight + other * other_weight, both


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32 at least: what log-sum-exps and sums over parts are kept in."""
    return torch.promote_types(dtype, torch.float32)


def _heads_first(x: Tensor, heads: int) -> Tensor:
    """``[B, T, Hk, D]`` to ``[B, H, T, D]``, each head of keys or values repeated for the queries that share it."""
    x = x.transpose(1, 2)
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _cpu_mask(mask: Mask, dtype: torch.dtype) -> tuple[dict[str, Any], Tensor | None]:
    """The mask as arguments of the CPU kernel, and the queries that see no key where there may be any."""
    if mask.everything:
        return {"is_causal": False}, None
    if mask.triangular:
        return {"is_causal": True}, None
    bias, blind = mask.additive(dtype)
    return {"is_causal": False, "attn_mask": bias}, blind


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
    width = q.shape[-1]
    if width < NARROWEST:
        q, k, v = (F.pad(x, (0, NARROWEST - width)) for x in (q, k, v))
    o, aux = _flex_attention(q.dtype)(
        *(x.transpose(1, 2) for x in (q, k, v)),
        block_mask=mask.blocks(q.device),
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
        return_aux=AuxRequest(lse=True),
    )
    return o[..., :width].transpose(1, 2), aux.lse


@cache
def _flex_attention(dtype: torch.dtype) -> Any:
    """Compiled, but for float64, which only its definition knows.

    Past a number of shapes the compiler gives up, and the definition holds a table of all queries × keys: with `fullgraph`
    that is an error and no silent loss of memory, and the number is one that no training comes to.
    """
    if dtype == torch.float64:
        return flex_attention
    return torch._dynamo.config.patch(recompile_limit=256)(torch.compile(flex_attention, fullgraph=True))


def _flex_backward(
    do: Tensor, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """By FlexAttention's own backward, which knows of these keys alone: its gradients are asked for as the whole weighs them.

    ``o = Σ w_i o_i`` with ``w_i = exp(lse_i − lse)`` over the parts i, so ``do_i = w_i do`` and
    ``dlse_i = w_i do · (o_i − o)``.
    """
    leaves = q, k, v = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        o_i, lse_i = _flex(q, k, v, mask, scale)
    base = lse.masked_fill(lse == -torch.inf, 0)
    weight = (lse_i.detach() - base).exp()
    dlse = weight * (do * (o_i.detach() - o)).to(weight.dtype).sum(-1).transpose(1, 2)
    do_i = (do * weight.transpose(1, 2).unsqueeze(-1)).to(o_i.dtype)
    dq, dk, dv = torch.autograd.grad([o_i, lse_i], leaves, [do_i, dlse.to(lse_i.dtype)])
    return dq, dk, dv
