"""The command line: options from it, and bad ones answered in one line."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import tyro

from lasp.parallel.mesh import launched_ranks
from lasp.training.options import Options

#: Seconds that ranks other than 0 leave it to speak for all: the launcher ends them as soon as it has.
PATIENCE = 10.0


def read_options(arguments: Sequence[str] | None = None) -> Options:
    """The options of the command line, checked for the ranks that the launcher started.

    Raises:
        ValueError: naming the option that cannot be.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        options = tyro.cli(Options, args=arguments, console_outputs=rank == 0)
    except SystemExit as end:
        if end.code and rank:
            time.sleep(PATIENCE)
        raise
    options.check(launched_ranks())
    return options


@contextmanager
def errors_in_one_line(program: str) -> Iterator[None]:
    """End the program with exit code 2 and one line where the block raises ValueError, once for all ranks that do."""
    try:
        yield
    except ValueError as error:
        if int(os.environ.get("RANK", "0")):
            # Nearly always rank 0 has the same error: it speaks, and this rank is ended before it does.
            time.sleep(PATIENCE)
        print(f"{program}: error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
