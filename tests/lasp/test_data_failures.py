"""What may go wrong while text becomes tokens: one clear error, and nothing left that looks whole."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lasp.data import Tokens, tokenizer_of, tokens_of
from lasp.data import tokens as tokens_on_disk

BYTES = tokenizer_of("bytes")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_bytes(b"0123456789abcde\n" * 20_000)
    return file


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def left(cache: Path) -> list[str]:
    return sorted(entry.name for entry in cache.iterdir() if entry.suffix != ".lock")


def killed_in(name: str, text: Path, cache: Path, then: Callable[[], Any]) -> int:
    """A process that makes tokens, and does something else where it would call a function of `lasp.data.tokens`."""
    if process := os.fork():
        return process
    place, _, attribute = ("lasp.data.tokens." + name).rpartition(".")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"{place}.{attribute}", lambda *_, **__: then())
            tokens_of(text, BYTES, cache)
    finally:
        os._exit(1)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("name", ["_progress", "_batches", "_to_disk", "json.dump", "os.rename"])
def test_whenever_it_is_killed_the_next_starts_over(name: str, text: Path, cache: Path) -> None:
    process = killed_in(name, text, cache, kill)
    assert os.WIFSIGNALED(os.waitpid(process, 0)[1])
    assert [entry[-11:] for entry in left(cache)] == [".unfinished"]
    assert bytes(tokens_of(text, BYTES, cache).tokens) == text.read_bytes()
    assert len(left(cache)) == 1


def test_who_waits_takes_over_from_who_is_killed(text: Path, cache: Path) -> None:
    process = killed_in("os.rename", text, cache, lambda: time.sleep(60))
    found: list[Tokens] = []
    try:
        deadline = time.monotonic() + 30
        while not list(cache.glob("*.unfinished/about.json")) and time.monotonic() < deadline:
            time.sleep(0.01)
        waits = threading.Thread(target=lambda: found.append(tokens_of(text, BYTES, cache)), daemon=True)
        waits.start()
        waits.join(0.3)
        assert waits.is_alive()
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    waits.join(30)
    assert bytes(found[0].tokens) == text.read_bytes()
    assert len(left(cache)) == 1


def test_what_others_left_is_removed_but_not_what_they_are_making(text: Path, cache: Path) -> None:
    for name in ("left", "making"):
        (cache / f"{name}.unfinished").mkdir(parents=True)
    with (cache / "making.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        tokens_of(text, BYTES, cache)
    assert [entry for entry in left(cache) if entry.endswith(".unfinished")] == ["making.unfinished"]


def test_a_full_disk_is_one_error_and_leaves_nothing(text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = r"--data-cache .*: {}; the tokens of --data .*text\.txt need room there, about 0 MiB"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(ValueError, match=room.format("File too large")):
            tokens_of(text, BYTES, cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert left(cache) == []

    def full(_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(tokens_on_disk, "_to_disk", full)
        with pytest.raises(ValueError, match=room.format("No space left on device")):
            tokens_of(text, BYTES, cache)
    assert left(cache) == []
    assert bytes(tokens_of(text, BYTES, cache).tokens) == text.read_bytes()


@pytest.mark.parametrize("change", ["grows", "is replaced", "is joined", "is removed"])
def test_text_that_changes_while_it_is_read_is_told(
    change: str, text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = text.parent / "data"
    data.mkdir()
    file = text.rename(data / "a.txt")
    batches = tokens_on_disk._batches

    def changed(found: Any) -> Any:
        yield from batches(found)
        if change == "grows":
            file.write_bytes(file.read_bytes() + b"more")
        elif change == "is replaced":
            file.write_bytes(b"x" * file.stat().st_size)
        elif change == "is joined":
            (data / "b.txt").write_text("another")
        else:
            file.rename(data.parent / "elsewhere")

    with monkeypatch.context() as patch:
        patch.setattr(tokens_on_disk, "_batches", changed)
        with pytest.raises(ValueError, match=r"--data .*data: (changed while it was read|no text there)"):
            tokens_of(data, BYTES, cache)
    assert left(cache) == []


def test_what_may_not_be_read_is_named(text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a directory in a directory may not: nothing is left out in silence."""
    (text.parent / "data" / "inner").mkdir(parents=True)
    denied = [str(text), str(text.parent / "data" / "inner")]

    def refuses(whole: Callable[..., Any]) -> Callable[..., Any]:
        def opened(path: Any, *given: Any, **named: Any) -> Any:
            if str(path) in denied:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return whole(path, *given, **named)

        return opened

    monkeypatch.setattr(Path, "open", refuses(Path.open))
    monkeypatch.setattr(os, "scandir", refuses(os.scandir))
    with pytest.raises(ValueError, match=r"^--data .*text\.txt: Permission denied$"):
        tokens_of(text, BYTES, cache)
    with pytest.raises(ValueError, match=r"^--data .*data/inner: Permission denied$"):
        tokens_of(text.parent / "data", BYTES, cache)
    assert left(cache) == []


def test_tokens_that_are_there_need_no_right_to_write(text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tokens_of(text, BYTES, cache)
    monkeypatch.setattr(tokens_on_disk, "_alone", lambda _: pytest.fail("a lock is a file that is written"))
    assert tokens_of(text, BYTES, cache).digest == made.digest


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokens.bin", None, r"No such file"),
        ("tokens.bin", b"", r"empty file"),
        ("tokens.bin", b"abc", r"3 tokens of 320000"),
        ("documents.bin", b"12345678", r"1 documents of 2"),
        ("documents.bin", b"12345", r""),
        ("sizes.bin", b"0123456789abcdef", r"2 sizes of 1"),
        ("about.json", b"", r""),
        ("about.json", b"[]", r""),
        ("about.json", b"{}", r"'dtype'"),
    ],
)
def test_damaged_tokens_are_one_error(name: str, content: bytes | None, message: str, text: Path, cache: Path) -> None:
    tokens_of(text, BYTES, cache)
    (file,) = cache.glob(f"*/{name}")
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"--data-cache .*: damaged.*{message}.*; remove it, it is made again"):
        tokens_of(text, BYTES, cache)
