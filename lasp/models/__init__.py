"""Models made of the layers."""

from lasp.models.config import MIXTURE, PRESETS, LinearLlama3Config, preset
from lasp.models.linear_llama3 import LinearLlama3

__all__ = ["MIXTURE", "PRESETS", "LinearLlama3", "LinearLlama3Config", "preset"]
