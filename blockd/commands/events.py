"""The events."""

from typing import ClassVar

from blockd.jobs.job import Action
from blockd.jobs.states import JobStatus
from blockd.qmp.models import Event


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
