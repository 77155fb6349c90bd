"""The events."""

from typing import ClassVar

from blockd.errors import Operation
from blockd.jobs.job import Action
from blockd.jobs.states import JobStatus, JobType
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
    type: JobType


class BlockJobCompleted(BlockJobEnd):
    """A job ended by itself; when it succeeded, its result is on the disk."""

    name: ClassVar[str] = "BLOCK_JOB_COMPLETED"
    error: str | None = None
    """What went wrong, in the system's words; absent on success."""
    x_detail: str | None = None
    """What else is known of the error: which image, what was done to it."""
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
    operation: Operation
    action: Action


class BlockJobPending(Event):
    """A job has done its work and waits for job-finalize."""

    name: ClassVar[str] = "BLOCK_JOB_PENDING"
    type: JobType
    id: str


class BlockStreamCompleted(Event):
    """A stream that block_stream started has ended by itself."""

    name: ClassVar[str] = "BLOCK_STREAM_COMPLETED"
    device: str
    len: int
    offset: int
    error: str | None = None
    """What went wrong, in the system's words; absent on success."""
    x_detail: str | None = None
    """What else is known of the error: which image, what was done to it."""
    image: str | None = None
    """The plain image that holds everything now; its add-cow file is not needed any more."""
    copied: int | None = None
    """Bytes copied, zeroes left out; absent if the stream had done its work when an earlier run ended."""


class BlockSwitched(Event):
    """A device has another active image."""

    name: ClassVar[str] = "BLOCK_SWITCHED"
    device: str
    filename: str
    backing: str
    """The image that was active before."""


class BlockWritesLost(Event):
    """Writes that were acknowledged to guests are lost; the next flush of each of them fails."""

    name: ClassVar[str] = "BLOCK_WRITES_LOST"
    device: str
    """Empty for a disk that has no name but that of its node."""
    node_name: str
    len: int | None = None
    """Bytes; absent if that is not known."""
    error: str
    """Why, for people."""


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
    BlockWritesLost,
    BlockExportDeleted,
)
