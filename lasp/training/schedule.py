"""How the learning rate rises and falls."""

from __future__ import annotations

import math

from lasp.training.options import Options


def learning_rate(options: Options, step: int) -> float:
    """That of a step, from 0: linear from 0 over the warm-up, then along the schedule to ``--min-lr`` of the peak.

    ``cosine``: https://arxiv.org/abs/1608.03983. ``wsd``: warm-up, stable, decay, https://arxiv.org/abs/2404.06395, the decay
    along 1 − √, https://arxiv.org/abs/2405.18392, section 4.
    """
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    return options.lr * (options.min_lr + (1 - options.min_lr) * _height(options, step))


def _height(options: Options, step: int) -> float:
    """How much of the way between the least and the peak is left: 1 after the warm-up, 0 after the last step."""
    if options.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - options.warmup) / max(1, options.steps - options.warmup)))
    falling = min(max(1, round(options.decay * options.steps)), max(1, options.steps - options.warmup))
    return 1 - math.sqrt(max(0, step - (options.steps - falling)) / falling)
