"""How fast text becomes tokens, and in how much memory, however much text there is.

``python -m lasp.launch.bench_tokens --result tokens.json`` repeats the sources of Python's standard library, in another order
each time, to one file of each size, trains a byte-pair encoding on them once, and makes tokens of each file with bytes and with
it, each in a process of its own.
"""

from __future__ import annotations

import multiprocessing
import random
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import tyro

from lasp.data import BYTES, tokenizer_of, tokens_of
from lasp.data.sources import pieces, source_of
from lasp.launch.record import command_of, record


@dataclass(frozen=True)
class Sizes:
    """What is tokenised."""

    mebibytes: tuple[int, ...] = (256, 1024)
    """Sizes of the text."""
    vocabulary: int = 16384
    """Tokens of the byte-pair encoding."""
    result: Path = Path("bench_tokens.json")
    """Where the JSON goes."""


@dataclass(frozen=True)
class Tokenised:
    """One text, by one tokenizer.

    Attributes:
        tokenizer: bytes, or bpe.
        size: of the text, in bytes.
        tokens: how many it became.
        seconds: from the file to the tokens on the disk.
        before: the largest memory of the process before, in bytes: Python, torch and the tokenizer.
        peak: likewise, to the end.
    """

    tokenizer: str
    size: int
    tokens: int
    seconds: float
    before: int
    peak: int

    def __str__(self) -> str:
        mib = 2**20
        return (
            f"{self.tokenizer:6} {self.size / mib:6.0f} MiB: {self.tokens / 1e6:.1f}M tokens in {self.seconds:.1f} s, "
            f"{self.size / mib / self.seconds:.1f} MiB a second; memory {self.before / mib:.0f} to {self.peak / mib:.0f} MiB"
        )


def write_text(file: Path, size: int) -> None:
    """The standard library's sources, repeated to a size in bytes, in another order each time."""
    order = random.Random(0)
    source = source_of(None)
    texts = [(source.root / name).read_bytes() for name, _, _ in source.listing]
    left = size
    with file.open("wb") as stream:
        while left > 0:
            order.shuffle(texts)
            for text in texts:
                left -= stream.write(text[:left].decode(errors="ignore").encode() or b"\n" * left)


def write_tokenizer(file: Path, vocabulary: int) -> None:
    """A byte-pair encoding over bytes, trained on the standard library's sources."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator((piece.text.decode() for piece in pieces(source_of(None))), trainer)
    made.save(str(file))


def tokenised(text: Path, name: str) -> Tokenised:
    """One text by one tokenizer, in this process, which should have done nothing before."""
    tokenizer, before = tokenizer_of(name), _peak()
    with TemporaryDirectory(dir=text.parent) as cache:
        began = time.perf_counter()
        tokens = len(tokens_of(text, tokenizer, Path(cache)))
        seconds = time.perf_counter() - began
    return Tokenised(BYTES if name == BYTES else "bpe", text.stat().st_size, tokens, seconds, before, _peak())


def measure(sizes: Sizes, folder: Path) -> Iterator[Tokenised]:
    """Every text by every tokenizer."""
    text, tokenizer = folder / "text.txt", folder / "tokenizer.json"
    write_tokenizer(tokenizer, sizes.vocabulary)
    spawn = multiprocessing.get_context("spawn")
    for mebibytes in sizes.mebibytes:
        write_text(text, mebibytes * 2**20)
        for name in (BYTES, str(tokenizer)):
            with ProcessPoolExecutor(1, spawn) as alone:
                yield alone.submit(tokenised, text, name).result()


def _peak() -> int:
    """The largest memory of this process until now, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    sizes = tyro.cli(Sizes, description=__doc__)
    found = []
    with TemporaryDirectory() as folder:
        for one in measure(sizes, Path(folder)):
            print(one, flush=True)
            found.append(one)
    record(sizes.result, command_of("lasp.launch.bench_tokens"), found)


if __name__ == "__main__":
    main()
