"""The rows of a parquet file, as Hugging Face's datasets streams them."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

#: How many rows are texts in memory at once, beside the row group that they are in.
ROWS = 64


def rows(file: Path, stream: IO[bytes], column: str) -> Iterator[bytes]:
    """A column's texts, UTF-8, row by row; reads nothing from the network, and leaves no copy on the disk.

    Args:
        file: the file.
        stream: the same, opened: its place is set to how far reading has come.
        column: its name.

    Raises:
        ValueError: where the package is missing, the file is damaged or a row has no text.
    """
    try:
        import datasets
        import pyarrow
        from pyarrow.dataset import ParquetFragmentScanOptions
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(f"--data {file}: parquet needs the package datasets, install it") from None
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would say is in the error below
    # Unbuffered, a row group's bytes are in memory beside what is in them.
    scan = ParquetFragmentScanOptions(
        use_buffered_stream=True, buffer_size=2**20, pre_buffer=False, page_checksum_verification=True
    )
    number, size = 0, os.fstat(stream.fileno()).st_size
    with TemporaryDirectory() as locks:
        try:
            with ParquetFile(file) as parquet:
                count, names = parquet.metadata.num_rows, parquet.schema_arrow.names
            if column not in names:
                raise ValueError(f"--data {file}: no column {column}, but {', '.join(names)}")
            found = datasets.IterableDataset.from_parquet(
                glob.escape(str(file.absolute())), columns=[column], batch_size=ROWS, fragment_scan_options=scan,
                cache_dir=locks,
            )  # fmt: skip
            for batch in found.iter(ROWS):
                for text in batch[column]:
                    number += 1
                    if not isinstance(text, str):
                        raise ValueError(f"--data {file}: row {number} has no text in its column {column}")
                    yield text.encode()
                stream.seek(size * number // count)
        except (pyarrow.ArrowException, OSError, UnicodeError) as error:
            raise ValueError(f"--data {file}: cut short or damaged: {error}") from None
