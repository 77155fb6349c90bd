"""Jobs that complete together or not at all."""

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blockd.jobs.job import Job


class JobGroup:
    """The jobs of a group; each is told of its group before it is started.

    Whether all commit is decided at one moment, for all of them: when the last has done its work, or when a
    client finalizes one. None can be cancelled from then on.
    """

    def __init__(self) -> None:
        self.members: list[Job] = []
        self._arrived_count = 0
        self._all_arrived = asyncio.Event()

    def add(self, job: "Job") -> None:
        self.members.append(job)
        job.group = self

    @property
    def is_finalized_by_itself(self) -> bool:
        return all(job.auto_finalize for job in self.members)

    async def meet(self) -> None:
        """Return when all have done their work; one that was cancelled meanwhile keeps the others here."""
        self._arrived_count += 1
        if self._arrived_count == len(self.members) and not any(job.is_cancelled for job in self.members):
            self._all_arrived.set()
            if self.is_finalized_by_itself:
                for job in self.members:
                    job.decide_to_commit()
        await self._all_arrived.wait()

    def cancel(self) -> None:
        """One failed or was cancelled: cancel the others."""
        for job in self.members:
            if job.can_be_cancelled:
                job.cancel()
