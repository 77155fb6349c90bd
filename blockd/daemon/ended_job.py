"""Jobs of an earlier run that need no more work, only somebody to be told of their end."""

from blockd.daemon.state import JobRecord
from blockd.errors import BlockdError
from blockd.jobs.job import Job


class _RecordedError(BlockdError):
    """An error of an earlier run."""

    def __init__(self, brief: str, detail: str | None) -> None:
        super().__init__(detail or brief)
        self._brief = brief

    @property
    def brief(self) -> str:
        return self._brief


class EndedJob(Job):
    """A job that was over when the run ended, or that cannot go on; `failure` says why."""

    def __init__(self, record: JobRecord, *, failure: str | None = None, was_cancelled: bool = False) -> None:
        super().__init__(
            record.id,
            length=record.length,
            speed=record.speed,
            on_error=record.on_error,
            auto_dismiss=record.auto_dismiss,
        )
        self.type = record.type
        # What stays in the journal until the end is told.
        self.record = record
        self.was_cancelled = was_cancelled
        self.plain_image = record.plain_image
        self._failure = failure

    async def run(self) -> None:
        if self._failure is not None:
            raise BlockdError(self._failure)
        self.set_progress(self.length, self.length)


def concluded_job(record: JobRecord) -> Job:
    """A job whose end was told, and which was not dismissed."""
    job = EndedJob(record)
    job.set_progress(record.offset, record.length)
    job.auto_finalize = record.auto_finalize
    job.is_cancelled = record.is_cancelled
    job.error = None if record.error is None else _RecordedError(record.error, record.error_detail)
    return job
