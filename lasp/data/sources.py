"""Documents out of files: text, a document a file, and JSON lines, a document a line; as they are, or by gzip or zstd."""

from __future__ import annotations

import gzip
import io
import json
import sysconfig
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

#: What of the standard library is not read: other people's packages, tests (a third of it), and files made by builds.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
#: The field of a JSON line that is its text.
FIELD = "text"
#: The largest piece of a document that is in memory at once, in bytes.
PIECE = 2**20


@dataclass(frozen=True)
class Source:
    """Files of text.

    Attributes:
        name: as errors call it.
        root: the directory that the files are in.
        files: all of them, in the order of their names.
    """

    name: str
    root: Path
    files: tuple[Path, ...]

    @property
    def size(self) -> int:
        """Bytes of all files, as they lie there."""
        return sum(file.stat().st_size for file in self.files)

    def listing(self) -> list[list[Any]]:
        """Name, size and time of change of every file: what tells that one has changed without reading it."""
        stats = ((file.relative_to(self.root).as_posix(), file.stat()) for file in self.files)
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


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
        path: a file, or a directory whose files are all read; None for the sources of Python's standard library, which every
            machine that runs this has.

    Raises:
        ValueError: where nothing is there.
    """
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        files = [file for file in root.rglob("*.py") if not SKIPPED.intersection(file.relative_to(root).parts)]
    elif path.is_dir():
        root = path
        files = [file for file in root.rglob("*") if file.is_file() and not file.name.startswith(".")]
    elif path.is_file():
        root, files = path.parent, [path]
    else:
        raise ValueError(f"--data {path}: no such file or directory")
    files.sort(key=lambda file: file.relative_to(root).as_posix())
    source = Source(f"--data {path or root}", root, tuple(files))
    if not source.size:
        raise ValueError(f"{source.name}: no text there")
    return source


def pieces(source: Source) -> Iterator[Piece]:
    """All documents, piece by piece; never more than a few pieces of `PIECE` bytes are in memory.

    Raises:
        ValueError: naming the file that is no text, cut short or no JSON lines, and where.
    """
    before = 0
    for file in source.files:
        with _opened(file) as (stream, raw):
            kind = file.with_suffix("") if file.suffix in _OPENED else file
            documents = _lines(file, stream) if kind.suffix in (".jsonl", ".ndjson") else [_chunks(stream)]
            for document in documents:
                yield from _cut(file, document, before, raw)
        before += file.stat().st_size


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


def _chunks(stream: IO[bytes]) -> Iterator[bytes]:
    while chunk := stream.read(PIECE):
        yield chunk


def _lines(file: Path, stream: IO[bytes]) -> Iterator[Iterator[bytes]]:
    """The documents of JSON lines; empty lines are none."""
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            raise ValueError(f"--data {file}: line {number} is no JSON: {error}") from None
        if not isinstance(found, dict) or not isinstance(found.get(FIELD), str):
            raise ValueError(f'--data {file}: line {number} has no text: expected {{"{FIELD}": "..."}}')
        text = found[FIELD].encode()
        yield (text[at : at + PIECE] for at in range(0, len(text), PIECE))


@contextmanager
def _opened(file: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """What is in a file, and the file, whose place tells how far reading it has come."""
    with file.open("rb") as raw:
        try:
            yield _OPENED.get(file.suffix, _itself)(raw), raw
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"--data {file}: cut short or damaged: {error}") from None


def _itself(raw: IO[bytes]) -> IO[bytes]:
    return raw


def _gunzipped(raw: IO[bytes]) -> IO[bytes]:
    return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]


def _unzstd(raw: IO[bytes]) -> IO[bytes]:
    try:
        import zstandard
    except ImportError:
        raise ValueError(f"--data {raw.name}: zstd needs the package zstandard, install it") from None
    return io.BufferedReader(_Frames(raw, zstandard), PIECE)


class _Frames(io.RawIOBase):
    """What zstd's frames hold, all of them; one that is cut short is an error, and not the end."""

    def __init__(self, raw: IO[bytes], zstandard: Any):
        self.raw, self.zstandard = raw, zstandard
        self.frame: Any = None
        self.ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            given = self.frame.unused_data if self.frame is not None and self.frame.eof else b""
            given = given or self.raw.read(2**16)
            if not given:
                if self.frame is not None and not self.frame.eof:
                    raise EOFError("a zstd frame does not end")
                return 0
            if self.frame is None or self.frame.eof:
                self.frame = self.zstandard.ZstdDecompressor().decompressobj()
            try:
                self.ready = self.frame.decompress(given)
            except self.zstandard.ZstdError as error:
                raise EOFError(error) from None
        count = min(len(buffer), len(self.ready))
        buffer[:count], self.ready = self.ready[:count], self.ready[count:]
        return count


#: How a file is opened, by the end of its name.
_OPENED = {".gz": _gunzipped, ".zst": _unzstd}
