"""Pretraining: options, data, the trainer, checkpoints and metrics."""

from lasp.training.command import errors_in_one_line, read_options
from lasp.training.metrics import Row, read_rows
from lasp.training.options import Options
from lasp.training.trainer import Trainer

__all__ = ["Options", "Row", "Trainer", "errors_in_one_line", "read_options", "read_rows"]
