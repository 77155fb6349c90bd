"""A slow read or write keeps its cluster: what was freed meanwhile is given to nobody before it ends."""

import asyncio
import threading

import pytest

from blockd.block.node import Buffer
from blockd.formats.qcow2.check import check
from blockd.formats.qcow2.image import Qcow2Image
from tests.chains import read_all
from tests.model import stamp
from tests.recording import RecordingFile
from tests.streaming import open_overlay, overlay

CLUSTER = 4096
COUNT = 8
WAIT_S = 100.0


class SlowFile(RecordingFile):
    """A file whose next read, or next awaited write, can be held at the moment it reaches the disk."""

    def __init__(self, content: bytes = b"") -> None:
        super().__init__(content)
        self.is_slow = True
        self.reached = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._holds_read = self._holds_write = False
        self._released = threading.Event()

    def hold_read(self) -> None:
        self._holds_read = True

    def hold_write(self) -> None:
        self._holds_write = True

    def release(self) -> None:
        self._released.set()

    def readinto_blocking(self, offset: int, buffer: memoryview) -> None:
        if self._holds_read and threading.current_thread() is not threading.main_thread():
            self._holds_read = False
            self._loop.call_soon_threadsafe(self.reached.set)
            assert self._released.wait(WAIT_S)
        super().readinto_blocking(offset, buffer)

    async def write(self, offset: int, data: Buffer) -> None:
        if self._holds_write:
            self._holds_write = False
            self.reached.set()
            await asyncio.to_thread(self._released.wait, WAIT_S)
        await super().write(offset, data)


@pytest.fixture
async def image() -> Qcow2Image:
    """All clusters written and durable, and not in the page cache; their table is in memory."""
    made = RecordingFile()
    new = await overlay(made, None, COUNT * CLUSTER, cluster_size=CLUSTER)
    await new.write(0, stamp(1, 0, COUNT * CLUSTER))
    await new.flush()
    slow = await open_overlay(SlowFile(bytes(made.disk)), None)
    assert isinstance(slow, Qcow2Image)
    await slow.map(0, CLUSTER)
    return slow


async def give_away(image: Qcow2Image) -> None:
    """Free the first cluster durably, and let another guest cluster have whatever is free."""
    await image.discard(0, CLUSTER)
    await image.flush()
    await image.write_zeroes(CLUSTER, 3 * CLUSTER)
    await image.write(CLUSTER, stamp(2, CLUSTER, 3 * CLUSTER))
    await image.flush()


async def test_slow_read_never_sees_what_others_write_into_its_cluster(image: Qcow2Image) -> None:
    file = image.file
    assert isinstance(file, SlowFile)
    file.hold_read()
    read = asyncio.ensure_future(image.read(0, CLUSTER))
    await file.reached.wait()
    await give_away(image)
    file.release()

    assert await read in (stamp(1, 0, CLUSTER), bytes(CLUSTER))


async def test_slow_write_never_lands_in_what_its_cluster_became(image: Qcow2Image) -> None:
    file = image.file
    assert isinstance(file, SlowFile)
    file.hold_write()
    write = asyncio.ensure_future(image.write(0, stamp(3, 0, CLUSTER)))
    await file.reached.wait()
    await give_away(image)
    file.release()
    await write

    assert (await read_all(image))[CLUSTER:] == (
        stamp(2, CLUSTER, 3 * CLUSTER) + stamp(1, 4 * CLUSTER, (COUNT - 4) * CLUSTER)
    )


@pytest.mark.parametrize("hold", ["read", "write"])
async def test_space_comes_back_when_the_slow_one_has_ended(image: Qcow2Image, hold: str) -> None:
    file = image.file
    assert isinstance(file, SlowFile)
    (file.hold_read if hold == "read" else file.hold_write)()
    slow = asyncio.ensure_future(
        image.read(0, CLUSTER) if hold == "read" else image.write(0, stamp(3, 0, CLUSTER))
    )
    await file.reached.wait()
    await give_away(image)
    file.release()
    await slow

    size = len(file.disk)
    await image.flush()
    await image.write(0, stamp(4, 0, CLUSTER))
    await image.flush()
    assert len(file.disk) == size
    report = await check(RecordingFile(bytes(file.disk)))
    assert (report.corruptions, report.leaks) == (0, 0)
