"""Tokens on disk, made once of text: memory-mapped, with the boundaries of documents."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lasp.data.sources import Piece, Source, pieces, source_of
from lasp.data.tokenizers import Tokenizer

#: Raised when what is in the files changes.
VERSION = 1
#: How much text is tokenised at once, in bytes: enough for all of a machine's cores.
BATCH = 2**24


@dataclass(frozen=True)
class Tokens:
    """A corpus.

    Attributes:
        tokens: ``[N]``, memory-mapped, in the smallest integers that hold the vocabulary.
        documents: where each begins, and N: int64 ``[D + 1]``.
        sizes: bytes of text of each document, int64 ``[D]``.
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
        ValueError: where the text is missing, empty or damaged, or there is no room for the tokens.
    """
    source = source_of(path)
    key = hashlib.sha256(json.dumps([VERSION, tokenizer.digest, source.listing()]).encode()).hexdigest()[:16]
    folder = cache / key
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _alone(cache / f"{key}.lock"):
            if not folder.is_dir():
                _make(source, tokenizer, folder)
    except OSError as error:
        raise ValueError(
            f"--data-cache {cache}: {error.strerror or error}; the tokens of {source.name} need room there, about "
            f"{source.size * tokenizer.dtype.itemsize / 2**20:.0f} MiB"
        ) from None
    return _open(folder, source.name)


def _make(source: Source, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a folder of tokens; it has its name only when all is there."""
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    digest, written = hashlib.sha256(), 0
    ends, sizes, size = [0], [], 0
    with (unfinished / "tokens.bin").open("wb") as file, _progress(source) as bar:
        for batch in _batches(pieces(source)):
            for piece, tokens in zip(batch, tokenizer.encode([piece.text for piece in batch]), strict=True):
                data = tokens.tobytes()
                file.write(data)
                digest.update(data)
                written, size = written + len(tokens), size + len(piece.text)
                if piece.last:
                    if written > ends[-1]:
                        ends.append(written)
                        sizes.append(size)
                    size = 0
            bar.update(batch[-1].read - bar.n)
        _to_disk(file)
    if not written:
        shutil.rmtree(unfinished)
        raise ValueError(f"{source.name}: no text there")
    documents = np.asarray(ends, dtype=np.int64)
    digest.update(documents.tobytes())
    for name, values in (("documents", documents), ("sizes", np.asarray(sizes, dtype=np.int64))):
        np.save(unfinished / f"{name}.npy", values)
    told = {
        "version": VERSION, "tokenizer": tokenizer.name, "tokenizer_digest": tokenizer.digest, "tokens": written,
        "vocabulary": tokenizer.vocabulary, "dtype": tokenizer.dtype.name, "digest": digest.hexdigest(),
        "source": str(source.root), "files": len(source.files),
    }  # fmt: skip
    with (unfinished / "about.json").open("w") as file:
        json.dump(told, file, indent=2)
        _to_disk(file)
    os.rename(unfinished, folder)


def _open(folder: Path, name: str) -> Tokens:
    """What lies in a folder."""
    try:
        told: dict[str, Any] = json.loads((folder / "about.json").read_text())
        tokens = np.memmap(folder / "tokens.bin", dtype=told["dtype"], mode="r")
        documents, sizes = np.load(folder / "documents.npy"), np.load(folder / "sizes.npy")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--data-cache {folder}: damaged ({error}); remove it, it is made again") from None
    if len(tokens) != told["tokens"] or documents[-1] != len(tokens):
        raise ValueError(
            f"--data-cache {folder}: damaged: {len(tokens)} tokens of {told['tokens']}; remove it, it is made again"
        )
    return Tokens(tokens, documents, sizes, told["vocabulary"], told["digest"], name)


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
    quick = source.size < BATCH
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
