"""The loss: a sum over this rank's tokens, divided by the number of targets of all ranks."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lasp.models import LinearLlama3
from lasp.ops.norm import at_least_float32

#: How many logits are alive at once: a gibibyte of float32.
LOGITS = 2**28


def sum_of_cross_entropies(model: LinearLlama3, features: Tensor, targets: Tensor) -> Tensor:
    """The sum, over this rank's tokens, of the cross entropy of the next token; 0 for a rank without any.

    Where the vocabulary is large, the logits are made piece by piece and made again in the backward.

    Args:
        model: its head makes the logits.
        features: ``[B, T, hidden]``, what `LinearLlama3.features` returned.
        targets: ``[B, T]``; those below 0 are left out.
    """

    def piece(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(at_least_float32(model.head(x)), y, reduction="sum")

    tokens = max(1, LOGITS // model.config.vocabulary)
    x, y = features.flatten(0, 1), targets.flatten()
    if len(y) <= tokens:
        return piece(x, y)
    pieces = zip(x.split(tokens), y.split(tokens), strict=True)
    return cast(Tensor, sum(checkpoint(piece, a, b, use_reentrant=False) for a, b in pieces))


def right_answers(model: LinearLlama3, features: Tensor, targets: Tensor) -> Tensor:
    """How many of this rank's targets the model finds likeliest, a float ``[]``; arguments as above, and pieces too."""
    tokens = max(1, LOGITS // model.config.vocabulary)
    x, y = features.flatten(0, 1), targets.flatten()
    right = torch.zeros((), device=x.device)
    with torch.no_grad():
        for a, b in zip(x.split(tokens), y.split(tokens), strict=True):
            right += ((model.head(a).argmax(-1) == b) & (b >= 0)).sum()
    return right
