"""Megatron-Core on CPU ranks: where it asks for a CUDA device it gets the CPU. What it computes is left as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode


class _OnCPU(TorchFunctionMode):
    """Tensors that are asked for on a CUDA device, or in pinned memory, are made on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return func(*args, **kwargs)


class _Stream:
    """No stream: what was asked for is done."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return _nothing

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


@contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Until the end of the block; with a CUDA device nothing changes."""
    if torch.cuda.is_available():
        yield
        return
    import megatron.core.tensor_parallel.random as megatron_random

    name_of, barrier = torch.Tensor.type, dist.barrier

    def current_device() -> str:
        return "cpu"

    def kind(self: Any, dtype: Any = None, *args: Any, **options: Any) -> Any:
        # Megatron sorts gradients by names of CUDA's types. Under the mode below, `name_of` leads here once more.
        if dtype is None:
            return "torch.cuda." + name_of(self).removeprefix("torch.").removeprefix("cuda.")
        return name_of(self, dtype, *args, **options)

    replaced: dict[Any, dict[str, Any]] = {
        torch.cuda: {
            "current_device": current_device,
            "synchronize": _nothing,
            "get_rng_state": _state,
            "manual_seed": torch.manual_seed,
            "Stream": _Stream,
            "current_stream": _Stream,
            "default_stream": _Stream,
            "stream": _Stream,
        },
        torch.Tensor: {"cuda": _itself, "type": kind},
        torch.nn.Module: {"cuda": _itself},
        dist: {"barrier": lambda group=None, **_: barrier(group=group)},
        megatron_random: {"_get_cuda_rng_state": _state, "_set_cuda_rng_state": _set_state},
    }
    before = [(owner, name, getattr(owner, name)) for owner, names in replaced.items() for name in names]
    for owner, names in replaced.items():
        for name, value in names.items():
            setattr(owner, name, value)
    try:
        with _OnCPU():
            yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _itself(x: Any, *_: Any, **__: Any) -> Any:
    return x


def _state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(state)
