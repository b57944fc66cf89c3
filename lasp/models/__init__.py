"""Models made of the layers."""

from lasp.models.config import MIXTURE, PRESETS, LinearLlama3Config, preset
from lasp.models.linear_llama3 import RECOMPUTE, LinearLlama3
from lasp.models.pretrained import Loaded, import_pretrained, load_pretrained, save_pretrained

__all__ = [
    "MIXTURE",
    "PRESETS",
    "RECOMPUTE",
    "LinearLlama3",
    "LinearLlama3Config",
    "Loaded",
    "import_pretrained",
    "load_pretrained",
    "preset",
    "save_pretrained",
]
