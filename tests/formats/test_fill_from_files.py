"""Copies that go from file to file, into room behind the end: the same bytes, whatever of it is missing."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from blockd.block.node import FillCounts
from blockd.errors import StorageError
from blockd.extents import Kind
from blockd.formats.qcow2.image import Qcow2Image
from blockd.protocols import cold
from blockd.protocols.file import FileNode
from blockd.units import KIB, MIB
from tests import chains, qemu_img
from tests.chains import Chain, read_all

CLUSTER_SIZE = 64 * KIB
# More than one pipe holds, zeroes at both ends and alone, and one piece that is already there.
BASE = "0ABCDEFGHIJKLMNOPQRSTUVWX0YZABCDE00"
OVERLAY = "-" * 10 + "!" + "-" * 24
FILLED_COUNT = len(BASE) - 1
ZERO_COUNT = BASE.count("0")


def refuse(*_: object, **__: object) -> int:
    raise OSError(22, "not here")


def failing_from(number: int) -> Callable[..., int]:
    """A splice that works until it is called for the `number`th time."""
    real, left = os.splice, iter(range(number))

    def splice(*arguments: int, **offsets: int) -> int:
        return refuse() if next(left, None) is None else real(*arguments, **offsets)

    return splice


async def make_chain(folder: Path, base_format: str = "raw") -> Chain:
    return await chains.make(folder, [BASE, OVERLAY], CLUSTER_SIZE, base_format)


async def fill(image: Qcow2Image) -> FillCounts:
    plan = await image.plan_read(0, image.size)
    return await image.fill(0, image.size, plan, lambda offset: True)


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


@pytest.mark.parametrize("number", range(6))
async def test_fill_where_splice_stops_working(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    chain = await make_chain(tmp_path)
    monkeypatch.setattr(os, "splice", failing_from(number))
    await assert_filled(chain)


async def test_fill_where_files_have_no_direct_io(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = await make_chain(tmp_path)
    monkeypatch.setattr(cold, "_open_direct", lambda fd: cold._NO_DIRECT)
    await assert_filled(chain)


async def test_fill_where_direct_writes_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that wants larger blocks than are written."""
    chain = await make_chain(tmp_path)
    monkeypatch.setattr(os, "splice", refuse)
    monkeypatch.setattr(cold.ColdWriter, "write", lambda *_: 0)
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
        end.reserve(opened.fileno(), 4096)
        end.finish(0, 4096)
        end.give_back(opened.fileno())
        assert os.fstat(opened.fileno()).st_size == 4096 + cold.ROOM_LENGTH
        end.finish(4096, 0)
        end.give_back(opened.fileno())
        assert os.fstat(opened.fileno()).st_size == end.size == 4096


def test_nothing_is_reserved_on_a_disk_that_is_nearly_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cold, "_free_length", lambda fd: cold.FREE_LENGTH_MIN - 1)
    with (tmp_path / "file").open("w+b") as opened:
        end = cold.FileEnd(0)
        end.begin()
        end.reserve(opened.fileno(), 4096)
        assert os.fstat(opened.fileno()).st_size == 0


def test_loop_does_not_wait_while_room_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[bool] = []
    monkeypatch.setattr(cold, "FREE_LENGTH_MIN", 0)
    with (tmp_path / "file").open("w+b") as opened:
        end = cold.FileEnd(0)
        end.begin()
        end.reserve(opened.fileno(), 4096)
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
