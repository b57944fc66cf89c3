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
    """A Triton function.

    Its signature has the tensors first, then numbers, then constants. Tensors must be `ready`, but for those of which it says
    ``do_not_specialize_on_alignment``, and integers below 2³¹ or annotated.

    Args:
        function: what ``@triton.jit`` made, with its integers not specialised.
    """

    def __init__(self, function: Any):
        self.function = function

    def launch(self, grid: tuple[int, int, int], *numbers: float, warps: int, **constants: Any) -> Launch:
        """Everything of a launch but its tensors: made once for all that are of the same sizes."""
        names = self.function.arg_names
        assert list(constants) == names[len(names) - len(constants) :], f"constants must stand last, in order: {names}"
        return Launch(self, grid, numbers, warps, constants)


class Launch:
    """A kernel with its grid, numbers and constants: call it with the tensors."""

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        numbers: tuple[float, ...],
        warps: int,
        constants: dict[str, Any],
    ):
        self._kernel, self._grid, self._numbers, self._warps, self._constants = kernel, grid, numbers, warps, constants
        self._rest = (*numbers, *constants.values())
        #: By device and dtypes.
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, *tensors: Tensor) -> None:
        """Launch on the current stream of the first tensor's device."""
        grid = self._grid
        if 0 in grid:
            return
        if INTERPRETED:
            self._check(tensors)
            self._kernel.function[grid](*tensors, *self._numbers, **self._constants)
            return
        device = tensors[0].get_device()
        if device != torch.cuda.current_device():
            with torch.cuda.device(device):
                self(*tensors)
            return
        # The autograd engine's threads do not inherit the allocator.
        triton.set_allocator(_scratch)
        key = (device, *[x.dtype for x in tensors])
        compiled = self._compiled.get(key)
        if compiled is None:
            self._compiled[key] = self._compile(tensors)
            return
        # Addresses spare the launcher a question to the driver for each tensor.
        addresses = [x.data_ptr() for x in tensors]
        if _observed():
            compiled[grid](*addresses, *self._rest)
        else:
            compiled.run(
                *grid, _stream(device), compiled.function, compiled.packed_metadata, None, None, None, *addresses, *self._rest
            )  # fmt: skip

    def _check(self, tensors: tuple[Tensor, ...]) -> None:
        """What a compiled form takes for granted, where there is time to look."""
        function = self._kernel.function
        anywhere = function.kwargs.get("do_not_specialize_on_alignment") or ()
        for name, x in zip(function.arg_names, tensors, strict=False):
            if name not in anywhere:
                assert x.is_contiguous(), f"{name} must be contiguous"
                assert x.data_ptr() % 16 == 0, f"{name} must begin at a multiple of 16 bytes"

    def _compile(self, tensors: tuple[Tensor, ...]) -> Any:
        """Compile and launch, with as many chunks in flight as fit the processor's memory: Triton's versions differ."""
        constants = self._constants
        while True:
            try:
                return self._kernel.function[self._grid](*tensors, *self._numbers, **constants, num_warps=self._warps)
            except OutOfResources:
                if constants.get("STAGES", 1) == 1:
                    raise
                constants = {**constants, "STAGES": constants["STAGES"] - 1}


def _stream(device: int) -> int:
    return torch._C._cuda_getCurrentRawStream(device)


def _observed() -> bool:
    """Whether a profiler wants to hear of launches."""
    hooks = triton.knobs.runtime
    return bool(hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls)


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
