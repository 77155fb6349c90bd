"""Tables that are being loaded while others want them, in every format, as schedules with names."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from blockd.block.node import OverlayNode
from blockd.formats.qcow2.image import Qcow2Image
from blockd.formats.table_cache import TableCache
from blockd.units import KIB, MIB
from tests.chains import read_all
from tests.inline_threads import steps
from tests.many.steps import counted
from tests.model import stamp
from tests.recording import RecordingFile
from tests.scheduled_threads import Threads, scheduled
from tests.streaming import check, open_overlay, overlay

CLUSTER = 4 * KIB
SIZE = 64 * CLUSTER

formats = pytest.mark.parametrize(
    ("image_format", "options"),
    [
        ("qcow2", {}),
        ("qcow2", {"extended_l2": True, "cluster_size": 16 * KIB}),
        ("qed", {}),
        ("add-cow", {}),
    ],
    ids=["qcow2", "extended L2", "QED", "add-cow"],
)


@asynccontextmanager
async def cold_image(
    image_format: str, options: dict[str, Any]
) -> AsyncIterator[tuple[OverlayNode, Threads]]:
    """An image with its first cluster in use, none of whose tables is in memory or in the page cache."""
    file = RecordingFile(name=f"cold.{image_format}")
    if image_format == "add-cow":
        file.beside = RecordingFile(name="cold.data")
    made = await overlay(file, None, SIZE, image_format=image_format, **{"cluster_size": CLUSTER, **options})
    await made.write(0, stamp(1, 0, CLUSTER))
    await made.close()
    image = await open_overlay(file.again(), None)
    with scheduled(Threads()) as threads:
        yield image, threads


def file_of(image: OverlayNode) -> RecordingFile:
    file = image.children()["file"]
    assert isinstance(file, RecordingFile)
    return file


async def write(image: OverlayNode, offset: int, data: bytes) -> None:
    """Write as an export does."""
    if not image.write_nowait(offset, data):
        await image.write(offset, data)


@formats
async def test_write_while_its_table_is_being_loaded(image_format: str, options: dict[str, Any]) -> None:
    """A load whose thread has read, and whose task does not know yet, and a guest that writes then."""
    async with cold_image(image_format, options) as (image, threads):
        file_of(image).is_slow = True
        reading = asyncio.create_task(image.read(0, 512))
        await steps(3)
        [load] = threads.calls
        load.act()  # the table's pages are in the page cache now
        file_of(image).is_slow = False
        data = stamp(2, SIZE // 2, CLUSTER)
        writing = asyncio.create_task(write(image, SIZE // 2, data))
        await steps(3)
        threads.finish(load)
        await threads.run_all(reading, writing)
        assert reading.result() == stamp(1, 0, CLUSTER)[:512]

        await threads.run(image.flush())
        expected = (stamp(1, 0, CLUSTER).ljust(SIZE // 2, b"\0") + data).ljust(SIZE, b"\0")
        assert await threads.run(read_all(image)) == expected
    assert await read_all(await open_overlay(file_of(image).again(), None)) == expected
    report = await check(file_of(image).again())
    assert (report.corruptions, report.leaks) == (0, 0), report.findings


@formats
async def test_load_that_is_cancelled_is_made_by_whoever_waits(
    image_format: str, options: dict[str, Any]
) -> None:
    async with cold_image(image_format, options) as (image, threads):
        file_of(image).is_slow = True
        first, second = (asyncio.create_task(image.read(0, 512)) for _ in range(2))
        await steps(3)
        assert len(threads.calls) == 1, "one thread reads one table"
        first.cancel()
        await threads.run_all(first, second)
        assert first.cancelled()
        assert second.result() == stamp(1, 0, CLUSTER)[:512]


async def test_write_whose_table_is_evicted_while_it_waits_for_its_range() -> None:
    """It finds its cluster in place as before, though another one is writing there just now."""
    size, span = 2 * MIB, 256 * KIB  # with 512-byte clusters a table maps 32 KiB
    made = await overlay(RecordingFile(), None, size, cluster_size=512)
    for table in range(3):
        await made.write(table * span, bytes([1 + table]) * 512)
    await made.close()
    file = made.children()["file"]
    assert isinstance(file, RecordingFile)
    image = await open_overlay(file.again(), None)
    assert isinstance(image, Qcow2Image)
    image.metadata.mapping.cache.count_max = 2
    with scheduled(Threads()) as threads:
        await threads.run(image.map(0, 512))
        file_of(image).is_slow = True
        first = asyncio.create_task(image.write(0, b"a" * 100))
        await steps(3)
        [in_place] = threads.calls
        next_cluster = asyncio.create_task(image.write(512, b"n" * 512))
        await steps(3)
        second = asyncio.create_task(image.write(100, b"b" * 500))
        await steps(3)
        for table in (1, 2):
            reading = asyncio.create_task(image.map(table * span, 1))
            await steps(3)
            threads.finish(threads.calls[-1])
            await reading
        assert 0 not in image.metadata.mapping.tables
        next_cluster.cancel()
        await threads.run_others(in_place, next_cluster, second)
        await threads.run_all(first)
        assert await threads.run(image.read(0, 600)) == b"a" * 100 + b"b" * 500


# -- the cache by itself ----------------------------------------------------------------------


class Tables:
    """What the disk has; each load ends when a test says so."""

    def __init__(self) -> None:
        self.waiting: list[asyncio.Future[str]] = []

    async def read(self) -> str:
        self.waiting.append(asyncio.get_running_loop().create_future())
        return await self.waiting[-1]


def refuse() -> str | None:
    raise AssertionError("it is being loaded")


async def loading(cache: TableCache[str], tables: Tables) -> asyncio.Task[str]:
    task = asyncio.create_task(cache.load(1, tables.read))
    await steps(1)
    return task


async def test_what_is_being_loaded_is_had_in_no_other_way() -> None:
    cache, tables = TableCache[str](2), Tables()
    first, second = [await loading(cache, tables) for _ in range(2)]
    assert cache.load_nowait(1, refuse) is None
    assert cache.load_nowait(2, lambda: "two") == "two"
    [load] = tables.waiting
    load.set_result("one")
    assert await first == await second == "one"


@pytest.mark.parametrize("is_evicted", [False, True])
async def test_load_is_dropped_when_a_table_was_put_meanwhile(is_evicted: bool) -> None:
    cache, tables = TableCache[str](2), Tables()
    task = await loading(cache, tables)
    cache.put(1, "new")
    if is_evicted:
        cache.write_succeeded(cache.take_changed())
        for number in (2, 3):
            cache.load_nowait(number, str)
        assert 1 not in cache.tables
    tables.waiting[0].set_result("old")
    await steps(3)
    if is_evicted:
        tables.waiting[1].set_result("new, read again")
    assert await task == ("new, read again" if is_evicted else "new")


@pytest.mark.parametrize("end", [lambda load: load.cancel(), lambda load: load.set_exception(OSError())])
async def test_load_that_fails_leaves_others_to_read(end: Callable[[Any], Any]) -> None:
    cache, tables = TableCache[str](2), Tables()
    first, second = [await loading(cache, tables) for _ in range(2)]
    end(tables.waiting[0])
    await steps(3)
    tables.waiting[1].set_result("one")
    assert await second == "one"
    assert isinstance(
        (await asyncio.gather(first, return_exceptions=True))[0], (OSError, asyncio.CancelledError)
    )


async def test_what_the_disk_lacks_stays() -> None:
    cache = TableCache[str](2)
    cache.put(1, "changed")
    cache.put(2, "being written")
    cache.changed.discard(1)
    taken = cache.take_changed()
    cache.changed.add(1)
    for number in range(3, 9):
        cache.load_nowait(number, str)
    assert {1, 2} <= set(cache.tables)
    cache.write_failed(taken)
    assert cache.changed == {1, 2}
    assert cache.is_under_pressure
    cache.write_succeeded(cache.take_changed())
    for number in range(3, 9):
        cache.load_nowait(number, str)
    assert not {1, 2} & set(cache.tables)


@pytest.mark.parametrize("changed_share", [0.0, 0.5, 1.0])
def test_what_comes_costs_the_same_beside_many_that_the_disk_lacks(changed_share: float) -> None:
    costs = []
    for count in (100, 3000):
        cache = TableCache[str](count)
        for number in range(count):
            cache.put(number, "table", is_changed=number < changed_share * count)
        with counted() as steps:
            for number in range(count, 2 * count):
                cache.load_nowait(number, str)
        costs.append(steps.count / count)
        assert len(cache.tables) <= (1 + changed_share) * count
        assert cache.changed <= set(cache.tables)
    assert costs[1] <= 1.02 * costs[0] + 1


def test_what_is_used_stays_whatever_else_is_read_once() -> None:
    cache, used_count, read = TableCache[str](64), 8, list[int]()

    def reading(number: int) -> Callable[[], str]:
        def note() -> str:
            read.append(number)
            return str(number)

        return note

    for number in range(100, 1000):
        cache.load_nowait(number, reading(number))
        used = number % used_count
        assert cache.load_nowait(used, reading(used)) == str(used)
    assert sum(number < used_count for number in read) == used_count
    assert len(cache.tables) + len(cache._aside) <= cache.count_max
