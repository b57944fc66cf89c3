"""Models made of the layers."""

from lasp.models.config import MIXTURE, PRESETS, LinearLlama3Config, preset
from lasp.models.linear_llama3 import RECOMPUTE, LinearLlama3

__all__ = ["MIXTURE", "PRESETS", "RECOMPUTE", "LinearLlama3", "LinearLlama3Config", "preset"]
