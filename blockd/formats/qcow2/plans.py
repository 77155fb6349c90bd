"""Plans: reads under way that name clusters, and what waits for their end before it is used again."""

import contextlib
from collections import Counter, deque
from collections.abc import Iterator
from typing import NamedTuple

from blockd.formats.qcow2.runs import Run, append_joined

# How many runs are handed out at once to be punched.
LEAVING_AT_ONCE_MAX = 1 << 9


class _Leaving(NamedTuple):
    """Clusters whose refcount has come to 0; plans of `epoch` and older may still name them."""

    run: Run
    epoch: int


class Plans:
    """The plans under way. An epoch ends whenever a map in memory stops to name something."""

    def __init__(self, cluster_bits: int) -> None:
        self._cluster_bits = cluster_bits
        self._epoch = 0
        self._counts: Counter[int] = Counter()
        self._leaving: deque[_Leaving] = deque()  # by epoch

    @contextlib.contextmanager
    def plan(self) -> Iterator[None]:
        """While inside, no cluster that a map named on entry is used for anything else."""
        epoch = self._epoch
        self._counts[epoch] += 1
        try:
            yield
        finally:
            self._counts[epoch] -= 1
            if not self._counts[epoch]:
                del self._counts[epoch]

    def end_epoch(self) -> None:
        """Something is named no longer: plans that are made from now on cannot name it."""
        self._epoch += 1

    def leave(self, run: Run) -> None:
        """Nobody has these clusters any more, but the plans so far may name them."""
        # Of several users the last to let go decides, whichever is dropped last: any plan so far may.
        self._leaving.append(_Leaving(run, self._epoch - 1))

    @property
    def has_leaving(self) -> bool:
        """Whether clusters with a fallen refcount wait for plans to end."""
        return bool(self._leaving)

    def take_leaving(self) -> list[Run]:
        """Hand out `LEAVING_AT_ONCE_MAX` runs of withheld clusters at most that no plan can name any more.

        Shape:    neighbours joined, in order.
        """
        oldest = min(self._counts, default=self._epoch)
        ready: list[Run] = []
        while self._leaving and self._leaving[0].epoch < oldest and len(ready) < LEAVING_AT_ONCE_MAX:
            ready.append(self._leaving.popleft().run)
        runs: list[Run] = []
        for run in sorted(ready):
            append_joined(runs, run, self._cluster_bits)
        return runs
