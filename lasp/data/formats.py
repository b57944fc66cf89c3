"""What a file is, by the end of its name: text, JSON lines or parquet; as it is, or by gzip or zstd."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lasp.data.parquet import rows

#: The field of a JSON line, and the column of a parquet file, that is its text.
FIELD = "text"
#: How much is read at once, in bytes.
CHUNK = 2**20
#: The longest line of JSON lines, in bytes: it is in memory as a whole, several times.
LINE = 2**28


@contextmanager
def documents(file: Path) -> Iterator[tuple[Iterator[Iterator[bytes]], IO[bytes]]]:
    """A file's documents, each in chunks of any length, and the file, whose place tells how far reading has come.

    Raises:
        ValueError: naming the file that cannot be read, is cut short or is not what its name says, and where.
    """
    kind = file.with_suffix("") if file.suffix in _OPENED else file
    try:
        with file.open("rb") as raw:
            yield _DOCUMENTS.get(kind.suffix, _whole)(file, _OPENED.get(file.suffix, _itself)(raw)), raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"--data {file}: cut short or damaged: {error}") from None
    except OSError as error:
        raise ValueError(f"--data {file}: {error.strerror or error}") from None


def _whole(_: Path, stream: IO[bytes]) -> Iterator[Iterator[bytes]]:
    yield iter(lambda: stream.read(CHUNK), b"")


def _lines(file: Path, stream: IO[bytes]) -> Iterator[Iterator[bytes]]:
    """The documents of JSON lines; empty lines are none."""
    number = 0
    while line := stream.readline(LINE + 1):
        number += 1
        if len(line) > LINE:
            raise ValueError(f"--data {file}: line {number} is longer than {LINE / 2**20:.0f} MiB; a text file may be")
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"--data {file}: line {number} is no JSON: {error}") from None
        if not isinstance(found, dict) or not isinstance(found.get(FIELD), str):
            raise ValueError(f'--data {file}: line {number} has no text: expected {{"{FIELD}": "..."}}')
        try:
            text = found[FIELD].encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"--data {file}: line {number} is not text: {error}") from None
        yield _chunks(text)


def _rows(file: Path, stream: IO[bytes]) -> Iterator[Iterator[bytes]]:
    """The documents of a parquet file."""
    return map(_chunks, rows(file, stream, FIELD))


def _chunks(text: bytes) -> Iterator[bytes]:
    return (text[at : at + CHUNK] for at in range(0, len(text), CHUNK))


def _itself(raw: IO[bytes]) -> IO[bytes]:
    return raw


def _gunzipped(raw: IO[bytes]) -> IO[bytes]:
    return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]


def _unzstd(raw: IO[bytes]) -> IO[bytes]:
    try:
        import zstandard
    except ImportError:
        raise ValueError(f"--data {raw.name}: zstd needs the package zstandard, install it") from None
    return io.BufferedReader(_Frames(raw, zstandard), CHUNK)


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
#: What its documents are, by the end of its name before that.
_DOCUMENTS = {".jsonl": _lines, ".ndjson": _lines, ".parquet": _rows}
