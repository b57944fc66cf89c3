"""What all ops share: how they take a sequence, and how they answer bad input in one line."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from operator import index

import torch
from torch import Tensor
from torch.compiler import assume_constant_result

from lasp.parallel import SequenceLayout, SequenceParallel
from lasp.parallel.routed import Routed

CuSeqlens = Sequence[int] | Tensor | None


@lru_cache(maxsize=64)
def _whole(total_tokens: int, cu_seqlens: tuple[int, ...] | None) -> SequenceParallel:
    return SequenceParallel.single(SequenceLayout.contiguous(total_tokens, 1, cu_seqlens))


@assume_constant_result
def _traced_whole(total_tokens: int, cu_seqlens: tuple[int, ...] | None) -> SequenceParallel:
    return SequenceParallel.named(_whole(total_tokens, cu_seqlens).name, keep=True)


def sequence_of(x: Tensor, cu_seqlens: CuSeqlens, sp: SequenceParallel | None) -> SequenceParallel:
    """The ranks and the layout of an op: those of `sp`, or without it this rank alone with the documents of `cu_seqlens`.

    Raises:
        ValueError: where `cu_seqlens` is given twice or malformed, packed documents come in a batch, or `cu_seqlens` is a
            tensor under ``torch.compile``: a graph is made for one layout.
    """
    if sp is not None:
        if cu_seqlens is not None:
            raise ValueError("cu_seqlens= was given beside sp=: under sp the documents come from its layout")
        return sp
    compiling = torch.compiler.is_compiling()
    # A graph is made for one layout: in it, `index` asks for the number of tokens itself.
    tokens = index(x.shape[1])
    if cu_seqlens is None:
        return _traced_whole(tokens, None) if compiling else _whole(tokens, None)
    if compiling and isinstance(cu_seqlens, Tensor):
        raise ValueError(
            "cu_seqlens= is a tensor, which torch.compile cannot look into: pass a tuple of integers, or a layout under sp="
        )
    bounds = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens
    if x.shape[0] != 1:
        raise ValueError(f"cu_seqlens= packs documents into one row: expected batch size 1, given {x.shape[0]}")
    documents = tuple(index(c) for c in bounds)
    return _traced_whole(tokens, documents) if compiling else _whole(tokens, documents)


def agree(
    sp: SequenceParallel,
    statement: str | Callable[[], str],
    check: Callable[[], None],
    call: Hashable = None,
) -> None:
    """Run `check` and settle with the other ranks of `sp` on `statement`, so that all raise where one would.

    In a graph of ``torch.compile`` the check is all: ranks cannot talk while they trace.

    Args:
        sp: the ranks.
        statement: what all must say alike, or what makes it.
        check: raises ValueError where something is wrong.
        call: what statement and check depend on: where it is as before, neither is made again.

    Raises:
        ValueError: what `check` raises, or what another rank reports.
    """
    if torch.compiler.is_compiling():
        check()
        return
    if call is not None and sp.knows(call):
        return
    if not sp.agrees:
        check()
    else:
        problem = None
        try:
            check()
        except ValueError as error:
            problem = str(error)
        sp.settle(statement if isinstance(statement, str) else statement(), problem)
    if call is not None:
        sp.learn(call)


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
    if x.dim() != len(names) or any(
        axis in sizes and size != sizes[axis] for axis, size in zip(names, x.shape, strict=True)
    ):
        wanted = [str(sizes[axis]) if axis in sizes else axis for axis in names]
        raise ValueError(f"{op}: {name} must be [{', '.join(names)}] = [{', '.join(wanted)}], given {list(x.shape)}")


def check_tokens(op: str, tokens: int, sp: SequenceParallel) -> None:
    """Raise unless a local tensor has as many tokens as the layout gives this rank."""
    if tokens != sp.local_tokens:
        raise ValueError(
            f"{op}: rank {sp.rank} was given {tokens} tokens, its layout of {sp.layout.total_tokens} tokens gives it "
            f"{sp.local_tokens}; shard the inputs with layout.shard"
        )


def check_routed(op: str, routed: Routed, batch: int, tokens: int, initial_state: Tensor | None, causal: bool) -> None:
    """Raise unless a tensor holds the tokens that were routed, and nothing is asked that memories do not give."""
    if (batch, tokens) != (1, routed.tokens):
        raise ValueError(
            f"{op}: routed tokens are one row of {routed.tokens}, as routed.dispatch.send gives them, given {batch} of {tokens}"
        )
    if not causal:
        raise ValueError(f"{op}: routed tokens see what is before them: causal=False is not for them")
    if initial_state is not None and not routed.whole:
        raise ValueError(
            f"{op}: memories start from states on one rank, in rows of one document: leave out initial_state"
        )
    if routed.sp.linear != "states":
        raise ValueError(
            f"{op}: memories are states that travel, and with the method {routed.sp.method} none do: choose the method lasp2, "
            "lasp1 or zeco"
        )


def check_log_decay(op: str, g: Tensor) -> None:
    """Raise where a log-decay is positive or NaN. It reads the values, which holds up a device and cannot be traced."""
    if torch.compiler.is_compiling():
        return
    if not bool(torch.all(g <= 0)):
        raise ValueError(
            f"{op}: g must be a log-decay, at most 0 everywhere; its largest value is {g.max().item():.4g}"
        )
