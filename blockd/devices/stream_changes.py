"""Starting a stream together with other changes."""

from collections.abc import Awaitable, Callable

from blockd.devices.changes import Change
from blockd.devices.stream_request import StreamRequest
from blockd.devices.streams import Streams
from blockd.jobs.group import JobGroup
from blockd.jobs.job import Job
from blockd.jobs.manager import JobManager


class StartStream(Change):
    """Puts a stream in place; it begins when all changes are final.

    What is to be streamed is found when it is its turn: it may be what a change before it made.
    """

    def __init__(
        self,
        streams: Streams,
        jobs: JobManager,
        find: Callable[[], Awaitable[StreamRequest]],
        group: JobGroup | None,
    ) -> None:
        self._streams = streams
        self._jobs = jobs
        self._find = find
        self._group = group
        self._job: Job

    async def prepare(self) -> None:
        """Nothing can be told before the other changes are made."""

    async def perform(self) -> None:
        self._job = await self._streams.place(await self._find())
        self._jobs.claim_id(self._job.id)
        if self._group is not None:
            self._group.add(self._job)

    async def undo(self) -> None:
        self._jobs.release_id(self._job.id)
        await self._streams.take_back(self._job)

    def make_final(self) -> None:
        self._jobs.start(self._job)

    async def clean(self) -> None:
        """Nothing was opened."""
