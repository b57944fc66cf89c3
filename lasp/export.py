"""Write a checkpoint's weights as Hugging Face has them: ``python -m lasp.export --checkpoint runs/pretrain --out exported``.

transformers reads them where all layers are softmax attention, `lasp.models.load_pretrained` and ``pretrain.py --init-from`` in
any case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from lasp.models import save_pretrained
from lasp.training import errors_in_one_line
from lasp.training.checkpoint import read_model


@dataclass(frozen=True)
class ExportOptions:
    """Write a checkpoint's weights as Hugging Face has them."""

    checkpoint: Path
    """What pretrain.py wrote: the checkpoint, or the directory that it is in."""
    out: Path
    """Directory to write: new, or of what was exported before, which is replaced when all is written."""
    max_positions: int = 8192
    """What other programs are told of the longest sequence; nothing here depends on it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, write, and say what was written."""
    with errors_in_one_line("lasp.export"):
        options = tyro.cli(ExportOptions, args=arguments)
        model, tokenizer = read_model(options.checkpoint)
        save_pretrained(model, options.out, tokenizer=tokenizer, max_positions=options.max_positions)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count / 1e6:.1f}M parameters, tokenizer {tokenizer}: {options.out}")


if __name__ == "__main__":
    main()
