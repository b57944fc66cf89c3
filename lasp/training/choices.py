"""What options that name something stand for."""

from __future__ import annotations

import torch

from lasp.parallel import SequenceLayout

#: Who holds which tokens of a sequence, as ``--layout`` takes it.
LAYOUTS = {
    "contiguous": SequenceLayout.contiguous,
    "zigzag": SequenceLayout.zigzag,
    "zigzag-per-document": SequenceLayout.zigzag_per_document,
}
#: What there is to train on, as ``--task`` takes it.
TASKS = ("text", "mqar")
#: How the learning rate goes after the warm-up, as ``--schedule`` takes it: see `lasp.training.schedule`.
SCHEDULES = ("cosine", "wsd")
#: What the matrix products are computed in, as ``--dtype`` takes it.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
