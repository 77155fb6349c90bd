"""A disk whose source can be held in the midst of a copy, for schedules of guests' writes beside it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from blockd.errors import StorageError
from blockd.filters.blkstream import BlkStream
from blockd.formats.check_report import CheckReport
from blockd.formats.qcow2.check import check
from blockd.formats.raw.image import RawImage
from blockd.jobs.stream import StreamJob
from tests.chains import read_all
from tests.cold_file import hold_few_tables
from tests.doubles import FailingFile, HeldNode
from tests.model import ModelDisk, drawn
from tests.recording import RecordingFile
from tests.streaming import Streaming, open_overlay, overlay, streaming

CLUSTER = 4096
COUNT = 8


Change = Callable[[int, int], Awaitable[None]]


@dataclass
class Rig:
    """An empty overlay over a source that can be held, with a stream's filter in front."""

    would_wait: ClassVar[Callable[[], bool] | None] = None

    source: HeldNode
    file: FailingFile
    disk: Streaming
    model: ModelDisk

    @property
    def node(self) -> BlkStream:
        assert isinstance(self.disk.root.top, BlkStream)
        return self.disk.root.top

    async def write(self, offset: int, length: int) -> None:
        """Write as the guest, and tell the model."""
        data = self.model.new_data(offset, length)
        self.model.begin_write(offset, data)
        try:
            if not self.disk.root.node.write_nowait(offset, data):
                async with self.disk.root.request() as node:
                    await node.write(offset, data)
        except (StorageError, asyncio.CancelledError):
            self.model.fail_write(offset, data)
            raise
        self.model.finish_write(offset, data)

    async def change(self, call: Change, offset: int, length: int) -> None:
        """Zero or discard as the guest; `call` does it."""
        self.model.begin_write(offset, bytes(length))
        try:
            await call(offset, length)
        except (StorageError, asyncio.CancelledError):
            self.model.fail_write(offset, bytes(length))
            raise
        self.model.finish_write(offset, bytes(length))

    async def compare(self) -> None:
        """Read all as a guest and compare."""
        self.model.check_read(0, await read_all(self.disk.root.top))

    async def stream_to_end(self) -> StreamJob:
        job = await self.disk.start(None)
        await job.wait_ended()
        return job

    async def whole_image(self) -> CheckReport:
        """Compare what the file holds, without any backing; returns the check's report."""
        await self.disk.active.flush()
        report = await check(RecordingFile(bytes(self.file.disk)))
        assert report.corruptions == 0, report.findings
        image = await open_overlay(RecordingFile(bytes(self.file.disk)), None, read_only=True)
        assert image.backing_filename is None
        self.model.check_read(0, await read_all(image))
        return report


@asynccontextmanager
async def rig(base: str = "B" * COUNT) -> AsyncIterator[Rig]:
    content = drawn([base], CLUSTER)
    raw = await RawImage.open(RecordingFile(content, "base.raw"), node_name="base", read_only=True)
    source = HeldNode(raw)
    file = FailingFile()
    active = await overlay(file, source, len(content), cluster_size=CLUSTER)
    file.is_slow = True
    if Rig.would_wait is not None:
        file.would_wait = Rig.would_wait
        hold_few_tables(active)
    async with streaming(active) as disk:
        disk.root.replace(BlkStream(active, None, "#filter"))
        yield Rig(source, file, disk, ModelDisk(content))


@asynccontextmanager
async def copy_held(scene: Rig, offset: int = 0, length: int = CLUSTER) -> AsyncIterator[asyncio.Task[Any]]:
    """A copy-on-read that has asked its source and waits for the answer; released after the block."""
    scene.source.hold()
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(scene.node.populate([(offset, offset + length)]))
        await scene.source.reached.wait()
        yield task
        scene.source.release()
