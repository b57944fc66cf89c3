"""Documents out of files, in pieces: of text a document a file, of JSON lines and parquet a document a row."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from lasp.data.formats import documents

#: What of the standard library is not read: other people's packages, tests (a third of it), and files made by builds.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
#: The largest piece of a document that is tokenised by itself, in bytes.
PIECE = 2**17


@dataclass(frozen=True)
class Source:
    """Files of text.

    Attributes:
        path: what was given.
        root: the directory that the files are in.
        listing: name, size and time of change in nanoseconds of every file, in the order of their names: what tells that one
            has changed without reading it.
    """

    path: Path | None
    root: Path
    listing: tuple[tuple[str, int, int], ...]

    @property
    def name(self) -> str:
        """As errors call it."""
        return f"--data {self.path or self.root}"

    @property
    def size(self) -> int:
        """Bytes of all files, as they lie there."""
        return sum(size for _, size, _ in self.listing)


@dataclass(frozen=True)
class Piece:
    """Some text of a document.

    Attributes:
        text: UTF-8, cut between characters, after a line or a space where there is one.
        last: whether the document ends with it.
        read: bytes of the source's files that were read so far.
    """

    text: bytes
    last: bool
    read: int


def source_of(path: Path | None) -> Source:
    """The files of a path.

    Args:
        path: a file, or a directory whose files are all read, but hidden ones; None for the sources of Python's standard
            library, which every machine that runs this has.

    Raises:
        ValueError: where nothing is there, or it may not be read.
    """
    try:
        return _listed(path)
    except OSError as error:
        raise ValueError(f"--data {error.filename or path}: {error.strerror or error}") from None


def _listed(path: Path | None) -> Source:
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        files = [file for file in _below(root, SKIPPED) if file.suffix == ".py"]
    elif path.is_dir():
        root, files = path, _below(path)
    elif path.is_file():
        root, files = path.parent, [path]
    else:
        raise ValueError(f"--data {path}: no such file or directory")
    found = sorted((file.relative_to(root).as_posix(), file.stat()) for file in files)
    source = Source(path, root, tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in found))
    if not source.size:
        raise ValueError(f"{source.name}: no text there")
    return source


def _below(root: Path, skipped: Collection[str] = ()) -> list[Path]:
    """All files of a directory and of those in it, but hidden ones and what is skipped."""

    def fail(error: OSError) -> None:
        raise error

    files = []
    for folder, inner, names in os.walk(root, onerror=fail):
        inner[:] = [name for name in inner if not name.startswith(".") and name not in skipped]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return [file for file in files if file.is_file()]


def pieces(source: Source) -> Iterator[Piece]:
    """All documents, piece by piece; never more than a few pieces of `PIECE` bytes are in memory.

    Raises:
        ValueError: naming the file that is no text, cut short or no JSON lines, and where.
    """
    before = 0
    for name, _, _ in source.listing:
        file = source.root / name
        with documents(file) as (found, raw):
            for document in found:
                yield from _cut(file, document, before, raw)
            before += os.fstat(raw.fileno()).st_size


def _cut(file: Path, chunks: Iterator[bytes], before: int, raw: IO[bytes]) -> Iterator[Piece]:
    """A document's pieces, from chunks of any length."""
    kept, at = b"", 0
    for chunk in chunks:
        kept += chunk
        while len(kept) > PIECE:
            end = _end(kept)
            yield Piece(_text(file, kept[:end], at), False, before + raw.tell())
            kept, at = kept[end:], at + end
    if kept or at:
        yield Piece(_text(file, kept, at), True, before + raw.tell())


def _end(text: bytes) -> int:
    """Where to cut: after the last line of a piece, or a space, or at least between two characters."""
    for mark in (b"\n", b" "):
        if (found := text.rfind(mark, 0, PIECE)) > 0:
            return found + 1
    end = PIECE
    while end > PIECE - 4 and 0x80 <= text[end] < 0xC0:
        end -= 1
    return end


def _text(file: Path, text: bytes, at: int) -> bytes:
    """The same, if it is text."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"--data {file}: not text: byte {at + error.start} is no UTF-8") from None
    if (zero := text.find(0)) >= 0:
        raise ValueError(f"--data {file}: not text: byte {at + zero} is 0")
    return text
