"""What all ops share: how they take a sequence, and how they answer bad input in one line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from lasp.parallel import SequenceLayout, SequenceParallel

CuSeqlens = Sequence[int] | Tensor | None


@lru_cache(maxsize=64)
def _whole(total_tokens: int, cu_seqlens: tuple[int, ...] | None) -> SequenceParallel:
    return SequenceParallel.single(SequenceLayout.contiguous(total_tokens, 1, cu_seqlens))


def sequence_of(x: Tensor, cu_seqlens: CuSeqlens, sp: SequenceParallel | None) -> SequenceParallel:
    """The ranks and the layout of an op: those of `sp`, or without it this rank alone with the documents of `cu_seqlens`.

    Raises:
        ValueError: where `cu_seqlens` is given twice or malformed, or packed documents come in a batch.
    """
    if sp is not None:
        if cu_seqlens is not None:
            raise ValueError("cu_seqlens= was given beside sp=: under sp the documents come from its layout")
        return sp
    if cu_seqlens is None:
        return _whole(x.shape[1], None)
    bounds = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens
    if x.shape[0] != 1:
        raise ValueError(f"cu_seqlens= packs documents into one row: expected batch size 1, given {x.shape[0]}")
    return _whole(x.shape[1], tuple(int(c) for c in bounds))


def agree(sp: SequenceParallel, statement: str, check: Callable[[], None]) -> None:
    """Run `check` and settle with the other ranks of `sp` on `statement`, so that all raise where one would.

    Raises:
        ValueError: what `check` raises, or what another rank reports.
    """
    problem = None
    try:
        check()
    except ValueError as error:
        problem = str(error)
    sp.settle(statement, problem)


def describe(**tensors: Tensor | None) -> str:
    """The shapes of tensors as far as ranks must agree on them: all axes but the tokens'."""
    return ", ".join(
        f"{name}=None"
        if x is None
        else f"{name}={str(x.dtype).removeprefix('torch.')}{list(x.shape[:1] + x.shape[2:])}"
        for name, x in tensors.items()
    )


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether the op will have a backward pass, which ranks must agree on."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def check_axes(op: str, x: Tensor | None, name: str, axes: str, **sizes: int) -> None:
    """Raise unless x has the named axes, each of the size given for it (others are free)."""
    if x is None:
        return
    names = axes.split()
    wanted = [str(sizes[axis]) if axis in sizes else axis for axis in names]
    if x.dim() != len(names) or any(
        axis in sizes and size != sizes[axis] for axis, size in zip(names, x.shape, strict=True)
    ):
        raise ValueError(f"{op}: {name} must be [{', '.join(names)}] = [{', '.join(wanted)}], given {list(x.shape)}")


def check_tokens(op: str, tokens: int, sp: SequenceParallel) -> None:
    """Raise unless a local tensor has as many tokens as the layout gives this rank."""
    if tokens != sp.local_tokens:
        raise ValueError(
            f"{op}: rank {sp.rank} was given {tokens} tokens, its layout of {sp.layout.total_tokens} tokens gives it "
            f"{sp.local_tokens}; shard the inputs with layout.shard"
        )


def check_log_decay(op: str, g: Tensor) -> None:
    """Raise where a log-decay is positive or NaN. It reads the values, which holds up a device."""
    if not bool(torch.all(g <= 0)):
        raise ValueError(
            f"{op}: g must be a log-decay, at most 0 everywhere; its largest value is {g.max().item():.4g}"
        )
