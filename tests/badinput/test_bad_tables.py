"""Images whose header or tables were spoiled: an error of our own, in bounded time, and no write."""

import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockd.errors import BlockdError
from blockd.formats.qcow2.check import check
from blockd.formats.qcow2.image import Qcow2Image
from blockd.units import KIB, MIB
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


HEADER_FIELDS = {
    "version": (4, ">I", 4),
    "cluster_bits too small": (20, ">I", 8),
    "cluster_bits too large": (20, ">I", 22),
    "encryption": (32, ">I", 1),
    "L1 too small": (36, ">I", 0),
    "L1 too large": (36, ">I", 1 << 30),
    "L1 not aligned": (40, ">Q", 0x3200),
    "L1 past the end": (40, ">Q", 1 << 40),
    "L1 on the header": (40, ">Q", 0),
    "refcount table past the end": (48, ">Q", 1 << 40),
    "refcount table not aligned": (48, ">Q", 0x1200),
    "refcount table too large": (56, ">I", 1 << 20),
    "no refcount table": (56, ">I", 0),
    "unknown incompatible feature": (72, ">Q", 1 << 20),
    "refcount_order": (96, ">I", 7),
    "header length too small": (100, ">I", 96),
    "header length not in words": (100, ">I", 105),
    "header length past the cluster": (100, ">I", 8192),
    "backing name past the cluster": (8, ">QI", (4000, 500)),
    "backing name too long": (8, ">QI", (200, 1024)),
    "backing name in the header": (8, ">QI", (8, 4)),
    "absurd size": (24, ">Q", 1 << 62),
}


@pytest.mark.parametrize("name", HEADER_FIELDS)
async def test_wrong_header_field_is_refused_with_the_file_and_the_field(sound: bytes, name: str) -> None:
    offset, layout, value = HEADER_FIELDS[name]
    spoiled = bytearray(sound)
    struct.pack_into(layout, spoiled, offset, *(value if isinstance(value, tuple) else (value,)))

    for read_only in (True, False):
        file = RecordingFile(bytes(spoiled))
        with pytest.raises(BlockdError, match=r"recorded\.qcow2"):
            await Qcow2Image.open(file, node_name="i", read_only=read_only)
        assert file.log == []


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
