"""The files of qcow2 images that were not closed and cannot say so, or are too large to be looked through."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from blockd.block.housekeeping import Housekeeper
from blockd.block.node import OverlayNode
from blockd.formats.qcow2 import header as headers
from blockd.formats.qcow2 import repair
from blockd.formats.qcow2.image import Qcow2Image
from blockd.protocols.file import FileNode
from blockd.protocols.folios import FOLIO_LENGTH_MAX
from blockd.protocols.new_file import new_file
from blockd.units import KIB, MIB, align_up
from tests.chains import read_all
from tests.loop_device import can_loop, loop_device
from tests.model import stamp
from tests.space.drawing import Space
from tests.streaming import create, open_overlay

CLUSTER = 64 * KIB
SIZE = 64 * CLUSTER
DATA_LENGTH = 8 * CLUSTER
# What was reserved behind the end, and what was written into it.
ROOM_LENGTH = 64 * MIB
LOST_LENGTH = 4 * CLUSTER


async def open_file(path: Path) -> OverlayNode:
    return await open_overlay(await FileNode.open(str(path), node_name="file", read_only=False), None)


async def close(image: OverlayNode) -> None:
    await image.close()
    for node in image.children().values():
        await node.close()


async def left_open(path: Path, compat: str, *, lost_length: int) -> int:
    """Make an image with some data as if its daemon was killed; tells how long its file has to be.

    Behind its end is room, with `lost_length` of data that was not in the tables yet. Other clusters are, but
    only in the refcounts.
    """
    async with new_file(str(path)) as file:
        await create(file, SIZE, "qcow2", compat=compat)
    image = await open_file(path)
    await image.write(0, stamp(1, 0, DATA_LENGTH))
    await image.flush()
    before = path.read_bytes()
    assert isinstance(image, Qcow2Image)
    end = await image.metadata.allocator.used_end()
    await image.write(DATA_LENGTH, stamp(2, 0, DATA_LENGTH))
    await image.flush()
    leaked = bytearray(path.read_bytes())
    await close(image)
    header = headers.parse(before, "image")
    table = int.from_bytes(before[header.l1_offset : header.l1_offset + 8]) & ~(1 << 63)
    leaked[table : table + CLUSTER] = before[table : table + CLUSTER]
    used_end = end + DATA_LENGTH
    with path.open("wb") as opened:
        opened.write(leaked[:used_end] + stamp(3, 0, lost_length))
        os.posix_fallocate(opened.fileno(), used_end, ROOM_LENGTH)
    assert leak_count(path) == DATA_LENGTH // CLUSTER
    return end


def leak_count(path: Path) -> int:
    return Space.of(path, "qcow2").leaks


async def require_content(path: Path) -> None:
    image = await open_file(path)
    assert await read_all(image) == stamp(1, 0, DATA_LENGTH) + bytes(SIZE - DATA_LENGTH)
    await close(image)


@pytest.mark.parametrize("lost_length", [0, LOST_LENGTH])
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
async def test_it_is_cut_behind_what_the_tables_name(tmp_path: Path, compat: str, lost_length: int) -> None:
    path = tmp_path / "image.qcow2"
    end = await left_open(path, compat, lost_length=lost_length)
    image = await open_file(path)
    assert path.stat().st_size == end
    assert leak_count(path) == 0
    await close(image)
    await require_content(path)


@pytest.mark.parametrize("lost_length", [0, LOST_LENGTH])
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
async def test_a_large_one_is_cut_behind_its_data(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    compat: str,
    lost_length: int,
) -> None:
    monkeypatch.setattr(repair, "ENTRY_COUNT_MAX", 1)
    path = tmp_path / "image.qcow2"
    end = await left_open(path, compat, lost_length=lost_length)
    image = await open_file(path)
    used_end = end + DATA_LENGTH + lost_length
    assert used_end <= path.stat().st_size <= align_up(used_end, FOLIO_LENGTH_MAX)  # as the cache sees data
    await close(image)
    assert "too large to be looked through" in caplog.text
    monkeypatch.undo()
    await require_content(path)
    if compat == "1.1":  # else nothing is left that tells
        assert path.stat().st_size == end


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
async def test_leaks_inside_a_file_that_never_grew_are_found(tmp_path: Path, compat: str) -> None:
    path, killed = tmp_path / "image.qcow2", tmp_path / "killed.qcow2"
    async with new_file(str(path)) as file:
        await create(file, SIZE, "qcow2", compat=compat)
    image = await open_file(path)
    await image.write(0, stamp(1, 0, 2 * DATA_LENGTH))
    await image.discard(DATA_LENGTH, DATA_LENGTH)
    await image.flush()
    before = path.read_bytes()
    await image.write(DATA_LENGTH, stamp(2, 0, CLUSTER))  # where the discarded data was
    await image.flush()
    leaked = bytearray(path.read_bytes())
    header = headers.parse(before, "image")
    table = int.from_bytes(before[header.l1_offset : header.l1_offset + 8]) & ~(1 << 63)
    leaked[table : table + CLUSTER] = before[table : table + CLUSTER]
    killed.write_bytes(leaked)
    await close(image)
    assert leak_count(killed) == 1
    await close(await open_file(killed))
    assert leak_count(killed) == 0
    assert killed.stat().st_size <= path.stat().st_size
    await require_content(killed)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
async def test_leaks_are_found_whenever_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compat: str
) -> None:
    """Also while clusters become free and none come into use."""
    path, killed = tmp_path / "image.qcow2", tmp_path / "killed.qcow2"
    async with new_file(str(path)) as file:
        await create(file, SIZE, "qcow2", compat=compat)
    image = await open_file(path)
    await image.write(0, stamp(1, 0, 2 * DATA_LENGTH))
    await close(image)
    states = [path.read_bytes()]
    with monkeypatch.context() as patch:
        for name in ("write_blocking", "punch_hole_blocking", "truncate_blocking"):
            patch.setattr(FileNode, name, then(lambda: states.append(path.read_bytes()), name))
        image = await open_file(path)
        await image.discard(DATA_LENGTH, DATA_LENGTH)
        await image.flush()
        await close(image)
    leak_counts = set()
    for state in states:
        killed.write_bytes(state)
        leak_counts.add(leak_count(killed))
        await close(await open_file(killed))
        assert leak_count(killed) == 0
    assert DATA_LENGTH // CLUSTER in leak_counts


def then(note: Callable[[], None], name: str) -> Callable[..., None]:
    """A method of a file, and after it `note`."""
    method: Callable[..., None] = getattr(FileNode, name)

    def noted(*arguments: object) -> None:
        method(*arguments)
        note()

    return noted


async def test_a_file_of_version_2_that_is_as_long_as_it_has_to_be_is_not_looked_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "image.qcow2"
    await left_open(path, "0.10", lost_length=0)
    await close(await open_file(path))
    monkeypatch.setattr(repair, "repair", None)
    await require_content(path)


async def test_version_2_on_a_block_device_is_looked_through_beside_guests(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """It is longer than any image on it; tried where there are such devices, the report says so."""
    path = tmp_path / "disk"
    await left_open(path, "0.10", lost_length=0)
    with path.open("r+b") as opened:
        opened.truncate(4 * ROOM_LENGTH)
    with_device = can_loop(tmp_path)
    record_property("with_block_device", with_device)
    if not with_device:
        return
    with loop_device(path) as device:
        async with asyncio.TaskGroup() as tasks:
            image = await open_file(device)
            assert leak_count(device) == DATA_LENGTH // CLUSTER
            Housekeeper(tasks).begin(image)
            await image.write(2 * DATA_LENGTH, stamp(3, 0, CLUSTER))
        await close(image)
        assert leak_count(device) == 0
        image = await open_file(device)
        found = await read_all(image)
        assert found[:DATA_LENGTH] == stamp(1, 0, DATA_LENGTH)
        assert found[2 * DATA_LENGTH :][:CLUSTER] == stamp(3, 0, CLUSTER)
        await close(image)
