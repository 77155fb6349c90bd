"""Writes past the page cache and through it never meet in one folio; and what the kernel makes of it."""

import asyncio
import ctypes
import mmap
import os
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from blockd.aio import in_thread
from blockd.protocols import native_aio
from blockd.protocols.file import FileNode
from blockd.protocols.folios import FOLIO_LENGTH_MAX, Folios
from blockd.units import KIB, MIB
from tests.inline_threads import steps

SIZE = 4 * FOLIO_LENGTH_MAX
BESIDE = FOLIO_LENGTH_MAX // 2
BUSY_COUNT, BUSY_LENGTH = 8, 4 * MIB
COLLISION_COUNT = 20


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[FileNode]:
    (tmp_path / "disk.raw").write_bytes(bytes(SIZE))
    node = await FileNode.open(str(tmp_path / "disk.raw"), node_name="file", read_only=False)
    yield node
    await node.close()


class HeldWrites:
    """Direct writes that last until they are told to be over."""

    def __init__(self, write_blocking: Callable[[native_aio.Write], int]) -> None:
        self._write_blocking = write_blocking
        self.began = threading.Semaphore(0)
        self.may_end = threading.Semaphore(0)
        self.count = 0

    def write(self, write: native_aio.Write) -> int:
        self.count += 1
        self.began.release()
        self.may_end.acquire()
        return self._write_blocking(write)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> HeldWrites:
    held = HeldWrites(native_aio.write_blocking)
    monkeypatch.setattr(native_aio, "write_blocking", held.write)
    return held


def copied(length: int) -> memoryview:
    """What a copy writes, aligned as direct writes need it."""
    memory = mmap.mmap(-1, length)
    memory.write(b"c" * length)
    return memoryview(memory)


async def test_writes_wait_while_their_folio_is_written_directly(node: FileNode, held: HeldWrites) -> None:
    node.is_longer_allowed = True
    copy = asyncio.create_task(in_thread(node.write_cold_blocking, 0, copied(64 * KIB)))
    await in_thread(held.began.acquire)
    assert not node.write_nowait(BESIDE, b"guest")
    assert not node.write_nowait(FOLIO_LENGTH_MAX - 1, b"ab"), "a part of it is in the next one"
    assert node.write_nowait(FOLIO_LENGTH_MAX, b"guest"), "another folio"
    guest = asyncio.create_task(node.write(BESIDE, b"guest"))
    await steps(5)
    assert not guest.done()
    held.may_end.release()
    await asyncio.gather(copy, guest)
    assert bytes(await node.read(0, 64 * KIB)) == b"c" * 64 * KIB
    assert bytes(await node.read(BESIDE, 5)) == b"guest"
    assert node.write_nowait(BESIDE, b"again")


async def test_a_file_without_room_is_not_written_on_the_loop_beside_a_copy(
    node: FileNode, held: HeldWrites
) -> None:
    """Its direct writes make it longer or fill holes: the kernel lets nobody else write meanwhile."""
    copy = asyncio.create_task(in_thread(node.write_cold_blocking, 0, copied(64 * KIB)))
    await in_thread(held.began.acquire)
    assert not node.write_nowait(FOLIO_LENGTH_MAX, b"guest")
    held.may_end.release()
    await copy
    assert node.write_nowait(FOLIO_LENGTH_MAX, b"guest")


async def test_a_copy_beside_a_write_goes_through_the_cache(
    node: FileNode, held: HeldWrites, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a thread makes the write or the event loop does."""
    real, copy = os.pwrite, copied(64 * KIB)

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        if offset == BESIDE:
            monkeypatch.setattr(os, "pwrite", real)
            node.write_cold_blocking(0, copy)
        return real(fd, data, offset)

    for write in (node.write_nowait, node.write_blocking):
        monkeypatch.setattr(os, "pwrite", pwrite)
        write(BESIDE, b"guest")
        assert bytes(await node.read(0, 64 * KIB)) == b"c" * 64 * KIB
    assert held.count == 0
    held.may_end.release()
    node.write_cold_blocking(0, copy)
    assert held.count == 1, "nobody is in the way any more"


def test_a_copy_gives_way_to_a_write_that_waits_for_another_copy() -> None:
    """Else copies one after another would keep a guest waiting for ever."""
    folios, is_waiting = Folios(), threading.Event()
    assert folios.begin_direct(0, MIB)

    def write() -> None:
        is_waiting.set()
        with folios.through_cache(BESIDE, 1):
            pass

    guest = threading.Thread(target=write)
    guest.start()
    is_waiting.wait()
    while folios.begin_direct(MIB, MIB):  # until the guest waits
        folios.end_direct(MIB, MIB)
    assert guest.is_alive()
    folios.end_direct(0, MIB)
    guest.join()
    assert folios.begin_direct(MIB, MIB)
    assert folios.direct == {0: 1}


class BusyDisk:
    """Keeps the disk busy for a while, so that what it gets next lasts."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        os.posix_fallocate(self._fd, 0, BUSY_COUNT * BUSY_LENGTH)
        self._memory = mmap.mmap(-1, BUSY_LENGTH)
        self._writes = native_aio.Writes(BUSY_COUNT)

    def start(self) -> None:
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        for number in range(BUSY_COUNT):
            self._writes.submit(native_aio.Write(self._fd, number * BUSY_LENGTH, address, BUSY_LENGTH))

    def wait(self) -> None:
        count = 0
        while count < BUSY_COUNT:
            count += len(self._writes.wait())

    def close(self) -> None:
        os.close(self._fd)


@pytest.mark.slow
async def test_what_is_read_ahead_beside_a_copy_is_not_stale(tmp_path: Path) -> None:
    """The real kernel: a copy under way, a reader that has it read ahead over that, a guest that writes
    there.

    Where the filesystem has large folios (ext4 since Linux 6.16, XFS), a write that came between failed the
    next sync, and the copied clusters read as what had been there before.
    """
    path, length, start = tmp_path / "image", 64 * KIB, 16 * MIB
    busy = BusyDisk(tmp_path / "busy")
    for attempt in range(COLLISION_COUNT):
        with path.open("wb") as opened:
            os.posix_fallocate(opened.fileno(), 0, 2 * start + FOLIO_LENGTH_MAX)
        node = await FileNode.open(str(path), node_name="image", read_only=False)
        for offset in range(start, 2 * start - 256 * KIB, 256 * KIB):
            os.pread(node._fd, 256 * KIB, offset)
        os.posix_fadvise(node._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        busy.start()
        copy = asyncio.create_task(in_thread(node.write_cold_blocking, 2 * start, copied(length)))
        for offset in range(start, 2 * start + FOLIO_LENGTH_MAX, 256 * KIB):
            os.pread(node._fd, 256 * KIB, offset)
            await asyncio.sleep(0)  # the copy has its turn
        if not node.write_nowait(2 * start + length, b"guest"):
            await node.write(2 * start + length, b"guest")
        busy.wait()
        await copy
        await node.flush()
        assert bytes(await node.read(2 * start, length)) == b"c" * length, f"attempt {attempt}"
        await node.close()
    busy.close()
