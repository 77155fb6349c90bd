"""A qcow2 image that was not closed: what it says of itself, and what becomes of it when it is opened."""

import struct

import pytest

from blockd.formats.check_report import Repair
from blockd.formats.qcow2 import header as headers
from blockd.formats.qcow2 import repair as repair_module
from blockd.formats.qcow2.repair import repair
from blockd.units import KIB
from tests.chains import read_all
from tests.model import stamp
from tests.recording import RecordingFile
from tests.streaming import check, open_overlay, overlay

CLUSTER = 4 * KIB
SIZE = 64 * CLUSTER


def is_marked(file: RecordingFile) -> bool:
    return bool(headers.parse(bytes(file.disk), "image").autoclear & headers.AUTOCLEAR_IN_USE)


async def unclean() -> RecordingFile:
    """Eight clusters with data, and behind them eight that no table names."""
    file = RecordingFile()
    image = await overlay(file, None, SIZE, cluster_size=CLUSTER)
    assert not is_marked(file)
    await image.write(0, stamp(1, 0, 8 * CLUSTER))
    await image.flush()
    assert is_marked(file)
    clean = file.again()
    await image.write(8 * CLUSTER, stamp(2, 0, 8 * CLUSTER))
    await image.flush()
    assert (await check(file)).leaks == 0
    left = file.again()
    table = headers.parse(bytes(file.disk), "image").l1_offset
    for offset in (table, struct.unpack_from(">Q", clean.disk, table)[0] & ~(1 << 63)):
        left.disk[offset : offset + CLUSTER] = clean.disk[offset : offset + CLUSTER]
    again = left.again()
    assert (await check(again)).leaks == 8
    return again


async def require_right(file: RecordingFile) -> None:
    report = await check(file)
    assert (report.leaks, report.corruptions, report.image_end_offset) == (0, 0, file.size)
    image = await open_overlay(file.again(), None, read_only=True)
    assert await read_all(image) == stamp(1, 0, 8 * CLUSTER) + bytes(SIZE - 8 * CLUSTER)


async def test_leaks_are_freed_and_the_file_is_cut() -> None:
    file = await unclean()
    before = file.size
    image = await open_overlay(file, None)
    assert file.size == before - 8 * CLUSTER
    await require_right(file)
    await image.close()
    assert not is_marked(file)
    await require_right(file)


@pytest.mark.parametrize("are_others_leaked", [True, False])
async def test_refcounts_behind_the_end_are_cleared(*, are_others_leaked: bool) -> None:
    """A killed writer had counted a cluster, and not written it: a leak as soon as the file is longer."""
    file = await unclean()
    if not are_others_leaked:
        await (await open_overlay(file, None)).close()
    file = file.again()
    file.disk[88] |= 0x80  # in use
    [table] = struct.unpack_from(">Q", file.disk, 48)
    [block] = struct.unpack_from(">Q", file.disk, table)
    struct.pack_into(">H", file.disk, block + 2 * (file.size // CLUSTER), 1)
    file = file.again()
    image = await open_overlay(file, None)
    await require_right(file)
    await image.write(8 * CLUSTER, stamp(3, 0, 16 * CLUSTER))
    await image.close()
    report = await check(file)
    assert (report.leaks, report.corruptions, report.image_end_offset) == (0, 0, file.size)


async def test_reading_changes_nothing() -> None:
    file = await unclean()
    image = await open_overlay(file, None, read_only=True)
    await read_all(image)
    await image.close()
    assert not file.log


async def test_a_large_image_stays_as_it_is_until_it_is_repaired(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(repair_module, "ENTRY_COUNT_MAX", CLUSTER // 8 - 1)
    file = await unclean()
    image = await open_overlay(file, None)
    await image.write(0, stamp(1, 0, CLUSTER))
    await image.close()
    assert "was not closed, and may take more space than it needs" in caplog.text
    assert is_marked(file)
    assert (await check(file)).leaks == 8
    assert (await repair(file, Repair.LEAKS)).leaks_fixed == 8
    assert not is_marked(file)
    await require_right(file)


async def test_of_a_corrupt_image_nothing_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    """Clusters in use have refcounts of 0: what is free nobody knows."""
    file = await unclean()
    header = headers.parse(bytes(file.disk), "image")
    block = struct.unpack_from(">Q", file.disk, header.refcount_table_offset)[0]
    end = file.size // CLUSTER
    file.disk[block + 2 * (end - 12) : block + 2 * end] = bytes(24)
    before = bytes(file.disk)
    image = await open_overlay(file, None)
    assert "corruptions, so that it is not certain what is leaked" in caplog.text
    await image.close()
    assert bytes(file.disk) == before


async def test_what_was_in_the_file_when_it_was_opened_is_not_cut() -> None:
    """An image that is not marked, with data in clusters that have refcounts of 0, keeps them."""
    file = RecordingFile()
    image = await overlay(file, None, SIZE, cluster_size=CLUSTER)
    await image.write(0, stamp(1, 0, 8 * CLUSTER))
    await image.close()
    header = headers.parse(bytes(file.disk), "image")
    block = struct.unpack_from(">Q", file.disk, header.refcount_table_offset)[0]
    end = file.size // CLUSTER
    file.disk[block + 2 * (end - 4) : block + 2 * end] = bytes(8)
    before = bytes(file.disk)
    image = await open_overlay(file, None)
    await image.trim()
    await image.close()
    assert bytes(file.disk) == before
