"""All jobs of the daemon: unique ids, and the task group that owns their tasks."""

import asyncio
import logging
import re
from collections.abc import Callable, Coroutine, Iterator
from types import TracebackType
from typing import Self

from blockd.errors import BlockdError, RequestError
from blockd.jobs.job import Job, JobObserver, RecordEnd
from blockd.jobs.states import JobStatus

log = logging.getLogger(__name__)

_WELL_FORMED_ID = re.compile(r"[A-Za-z][A-Za-z0-9\-._]*", re.ASCII)


def is_well_formed(name: str) -> bool:
    """Whether a client may give this id to a job, an export or a node."""
    return _WELL_FORMED_ID.fullmatch(name) is not None


class JobManager:
    """Starts jobs, finds them by id and forgets them when they are dismissed.

    With `record_end` (see there) jobs outlive the daemon: its end suspends them instead of cancelling them.
    """

    def __init__(self, observer: JobObserver, record_end: RecordEnd | None = None) -> None:
        self._observer = observer
        self._record_end = record_end
        self._jobs: dict[str, Job] = {}
        self._claimed: set[str] = set()
        self._tasks = asyncio.TaskGroup()
        self._beside: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop what still runs and wait until every job has ended, its events sent."""
        try:
            await self.stop_all()
        finally:
            await self.stop_beside()
            await self._tasks.__aexit__(kind, error, trace)

    def __iter__(self) -> Iterator[Job]:
        """The jobs that are not dismissed, newest first."""
        return reversed(list(self._jobs.values()))

    def get(self, job_id: str) -> Job | None:
        return self._jobs.get(job_id)

    def check_id(self, job_id: str) -> None:
        """Refuse an id that is malformed or taken."""
        if not is_well_formed(job_id):
            raise RequestError(f"Invalid job ID '{job_id}'")
        if job_id in self._jobs or job_id in self._claimed:
            raise RequestError(f"Job ID '{job_id}' already in use")

    def claim_id(self, job_id: str) -> None:
        """Keep an id for a job that is not started yet; `release_id` or `start` end that."""
        self.check_id(job_id)
        self._claimed.add(job_id)

    def release_id(self, job_id: str) -> None:
        self._claimed.discard(job_id)

    def start(self, job: Job) -> None:
        """Bring a job to life; it is running on return, its work starts when the caller next waits."""
        self.release_id(job.id)
        self.check_id(job.id)
        self._jobs[job.id] = job
        job.create(self._observer, self._end)
        job.begin()
        self._tasks.create_task(job.supervise(), name=f"job {job.id}")

    def run_beside(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        """Do what no job waits for, and nobody is told the error of: cancelled by `stop_beside`."""
        task = self._tasks.create_task(_supervised(work))
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)
        return task

    async def stop_beside(self) -> None:
        """Cancel what is done beside the jobs; returns when it is over."""
        for task in self._beside:
            task.cancel()
        if self._beside:
            await asyncio.wait(self._beside)

    async def _end(self, job: Job, tell: Callable[[], None]) -> None:
        """Have the end of a job recorded and told; then its id is free, unless it is to be dismissed."""
        is_told = False

        def tell_and_forget() -> None:
            nonlocal is_told
            is_told = True
            tell()
            if job.auto_dismiss:
                del self._jobs[job.id]

        if self._record_end is None:
            tell_and_forget()
            return
        try:
            await self._record_end(job, tell_and_forget)
        except Exception:
            log.exception("job %s: its end could not be recorded", job.id)
            if not is_told:
                tell_and_forget()

    def add_concluded(self, job: Job) -> None:
        """Take in a job that ended in an earlier run and was not dismissed."""
        self.check_id(job.id)
        self._jobs[job.id] = job
        job.conclude(self._observer)

    def dismiss(self, job: Job) -> None:
        """Forget a concluded job."""
        job.dismiss()
        del self._jobs[job.id]

    async def stop_all(self) -> None:
        """End every job: those that already commit complete, the others are suspended or cancelled."""
        for job in self:
            if self._record_end is not None:
                job.suspend()
            elif job.can_be_cancelled:
                job.cancel()
        for job in self:
            await job.wait_ended()
            if not self.keeps_jobs and job.status is JobStatus.CONCLUDED:
                self.dismiss(job)  # nobody can any more

    @property
    def keeps_jobs(self) -> bool:
        """Whether jobs that have not ended with a run go on in the next one."""
        return self._record_end is not None


async def _supervised(work: Coroutine[object, object, None]) -> None:
    """Do something whose failure is told by the log alone: jobs and guests go on."""
    try:
        await work
    except BlockdError as error:
        log.error("%s", error.message)
    except Exception:
        log.exception("what was done beside the jobs has failed")
