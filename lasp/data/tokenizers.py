"""How text becomes tokens, and tokens text."""

from __future__ import annotations

import codecs
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

#: The tokenizer that needs no file.
BYTES = "bytes"
#: What is shown for what is no text.
NO_TEXT = "\ufffd"


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

    @abstractmethod
    def stream(self, tokens: Iterable[int], before: Sequence[int] = ()) -> Iterator[str]:
        """The text of tokens as they come: each character once all of it has come.

        Args:
            tokens: which are asked for one by one.
            before: what they follow on, whose text is not given again.
        """


class Bytes(Tokenizer):
    """A token a byte."""

    name, vocabulary, digest = BYTES, 256, BYTES

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(text, dtype=np.uint8) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    def stream(self, tokens: Iterable[int], before: Sequence[int] = ()) -> Iterator[str]:
        reader = codecs.getincrementaldecoder("utf-8")("replace")
        reader.decode(bytes(before))
        for token in tokens:
            # A model may have more tokens than there are bytes. 255 is no byte of a text.
            yield reader.decode(bytes([min(token, 255)]))
        yield reader.decode(b"", final=True)


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

    def stream(self, tokens: Iterable[int], before: Sequence[int] = ()) -> Iterator[str]:
        # Text depends on what it follows on: a space at the beginning of all is left out.
        last, waiting = list(before[-1:]), list[int]()
        for token in tokens:
            waiting.append(token)
            ready = len(waiting)
            if self.decode(last + waiting).endswith(NO_TEXT):
                # Perhaps part of a character. It has four bytes at most, so what waits longer is none.
                ready = max(0, ready - 3)
            if ready:
                yield self._following(last, waiting[:ready])
                last, waiting = waiting[ready - 1 : ready], waiting[ready:]
        if waiting:
            yield self._following(last, waiting)

    def _following(self, last: list[int], tokens: list[int]) -> str:
        """The text that tokens add to that of the last before."""
        return self.decode(last + tokens)[len(self.decode(last)) :]


def tokenizer_of(name: str) -> Tokenizer:
    """The tokenizer that ``--tokenizer`` names: "bytes", or the path of a ``tokenizer.json`` or of its directory.

    Raises:
        ValueError: where it cannot be read.
    """
    return Bytes() if name == BYTES else HuggingFace(Path(name))
