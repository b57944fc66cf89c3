"""The loss: a sum over this rank's tokens, divided by the number of targets of all ranks."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lasp.models import LinearLlama3
from lasp.ops.norm import at_least_float32

#: How many logits are alive at once: a gibibyte of float32.
LOGITS = 2**28


class Sums(NamedTuple):
    """Over this rank's targets; 0 for a rank without any.

    Attributes:
        cross_entropy: of the next token, in nats.
        z_loss: of the squared logarithm of the normaliser of each token's probabilities: PaLM, https://arxiv.org/abs/2204.02311,
            section 5. None unless asked for.
    """

    cross_entropy: Tensor
    z_loss: Tensor | None


def sums_of_losses(model: LinearLlama3, features: Tensor, targets: Tensor, z_loss: bool = False) -> Sums:
    """What the model is trained on.

    Where the vocabulary is large, the logits are made piece by piece and made again in the backward.

    Args:
        model: its head makes the logits.
        features: ``[B, T, hidden]``, what `LinearLlama3.features` returned.
        targets: ``[B, T]``; those below 0 are left out.
        z_loss: whether its sum is asked for.
    """

    def piece(x: Tensor, y: Tensor) -> Tensor:
        logits = at_least_float32(model.head(x))
        total = F.cross_entropy(logits, y, reduction="sum")
        if not z_loss:
            return total[None]
        return torch.stack([total, logits.logsumexp(-1).square().masked_fill(y < 0, 0).sum()])

    tokens = max(1, LOGITS // model.config.vocabulary)
    x, y = features.flatten(0, 1), targets.flatten()
    if len(y) <= tokens:
        total = piece(x, y)
    else:
        pieces = zip(x.split(tokens), y.split(tokens), strict=True)
        total = cast(Tensor, sum(checkpoint(piece, a, b, use_reentrant=False) for a, b in pieces))
    return Sums(total[0], total[1] if z_loss else None)


def right_answers(model: LinearLlama3, features: Tensor, targets: Tensor) -> Tensor:
    """How many of this rank's targets the model finds likeliest, a float ``[]``; arguments as above, and pieces too."""
    tokens = max(1, LOGITS // model.config.vocabulary)
    x, y = features.flatten(0, 1), targets.flatten()
    right = torch.zeros((), device=x.device)
    with torch.no_grad():
        for a, b in zip(x.split(tokens), y.split(tokens), strict=True):
            right += ((model.head(a).argmax(-1) == b) & (b >= 0)).sum()
    return right
