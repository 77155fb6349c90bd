"""Leaks that are looked for beside guests: found, freed, and nothing that is in use with them."""

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import pytest

from blockd.block.housekeeping import Housekeeper
from blockd.block.node import ProtocolNode
from blockd.formats.qcow2 import checkpoint
from blockd.formats.qcow2.allocator import Allocator
from blockd.formats.qcow2.check import Census
from blockd.formats.qcow2.image import Qcow2Image
from blockd.formats.qcow2.leaks import Leaks, LeakSearch
from blockd.formats.qcow2.mapping import MappingChanges
from blockd.formats.qcow2.refcount_changes import RefcountChanges
from blockd.formats.qcow2.runs import Run
from blockd.units import MIB
from tests.chains import read_all
from tests.inline_threads import steps
from tests.model import stamp
from tests.planted_leaks import plant_leaks, searched_in_small_steps
from tests.recording import RecordingFile
from tests.streaming import check, open_overlay, overlay

CLUSTER = 512
SIZE = 1 * MIB
DATA = stamp(1, 0, SIZE // 4)


@pytest.fixture(autouse=True)
def small_steps() -> Iterator[None]:
    with searched_in_small_steps():
        yield


async def left_open(compat: str = "1.1") -> tuple[RecordingFile, int]:
    """A file with an image of some data, and how many of its clusters are leaked."""
    file = RecordingFile()
    image = await overlay(file, None, SIZE, cluster_size=CLUSTER, compat=compat)
    await image.write(0, DATA)
    await image.close()
    file = file.again()
    count = plant_leaks(file, random.Random(1))
    assert (await check(file.again())).leaks == count > 0
    return file, count


async def opened(file: RecordingFile) -> tuple[Qcow2Image, LeakSearch]:
    image = await open_overlay(file, None)
    assert isinstance(image, Qcow2Image)
    search = image.metadata.leak_search
    assert search is not None
    search.begin()
    return image, search


async def require_right(file: RecordingFile, content: bytes, *, leaks: int = 0) -> None:
    report = await check(file.again())
    assert not report.corruptions, report.findings
    assert report.leaks == leaks, report.findings
    image = await open_overlay(file.again(), None, read_only=True)
    assert (await read_all(image))[: len(content)] == content


@contextmanager
def meanwhile(is_due: Callable[[int], bool], work: Callable[[], Awaitable[object]]) -> Iterator[None]:
    """Have `work` done before the step of a census whose number is due."""
    advance, numbers = Census.advance, iter(range(1 << 20))

    async def advanced(census: Census) -> bool:
        if is_due(next(numbers)):
            await work()
        return await advance(census)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Census, "advance", advanced)
        yield


@asynccontextmanager
async def housekeeper() -> AsyncIterator[Housekeeper]:
    async with asyncio.TaskGroup() as tasks:
        yield Housekeeper(tasks)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
async def test_leaks_are_free_and_the_mark_goes(compat: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    file, count = await left_open(compat)
    async with housekeeper() as keeper:
        image = await open_overlay(file, None)
        keeper.begin(image)
    assert f"was not closed: {count} leaked clusters are free" in caplog.text
    await image.close()
    await require_right(file, DATA)
    again = await open_overlay(file.again(), None)
    assert isinstance(again, Qcow2Image)
    # A device is always longer, and version 2 has no mark: such an image is looked through each time.
    assert (again.metadata.leak_search is None) == (compat == "1.1")


@pytest.mark.parametrize("number", range(12))
async def test_what_guests_write_meanwhile_is_not_put_there(number: int) -> None:
    file, _ = await left_open()
    image, search = await opened(file)
    written = stamp(2, len(DATA), len(DATA))
    with meanwhile(lambda now: now == number, lambda: image.write(len(DATA), written)):
        await search.run()
    await image.close()
    await require_right(file, DATA + written)


@pytest.mark.parametrize("number", range(12))
async def test_what_guests_free_meanwhile_is_freed_once(number: int) -> None:
    """The refcounts were read before, and the tables are read after: it looks like a leak."""
    file, _ = await left_open()
    image, search = await opened(file)

    async def discard() -> None:
        await image.discard(0, 16 * CLUSTER)
        await image.flush()

    with meanwhile(lambda now: now == number, discard):
        await search.run()
    await image.write(0, DATA[: 16 * CLUSTER])
    await image.close()
    await require_right(file, DATA)


async def test_what_a_checkpoint_is_about_to_free_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables on the disk name it no longer, and it has its refcount still."""
    file, _ = await left_open()
    image, search = await opened(file)
    drop, may_go_on, is_there = Allocator.drop, asyncio.Event(), asyncio.Event()

    async def held(allocator: Allocator, freed: list[Run]) -> None:
        is_there.set()
        await may_go_on.wait()
        await drop(allocator, freed)

    monkeypatch.setattr(Allocator, "drop", held)
    await image.discard(0, 16 * CLUSTER)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(image.flush())
        await is_there.wait()
        is_counted = asyncio.Event()
        find = search._find

        async def found() -> Leaks | None:
            leaks = await find()
            is_counted.set()
            return leaks

        monkeypatch.setattr(search, "_find", found)
        tasks.create_task(search.run())
        await is_counted.wait()
        await steps(100)
        may_go_on.set()
    await image.write(0, DATA[: 16 * CLUSTER])
    await image.close()
    await require_right(file, DATA)


async def test_what_a_checkpoint_has_half_written_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its refcount is on the disk, and its entry in a table is not."""
    file, _ = await left_open()
    image, search = await opened(file)
    write, may_go_on, is_there = checkpoint.write_checkpoint, threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def held(file: ProtocolNode, refcounts: RefcountChanges, maps: MappingChanges) -> None:
        checkpoint.write_refcounts(file, refcounts)
        loop.call_soon_threadsafe(is_there.set)
        may_go_on.wait()
        write(file, refcounts, maps)

    monkeypatch.setattr(checkpoint, "write_checkpoint", held)
    written = stamp(2, len(DATA), 4 * CLUSTER)
    await image.write(len(DATA), written)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(image.flush())
        await is_there.wait()
        leaks = await search._find()
        may_go_on.set()
    assert leaks is not None
    await search._free(leaks)
    await image.close()
    await require_right(file, DATA + written)


@pytest.mark.parametrize("number", range(8))
async def test_an_l1_table_that_moves_meanwhile_is_read_as_it_was(number: int) -> None:
    file, _ = await left_open()
    image, search = await opened(file)
    l1_offset = image.metadata.header.l1_offset

    async def grow() -> None:
        await image.resize(8 * SIZE)
        await image.flush()
        await image.flush()
        assert image.metadata.header.l1_offset != l1_offset

    with meanwhile(lambda now: now == number, grow):
        await search.run()
    await image.close()
    await require_right(file, DATA)


async def test_what_waits_for_a_checkpoint_is_left_alone() -> None:
    file, count = await left_open()
    image, search = await opened(file)
    allocator = image.metadata.allocator
    await search.run()
    run = await image.metadata.allocate(4)
    first = run.host_offset // CLUSTER
    assert await allocator.free_leaked(range(first, first + run.cluster_count), 1, 1) == run.cluster_count
    assert await allocator.free_leaked(range(first, first + run.cluster_count), 1, 1) == 0
    await image.close()
    await require_right(file, DATA)
    assert count


@pytest.mark.parametrize("number", [0, 1, 5, 10])
async def test_closing_ends_it(number: int) -> None:
    """What is not free yet is so at the next opening."""
    file, count = await left_open()
    image, search = await opened(file)
    closing: list[asyncio.Task[None]] = []

    async def close() -> None:
        closing.append(asyncio.create_task(image.close()))
        await steps(10)

    with meanwhile(lambda now: now == number, close):
        await search.run()
    await closing[0]
    await require_right(file, DATA, leaks=count)
    again, search = await opened(file.again())
    assert isinstance(again.file, RecordingFile)
    await search.run()
    await again.close()
    await require_right(again.file, DATA)


async def test_one_that_has_not_begun_when_the_image_is_closed_does_nothing() -> None:
    file, count = await left_open()
    image, search = await opened(file)
    await image.close()
    await search.run()
    await require_right(file, DATA, leaks=count)


async def test_of_a_corrupt_image_nothing_is_freed(caplog: pytest.LogCaptureFixture) -> None:
    file, count = await left_open()
    image, search = await opened(file)
    table = image.metadata.mapping.l1[0] & ~(1 << 63)
    file.disk[table : table + 8] = (1 << 40).to_bytes(8)  # behind the end of the file, at any time
    file.disk[table + 8 : table + 16] = (3).to_bytes(8)
    await search.run()
    assert "it is not certain what is leaked" in caplog.text
    assert await image.metadata.allocator.used_end() > 0
    await image.close()
    assert (await check(file.again())).leaks >= count
