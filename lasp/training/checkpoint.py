"""What a run needs to continue exactly: written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

NAME = "checkpoint.pt"


def save(directory: Path, state: dict[str, Any]) -> None:
    """Write the checkpoint of `directory`. One that a crash interrupts leaves the last one as it was."""
    unfinished = directory / f"{NAME}.unfinished"
    torch.save(state, unfinished)
    os.replace(unfinished, directory / NAME)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint, from its file or its directory, onto the CPU.

    Raises:
        ValueError: where there is none.
    """
    file = path / NAME if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"--resume {path}: no checkpoint there")
    state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return state
