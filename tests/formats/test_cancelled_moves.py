"""Whatever is cancelled after its thread has changed the disk: memory knows what the disk has.

Each operation is cancelled once at each of its threads, after that has acted; then the image is used on,
closed, checked, and compared.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from blockd.block.node import OverlayNode
from blockd.formats.raw.image import RawImage
from blockd.units import KIB, SECTOR_SIZE
from tests.chains import read_all
from tests.inline_threads import steps
from tests.model import describe, stamp
from tests.recording import RecordingFile
from tests.scheduled_threads import Threads, scheduled
from tests.streaming import check, open_overlay, overlay

CLUSTER = 4 * KIB
SIZE = 40 * CLUSTER
GROWN = 3 * SIZE
# What a refcount table of 512 bytes, and refcounts of 64 bits, can describe.
REFCOUNT_TABLE_SPAN = 64 * 64 * 512

NOTHING = bytes(SECTOR_SIZE)


class Disk:
    """An image, and by sector what a guest may find there."""

    def __init__(self, image: OverlayNode, threads: Threads) -> None:
        self.image = image
        self.threads = threads
        self.count = 0
        self.allowed: dict[int, set[bytes]] = {}

    @property
    def file(self) -> RecordingFile:
        file = self.image.children()["file"]
        assert isinstance(file, RecordingFile)
        return file

    async def write(self, cluster: int, count: int = 1) -> None:
        self.count += 1
        value = stamp(self.count, 0, SECTOR_SIZE)
        data = value * (count * CLUSTER // SECTOR_SIZE)
        await self._change(self.image.write(cluster * CLUSTER, data), cluster, count, value)

    async def zero(self, cluster: int, count: int = 1) -> None:
        work = self.image.write_zeroes(cluster * CLUSTER, count * CLUSTER)
        await self._change(work, cluster, count, bytes(SECTOR_SIZE))

    async def _change(self, work: Coroutine[Any, Any, None], cluster: int, count: int, value: bytes) -> None:
        """A change that is cancelled leaves each sector as it was or as it should be."""
        sectors = range(cluster * CLUSTER // SECTOR_SIZE, (cluster + count) * CLUSTER // SECTOR_SIZE)
        for sector in sectors:
            self.allowed.setdefault(sector, {NOTHING}).add(value)
        await work
        self.allowed.update((sector, {value}) for sector in sectors)

    def require(self, content: bytes) -> None:
        for sector in range(len(content) // SECTOR_SIZE):
            found = content[sector * SECTOR_SIZE : (sector + 1) * SECTOR_SIZE]
            assert found in self.allowed.get(sector, {NOTHING}), f"sector {sector} holds {describe(found)}"


async def write_new(disk: Disk) -> None:
    await disk.write(7, 6)
    await disk.image.flush()


async def zero_and_write_again(disk: Disk) -> None:
    await disk.zero(0, 4)
    await disk.image.flush()
    await disk.write(2, 3)
    await disk.image.flush()


async def grow(disk: Disk) -> None:
    await disk.write(1)
    await disk.image.resize(GROWN)
    await disk.write(GROWN // CLUSTER - 1)


async def rename_backing(disk: Disk) -> None:
    await disk.write(9)
    await disk.image.change_backing("other.raw", "raw")


async def detach(disk: Disk) -> None:
    await disk.write(9)
    await disk.image.change_backing(None, None)


async def close(disk: Disk) -> None:
    await disk.write(9)
    await disk.image.close()


async def grow_refcount_table(disk: Disk) -> None:
    """Use more clusters than a refcount table of one cluster describes."""
    await disk.write(0, disk.image.size // CLUSTER)


MOVES: list[Callable[[Disk], Awaitable[None]]] = [
    write_new,
    zero_and_write_again,
    grow,
    rename_backing,
    detach,
    close,
]
FORMATS: dict[str, dict[str, Any]] = {
    "qcow2": {"cluster_size": CLUSTER},
    "small": {"cluster_size": 512, "refcount_bits": 64},
    "extended L2": {"extended_l2": True, "cluster_size": 16 * KIB},
    "QED": {"cluster_size": CLUSTER, "image_format": "qed"},
    "add-cow": {"cluster_size": CLUSTER, "image_format": "add-cow"},
}


async def cancelled(
    move: Callable[[Disk], Awaitable[None]], options: dict[str, Any], number: int, size: int = SIZE
) -> bool:
    """Cancel a move at its thread `number`, and use the image on; False: it has not so many threads."""
    file = RecordingFile(name="moved")
    if options.get("image_format") == "add-cow":
        file.beside = RecordingFile(name="moved.data")
    base = await RawImage.open(RecordingFile(bytes(CLUSTER), "base.raw"), node_name="base", read_only=True)
    disk = Disk(await overlay(file, base, size, **options), Threads())
    await disk.write(0, 4)
    await disk.image.flush()
    with scheduled(disk.threads):
        for part in (file, file.beside):
            if part is not None:
                part.is_slow = True
        task = asyncio.ensure_future(move(disk))
        if not await _act(disk.threads, task, number):
            return False
        task.cancel()
        await steps(3)
        await disk.threads.run_all(task)
        assert task.cancelled() or task.exception() is None
        if move is not close:
            await disk.threads.run(_use_on(disk))
            disk.require(await disk.threads.run(read_all(disk.image)))
        await disk.threads.run(disk.image.close())
    await _compare(disk, base)
    return True


async def _act(threads: Threads, task: "asyncio.Future[None]", number: int) -> bool:
    """Let `number` threads come to their end, and the next one act without having been heard."""
    for count in range(number + 1):
        for _ in range(20):
            if threads.calls or task.done():
                break
            await asyncio.sleep(0)
        if not threads.calls:
            assert task.done() and task.exception() is None
            return False
        if count < number:
            threads.finish(threads.calls[0])
    threads.calls[0].act()
    return True


async def _use_on(disk: Disk) -> None:
    """Allocate, free, and close."""
    await disk.write(20, 5)
    await disk.zero(1)
    await disk.image.flush()
    await disk.write(30)
    if disk.image.size < GROWN:
        await disk.image.resize(GROWN)
    await disk.write(SIZE // CLUSTER)


async def _compare(disk: Disk, base: RawImage) -> None:
    report = await check(disk.file.again())
    assert (report.corruptions, report.leaks) == (0, 0), report.findings
    reopened = await open_overlay(disk.file.again(), None)
    assert reopened.backing_filename == disk.image.backing_filename
    assert reopened.size == disk.image.size
    reopened.backing = base if reopened.backing_filename is not None else None
    disk.require(await read_all(reopened))


@pytest.mark.parametrize("options", FORMATS.values(), ids=list(FORMATS))
@pytest.mark.parametrize("move", MOVES)
async def test_cancelled_at_every_thread(
    move: Callable[[Disk], Awaitable[None]], options: dict[str, Any]
) -> None:
    number = 0
    while await cancelled(move, options, number):
        number += 1
    assert number


@pytest.mark.slow
async def test_growing_the_refcount_table_cancelled_at_every_thread() -> None:
    number = 0
    while await cancelled(grow_refcount_table, FORMATS["small"], number, size=REFCOUNT_TABLE_SPAN):
        number += 1
    assert number
