"""Groups of ranks for the tests: `mpirun -n 4 python -m pytest --with-mpi -m mpi` runs every test on 1, 2 and 4 of them."""

from __future__ import annotations

import io
import os
import socket
import sys
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch

# Without a GPU, Triton's kernels are tested in its interpreter. It looks once, when it is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import torch.distributed as dist
from _pytest.terminal import TerminalReporter

FAILED = pytest.StashKey[bool]()
KEPT = pytest.StashKey[io.StringIO]()

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def one_loop() -> type[dist.ProcessGroupGloo]:
    """Gloo's groups on one network thread a rank: one of their own wakes up 100 times a second, and tests make over 150."""
    device = dist.ProcessGroupGloo.create_default_device()

    class OneLoop(dist.ProcessGroupGloo):
        def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta):
            options = dist.ProcessGroupGloo._Options()
            options._devices, options._threads, options._timeout = [device], 2, timeout
            super().__init__(store, rank, size, options)

    return OneLoop


@pytest.fixture(scope="session")
def world() -> Iterator[int]:
    """The MPI ranks as a gloo process group; its size."""
    from mpi4py import MPI

    dist.distributed_c10d.ProcessGroupGloo = one_loop()  # type: ignore[misc]
    comm = MPI.COMM_WORLD
    port = None
    if comm.rank == 0:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
    port = comm.bcast(port)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=comm.rank, world_size=comm.size)
    yield comm.size
    # No barrier: a rank that has failed must be able to leave, which ends the job.
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def groups(world: int) -> dict[int, dist.ProcessGroup]:
    """For W = 1, 2, 4 this rank's group of W consecutive ranks: all ranks are always at work."""
    mine: dict[int, dist.ProcessGroup] = {}
    for size in (1, 2, 4):
        for first in range(0, world - size + 1, size):
            group = dist.new_group(list(range(first, first + size)))
            if first <= dist.get_rank() < first + size:
                mine[size] = group
    return mine


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """All ranks run the same tests: rank 0 tells how they go, the others keep their report unless something fails."""
    if int(os.environ.get("OMPI_COMM_WORLD_RANK", "0")) > 0:
        config.stash[KEPT] = io.StringIO()
        config.pluginmanager.unregister(name="terminalreporter")
        config.pluginmanager.register(TerminalReporter(config, config.stash[KEPT]), "terminalreporter")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[FAILED] = exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)


def pytest_unconfigure(config: pytest.Config) -> None:
    """A failed rank ends the whole job, after its report: the others may wait for it in a collective."""
    if config.stash.get(FAILED, False) and KEPT in config.stash:
        print(
            f"---- rank {os.environ['OMPI_COMM_WORLD_RANK']} ----", config.stash[KEPT].getvalue(), sep="\n", flush=True
        )
    if config.stash.get(FAILED, False) and "mpi4py.MPI" in sys.modules:
        from mpi4py import MPI

        if MPI.COMM_WORLD.size > 1:
            sys.stdout.flush()
            MPI.COMM_WORLD.Abort(1)
