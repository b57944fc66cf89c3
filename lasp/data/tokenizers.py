"""How text becomes tokens, and tokens text."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

#: The tokenizer that needs no file.
BYTES = "bytes"


class Tokenizer(ABC):
    """How text becomes tokens.

    Attributes:
        name: as ``--tokenizer`` takes it.
        vocabulary: how many tokens there are.
        digest: of all that its tokens depend on.
    """

    name: str
    vocabulary: int
    digest: str

    @property
    def dtype(self) -> np.dtype:
        """The smallest integer that holds a token."""
        return np.dtype(np.min_scalar_type(self.vocabulary - 1))

    @abstractmethod
    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """The tokens of each text, which is UTF-8."""

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; what is no text is shown as such."""


class Bytes(Tokenizer):
    """A token a byte."""

    name, vocabulary, digest = BYTES, 256, BYTES

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(text, dtype=np.uint8) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(errors="replace")


class HuggingFace(Tokenizer):
    """A ``tokenizer.json`` as Hugging Face's tokenizers write it; adds no tokens that stand for beginnings and ends.

    Args:
        path: the file, or the directory that it is in.

    Raises:
        ValueError: where it cannot be read.
    """

    def __init__(self, path: Path):
        file = path / "tokenizer.json" if os.path.isdir(path) else path
        try:
            from tokenizers import Tokenizer as Reader
        except ImportError:
            raise ValueError(f"--tokenizer {path}: needs the package tokenizers, install it") from None
        if not os.path.isfile(file):
            raise ValueError(f"--tokenizer {path}: expected {BYTES}, a tokenizer.json or its directory; there is none")
        try:
            content = file.read_bytes()
            self._reader = Reader.from_buffer(content)
            self.vocabulary = 1 + max(self._reader.get_vocab(with_added_tokens=True).values())
        except Exception as error:  # the package raises plain Exceptions
            raise ValueError(f"--tokenizer {file}: no tokenizer.json of Hugging Face: {error}") from None
        self._reader.no_truncation()
        self._reader.no_padding()
        self.name = str(path)
        self.digest = hashlib.sha256(content).hexdigest()

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        try:
            found = self._reader.encode_batch_fast([text.decode() for text in texts], add_special_tokens=False)
        except Exception as error:
            raise ValueError(f"--tokenizer {self.name}: cannot read this text: {error}") from None
        return [np.asarray(one.ids, dtype=self.dtype) for one in found]

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self._reader.decode(list(tokens), skip_special_tokens=False)
        return text


def tokenizer_of(name: str) -> Tokenizer:
    """The tokenizer that ``--tokenizer`` names: "bytes", or the path of a ``tokenizer.json`` or of its directory.

    Raises:
        ValueError: where it cannot be read.
    """
    return Bytes() if name == BYTES else HuggingFace(Path(name))
