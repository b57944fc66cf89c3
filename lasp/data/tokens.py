"""Tokens on disk, made once of text: memory-mapped, with the boundaries of documents."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lasp.data.sources import Piece, Source, pieces, source_of
from lasp.data.tokenizers import Tokenizer

#: Raised when what is in the files changes.
VERSION = 2
#: How much text is tokenised at once, in bytes: enough pieces for all of a machine's cores, and little enough that what
#: Hugging Face's tokenizers tell of every token, some hundred bytes, is a few hundred megabytes.
BATCH = 2**22
#: Text that takes so little time that no bar shows it, in bytes.
QUICK = 2**24
#: The files of a corpus, numbers and nothing else.
NAMES = ("tokens", "documents", "sizes")


@dataclass(frozen=True)
class Tokens:
    """A corpus.

    Attributes:
        tokens: ``[N]``, memory-mapped, in the smallest integers that hold the vocabulary.
        documents: where each begins, and N: int64 ``[D + 1]``, memory-mapped.
        sizes: bytes of text of each document, int64 ``[D]``, memory-mapped.
        vocabulary: how many tokens there are.
        digest: of the tokens and the documents: of two corpora with the same one, each is the other.
        name: as errors call it.
    """

    tokens: np.ndarray
    documents: np.ndarray
    sizes: np.ndarray
    vocabulary: int
    digest: str
    name: str

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def per_byte(self) -> float:
        """Tokens a byte of text."""
        return len(self.tokens) / int(self.sizes.sum())


def tokens_of(path: Path | None, tokenizer: Tokenizer, cache: Path) -> Tokens:
    """The tokens of a path's text: those that lie in the cache, or made now and put there, whole or not at all.

    One process makes them, any others wait for it; where it is killed, the next starts over.

    Args:
        path: a file or a directory, see `lasp.data.sources.source_of`; None for the default corpus.
        tokenizer: how text becomes tokens.
        cache: a directory; what it has of changed text or another tokenizer is not used.

    Raises:
        ValueError: where the text is missing, empty, damaged or changing, or there is no room for the tokens.
    """
    source = source_of(path)
    key = hashlib.sha256(json.dumps([VERSION, tokenizer.digest, source.listing]).encode()).hexdigest()[:16]
    folder = cache / key
    try:
        if not folder.is_dir():
            cache.mkdir(parents=True, exist_ok=True)
            with _alone(cache / f"{key}.lock"):
                if not folder.is_dir():
                    _tidy(cache)
                    _make(source, tokenizer, folder)
    except OSError as error:
        raise ValueError(
            f"--data-cache {cache}: {error.strerror or error}; the tokens of {source.name} need room there, about "
            f"{source.size * tokenizer.dtype.itemsize / 2**20:.0f} MiB"
        ) from None
    return _open(folder, source.name)


def _make(source: Source, tokenizer: Tokenizer, folder: Path) -> None:
    """Make a folder of tokens; it has its name only when all is there."""
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        _write(source, tokenizer, unfinished)
        if source_of(source.path) != source:
            raise ValueError(f"{source.name}: changed while it was read; start again when nothing writes to it")
        os.rename(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _write(source: Source, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files of a folder, of which no more than a batch is in memory."""
    of_tokens, of_documents = hashlib.sha256(), hashlib.sha256()
    written = end = size = documents = 0

    def boundary(at: int) -> bytes:
        data = np.int64(at).tobytes()
        of_documents.update(data)
        return data

    with _progress(source) as bar, ExitStack() as stack:
        files = {name: stack.enter_context((folder / f"{name}.bin").open("wb")) for name in NAMES}
        files["documents"].write(boundary(0))
        for batch in _batches(pieces(source)):
            for piece, tokens in zip(batch, tokenizer.encode([piece.text for piece in batch]), strict=True):
                data = tokens.tobytes()
                files["tokens"].write(data)
                of_tokens.update(data)
                written, size = written + len(tokens), size + len(piece.text)
                if piece.last:
                    if written > end:
                        end, documents = written, documents + 1
                        files["documents"].write(boundary(end))
                        files["sizes"].write(np.int64(size).tobytes())
                    size = 0
            bar.update(batch[-1].read - bar.n)
        for file in files.values():
            _to_disk(file)
    if not written:
        raise ValueError(f"{source.name}: no text there")
    of_tokens.update(of_documents.digest())
    told = {
        "version": VERSION, "tokenizer": tokenizer.name, "tokenizer_digest": tokenizer.digest,
        "vocabulary": tokenizer.vocabulary, "dtype": tokenizer.dtype.name, "digest": of_tokens.hexdigest(),
        "source": str(source.root), "files": len(source.listing),
        "tokens": written, "documents": documents + 1, "sizes": documents,
    }  # fmt: skip
    with (folder / "about.json").open("w") as about:
        json.dump(told, about, indent=2)
        _to_disk(about)


def _open(folder: Path, name: str) -> Tokens:
    """What lies in a folder."""
    try:
        told: dict[str, Any] = json.loads((folder / "about.json").read_text())
        types = {"tokens": told["dtype"], "documents": "int64", "sizes": "int64"}
        found = {name: np.memmap(folder / f"{name}.bin", dtype=types[name], mode="r") for name in NAMES}
        lengths = [(name, len(found[name]), told[name]) for name in NAMES]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--data-cache {folder}: damaged ({error}); remove it, it is made again") from None
    for kind, length, whole in lengths:
        if length != whole:
            raise ValueError(f"--data-cache {folder}: damaged: {length} {kind} of {whole}; remove it, it is made again")
    return Tokens(found["tokens"], found["documents"], found["sizes"], told["vocabulary"], told["digest"], name)


def _tidy(cache: Path) -> None:
    """Remove what was left by processes that were killed: nobody holds its lock any more."""
    for unfinished in cache.glob("*.unfinished"):
        try:
            with unfinished.with_suffix(".lock").open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(unfinished)
        except OSError:
            continue  # it is being made, or another user's


def _batches(found: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Pieces, so many together that all cores have work."""
    batch: list[Piece] = []
    size = 0
    for piece in found:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _progress(source: Source) -> Any:
    """A bar over the bytes that are read; what takes no time has none."""
    quick = source.size < QUICK
    return tqdm(total=source.size, unit="B", unit_scale=True, desc=f"tokenising {source.root}", disable=quick)


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Until the end of the block no other process is in one of the same path; a killed one is none any more."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
