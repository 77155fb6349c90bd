"""An image whose tables turn out to be wrong while it is written says so, and is left alone from then on."""

import struct
from collections.abc import Awaitable, Callable

import pytest

from blockd.errors import ImageError, StorageError
from blockd.formats.qcow2 import header as headers
from blockd.formats.qcow2.corruption import Corruption
from blockd.formats.qcow2.create import create
from blockd.formats.qcow2.image import Qcow2Image
from blockd.formats.qcow2.mapping import COPIED
from tests.chains import read_all
from tests.model import stamp
from tests.recording import Entry, RecordingFile, Write
from tests.streaming import open_overlay, overlay

CLUSTER = 4096
SIZE = 16 * CLUSTER

Damage = Callable[[bytearray], None]
Operation = Callable[[Qcow2Image], Awaitable[object]]


async def made() -> bytearray:
    """Half of the clusters are written; the first 8 are header, refcount table, block, L1, L2, data, …"""
    file = RecordingFile()
    image = await overlay(file, None, SIZE, cluster_size=CLUSTER)
    await image.write(0, stamp(1, 0, SIZE // 2))
    await image.close()
    return file.disk


def places(disk: bytearray) -> dict[str, int]:
    header = headers.parse(bytes(disk), "made")
    l2 = int.from_bytes(disk[header.l1_offset : header.l1_offset + 8]) & ~COPIED
    block = int.from_bytes(disk[header.refcount_table_offset : header.refcount_table_offset + 8])
    return {"L1": header.l1_offset, "L2": l2, "refcount table": header.refcount_table_offset, "block": block}


def put(where: str, position: int, value: int, layout: str = ">Q") -> Damage:
    def damage(disk: bytearray) -> None:
        struct.pack_into(layout, disk, places(disk)[where] + position, value)

    return damage


def data_without_refcount(disk: bytearray) -> None:
    """The first data cluster has a refcount of 0."""
    data = int.from_bytes(disk[places(disk)["L2"] :][:8]) & ~COPIED
    put("block", data // CLUSTER * 2, 0, ">H")(disk)


def table_without_refcount(disk: bytearray) -> None:
    """So has the L2 table: it would be given away."""
    put("block", places(disk)["L2"] // CLUSTER * 2, 0, ">H")(disk)


async def rewrite_everything(image: Qcow2Image) -> None:
    await image.discard(0, CLUSTER)
    await image.flush()
    await image.write(SIZE // 2, b"x" * (SIZE // 2))


def writing(offset: int, length: int = 512) -> Operation:
    return lambda image: image.write(offset, b"x" * length)


FOUND: dict[str, tuple[Damage, Operation]] = {
    "L1 entry past the end, reading": (put("L1", 0, 1 << 40 | COPIED), lambda image: image.read(0, 512)),
    "L1 entry past the end, writing": (put("L1", 0, 1 << 40 | COPIED), writing(0)),
    "L1 entry not aligned": (put("L1", 0, 0x1200 | COPIED), lambda image: image.map(0, 512)),
    "data cluster not aligned": (put("L2", 0, 0x5200 | COPIED), lambda image: image.read(0, 512)),
    "data cluster past the end": (put("L2", 0, 1 << 40 | COPIED), writing(0)),
    "zero cluster on a table": (put("L2", 0, CLUSTER | COPIED | 1), writing(0)),
    "shared data cluster on a table": (put("L2", 0, CLUSTER), writing(0, CLUSTER)),
    "discarded cluster is a table": (put("L2", 0, CLUSTER), lambda image: image.discard(0, CLUSTER)),
    "freed cluster without a refcount": (data_without_refcount, rewrite_everything),
    "table without a refcount": (table_without_refcount, rewrite_everything),
    "refcount block past the end": (put("refcount table", 0, 1 << 40), writing(SIZE // 2, CLUSTER)),
    "refcount block not aligned": (put("refcount table", 0, 0x2200), writing(SIZE // 2, CLUSTER)),
}


@pytest.mark.parametrize(("damage", "operation"), FOUND.values(), ids=list(FOUND))
async def test_image_is_marked_and_left_alone(damage: Damage, operation: Operation) -> None:
    disk = await made()
    damage(disk)
    file = RecordingFile(bytes(disk))
    image = await Qcow2Image.open(file, node_name="i", read_only=False)

    with pytest.raises(Corruption, match=r"recorded\.qcow2"):
        await operation(image)
    changed = len(file.log)
    assert headers.parse(bytes(file.disk), "i").incompatible == headers.INCOMPATIBLE_CORRUPT

    changes: list[Callable[[], Awaitable[object]]] = [
        lambda: image.write(SIZE - 512, b"y" * 512),
        lambda: image.write_zeroes(0, CLUSTER),
        lambda: image.discard(0, SIZE),
        lambda: image.resize(2 * SIZE),
        image.flush,
    ]
    for change in changes:
        with pytest.raises(Corruption):
            await change()
    assert not image.write_nowait(CLUSTER, b"y" * 512)
    await image.close()
    assert len(file.log) == changed

    with pytest.raises(ImageError, match="is marked corrupt"):
        await open_overlay(RecordingFile(bytes(file.disk)), None)
    await open_overlay(RecordingFile(bytes(file.disk)), None, read_only=True)


async def test_read_only_image_is_not_marked() -> None:
    disk = await made()
    put("L2", 0, 0x5200 | COPIED)(disk)
    file = RecordingFile(bytes(disk))
    image = await open_overlay(file, None, read_only=True)
    with pytest.raises(Corruption):
        await image.read(0, 512)
    assert file.log == []


async def test_corrupt_backing_does_not_condemn_the_overlay() -> None:
    disk = await made()
    put("L2", 0, 0x5200 | COPIED)(disk)
    backing = await open_overlay(RecordingFile(bytes(disk), "backing.qcow2"), None, read_only=True)
    file = RecordingFile()
    image = await overlay(file, backing, SIZE, cluster_size=CLUSTER, backing_format="qcow2")

    with pytest.raises(Corruption, match=r"backing\.qcow2"):
        await image.write(512, b"x" * 512)
    await image.write(CLUSTER, b"x" * CLUSTER)
    await image.flush()
    assert headers.parse(bytes(file.disk), "i").incompatible == 0


async def test_version_2_has_no_mark_but_is_left_alone() -> None:
    disk = await made()
    struct.pack_into(">I", disk, 4, 2)
    put("L2", 0, 0x5200 | COPIED)(disk)
    file = RecordingFile(bytes(disk))
    image = await open_overlay(file, None)
    for _ in range(2):
        with pytest.raises(Corruption):
            await image.write(0, b"x" * 512)
    assert file.log == []


async def test_zero_cluster_in_version_2_is_corrupt() -> None:
    disk = await made()
    struct.pack_into(">I", disk, 4, 2)
    put("L2", 0, 1)(disk)
    image = await open_overlay(RecordingFile(bytes(disk)), None)
    with pytest.raises(Corruption, match="version 2 cannot have"):
        await read_all(image)


class FullDisk(RecordingFile):
    """Fails every write of the mark."""

    def before_change(self, change: Entry) -> None:
        if isinstance(change, Write) and change.offset == headers.INCOMPATIBLE_FIELD:
            raise StorageError("no")


async def test_corruption_is_told_even_if_the_mark_cannot_be_written() -> None:
    disk = await made()
    put("L2", 0, 0x5200 | COPIED)(disk)
    image = await open_overlay(FullDisk(bytes(disk)), None)
    for _ in range(2):
        with pytest.raises(Corruption):
            await image.write(0, b"x" * 512)


# -- subclusters ----------------------------------------------------------------------------------------

EXTENDED_CLUSTER = 16 * 1024


async def made_extended() -> bytearray:
    """The first cluster has half of its subclusters, which are of 512 bytes."""
    file = RecordingFile()
    await create(file, 16 * EXTENDED_CLUSTER, cluster_size=EXTENDED_CLUSTER, extended_l2=True)
    image = await Qcow2Image.open(file, node_name="i", read_only=False)
    await image.write(0, stamp(1, 0, EXTENDED_CLUSTER // 2))
    await image.close()
    return file.disk


ZERO_AND_PRESENT, PRESENT, HALF = (1 << 32 | 1), 1, EXTENDED_CLUSTER // 2
EXTENDED_FOUND: dict[str, tuple[Damage, Operation]] = {
    "zero and present, reading": (put("L2", 8, ZERO_AND_PRESENT), lambda image: image.read(0, 512)),
    "zero and present, map": (put("L2", 8, ZERO_AND_PRESENT), lambda image: image.map(0, 512)),
    "zero and present, writing": (put("L2", 8, ZERO_AND_PRESENT), writing(512)),
    "zero and present, discard": (put("L2", 8, ZERO_AND_PRESENT), lambda image: image.discard(4096, 4096)),
    "present nowhere, reading": (put("L2", 24, PRESENT), lambda image: image.read(EXTENDED_CLUSTER, 512)),
    "present nowhere, writing": (put("L2", 24, PRESENT), writing(EXTENDED_CLUSTER + HALF)),
    "not aligned, reading": (put("L2", 0, 0x14200 | COPIED), lambda image: image.read(0, 512)),
    "not aligned, writing": (put("L2", 0, 0x14200 | COPIED), writing(HALF)),
    "not aligned, zeroes": (put("L2", 0, 0x14200 | COPIED), lambda image: image.write_zeroes(0, HALF)),
    "on a table": (put("L2", 0, EXTENDED_CLUSTER | COPIED), writing(HALF)),
    "past the end": (put("L2", 0, 1 << 40 | COPIED), writing(0)),
    "past the end, new subcluster": (put("L2", 0, 1 << 40 | COPIED), writing(HALF)),
    "discarded cluster is a table": (
        put("L2", 0, EXTENDED_CLUSTER),
        lambda image: image.discard(0, EXTENDED_CLUSTER),
    ),
}


@pytest.mark.parametrize(("damage", "operation"), EXTENDED_FOUND.values(), ids=list(EXTENDED_FOUND))
async def test_impossible_subclusters_are_noticed(damage: Damage, operation: Operation) -> None:
    disk = await made_extended()
    damage(disk)
    file = RecordingFile(bytes(disk))
    image = await Qcow2Image.open(file, node_name="i", read_only=False)
    with pytest.raises(Corruption):
        await operation(image)
    with pytest.raises(Corruption):
        await image.write(15 * EXTENDED_CLUSTER, b"y" * 512)
    disk[headers.INCOMPATIBLE_FIELD + 7] |= headers.INCOMPATIBLE_CORRUPT
    disk[headers.AUTOCLEAR_FIELD] = file.disk[headers.AUTOCLEAR_FIELD]  # a change marks it as in use first
    assert file.disk == disk
