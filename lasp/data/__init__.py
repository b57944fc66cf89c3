"""Text as tokens on disk, and the windows of them that a step trains on."""

from lasp.data.tokenizers import BYTES, Tokenizer, tokenizer_of
from lasp.data.tokens import Tokens, tokens_of
from lasp.data.windows import Part, Windows

__all__ = ["BYTES", "Part", "Tokenizer", "Tokens", "Windows", "tokenizer_of", "tokens_of"]
