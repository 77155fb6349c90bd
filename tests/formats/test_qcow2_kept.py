"""What a qcow2 image has besides data, and where its data is: writing leaves it as the format asks."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from blockd.formats.qcow2 import header as headers
from blockd.formats.qcow2.header import Extension, Header
from blockd.units import KIB, MIB
from tests import qemu_img
from tests.chains import Chain, opened, read_all
from tests.formats.test_qcow2_features import assert_no_leaks, features
from tests.model import stamp
from tests.recording import RecordingFile
from tests.streaming import open_overlay, overlay

pytestmark = pytest.mark.slow

CLUSTER = 64 * KIB


def chain_of(path: Path) -> Chain:
    return Chain([path], ["qcow2"], CLUSTER, b"")


def header_of(path: Path) -> Header:
    return headers.parse(path.read_bytes()[:CLUSTER], path.name)


def host_offsets(path: Path) -> dict[int, tuple[bool, int | None]]:
    """By guest offset, as QEMU sees the map: whether it reads as zeroes, and where it is."""
    found = json.loads(qemu_img.qemu("qemu-img", "map", "--output=json", "-f", "qcow2", path))
    return {extent["start"]: (extent["zero"], extent.get("offset")) for extent in found}


# -- the header -----------------------------------------------------------------------------------------


async def test_image_with_lazy_refcounts_is_clean_at_every_moment(tmp_path: Path) -> None:
    """The option stays; what is written here keeps the refcounts right without it."""
    path = qemu_img.create(tmp_path / "i.qcow2", 4 * MIB, "lazy_refcounts=on")
    before = header_of(path)
    assert before.compatible == headers.COMPATIBLE_LAZY_REFCOUNTS

    async with opened(chain_of(path)) as image:
        await image.write(100, stamp(1, 100, 300 * KIB))
        assert header_of(path).incompatible == 0
        await image.flush()
        now = tmp_path / "now.qcow2"
        now.write_bytes(path.read_bytes())
        assert_no_leaks(now)
        await image.discard(0, 128 * KIB)
    assert header_of(path) == before
    assert_no_leaks(path)


async def test_unknown_extensions_stay_when_the_backing_changes() -> None:
    unknown = (Extension(0x1234, b"whose is this"), Extension(0x5678, b""))
    made = RecordingFile()
    base = RecordingFile(bytes(MIB), "base")
    await (await overlay(made, base, MIB, cluster_size=CLUSTER)).close()
    disk = bytes(made.disk)
    header = headers.parse(disk, "i")
    header = replace(header, extensions=(*header.extensions, *unknown), autoclear=1 << 40 | 1)
    file = RecordingFile(headers.pack(header) + disk[CLUSTER:])

    image = await open_overlay(file, base)
    assert headers.parse(bytes(file.disk), "i") == replace(header, autoclear=0)
    for name in ("other", "o" * 1000, None):
        await image.change_backing(name, "raw")
        found = headers.parse(bytes(file.disk), "i")
        assert found.backing_filename == name
        assert set(unknown) <= set(found.extensions)


async def test_read_only_image_keeps_its_autoclear_bits() -> None:
    made = RecordingFile()
    await (await overlay(made, None, MIB, cluster_size=CLUSTER)).close()
    struct.pack_into(">Q", made.disk, headers.AUTOCLEAR_FIELD, 1)
    file = RecordingFile(bytes(made.disk))
    await open_overlay(file, None, read_only=True)
    assert file.log == []


# -- places ---------------------------------------------------------------------------------------------


async def test_zero_cluster_that_has_a_place_is_written_there(tmp_path: Path) -> None:
    path = qemu_img.create(tmp_path / "i.qcow2", 4 * MIB)
    qemu_img.write(path, "write -P 1 0 256k", "write -z 64k 128k")
    place = host_offsets(path)[0][1]
    assert place is not None
    assert host_offsets(path)[CLUSTER] == (True, place + CLUSTER)

    async with opened(chain_of(path)) as image:
        await image.write(80 * KIB, b"x" * 512)
        await image.write(130 * KIB, b"y" * 512)
    assert host_offsets(path) == {0: (False, place), 4 * CLUSTER: (True, None)}
    content = qemu_img.content(path)
    assert content[64 * KIB : 192 * KIB] == (
        bytes(16 * KIB) + b"x" * 512 + bytes(50 * KIB - 512) + b"y" * 512 + bytes(62 * KIB - 512)
    )
    assert_no_leaks(path)


async def test_zero_cluster_whose_place_a_snapshot_has_goes_elsewhere(tmp_path: Path) -> None:
    path = qemu_img.create(tmp_path / "i.qcow2", 4 * MIB)
    qemu_img.write(path, "write -P 1 0 256k")
    qemu_img.qemu("qemu-img", "snapshot", "-c", "s", path)
    async with opened(chain_of(path)) as image:
        await image.write_zeroes(0, 128 * KIB, unmap=False)
        await image.write(0, b"x" * 512)
    assert qemu_img.content(path)[: 128 * KIB] == b"x" * 512 + bytes(128 * KIB - 512)
    qemu_img.qemu("qemu-img", "snapshot", "-a", "s", path)
    assert qemu_img.content(path)[: 256 * KIB] == b"\1" * (256 * KIB)
    assert_no_leaks(path)


@pytest.mark.parametrize("preallocation", ["metadata", "falloc", "full"])
async def test_preallocated_clusters_are_where_they_were(tmp_path: Path, preallocation: str) -> None:
    path = qemu_img.create(tmp_path / "i.qcow2", 2 * MIB, f"preallocation={preallocation}")
    before = {start: offset for start, (_, offset) in host_offsets(path).items()}
    size = path.stat().st_size
    async with opened(chain_of(path)) as image:
        await image.write(100 * KIB, stamp(1, 100 * KIB, MIB))
    first = before[0]
    assert first is not None
    for start, (_, offset) in host_offsets(path).items():
        assert offset == first + start
    assert path.stat().st_size == size
    assert_no_leaks(path)


@features
async def test_image_of_every_kind_grows(tmp_path: Path, options: tuple[str, ...]) -> None:
    """By more than its L1 table has room for; what is written before and after is there."""
    small = any(option == "cluster_size=512" for option in options)
    size, larger = MIB, (20 if small else 700) * MIB
    path = qemu_img.create(tmp_path / "i.qcow2", size, *options)
    qemu_img.write(path, f"write -P 1 {size - 4096} 4k")
    before = header_of(path).l1_entry_count
    async with opened(chain_of(path)) as image:
        await image.resize(larger)
        assert bytes(await image.read(size - 4096, 64 * KIB)) == b"\1" * 4096 + bytes(60 * KIB)
        await image.write(larger - 5000, b"\2" * 5000)
    assert header_of(path).l1_entry_count > before
    assert_no_leaks(path)
    qemu_img.write(
        path, f"read -P 1 {size - 4096} 4k", f"read -P 0 {size} 1M", f"read -P 2 {larger - 5000} 5000"
    )


# -- subclusters ----------------------------------------------------------------------------------------


async def test_only_the_subclusters_that_are_written_take_data(tmp_path: Path) -> None:
    """A cluster of 64 KiB has 32 of 2 KiB."""
    path = qemu_img.create(tmp_path / "i.qcow2", MIB, "extended_l2=on")
    async with opened(chain_of(path)) as image:
        assert image.cluster_size == 2 * KIB
        await image.write(5 * KIB, b"x" * 4 * KIB)
        await image.write(23 * KIB, b"y" * 512)
        await image.write_zeroes(20 * KIB, 1 * KIB)  # which it is already
        await image.discard(8 * KIB, 2 * KIB)
    places = host_offsets(path)
    host_offset = places[4 * KIB][1]
    assert host_offset is not None
    assert [start for start, (is_zero, _) in places.items() if not is_zero] == [4 * KIB, 22 * KIB]
    assert places[22 * KIB] == (False, host_offset + 18 * KIB)
    expected = bytearray(MIB)
    expected[5 * KIB : 8 * KIB] = b"x" * 3 * KIB
    expected[23 * KIB : 23 * KIB + 512] = b"y" * 512
    assert qemu_img.content(path) == expected
    assert_no_leaks(path)


async def test_cluster_leaves_the_file_with_its_last_subcluster(tmp_path: Path) -> None:
    path = qemu_img.create(tmp_path / "i.qcow2", MIB, "extended_l2=on")
    async with opened(chain_of(path)) as image:
        await image.write(0, b"x" * 6 * KIB)
        await image.discard(0, 4 * KIB)
        await image.write_zeroes(4 * KIB, 2 * KIB)
        await image.flush()
        assert await read_all(image) == bytes(MIB)
    verdict = qemu_img.check(path)
    assert verdict is not None
    assert (verdict.allocated_clusters, verdict.leaks, verdict.corruptions) == (0, 0, 0)


async def test_part_of_a_compressed_cluster_becomes_zeroes(tmp_path: Path) -> None:
    raw, path = tmp_path / "raw", tmp_path / "i.qcow2"
    raw.write_bytes(b"abcd" * (MIB // 4))
    words = ("-f", "raw", "-O", "qcow2", "-o", "extended_l2=on")
    qemu_img.qemu("qemu-img", "convert", "-c", *words, raw, path)
    async with opened(chain_of(path)) as image:
        await image.write_zeroes(2 * KIB, 4 * KIB)
        await image.write_zeroes(127 * KIB, 70 * KIB)
        await image.discard(512 * KIB, 4 * KIB)  # may be left undone, and is
        await image.discard(640 * KIB, 64 * KIB)
    expected = bytearray(raw.read_bytes())
    for start, length in ((2, 4), (127, 70), (640, 64)):
        expected[start * KIB : (start + length) * KIB] = bytes(length * KIB)
    assert qemu_img.content(path) == expected
    assert_no_leaks(path)


def test_too_small_clusters_have_no_subclusters() -> None:
    header = Header(3, 13, MIB, 1, 8192, 16384, 1, incompatible=headers.INCOMPATIBLE_EXTENDED_L2)
    with pytest.raises(Exception, match="too small for subclusters"):
        headers.parse(headers.pack(header), "i")
