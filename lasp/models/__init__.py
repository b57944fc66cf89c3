"""Models made of the layers."""

from lasp.models.config import MIXTURE, PRESETS, LinearLlama3Config, preset
from lasp.models.generation import Generation, generate
from lasp.models.linear_llama3 import RECOMPUTE, LinearLlama3, LinearLlama3State
from lasp.models.pretrained import Loaded, import_pretrained, load_pretrained, save_pretrained

__all__ = [
    "MIXTURE",
    "PRESETS",
    "RECOMPUTE",
    "Generation",
    "LinearLlama3",
    "LinearLlama3Config",
    "LinearLlama3State",
    "Loaded",
    "generate",
    "import_pretrained",
    "load_pretrained",
    "preset",
    "save_pretrained",
]
