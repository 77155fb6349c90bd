"""The job that makes an image: one step, whose end clients ask for with query-jobs."""

from collections.abc import Awaitable, Callable

from blockd.jobs.job import Job


class CreateJob(Job):
    """Does `work`; its end is kept until it is dismissed."""

    type = "create"

    def __init__(self, job_id: str, work: Callable[[], Awaitable[None]]) -> None:
        super().__init__(job_id, length=1, auto_dismiss=False)
        self._work = work

    async def run(self) -> None:
        try:
            await self._work()
        finally:
            self.set_progress(1, 1)
