"""Text as tokens, and the windows of it that a step trains on: the same windows however the step is split."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

#: How text becomes tokens, as ``--tokenizer`` takes it: the size of the vocabulary by name.
TOKENIZERS = {"bytes": 256}
#: What of the standard library is not read: other people's packages, tests (a third of it), and files made by builds.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def read_corpus(path: Path | None) -> Tensor:
    """The text as bytes: uint8 ``[N]``.

    Args:
        path: a text file, or a directory whose text files are read in the order of their names; None reads the sources of
            Python's standard library, which every machine that runs this has.

    Raises:
        ValueError: where nothing is there.
    """
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        files = [file for file in root.rglob("*.py") if not SKIPPED.intersection(file.relative_to(root).parts)]
    elif path.is_dir():
        root = path
        files = [file for file in root.rglob("*") if file.is_file()]
    elif path.is_file():
        root, files = path.parent, [path]
    else:
        raise ValueError(f"--data {path}: no such file or directory")
    text = bytearray()
    for file in sorted(files, key=lambda file: file.relative_to(root).as_posix()):
        text += file.read_bytes()
    if not text:
        raise ValueError(f"--data {root}: no text there")
    return torch.frombuffer(text, dtype=torch.uint8)


class Windows:
    """Random windows of a corpus, `batch_size` of them a step, drawn from (seed, step) alone.

    Args:
        corpus: uint8 ``[N]``.
        seq_len: T, how many tokens a window trains on; it holds one more, the last target.
        batch_size: how many windows a step has, over all ranks.
        seed: what they are drawn from.

    Raises:
        ValueError: where the corpus is shorter than a window.
    """

    def __init__(self, corpus: Tensor, seq_len: int, batch_size: int, seed: int):
        if len(corpus) < seq_len + 1:
            raise ValueError(
                f"--data holds {len(corpus)} tokens: a window of --seq-len {seq_len} and its last target need {seq_len + 1}"
            )
        self.corpus, self.seq_len, self.batch_size, self.seed = corpus, seq_len, batch_size, seed

    def targets(self, step: int) -> int:
        """How many a window of the step has."""
        return self.seq_len

    def rows(self, step: int, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Windows `first` to ``first + count`` of the step: inputs and targets, int64 ``[count, T]`` each."""
        starts = np.random.default_rng((self.seed, step)).integers(
            len(self.corpus) - self.seq_len, size=self.batch_size
        )
        rows = torch.stack([self.corpus[s : s + self.seq_len + 1] for s in starts[first : first + count].tolist()])
        return rows[:, :-1].long(), rows[:, 1:].long()
