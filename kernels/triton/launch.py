"""Launching kernels without Triton's own look at every argument, which takes longer than a short kernel."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from lasp.kernels.triton.language import INTERPRETED


def ready(x: Tensor) -> Tensor:
    """x as kernels take it: contiguous, its first element at a multiple of 16 bytes."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


class Kernel:
    """A Triton function whose compiled forms are found by the types of its tensors and by its constants alone.

    Its tensors must be `ready`, but for those of which it says ``do_not_specialize_on_alignment``, and its integers below 2³¹
    or annotated. The constants stand last in its signature.

    Args:
        function: what ``@triton.jit`` made, with its integers not specialised.
    """

    def __init__(self, function: Any):
        self.function = function
        self._compiled: dict[tuple[Any, ...], Any] = {}
        #: Which of the arguments are tensors.
        self._tensors: tuple[int, ...] | None = None

    def __call__(self, grid: tuple[int, int, int], *arguments: Any, warps: int, **constants: Any) -> None:
        """Launch it on the device of the first argument."""
        first: Tensor = arguments[0]
        if 0 in grid:
            return
        if INTERPRETED:
            self._check(arguments)
            self.function[grid](*arguments, **constants)
        elif first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                self(grid, *arguments, warps=warps, **constants)
        else:
            # The autograd engine's threads do not inherit the allocator.
            triton.set_allocator(_scratch)
            if self._tensors is None:
                self._tensors = tuple(i for i, x in enumerate(arguments) if isinstance(x, Tensor))
            values = tuple(constants.values())
            key = (first.device.index, warps, values, *[arguments[i].dtype for i in self._tensors])
            compiled = self._compiled.get(key)
            if compiled is None:
                assert list(constants) == self.function.arg_names[-len(constants) :], "constants stand last, in order"
                self._compiled[key] = self._compile(grid, arguments, warps, constants)
            else:
                # Addresses spare the launcher a question to the driver for each tensor.
                places = list(arguments)
                for i in self._tensors:
                    places[i] = arguments[i].data_ptr()
                compiled[grid](*places, *values)

    def _check(self, arguments: tuple[Any, ...]) -> None:
        """What a compiled form takes for granted, where there is time to look."""
        anywhere = self.function.kwargs.get("do_not_specialize_on_alignment") or ()
        for name, x in zip(self.function.arg_names, arguments, strict=False):
            if isinstance(x, Tensor) and name not in anywhere:
                assert x.is_contiguous(), f"{name} must be contiguous"
                assert x.data_ptr() % 16 == 0, f"{name} must begin at a multiple of 16 bytes"

    def _compile(self, grid: tuple[int, int, int], arguments: Any, warps: int, constants: dict[str, Any]) -> Any:
        """Compile and launch, with as many chunks in flight as fit the processor's memory: Triton's versions differ."""
        while True:
            try:
                return self.function[grid](*arguments, **constants, num_warps=warps)
            except OutOfResources:
                if constants.get("STAGES", 1) == 1:
                    raise
                constants = {**constants, "STAGES": constants["STAGES"] - 1}


#: Where the kernels' tensor descriptors stand, by device and stream: all that were made, the largest last.
_SCRATCH: dict[tuple[int, int | None], list[Tensor]] = {}


def _scratch(size: int, _alignment: int, stream: int | None) -> Tensor:
    """Memory for one kernel's tensor descriptors: kernels of a stream follow one another and may share it.

    None is ever given back: a graph that was captured may point to it.
    """
    made = _SCRATCH.setdefault((torch.cuda.current_device(), stream), [])
    if not made or made[-1].numel() < size:
        made.append(torch.empty(1 << max(20, (size - 1).bit_length()), dtype=torch.int8, device="cuda"))
    return made[-1]
