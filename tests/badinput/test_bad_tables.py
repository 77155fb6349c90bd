"""Images whose header or tables were spoiled: an error of our own, in bounded time, and no write."""

import random
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockd.errors import BlockdError, ImageError
from blockd.formats.qcow2.check import check
from blockd.formats.qcow2.image import Qcow2Image
from blockd.protocols.file import FileNode
from blockd.units import GIB, KIB, MIB
from tests import qemu_img
from tests.chains import read_all
from tests.recording import RecordingFile

SIZE = 2 * MIB
INCOMPATIBLE_FEATURES = 72
MUTATION_COUNT = 40


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = qemu_img.create(tmp_path_factory.mktemp("sound") / "i.qcow2", SIZE, "cluster_size=4k")
    qemu_img.write(path, "write -P 1 0 100k", "write -z 200k 100k", "write -P 2 1M 64k")
    return path.read_bytes()


def tables(image: bytes) -> dict[str, tuple[int, int]]:
    """Where the structures are: offset and length."""
    l1, refcount_table = struct.unpack_from(">QQ", image, 40)
    l2 = struct.unpack_from(">Q", image, l1)[0] & ~(1 << 63)
    block = struct.unpack_from(">Q", image, refcount_table)[0]
    return {
        "header": (0, 112),
        "extensions": (112, 300),
        "L1 table": (l1, 8),
        "L2 table": (l2, 800),
        "refcount table": (refcount_table, 16),
        "refcount block": (block, 200),
    }


def mutations(image: bytes, offset: int, length: int, seed: str) -> Iterator[bytes]:
    """Bits turned, words replaced by the values that hurt most, and the file cut off behind the structure."""
    rng = random.Random(seed)
    nasty = [
        0,
        1,
        0xFFFF_FFFF_FFFF_FFFF,
        1 << 62,
        1 << 55,
        1 << 40,
        0x1000,
        0x1200,
        len(image),
        len(image) - 1,
    ]
    for _ in range(MUTATION_COUNT):
        spoiled = bytearray(image)
        position = offset + rng.randrange(0, length, 8)
        if rng.random() < 0.5:
            spoiled[offset + rng.randrange(length)] ^= 1 << rng.randrange(8)
        else:
            struct.pack_into(">Q", spoiled, position, rng.choice(nasty))
        yield bytes(spoiled)
    yield image[:offset]
    yield image[: offset + length // 2]


@pytest.mark.parametrize(
    "table", ["header", "extensions", "L1 table", "L2 table", "refcount table", "refcount block"]
)
async def test_spoiled_image_gets_an_error_or_is_read_and_is_never_written(sound: bytes, table: str) -> None:
    refused = 0
    for spoiled in mutations(sound, *tables(sound)[table], seed=table):
        file = RecordingFile(spoiled)
        try:
            await check(file)
            image = await Qcow2Image.open(file, node_name="i", read_only=True)
            if image.size <= 16 * MIB:
                await read_all(image)
        except BlockdError as error:
            refused += 1
            assert "recorded.qcow2" in error.message
        assert file.log == []
    assert refused > 0 or table.startswith(("refcount", "extensions"))


@pytest.mark.parametrize(
    "table",
    [
        "L1 table",
        "L2 table",
        "refcount table",
        "refcount block",
    ],
)
async def test_writing_to_a_spoiled_image_raises_only_our_errors(sound: bytes, table: str) -> None:
    for spoiled in mutations(sound, *tables(sound)[table], seed=table):
        file = RecordingFile(spoiled)
        try:
            image = await Qcow2Image.open(file, node_name="i", read_only=False)
            for offset in range(0, SIZE, 64 * KIB):
                await image.write(offset + 100, b"x" * 5000)
                await image.discard(offset + 32 * KIB, 16 * KIB)
            await image.flush()
            await image.close()
        except BlockdError as error:
            assert "recorded.qcow2" in error.message


# What the error says, and the field that is spoiled: where it is, its layout, its value.
HEADER_FIELDS = [
    ("qcow2 version 4 is not supported", 4, ">I", 4),
    ("cluster_bits 8 is outside 9..21", 20, ">I", 8),
    ("cluster_bits 22 is outside 9..21", 20, ">I", 22),
    ("encrypted images are not supported", 32, ">I", 1),
    ("the L1 table of 0 entries is too small for the disk size", 36, ">I", 0),
    ("an L1 table of 1073741824 entries is larger than 32 MiB", 36, ">I", 1 << 30),
    ("the L1 table offset 0x3200 is not cluster aligned", 40, ">Q", 0x3200),
    ("the L1 table at 0x10000000000 runs past the end of the file", 40, ">Q", 1 << 40),
    ("the L1 table offset 0x0 overlaps the header", 40, ">Q", 0),
    ("the refcount table at 0x10000000000 runs past the end of the file", 48, ">Q", 1 << 40),
    ("the refcount table offset 0x1200 is not cluster aligned", 48, ">Q", 0x1200),
    ("the refcount table is larger than 8 MiB", 56, ">I", 1 << 20),
    ("the image has no refcount table", 56, ">I", 0),
    ("unknown incompatible feature bit 20", 72, ">Q", 1 << 20),
    ("refcount_order 7 is larger than 6", 96, ">I", 7),
    ("header length 96 is invalid", 100, ">I", 96),
    ("header length 105 is invalid", 100, ">I", 105),
    ("header length 8192 is invalid", 100, ">I", 8192),
    ("the backing file name at 4000 is outside the header cluster", 8, ">QI", (4000, 500)),
    ("the backing file name is 1024 bytes long, more than 1023", 8, ">QI", (200, 1024)),
    ("the backing file name at 8 is outside the header cluster", 8, ">QI", (8, 4)),
    ("the L1 table of 1 entries is too small for the disk size", 24, ">Q", 1 << 62),
]


@pytest.mark.parametrize(("said", "offset", "layout", "value"), HEADER_FIELDS)
async def test_wrong_header_field_is_refused_with_the_file_and_the_field(
    sound: bytes, said: str, offset: int, layout: str, value: int | tuple[int, ...]
) -> None:
    spoiled = bytearray(sound)
    struct.pack_into(layout, spoiled, offset, *(value if isinstance(value, tuple) else (value,)))

    for read_only in (True, False):
        file = RecordingFile(bytes(spoiled))
        with pytest.raises(BlockdError, match=rf"'recorded\.qcow2'.* {re.escape(said)}$"):
            await Qcow2Image.open(file, node_name="i", read_only=read_only)
        assert file.log == []


async def test_l1_table_that_names_more_tables_than_are_kept_in_memory_is_refused(tmp_path: Path) -> None:
    path = qemu_img.create(tmp_path / "i.qcow2", 64 * GIB, "cluster_size=512")
    with path.open("r+b") as file:
        file.seek(36)
        entry_count, l1_offset = struct.unpack(">IQ", file.read(12))
        file.seek(l1_offset)
        file.write(struct.pack(f">{entry_count}Q", *range(2**30, 2**30 + 512 * entry_count, 512)))
        file.truncate(8 * GIB)
    opened = await FileNode.open(str(path), node_name="f", read_only=True)
    try:
        with pytest.raises(
            ImageError, match=r"i\.qcow2': the L1 table names 2097152 L2 tables, more than 1048576"
        ):
            await Qcow2Image.open(opened, node_name="i", read_only=True)
    finally:
        await opened.close()


@pytest.mark.parametrize("where", ["header", "L1 table", "refcount table", "refcount block", "L2 table"])
async def test_guest_write_never_lands_in_metadata(sound: bytes, where: str) -> None:
    """A map that names a table of the image as a data cluster would let a guest rewrite the table."""
    offset, _ = tables(sound)[where]
    spoiled = bytearray(sound)
    l2, _ = tables(sound)["L2 table"]
    struct.pack_into(">Q", spoiled, l2, offset | 1 << 63)
    file = RecordingFile(bytes(spoiled))

    image = await Qcow2Image.open(file, node_name="i", read_only=False)
    with pytest.raises(BlockdError):
        await image.write(0, b"x" * 4096)
    # The image is marked corrupt, and that is all.
    spoiled[INCOMPATIBLE_FEATURES + 7] |= 1 << 1
    assert file.disk == spoiled


def test_corpus_is_sound_before_it_is_spoiled(sound: bytes, tmp_path: Path) -> None:
    path = tmp_path / "i.qcow2"
    path.write_bytes(sound)
    qemu_img.assert_sound(path)
