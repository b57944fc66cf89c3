"""Text as tokens: what is read of which files, what lies in the cache, and the order in which windows of it come."""

from __future__ import annotations

import gzip
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lasp.data import Part, Tokens, Windows, tokenizer_of, tokens_of
from lasp.data import sources as sources_of_text
from lasp.data import tokens as tokens_on_disk
from lasp.data.sources import pieces, source_of
from lasp.data.windows import NO_TARGET, shuffled

BYTES = tokenizer_of("bytes")


def documents(path: Path | None) -> list[bytes]:
    found = [b""]
    for piece in pieces(source_of(path)):
        found[-1] += piece.text
        if piece.last:
            found.append(b"")
    assert found.pop() == b""
    return found


def corpus(sizes: list[int]) -> Tokens:
    bounds = np.cumsum([0, *sizes])
    return Tokens(np.arange(bounds[-1]), bounds, np.asarray(sizes), 256, "", "--data made up")


# -- files ---------------------------------------------------------------------------------------------------------


def test_a_file_is_a_document_and_so_is_a_json_line(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.txt").write_text("first")
    (tmp_path / ".hidden").write_text("not read")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("not read")
    lines = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in ("third", "vierté", ""))
    (tmp_path / "c.jsonl").write_text(lines + "\n")
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"fifth"))
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(b'{"text": "sixth"}'))
    want = ["first", "second", "third", "vierté", "fifth", "sixth"]
    assert documents(tmp_path) == [text.encode() for text in want]
    assert documents(tmp_path / "b.txt") == [b"second"]


def test_zstd_and_its_frames(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    text = os.urandom(300_000).hex().encode()
    whole = b"".join(zstandard.ZstdCompressor().compress(part) for part in (text[:100], text[100:]))
    (tmp_path / "a.txt.zst").write_bytes(whole)
    assert documents(tmp_path) == [text]
    (tmp_path / "a.txt.zst").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"a\.txt\.zst: cut short or damaged"):
        documents(tmp_path)


def parquet(file: Path, texts: list[Any], **options: Any) -> None:
    pyarrow_parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"id": range(len(texts)), "text": texts})
    pyarrow_parquet.write_table(table, file, write_page_checksum=True, **options)


def test_a_row_of_parquet_is_a_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over pieces and row groups, beside other files, and neither from the network nor by way of a copy."""
    datasets = pytest.importorskip("datasets")
    copies = tmp_path / "copies"
    for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, name, copies)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network is asked"))
    texts = ["first", "zweité", "", os.urandom(sources_of_text.PIECE).hex(), "5"] * 40
    (tmp_path / "data").mkdir()
    parquet(tmp_path / "data" / "a[1]*.parquet", texts, row_group_size=30)
    (tmp_path / "data" / "b.txt").write_text("last")
    assert documents(tmp_path / "data") == [text.encode() for text in [*texts, "last"] if text]
    size = source_of(tmp_path / "data").size
    read = [piece.read for piece in pieces(source_of(tmp_path / "data"))]
    assert 0 <= read[0] < size / 10
    assert size / 4 < read[len(read) // 2] < 3 * size / 4
    assert read == sorted(read)
    assert read[-1] == size
    assert not copies.exists()


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["one", None], "row 2 has no text in its column text"),
        ([b"one"], "row 1 has no text in its column text"),
        ([[1]], "row 1 has no text in its column text"),
        (["a\0b"], "not text: byte 1 is 0"),
    ],
)
def test_rows_without_text(texts: list[Any], message: str, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    parquet(tmp_path / "a.parquet", texts)
    with pytest.raises(ValueError, match=rf"^--data .*a\.parquet: {message}$"):
        documents(tmp_path)


def test_parquet_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    file = tmp_path / "a.parquet"
    parquet(file, [os.urandom(1000).hex()] * 3)
    whole = file.read_bytes()
    flipped = whole[:500] + bytes([whole[500] ^ 1]) + whole[501:]
    for content in (whole[:-20], whole[: len(whole) // 2], flipped, b"text"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"^--data .*a\.parquet: cut short or damaged: .*$"):
            documents(tmp_path)
    file.write_bytes(whole)
    monkeypatch.setattr("lasp.data.formats.FIELD", "body")
    with pytest.raises(ValueError, match=r"a\.parquet: no column body, but id, text"):
        documents(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"a\.parquet: parquet needs the package datasets, install it"):
        documents(tmp_path)


@settings(deadline=None, max_examples=50)
@given(text=st.text(min_size=1).filter(lambda text: "\0" not in text), piece=st.integers(4, 20))
def test_pieces_are_the_text_and_each_is_text(tmp_path_factory: pytest.TempPathFactory, text: str, piece: int) -> None:
    file = tmp_path_factory.mktemp("text") / "a.txt"
    file.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources_of_text, "PIECE", piece)
        found = list(pieces(source_of(file)))
    assert b"".join(one.text for one in found) == text.encode()
    assert [one.last for one in found] == [False] * (len(found) - 1) + [True]
    for one in found:
        assert 0 < len(one.text) <= piece
        one.text.decode()


def test_the_default_corpus_is_a_few_megabytes_of_python() -> None:
    found = documents(None)
    assert len(found) > 300
    assert 3e6 < sum(len(text) for text in found) < 60e6
    assert any(b"def __init__(self" in text for text in found)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"--data .*: no text there"),
        ("a.txt", b"abc\xff", r"a\.txt: not text: byte 3 is no UTF-8"),
        ("a.bin", b"abc\0def", r"a\.bin: not text: byte 3 is 0"),
        ("a.txt.gz", gzip.compress(bytes(range(1, 100)))[:-9], r"a\.txt\.gz: cut short or damaged"),
        ("a.txt.gz", b"plain", r"a\.txt\.gz: cut short or damaged"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b\n', r"a\.jsonl: line 2 is no JSON"),
        ("a.jsonl", b'{"content": "a"}\n', r'a\.jsonl: line 1 has no text: expected {"text": "\.\.\."}'),
        ("a.jsonl", b"\n\n", r"--data .*: no text there"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl: line 1 is not text: .*surrogates not allowed"),
        ("a.jsonl", b"\n" + b"[" * 100_000, r"a\.jsonl: line 2 is no JSON: ."),
    ],
)
def test_what_is_no_text_is_one_clear_error(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        tokens_of(tmp_path / "data", BYTES, tmp_path / "cache")
    assert not [entry for entry in (tmp_path / "cache").glob("*") if entry.is_dir() and not entry.suffix]


def test_a_line_that_would_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = json.dumps({"text": "x" * 2**20}).encode() + b"\n"
    (tmp_path / "a.jsonl").write_bytes(2 * line)
    monkeypatch.setattr("lasp.data.formats.LINE", len(line))
    assert documents(tmp_path) == [b"x" * 2**20] * 2
    monkeypatch.setattr("lasp.data.formats.LINE", len(line) - 1)
    with pytest.raises(ValueError, match=r"a\.jsonl: line 1 is longer than 1 MiB"):
        documents(tmp_path)


def test_no_data_and_no_room(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--data /nowhere: no such file or directory"):
        tokens_of(Path("/nowhere"), BYTES, tmp_path)
    (tmp_path / "file").write_text("text")
    with pytest.raises(ValueError, match=r"--data-cache .*: .*; the tokens of --data .*file need room there"):
        tokens_of(tmp_path / "file", BYTES, tmp_path / "file" / "cache")


# -- tokens --------------------------------------------------------------------------------------------------------


def test_tokens_are_made_once_and_again_when_the_text_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, cache = tmp_path / "text", tmp_path / "cache"
    text.mkdir()
    (text / "a.txt").write_text("first")
    (text / "b.txt").write_text("second one")
    made = []
    make = tokens_on_disk._make
    monkeypatch.setattr(tokens_on_disk, "_make", lambda *given: made.append(1) or make(*given))
    first, again = (tokens_of(text, BYTES, cache) for _ in range(2))
    assert len(made) == 1
    assert bytes(first.tokens) == b"firstsecond one"
    assert first.documents.tolist() == [0, 5, 15]
    assert first.sizes.tolist() == [5, 10]
    assert first.digest == again.digest
    assert first.per_byte == 1
    (text / "b.txt").write_text("second two")
    changed = tokens_of(text, BYTES, cache)
    assert len(made) == 2
    assert changed.digest != first.digest
    (found,) = [entry for entry in cache.glob("*/tokens.bin") if entry.read_bytes().endswith(b"two")]
    found.write_bytes(b"short")
    with pytest.raises(ValueError, match=r"--data-cache .*: damaged: 5 tokens of 15; remove it"):
        tokens_of(text, BYTES, cache)


def test_a_tokenizer_of_hugging_face(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(["the cat and the dog, the end"] * 20, trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    ours = tokenizer_of(str(tmp_path))
    assert ours.vocabulary == made.get_vocab_size() > 256
    assert ours.dtype == np.uint16
    text = "the cat and thé dog"
    (encoded,) = ours.encode([text.encode()])
    assert encoded.tolist() == made.encode(text).ids
    assert ours.decode(encoded.tolist()) == text
    (tmp_path / "text.txt").write_text(text)
    found = tokens_of(tmp_path / "text.txt", ours, tmp_path / "cache")
    assert found.tokens.tolist() == encoded.tolist()
    assert found.per_byte == len(encoded) / len(text.encode())
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ValueError, match=r"broken\.json: no tokenizer\.json of Hugging Face"):
        tokenizer_of(str(tmp_path / "broken.json"))


def _open(text: Path, cache: Path) -> str:
    return tokens_of(text, BYTES, cache).digest


def test_several_processes_make_tokens_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text " * 10_000)
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        found = pool.starmap(_open, [(tmp_path / "a.txt", tmp_path / "cache")] * 3)
    assert len(set(found)) == 1
    assert not list((tmp_path / "cache").glob("*.unfinished"))


def test_what_is_killed_starts_over(tmp_path: Path) -> None:
    text, cache = tmp_path / "a.txt", tmp_path / "cache"
    text.write_bytes(b"0123456789abcde\n" * (3 * tokens_on_disk.BATCH // 16))
    program = f"""
import time
from dataclasses import replace
from pathlib import Path
from lasp.data import tokens, tokenizer_of
batches = tokens._batches
def slow(found):
    for batch in batches(found):
        yield batch
        time.sleep(60)
tokens._batches = slow
tokens.tokens_of(Path({str(text)!r}), tokenizer_of("bytes"), Path({str(cache)!r}))
"""
    run = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(cache.glob("*.unfinished/tokens.bin")) and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert list(cache.glob("*.unfinished"))
    found = tokens_of(text, BYTES, cache)
    assert bytes(found.tokens) == text.read_bytes()
    assert not list(cache.glob("*.unfinished"))


def windows(
    tokens: Tokens, seq_len: int, batch: int, seed: int, share: tuple[float, float] = (0.0, 1.0), masked: bool = False
) -> Windows:
    return Windows([Part.of(tokens, seq_len, share)], seq_len, batch, seed, masked=masked)


# -- windows -------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(count=st.integers(1, 300), seed=st.integers(0, 2**31), epoch=st.integers(0, 5))
def test_an_epoch_is_every_window_once(count: int, seed: int, epoch: int) -> None:
    assert sorted(shuffled(place, count, (seed, epoch)) for place in range(count)) == list(range(count))


def test_orders_differ_by_seed_and_epoch_and_are_no_order() -> None:
    orders = [[shuffled(i, 1000, key) for i in range(1000)] for key in ((0, 0), (0, 1), (1, 0))]
    assert all(orders[a] != orders[b] for a, b in ((0, 1), (0, 2), (1, 2)))
    for order in orders:
        assert abs(np.corrcoef(order, range(1000))[0, 1]) < 0.15
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.15


@settings(deadline=None, max_examples=40)
@given(batch=st.integers(1, 7), seq_len=st.integers(1, 9), tokens=st.integers(30, 90), steps=st.integers(0, 9))
def test_no_window_is_left_out_or_read_twice_however_a_run_is_cut(
    batch: int, seq_len: int, tokens: int, steps: int
) -> None:
    """Read with one size of step, then with another from where the first ended."""
    made = corpus([tokens])
    first, whole = windows(made, seq_len, batch, seed=1), windows(made, seq_len, 1, seed=1)
    second = windows(made, seq_len, batch + 1, seed=9)
    second.go_on(first.position(steps), 100)
    starts = [int(row[0]) for step in range(steps) for row in first.rows(step, 0, batch)[0]]
    starts += [int(row[0]) for step in range(100, 103) for row in second.rows(step, 0, batch + 1)[0]]
    assert starts == [int(whole.rows(step, 0, 1)[0][0, 0]) for step in range(len(starts))]
    epoch = starts[: whole.round]
    assert len(set(epoch)) == len(epoch)


def test_rows_do_not_depend_on_how_a_step_is_split() -> None:
    whole = windows(corpus([250]), 20, 6, seed=3)
    inputs, targets = whole.rows(7, 0, 6)
    assert torch.equal(targets, inputs + 1)
    for first in (0, 2, 4):
        assert torch.equal(whole.rows(7, first, 2)[0], inputs[first : first + 2])
    some = [(3, 3), (5, 27), (59, 60)]
    for part, rows in zip(whole.take(7, 1, some), whole.rows(7, 1, 3), strict=True):
        assert torch.equal(part, torch.cat([rows.flatten()[start:end] for start, end in some]))
    assert all(part.shape == (0,) for part in whole.take(7, 1, []))


@settings(deadline=None, max_examples=60)
@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=12), seq_len=st.integers(1, 15), first=st.integers(0, 2))
def test_documents_are_told_apart(sizes: list[int], seq_len: int, first: int) -> None:
    made = corpus(sizes)
    if len(made) < seq_len + 1:
        return
    found = windows(made, seq_len, 4, seed=0, masked=True)
    inputs, targets = (x.flatten().tolist() for x in found.rows(0, first, 2))
    begins = set(made.documents.tolist())
    bounds = found.documents(0, first, 2)
    assert bounds is not None
    assert list(bounds[:-1]) == [place for place, token in enumerate(inputs) if place % seq_len == 0 or token in begins]
    assert bounds[-1] == 2 * seq_len
    for token, target in zip(inputs, targets, strict=True):
        assert target == (NO_TARGET if token + 1 in begins else token + 1)
    every = found.rows(0, 0, 4)[1]
    cut = [(a, b) for a, b in itertools.pairwise(range(4 * seq_len + 1))]
    assert torch.equal(found.take(0, 0, cut)[1], every.flatten())
    assert found.targets(0) == int((every != NO_TARGET).sum())
    assert windows(made, seq_len, 4, seed=0).documents(0, 0, 2) is None


def test_what_validates_is_not_trained_on() -> None:
    made = corpus([1000])
    train, unseen = (windows(made, 7, 1, 0, part) for part in ((0.0, 0.9), (0.9, 1.0)))
    read = [
        {int(t) for step in range(w.round) for x in w.rows(step, 0, 1) for t in x.flatten()} for w in (train, unseen)
    ]
    assert not read[0] & read[1]
    assert max(read[0]) < 900 <= min(read[1])
    with pytest.raises(ValueError, match=r"--data made up holds 100 tokens for this: a window of --seq-len 100"):
        windows(made, 100, 1, 0, (0.9, 1.0))
    with pytest.raises(ValueError, match=r"--data made up holds 1000 tokens: .* --seq-len 1000 .* need 1001"):
        windows(made, 1000, 1, 0)


def test_several_texts_are_read_by_their_weights() -> None:
    """Each as often as it should be, all windows of each before any comes again, and a run goes on where another ended."""
    sizes, weights = (50, 20_000, 900), (0.5, 0.3, 0.2)
    texts = [corpus([size]) for size in sizes]
    parts = [Part.of(replace(text, tokens=text.tokens + 10**6 * i), 7) for i, text in enumerate(texts)]
    mixed = Windows(parts, 7, 8, 0, weights)
    drawn = [int(row[0]) for step in range(1024) for row in mixed.rows(step, 0, 8)[0]]
    for i, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        own = [token - 10**6 * i for token in drawn if token // 10**6 == i]
        assert abs(len(own) - 8192 * weight) <= 2
        for first in range(0, len(own) - part.count + 1, part.count):
            assert len(set(own[first : first + part.count])) == part.count
        in_each_hundred = [sum(t // 10**6 == i for t in drawn[at : at + 100]) for at in range(0, 8100, 100)]
        assert all(abs(count - 100 * weight) <= 2 for count in in_each_hundred)
    again = Windows(parts, 7, 4, 5, weights)
    again.go_on(mixed.position(600), 0)
    assert [int(row[0]) for step in range(10) for row in again.rows(step, 0, 4)[0]] == drawn[4800:4840]
    assert mixed.digest == again.digest != Windows(parts, 7, 8, 0).digest
    assert mixed.tokens_per_byte == 1
    with pytest.raises(ValueError, match=r"--data-weights .*: expected one above 0 for each of 3 --data"):
        Windows(parts, 7, 8, 0, (1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="the least is less than one window in 4096"):
        Windows(parts, 7, 8, 0, (1.0, 1e-6, 1.0))
