"""Copies that go from file to file, into room behind the end: the same bytes, whatever of it is missing."""

import errno
import math
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import pytest

from blockd.block.node import FillCounts
from blockd.block.segments import SourcePlan
from blockd.errors import StorageError
from blockd.extents import Kind
from blockd.formats.qcow2.image import Qcow2Image
from blockd.protocols import cold, native_aio
from blockd.protocols import file as file_module
from blockd.protocols.file import FileNode
from blockd.units import GIB, KIB, MIB
from tests import chains, qemu_img
from tests.chains import Chain, read_all

pytestmark = pytest.mark.usefixtures("without_cloning")

CLUSTER_SIZE = 64 * KIB
# Several stretches of data, zeroes at both ends and alone, and one piece that is already there.
BASE = "0ABCDEFGHIJKLMNOPQRSTUVWX0YZABCDE00"
OVERLAY = "-" * 10 + "!" + "-" * 24
FILLED_COUNT = len(BASE) - 1
ZERO_COUNT = BASE.count("0")


def failing_from(number: int, real: Callable[..., int]) -> Callable[..., int]:
    """A write that works until it is called for the `number`th time, and from then on writes nothing."""
    left = iter(range(number))
    return lambda *arguments: 0 if next(left, None) is None else real(*arguments)


async def make_chain(folder: Path, base_format: str = "raw") -> Chain:
    return await chains.make(folder, [BASE, OVERLAY], CLUSTER_SIZE, base_format)


async def fill(image: Qcow2Image) -> FillCounts:
    plan = await image.plan_read(0, image.size)
    return await image.fill([(0, image.size)], SourcePlan(0, plan), lambda *_: True)


async def assert_filled(chain: Chain) -> None:
    async with chains.opened(chain) as image:
        counts = await fill(image)
        assert counts == FillCounts((FILLED_COUNT - ZERO_COUNT) * CLUSTER_SIZE, ZERO_COUNT * CLUSTER_SIZE, 0)
        await image.flush()
        assert await read_all(image, CLUSTER_SIZE) == chain.content
        await image.change_backing(None, None)
        file_size = image.file.size
    assert chain.active.stat().st_size == file_size
    verdict = qemu_img.check(chain.active)
    assert verdict is not None
    assert (verdict.corruptions, verdict.leaks) == (0, 0)
    assert qemu_img.content(chain.active) == chain.content


@pytest.mark.parametrize("base_format", ["raw", "qcow2"])
async def test_fill(tmp_path: Path, base_format: str) -> None:
    await assert_filled(await make_chain(tmp_path, base_format))


async def test_cluster_that_only_begins_with_zeroes_is_copied(tmp_path: Path) -> None:
    chain = await make_chain(tmp_path)
    with chain.paths[0].open("r+b") as opened:
        opened.seek(CLUSTER_SIZE - 1)
        opened.write(b"x")
    async with chains.opened(chain) as image:
        counts = await fill(image)
        assert counts.zeroed == (ZERO_COUNT - 1) * CLUSTER_SIZE
        expected = bytes(CLUSTER_SIZE - 1) + b"x" + chain.content[CLUSTER_SIZE:]
        assert await read_all(image, CLUSTER_SIZE) == expected


@pytest.mark.parametrize("number", range(4))
async def test_fill_where_direct_writes_stop_working(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    chain = await make_chain(tmp_path)
    monkeypatch.setattr(native_aio, "write_blocking", failing_from(number, native_aio.write_blocking))
    await assert_filled(chain)


async def test_fill_where_only_a_part_is_written_directly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Less than a cluster, so that the rest of that is written too."""
    chain, real = await make_chain(tmp_path), native_aio.write_blocking

    def write_most(write: native_aio.Write) -> int:
        return real(write._replace(length=write.length - 4096))

    monkeypatch.setattr(native_aio, "write_blocking", write_most)
    await assert_filled(chain)


@pytest.mark.parametrize("missing", ["__init__", "submit"])
async def test_fill_where_the_kernel_takes_no_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    chain = await make_chain(tmp_path)
    waited: list[native_aio.Writes] = []

    def refuse(*_: object) -> NoReturn:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(native_aio, "_thread", native_aio._Thread())
    monkeypatch.setattr(native_aio.Writes, missing, refuse)
    monkeypatch.setattr(native_aio.Writes, "wait", waited.append)
    await assert_filled(chain)
    assert not waited


async def test_fill_where_files_have_no_direct_io(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = await make_chain(tmp_path)
    monkeypatch.setattr(cold, "_open_direct", lambda fd: cold._NO_DIRECT)
    await assert_filled(chain)


async def test_fill_where_direct_writes_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that wants larger blocks than are written."""
    chain = await make_chain(tmp_path)
    monkeypatch.setattr(native_aio, "write_blocking", lambda *_: 0)
    await assert_filled(chain)


async def test_fill_where_nothing_can_be_reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = await make_chain(tmp_path)

    class NoCall:
        @staticmethod
        def fallocate(*_: int) -> int:
            return -1

    monkeypatch.setattr(cold, "_libc", NoCall)
    await assert_filled(chain)


async def test_source_that_was_cut_short_is_an_error(tmp_path: Path) -> None:
    chain = await make_chain(tmp_path)
    async with chains.opened(chain) as image:
        os.truncate(chain.paths[0], 20 * CLUSTER_SIZE)
        with pytest.raises(StorageError, match="cut short"):
            await fill(image)
        [extent] = await image.map(0, 10 * CLUSTER_SIZE)
        assert extent.kind is Kind.UNALLOCATED


def test_direct_writes_are_prepared_while_the_disk_has_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk has so many at once, and gets the next one as soon as one is over."""
    is_over = threading.Semaphore(0)
    under_way: list[int] = []
    began: queue.Queue[int] = queue.Queue()

    def write_blocking(write: native_aio.Write) -> int:
        under_way.append(write.offset)
        began.put(len(under_way))
        is_over.acquire()
        under_way.remove(write.offset)
        return write.length

    monkeypatch.setattr(native_aio, "write_blocking", write_blocking)
    count = 2 * cold.DIRECT_WRITE_COUNT
    with (tmp_path / "file").open("w+b") as opened, ThreadPoolExecutor(count) as threads:
        writer = cold.ColdWriter()
        assert writer.can_write(opened.fileno(), 0)
        done = [threads.submit(writer.write, 4096 * number, bytearray(4096)) for number in range(count)]
        at_once = [began.get() for _ in range(cold.DIRECT_WRITE_COUNT)]
        for _ in range(count - cold.DIRECT_WRITE_COUNT):
            is_over.release()
            at_once.append(began.get())
        is_over.release(cold.DIRECT_WRITE_COUNT)
        assert [write.result() for write in done] == [4096] * count
        writer.close_blocking()
    assert max(at_once) == cold.DIRECT_WRITE_COUNT


# -- the room behind the end ------------------------------------------------------------------


async def open_file(path: Path) -> FileNode:
    path.touch()
    node = await FileNode.open(str(path), node_name="file", read_only=False)
    node.is_longer_allowed = True
    return node


async def test_room_goes_when_copying_is_over(tmp_path: Path) -> None:
    path = tmp_path / "file"
    node = await open_file(path)
    node.write_cold_blocking(0, memoryview(bytearray(1 * MIB)))
    assert node.size == 1 * MIB
    await node.flush()
    node.write_cold_blocking(1 * MIB, memoryview(bytearray(1 * MIB)))
    await node.flush()
    await node.flush()  # nothing was copied between the two
    assert path.stat().st_size == node.size == 2 * MIB

    node.write_cold_blocking(2 * MIB, memoryview(bytearray(1 * MIB)))
    await node.write(3 * MIB, b"a guest")
    await node.close()
    assert path.stat().st_size == 3 * MIB + len(b"a guest")
    assert path.read_bytes().endswith(b"a guest")


async def write(node: FileNode, offset: int, data: bytes) -> None:
    if not node.write_nowait(offset, data):
        await node.write(offset, data)


async def test_a_file_that_guests_make_longer_and_longer_gets_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_module, "SLOW_WRITE_S", math.inf)  # however busy the machine is
    monkeypatch.setattr(cold, "FREE_LENGTH_MIN", 0)
    path = tmp_path / "file"
    node = await open_file(path)
    await write(node, 0, bytes(cold.GROWTH_MIN))
    assert path.stat().st_size == cold.GROWTH_MIN, "it may stay at that"

    assert not node.write_nowait(cold.GROWTH_MIN, b"more"), "waits until there is room"
    assert not node.write_nowait(cold.GROWTH_MIN, b"less"), "nor does the event loop look at the file"
    await node.write(cold.GROWTH_MIN, b"more")
    end = cold.GROWTH_MIN + len(b"more")
    with_room = path.stat().st_size
    assert node.size == end
    assert with_room >= end + cold.ROOM_LENGTH
    await node.flush()
    assert node.write_nowait(end, b"still more")
    await node.flush()
    assert path.stat().st_size == with_room, "it is in use"
    await node.flush()  # nothing was written between the two

    assert path.stat().st_size == node.size == end + len(b"still more")
    assert path.read_bytes() == bytes(cold.GROWTH_MIN) + b"morestill more"
    await node.close()


async def test_a_file_whose_end_says_what_is_in_use_gets_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cold, "FREE_LENGTH_MIN", 0)
    path = tmp_path / "file"
    node = await open_file(path)
    node.is_longer_allowed = False
    await write(node, 0, bytes(cold.GROWTH_MIN + 1))
    assert path.stat().st_size == cold.GROWTH_MIN + 1
    await node.close()


async def test_giving_room_back_does_not_hide_that_the_file_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "file"
    node = await open_file(path)
    node.write_cold_blocking(0, memoryview(bytearray(1 * MIB)))
    os.truncate(path, 4096)
    with pytest.raises(StorageError, match="cut short to 4096 bytes"):
        await node.flush()
    with pytest.raises(StorageError, match="cut short to 4096 bytes"):
        node.write_cold_blocking(1 * MIB, memoryview(bytearray(1 * MIB)))
    await node.close()
    assert path.stat().st_size == 4096


def test_room_stays_while_somebody_writes_behind_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cold, "FREE_LENGTH_MIN", 0)
    with (tmp_path / "file").open("w+b") as opened:
        end = cold.FileEnd(0)
        end.begin()
        end.begin()
        with end.room(opened.fileno(), 0, 4096):
            pass
        end.finish(0, 4096)
        end.give_back(opened.fileno())
        assert os.fstat(opened.fileno()).st_size == 4096 + cold.ROOM_LENGTH
        end.finish(4096, 0)
        end.give_back(opened.fileno())
        assert os.fstat(opened.fileno()).st_size == end.size == 4096


def test_room_is_reserved_while_nothing_is_written_directly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel would wait for what is written, and keep everybody from writing meanwhile."""
    direct_counts: list[int] = []
    waits_or_is_done = threading.Event()

    class NotedCall:
        @staticmethod
        def fallocate(*_: int) -> int:
            direct_counts.append(end._direct_count)
            return 0

    monkeypatch.setattr(cold, "_libc", NotedCall)
    monkeypatch.setattr(cold, "_free_length", lambda fd: cold.FREE_LENGTH_MIN)
    end = cold.FileEnd(0)
    real_wait = end._room_lock.wait

    def wait() -> None:
        waits_or_is_done.set()
        real_wait()

    def write_behind_the_room() -> None:
        with end.room(0, 0, 4096 + cold.ROOM_LENGTH + 4096):
            waits_or_is_done.set()

    monkeypatch.setattr(end._room_lock, "wait", wait)
    other = threading.Thread(target=write_behind_the_room)
    with end.room(0, 0, 4096), end.room(0, 0, 4096 + cold.ROOM_LENGTH):  # for both there is room at once
        other.start()
        waits_or_is_done.wait()
    other.join()
    assert direct_counts == [0, 0]


async def test_no_room_is_reserved_before_what_is_written_far_behind_the_end(tmp_path: Path) -> None:
    """Where that is the image says, whose refcounts may be spoiled: the gap stays a hole."""
    path = tmp_path / "file"
    node = await open_file(path)
    node.write_cold_blocking(4 * GIB, memoryview(bytearray(1 * MIB)))
    assert path.stat().st_blocks * 512 < 2 * cold.ROOM_LENGTH
    await node.close()
    assert path.stat().st_size == 4 * GIB + 1 * MIB


def test_room_grows_with_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    class NotedCall:
        @staticmethod
        def fallocate(_fd: int, _mode: int, _start: int, length: int) -> int:
            lengths.append(length)
            return 0

    monkeypatch.setattr(cold, "_libc", NotedCall)
    free = 4 * cold.ROOM_LENGTH * cold.FREE_SHARE_MAX
    monkeypatch.setattr(cold, "_free_length", lambda fd: free)
    end = cold.FileEnd(0)
    for _ in range(5):
        with end.room(0, 0, end._room_end + 1):
            pass
    assert lengths == [1 + factor * cold.ROOM_LENGTH for factor in (1, 2, 4, 4, 4)]


def test_nothing_is_reserved_on_a_disk_that_is_nearly_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cold, "_free_length", lambda fd: cold.FREE_LENGTH_MIN - 1)
    with (tmp_path / "file").open("w+b") as opened:
        end = cold.FileEnd(0)
        end.begin()
        with end.room(opened.fileno(), 0, 4096):
            assert os.fstat(opened.fileno()).st_size == 0


def test_loop_does_not_wait_while_room_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[bool] = []
    monkeypatch.setattr(cold, "FREE_LENGTH_MIN", 0)
    with (tmp_path / "file").open("w+b") as opened:
        end = cold.FileEnd(0)
        end.begin()
        with end.room(opened.fileno(), 0, 4096):
            pass
        end.finish(0, 4096)
        monkeypatch.setattr(os, "ftruncate", lambda *_: found.append(end.begin_nowait()))
        end.give_back(opened.fileno())
    assert found == [False]
    assert end.begin_nowait()


async def test_image_with_room_left_behind_by_a_crash_is_whole(tmp_path: Path) -> None:
    chain = await make_chain(tmp_path)
    os.truncate(chain.active, chain.active.stat().st_size + cold.ROOM_LENGTH)
    verdict = qemu_img.check(chain.active)
    assert verdict is not None
    assert (verdict.corruptions, verdict.leaks) == (0, 0)
    async with chains.opened(chain) as image:
        await fill(image)
        assert await read_all(image, CLUSTER_SIZE) == chain.content
