"""A disk in memory or in files that a guest uses while a stream runs, without a daemon around it."""

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from blockd.block.chain import chain
from blockd.block.node import BlockNode, OverlayNode, ProtocolNode
from blockd.block.root import Root
from blockd.drivers import FORMATS
from blockd.errors import StorageError
from blockd.filters.blkstream import BlkStream
from blockd.formats.add_cow import header as add_cow_header
from blockd.formats.add_cow.check import check as check_add_cow
from blockd.formats.add_cow.create import create as create_add_cow
from blockd.formats.add_cow.image import AddCowImage
from blockd.formats.check_report import CheckReport
from blockd.formats.qed import header as qed_header
from blockd.formats.raw.create import create as create_raw
from blockd.formats.raw.image import RawImage
from blockd.jobs.job import Action, Job
from blockd.jobs.manager import JobManager
from blockd.jobs.stream import StreamJob
from tests.recording import RecordingFile


class Observer:
    """Nobody needs to be told; what was told is kept."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def status_changed(self, job: Job) -> None:
        self.told.append(job.status.value)

    def error_met(self, job: Job, operation: str, action: Action) -> None:
        self.told.append(f"{operation} error: {action.value}")

    def pending(self, job: Job) -> None:
        self.told.append("pending")

    def ended(self, job: Job) -> None:
        self.told.append("cancelled" if job.is_cancelled else "failed" if job.error else "completed")


async def overlay(
    file: ProtocolNode,
    backing: BlockNode | None,
    size: int,
    *,
    cluster_size: int,
    backing_format: str = "raw",
    image_format: str = "qcow2",
    **options: Any,
) -> OverlayNode:
    """Make an empty image over `backing` in an empty file, and open it."""
    await create(
        file,
        size,
        image_format,
        cluster_size=cluster_size,
        backing_filename=backing.filename if backing else None,
        backing_format=backing_format if backing else None,
        **options,
    )
    return await open_overlay(file, backing)


async def create(file: ProtocolNode, size: int, image_format: str, **options: Any) -> None:
    """Make an image in a file; an add-cow file speaks of the one beside it."""
    if image_format != AddCowImage.driver:
        await FORMATS[image_format].create(file, size, **options)
        return
    image = beside(file)
    await create_raw(image, size)
    await create_add_cow(file, size, image_filename=image.filename, **options)


def beside(file: ProtocolNode) -> RecordingFile:
    """The file of the image that the add-cow file `file` speaks of."""
    assert isinstance(file, RecordingFile), "it is recorded"
    assert file.beside is not None, "a test has put it there"
    return file.beside


async def open_overlay(
    file: ProtocolNode,
    backing: BlockNode | None,
    *,
    read_only: bool = False,
    image_file: ProtocolNode | None = None,
) -> OverlayNode:
    """Open the image in a file, whatever its format; an add-cow image has its data in `image_file`."""
    image = await FORMATS[await format_of(file)].open(file, "active", read_only)
    assert isinstance(image, OverlayNode)
    if isinstance(image, AddCowImage):
        data = image_file or beside(file)
        image.attach(await RawImage.open(data, node_name="image", read_only=read_only))
    image.backing = backing
    return image


async def format_of(file: ProtocolNode) -> str:
    """The format of an image that a test has made: no guest has had a hand in its first bytes."""
    first_bytes = bytes(await file.read(0, 4)) if file.size else b""
    probes = {"qed": qed_header.probe, "add-cow": add_cow_header.probe}
    return next((name for name, probe in probes.items() if probe(first_bytes)), "qcow2")


async def check(file: ProtocolNode) -> CheckReport:
    """Check the image in a file, whatever its format."""
    image_format = await format_of(file)
    if image_format == AddCowImage.driver:
        return await check_add_cow(file, beside(file).size)
    check_file = FORMATS[image_format].check
    assert check_file is not None, "all of these formats have a check"
    return await check_file(file)


class Streaming:
    """One disk and the streams on it; does what a device does around a job."""

    def __init__(self, active: OverlayNode, jobs: JobManager) -> None:
        self.active = active
        self.root = Root(active)
        self.filter_type = BlkStream
        self._jobs = jobs
        self._count = 0

    async def start(self, base: BlockNode | None = None, **options: object) -> StreamJob:
        """Put the filter in front and start a stream down to `base`; one that stayed there serves again."""
        staying = self.root.top
        async with self.root.drained():
            if isinstance(staying, self.filter_type) and staying.staged_length:
                stream = staying
                stream.begin_again(base, "#stream")
            else:
                stream = self.filter_type(self.active, base, "#stream")
            self.root.replace(stream)
        self._count += 1
        job = StreamJob(
            f"job{self._count}",
            stream,
            base_filename=base.filename if base else None,
            base_format="raw" if base else None,
            **options,  # type: ignore[arg-type]
        )

        async def clean() -> None:
            await self.drain()
            if stream.staged_length:
                assert job.is_cancelled or job.error is not None
            elif not job.is_cancelled and job.error is None:
                self.active.backing = base

        job.clean = clean
        self._jobs.start(job)
        return job

    async def drain(self) -> None:
        """Merge what is staged, and take the filter away unless something stays."""
        stream = self.root.top
        assert isinstance(stream, self.filter_type)
        with contextlib.suppress(StorageError):
            await stream.flush_staged()
        async with self.root.drained():
            if not stream.staged_length:
                self.root.replace(self.active)

    async def switch(self, overlay: OverlayNode) -> None:
        """Put an empty overlay on top: the old active image becomes its backing, and read-only."""
        async with self.root.drained():
            await self.active.reopen(read_only=True)
            overlay.backing = self.active
            self.active = overlay
            self.root.replace(overlay)

    def base_at(self, depth: int) -> BlockNode | None:
        """The node `depth` layers below the active image."""
        nodes = list(chain(self.active))
        return nodes[depth] if depth < len(nodes) else None


@asynccontextmanager
async def streaming(active: OverlayNode) -> AsyncIterator[Streaming]:
    """A disk whose streams are ended with it."""
    async with JobManager(Observer()) as jobs:
        yield Streaming(active, jobs)
