"""`blockctl image convert`: a stream, into a fresh image, of all that a chain holds.

The target is made as an empty overlay of the source, streamed into, and then records no backing any more.
So a copy that a power cut ends is an overlay of its source, complete and correct, and one that ends with
an error or Ctrl-C is removed. A raw target knows no backing: until the copy is done it is no image.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from blockd.block.chain import format_of
from blockd.block.node import BlockNode, OverlayNode, ProtocolNode
from blockd.cli.following import POLL_INTERVAL_S, StreamStatus
from blockd.cli.image.create import NewImage, make_image
from blockd.cli.image.opening import format_entry, opened_image
from blockd.drivers import NodeGraph
from blockd.filenames import absolute, basename, folder_of, given_path, plain
from blockd.filters.blkstream import BlkStream
from blockd.formats.raw.target import RawTarget
from blockd.jobs.job import Action, Job
from blockd.jobs.manager import JobManager
from blockd.jobs.stream import StreamJob
from blockd.protocols.file import FileNode
from blockd.protocols.new_file import MadeFile
from blockd.protocols.opening import Find

_JOB_ID = "convert"


class Source(NamedTuple):
    """The image to copy."""

    filename: str
    image_format: str | None
    image_paths: Sequence[str]
    backing_format: str | None = None


class Converted(NamedTuple):
    """What was done, in bytes."""

    size: int
    copied: int
    zero: int


async def convert_image(
    source: Source, target: str, image: NewImage, show: Callable[[StreamStatus], None]
) -> Converted:
    """Copy an image, and `show` how far it is.

    Raises:   RequestError, ImageError, StorageError: the source cannot be read, or the target not be made.
    Fails to: there is no such target.
    """
    entry = format_entry(image.image_format)
    target = given_path(target)
    async with _opened(source) as (top, graph):
        if entry.has_backing:
            image = image._replace(backing=_name_for(top, target), backing_format=format_of(top))
        _, made = await make_image(target, image._replace(size=top.size))
        with _removed_on_failure(made):
            opening = (
                _overlay(graph, target, image.image_format, top, made[0].find)
                if entry.has_backing
                else _plain(made[0].find, top)
            )
            async with opening as overlay:
                job = await _stream(overlay, target, show)
    return Converted(job.length, job.counters.copied, job.counters.zero)


def _opened(source: Source) -> AbstractAsyncContextManager[tuple[BlockNode, NodeGraph]]:
    return opened_image(
        source.filename, source.image_format, source.image_paths, backing_format=source.backing_format
    )


def _name_for(source: BlockNode, target: str) -> str:
    """How the target is to name the source: shortly if they are in one folder."""
    name = plain(basename(source.filename))
    return name if _are_beside(source.filename, target) else absolute(source.filename)


def _are_beside(one: str, other: str) -> bool:
    try:
        return Path(folder_of(one)).samefile(folder_of(other) or ".")
    except OSError:
        return False


@contextmanager
def _removed_on_failure(made: Iterable[MadeFile]) -> Iterator[None]:
    """Leave no half-made image behind, whatever ends the block."""
    try:
        yield
    except BaseException:
        for file in made:
            file.remove()
        raise
    finally:
        for file in made:
            file.close()


@asynccontextmanager
async def _overlay(
    graph: NodeGraph, target: str, image_format: str, source: BlockNode, find: Find
) -> AsyncIterator[OverlayNode]:
    """The target as an overlay; the graph closes it."""
    overlay = await graph.open_overlay(target, image_format, source, find=find)
    graph.connect(overlay, "backing", source)
    yield overlay


@asynccontextmanager
async def _plain(find: Find, source: BlockNode) -> AsyncIterator[OverlayNode]:
    """The target as what cannot have a backing."""
    file = await FileNode.open(find, node_name="target", read_only=False)
    try:
        yield RawTarget(file, source, node_name="raw-target")
    finally:
        await file.close()


class _Silent:
    """Nobody needs to be told what the job is told; its errors are raised at the end."""

    def status_changed(self, job: Job) -> None:
        """Seen from its progress."""

    def error_met(self, job: Job, operation: str, action: Action) -> None:
        """Each is reported by ending the job."""

    def pending(self, job: Job) -> None:
        """It is finalized by itself."""

    def ended(self, job: Job) -> None:
        """Waited for."""


class _Conversion(StreamJob):
    """A stream beside which nobody writes: what was copied once is there, and zeroes are left out."""

    async def commit(self) -> None:
        await self._target.active.change_backing(None, None)


async def _stream(overlay: OverlayNode, name: str, show: Callable[[StreamStatus], None]) -> StreamJob:
    file = overlay.children()["file"]
    if isinstance(file, ProtocolNode):
        file.may_clone = False  # whoever converts an image expects its zeroes to take no space any more
    overlay.records_zeroes = False
    job = _Conversion(_JOB_ID, BlkStream(overlay, None, "stream"), base_filename=None, base_format=None)
    async with JobManager(_Silent()) as jobs:
        jobs.start(job)
        while not await _has_ended(job):
            show(_status(job, name))
    if job.error is not None:
        raise job.error
    overlay.backing = None
    return job


async def _has_ended(job: Job) -> bool:
    """Wait for the end, or until it is time to show how far it is."""
    with suppress(TimeoutError):
        async with asyncio.timeout(POLL_INTERVAL_S):
            await job.wait_ended()
            return True
    return False


def _status(job: StreamJob, name: str) -> StreamStatus:
    status: StreamStatus = {
        "device": name,
        "len": job.length,
        "offset": job.offset,
        "speed": job.speed,
        "status": job.status.value,
        "io-status": job.io_status.value,
        "copied": job.counters.copied,
        "rate": round(job.rate),
    }
    if job.seconds_left is not None:
        status["seconds-left"] = round(job.seconds_left, 1)
    return status
