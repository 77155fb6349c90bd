"""The events, and the observer that turns what happens to jobs into them."""

from typing import ClassVar

from blockd.jobs.job import Action, Job
from blockd.jobs.states import JobStatus
from blockd.qmp.events import Event, EventBus


class JobStatusChange(Event):
    """A job moved to another state."""

    name: ClassVar[str] = "JOB_STATUS_CHANGE"
    status: JobStatus
    id: str


class BlockJobEnd(Event):
    """How far a job came."""

    device: str
    """The job's id."""
    len: int
    offset: int
    speed: int
    type: str


class BlockJobCompleted(BlockJobEnd):
    """A job ended by itself; when it succeeded, its result is on the disk."""

    name: ClassVar[str] = "BLOCK_JOB_COMPLETED"
    error: str | None = None
    """What went wrong, for people; absent on success."""
    image: str | None = None
    """The plain image that holds everything now; its add-cow file is not needed any more."""


class BlockJobCancelled(BlockJobEnd):
    """A job ended because a client asked for it."""

    name: ClassVar[str] = "BLOCK_JOB_CANCELLED"


class BlockJobError(Event):
    """A read or write of a job failed."""

    name: ClassVar[str] = "BLOCK_JOB_ERROR"
    device: str
    """The job's id."""
    operation: str
    action: Action


class BlockJobPending(Event):
    """A job has done its work and waits for job-finalize."""

    name: ClassVar[str] = "BLOCK_JOB_PENDING"
    type: str
    id: str


class BlockStreamCompleted(Event):
    """A stream that block_stream started has ended by itself."""

    name: ClassVar[str] = "BLOCK_STREAM_COMPLETED"
    device: str
    len: int
    offset: int
    error: str | None = None
    """What went wrong, for people; absent on success."""
    image: str | None = None
    """The plain image that holds everything now; its add-cow file is not needed any more."""


class BlockSwitched(Event):
    """A device has another active image."""

    name: ClassVar[str] = "BLOCK_SWITCHED"
    device: str
    filename: str
    backing: str
    """The image that was active before."""


class BlockExportDeleted(Event):
    """An export is gone, its clients too."""

    name: ClassVar[str] = "BLOCK_EXPORT_DELETED"
    id: str


# For query-qmp-schema and the JSON schemas.
EVENTS: tuple[type[Event], ...] = (
    JobStatusChange,
    BlockJobCompleted,
    BlockJobCancelled,
    BlockJobError,
    BlockJobPending,
    BlockStreamCompleted,
    BlockSwitched,
    BlockExportDeleted,
)


class JobEvents:
    """A `JobObserver` that emits an event for everything."""

    def __init__(self, bus: EventBus) -> None:
        self._bus = bus

    def status_changed(self, job: Job) -> None:
        self._bus.emit(JobStatusChange(status=job.status, id=job.id))

    def error_met(self, job: Job, operation: str, action: Action) -> None:
        self._bus.emit(BlockJobError(device=job.id, operation=operation, action=action))

    def pending(self, job: Job) -> None:
        self._bus.emit(BlockJobPending(type=job.type, id=job.id))

    def ended(self, job: Job) -> None:
        if not job.is_block_job:
            return
        end = {"device": job.id, "len": job.length, "offset": job.offset, "speed": job.speed}
        if job.is_cancelled:
            self._bus.emit(BlockJobCancelled.model_validate({**end, "type": job.type}))
        else:
            error = job.error.message if job.error else None
            result = {"type": job.type, "error": error, "image": job.plain_image}
            self._bus.emit(BlockJobCompleted.model_validate({**end, **result}))
