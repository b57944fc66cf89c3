"""Bad input on one rank must end in one clear line on every rank, and never in a hang.

Before ranks enter a collective they settle, through the process group's key-value store, that all of them are about to do
the same thing. No collective and no device is involved.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist


def _timeout_of(group: dist.ProcessGroup) -> timedelta:
    """How long the group's ranks wait for each other."""
    backend = group._get_backend(torch.device("cuda" if "nccl" in dist.get_backend(group) else "cpu"))
    limit: timedelta = backend.options._timeout
    return limit


class Agreement:
    """A line of statements that all ranks of a group make one after the other, in the same order.

    Args:
        group: the ranks that must agree.
        longest: how long to wait for the others, where the group's own timeout is not shorter.
    """

    def __init__(self, group: dist.ProcessGroup, longest: timedelta = timedelta(minutes=5)):
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.timeout = min(longest, _timeout_of(group))
        self.rounds = 0
        ranks = "-".join(map(str, dist.get_process_group_ranks(group)))
        self.store: dist.Store = dist.PrefixStore(f"lasp/{ranks}", dist.distributed_c10d._get_default_store())
        # Each rank counts its own agreements in the store: the n-th of one rank belongs to the n-th of every other.
        number = self.store.add(f"agreements/{self.rank}", 1)
        self.store = dist.PrefixStore(str(number), self.store)

    def settle(self, statement: str, problem: str | None = None) -> None:
        """Return once every rank has made the same statement and none has a problem.

        Raises:
            ValueError: on every rank alike, naming this rank's `problem`, or the other ranks that have one or differ.
            RuntimeError: where a rank does not come within the timeout, or the job is ending.
        """
        try:
            self._settle(statement, problem)
        except dist.DistNetworkError as error:
            raise RuntimeError(
                f"rank 0 of the job, which keeps what its ranks tell each other, has ended: look at its log ({error})"
            ) from error

    def _settle(self, statement: str, problem: str | None) -> None:
        key = f"round/{self.rounds}"
        self.rounds += 1
        common = self.store.compare_set(f"{key}/statement", "", statement).decode()
        if problem is not None:
            self._object(key, "problem", problem)
        elif statement != common:
            self._object(key, "difference", statement)
        if self.store.add(f"{key}/arrived", 1) == self.size:
            self.store.set(
                f"{key}/verdict", "settled" if self.store.add(f"{key}/objections", 0) == 0 else "not settled"
            )
        try:
            self.store.wait([f"{key}/verdict"], self.timeout)
        except RuntimeError as error:
            raise RuntimeError(
                f"{self.store.add(f'{key}/arrived', 0)} of {self.size} sequence-parallel ranks came to: {statement} "
                f"(waited {self.timeout}); every rank of the group must make the same calls in the same order"
            ) from error
        if self.store.get(f"{key}/verdict") != b"settled":
            raise ValueError(problem or self._told(key, common))
        if self.rank == 0 and self.rounds > 2:
            # Every rank is in this round, so none still reads the one before the last.
            for name in ("statement", "arrived", "objections", "verdict"):
                self.store.delete_key(f"round/{self.rounds - 3}/{name}")

    def _object(self, key: str, kind: str, line: str) -> None:
        self.store.set(f"{key}/{kind}/{self.rank}", line)
        self.store.add(f"{key}/objections", 1)

    def _told(self, key: str, common: str) -> str:
        problems, differences = (
            [
                f"rank {rank}: {self.store.get(f'{key}/{kind}/{rank}').decode()}"
                for rank in range(self.size)
                if self.store.check([f"{key}/{kind}/{rank}"])
            ]
            for kind in ("problem", "difference")
        )
        if problems:
            return "; ".join(problems)
        return f"the ranks disagree: {'; '.join(differences)}; the others: {common}"
