"""A measured figure is worth what is known of how it was measured: results as JSON, with hardware, versions and command."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from dataclasses import asdict, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

#: Packages whose versions change a figure.
PACKAGES = ("lasp", "torch", "triton", "numpy", "tokenizers", "flash-linear-attention", "megatron-core")


#: The environment variable by which a launcher other than torchrun says how it was called.
LAUNCHER = "LASP_LAUNCHER"


def record(path: Path, command: str, figures: Any) -> None:
    """Write figures to a JSON file.

    Args:
        path: the file; its directory is made.
        command: what a reader runs to get them again.
        figures: anything that JSON holds, and dataclasses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"command": command, "hardware": hardware(), "versions": versions(), "figures": figures}
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False, default=_plain) + "\n")


def command_of(module: str) -> str:
    """The command that this process was started by, as a reader types it: with its launcher and its options.

    Args:
        module: what was run, as ``python -m`` takes it.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    launcher = os.environ.get(LAUNCHER) or (f"torchrun --nproc-per-node {ranks}" if ranks > 1 else "python")
    return f"{launcher} -m {module} {shlex.join(sys.argv[1:])}".strip()


def _plain(figure: Any) -> dict[str, Any]:
    if is_dataclass(figure) and not isinstance(figure, type):
        return asdict(figure)
    raise TypeError(f"a figure must be what JSON holds or a dataclass, given {type(figure).__name__}")


def hardware() -> dict[str, Any]:
    """This node's processors: the GPUs by name, or the CPU."""
    found: dict[str, Any] = {"cpu": _cpu(), "cores": len(os.sched_getaffinity(0))}
    if torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found


def versions() -> dict[str, str]:
    """Python, the packages that are installed of those that matter, and CUDA where torch has it."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def _cpu() -> str:
    """The model of the CPU."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
