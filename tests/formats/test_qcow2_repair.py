"""Repair: images damaged on purpose become right for QEMU too, with the same content, or stay as they are."""

import random
import shutil
import signal
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from blockd.errors import ImageError
from blockd.formats.check_report import CheckReport, Repair
from blockd.formats.qcow2.image import Qcow2Image
from blockd.formats.qcow2.repair import repair
from blockd.protocols.file import FileNode
from blockd.units import KIB, MIB
from tests import qemu_img
from tests.formats.damaged import COPIED, Image
from tests.formats.test_qcow2_check import DAMAGES, our_check, some_data
from tests.qemu_img import qemu


async def our_repair(path: Path, mode: Repair = Repair.ALL) -> CheckReport:
    file = await FileNode.open(str(path), node_name="f", read_only=False)
    try:
        return await repair(file, mode)
    finally:
        await file.close()


def assert_clean(path: Path) -> None:
    verdict = qemu_img.check(path)
    assert verdict is not None
    assert (verdict.corruptions, verdict.leaks) == (0, 0)


# What nothing in the image says how it should be.
HOPELESS = {
    "data past the end",
    "data right at the end",
    "data not aligned",
    "reserved bit in L2",
    "high reserved bit in L2",
    "data on the L1 table",
    "reserved bit in L1",
    "L2 table past the end",
    "copied flag on a compressed cluster",
}


@pytest.mark.parametrize("name", sorted(DAMAGES.keys() - HOPELESS))
async def test_damage_that_follows_from_the_maps_is_repaired(tmp_path: Path, name: str) -> None:
    path = some_data(qemu_img.create(tmp_path / "i.qcow2", 5 * MIB))
    DAMAGES[name][0](Image(path))
    content = qemu_img.content(path)
    before = await our_check(path)

    report = await our_repair(path)
    assert (report.refusal, report.corruptions, report.leaks, report.findings) == (None, 0, 0, [])
    assert report.corruptions_fixed == before.corruptions
    assert report.leaks_fixed == before.leaks
    assert_clean(path)
    assert qemu_img.content(path) == content


@pytest.mark.parametrize("name", sorted(HOPELESS))
async def test_damage_that_loses_data_is_said_and_left_alone(tmp_path: Path, name: str) -> None:
    path = some_data(qemu_img.create(tmp_path / "i.qcow2", 5 * MIB))
    DAMAGES[name][0](Image(path))
    before = path.read_bytes()

    report = await our_repair(path)
    assert report.refusal is not None
    assert report.refusal.startswith("this cannot be repaired without losing data: ")
    assert report.corruptions > 0
    assert path.read_bytes() == before


# -- every variant --------------------------------------------------------------------------------------

VARIANTS: dict[str, tuple[str, ...]] = {
    "default": (),
    "version 2": ("compat=0.10",),
    "512-byte clusters": ("cluster_size=512",),
    "2M clusters": ("cluster_size=2M",),
    **{f"{bits}-bit refcounts": (f"refcount_bits={bits}",) for bits in (1, 2, 4, 8, 32, 64)},
    "64-bit refcounts, 512-byte clusters": ("refcount_bits=64", "cluster_size=512"),
    "1-bit refcounts, 512-byte clusters": ("refcount_bits=1", "cluster_size=512"),
    "extended L2": ("extended_l2=on",),
    "preallocated metadata": ("preallocation=metadata",),
    "zlib": ("compression_type=zlib",),
    "zstd": ("compression_type=zstd",),
    "snapshots and a bitmap": (),
}


def make_variant(path: Path, name: str) -> Path:
    options = VARIANTS[name]
    if name.startswith("z"):
        raw = path.with_name("raw")
        raw.write_bytes(b"".join(struct.pack(">Q", i * i) for i in range(100_000)))
        qemu("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", *options, raw, path)
        qemu_img.write(path, "write -P 3 100k 50k")
        return path
    some_data(qemu_img.create(path, 5 * MIB, *options))
    if name.startswith("snapshots"):
        for number in range(2):
            qemu("qemu-img", "snapshot", "-c", f"s{number}", path)
            qemu_img.write(path, f"write -P {number} {number}M 100k")
        qemu("qemu-img", "bitmap", "--add", path, "tracks")
    return path


def _clear_copied(image: Image) -> None:
    image.change(image.l1, lambda entry: entry ^ COPIED)
    for index in range(8):
        if image.data_cluster(index) & ~1 and not image.data_cluster(index) & 1 << 62:
            image.change(image.l2 + index * image.entry_size, lambda entry: entry ^ COPIED)


GENERAL: dict[str, Callable[[Image], None]] = {
    "some refcounts random": lambda image: image.spoil_refcounts(random.Random(1), 0.1),
    "all refcounts random": lambda image: image.spoil_refcounts(random.Random(2), 1),
    "refcounts all zero": lambda image: image.fill(image.refcount_block, 0),
    "refcounts all ones": lambda image: image.fill(image.refcount_block, 0xFF),
    "refcount table empty": lambda image: image.fill(image.refcount_table, 0),
    "refcount table of rubbish": lambda image: image.fill(image.refcount_table, 0x5A),
    "refcount table past the end": lambda image: image.put(48, 1 << 40),
    "flags the other way round": _clear_copied,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
async def test_any_refcounts_are_made_right_in_every_variant(tmp_path: Path, name: str) -> None:
    sound = make_variant(tmp_path / "sound.qcow2", name)
    path = tmp_path / "i.qcow2"
    for what, damage in GENERAL.items():
        shutil.copy(sound, path)
        damage(Image(path))
        assert (await our_check(path)).findings or (what == "refcounts all ones" and name[:5] == "1-bit")
        report = await our_repair(path)
        assert (report.refusal, report.corruptions, report.leaks) == (None, 0, 0), what
        assert_clean(path)
        qemu_img.assert_same(sound, "qcow2", path, "qcow2")


@pytest.mark.slow
async def test_snapshots_are_as_they_were(tmp_path: Path) -> None:
    path = make_variant(tmp_path / "i.qcow2", "snapshots and a bitmap")
    qemu("qemu-img", "bitmap", "--remove", path, "tracks")  # QEMU applies no snapshot while there is one
    copy = tmp_path / "copy.qcow2"
    shutil.copy(path, copy)
    GENERAL["refcount table of rubbish"](Image(path))
    await our_repair(path)
    for number in range(2):
        for image in (path, copy):
            qemu("qemu-img", "snapshot", "-a", f"s{number}", image)
        qemu_img.assert_same(copy, "qcow2", path, "qcow2")
    assert_clean(path)


# -- leaks, flags in the header, sizes --------------------------------------------------------------------


async def test_leaks_are_given_back(tmp_path: Path) -> None:
    path = some_data(qemu_img.create(tmp_path / "i.qcow2", 5 * MIB))
    image = Image(path)
    for index in range(4):
        image.put(image.l2 + 8 * index, 0)
    blocks_before = path.stat().st_blocks

    report = await our_repair(path, Repair.LEAKS)
    assert (report.leaks_fixed, report.leaks, report.corruptions, report.refusal) == (4, 0, 0, None)
    assert_clean(path)
    assert blocks_before - path.stat().st_blocks >= 4 * 64 * KIB // 512


async def test_refcount_that_is_too_high_is_lowered_as_a_leak(tmp_path: Path) -> None:
    """Then the flag says that the cluster may be written in place, which it did not before."""
    path = some_data(qemu_img.create(tmp_path / "i.qcow2", 5 * MIB))
    image = Image(path)
    image.put(image.refcount_at(image.data_cluster(0)), 2, 2)
    image.change(image.l2, lambda entry: entry & ~COPIED)
    assert (await our_check(path)).corruptions == 0

    await our_repair(path, Repair.LEAKS)
    assert_clean(path)


async def test_leaks_stay_while_something_else_is_wrong(tmp_path: Path) -> None:
    path = some_data(qemu_img.create(tmp_path / "i.qcow2", 5 * MIB))
    image = Image(path)
    image.put(image.refcount_at(image.data_cluster(0)), 0, 2)
    image.append_cluster(refcount=1)

    report = await our_repair(path, Repair.LEAKS)
    assert report.refusal is not None
    assert "so that it is not certain what is leaked" in report.refusal
    assert path.read_bytes() == image.data


async def test_nothing_is_written_to_a_sound_image(tmp_path: Path) -> None:
    path = some_data(qemu_img.create(tmp_path / "i.qcow2", 5 * MIB))
    before, changed_at = path.read_bytes(), path.stat().st_mtime_ns

    report = await our_repair(path)
    assert (report.refusal, report.leaks_fixed, report.corruptions_fixed) == (None, 0, 0)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (before, changed_at)


async def test_marks_are_cleared_when_all_is_well(tmp_path: Path) -> None:
    path = some_data(qemu_img.create(tmp_path / "i.qcow2", 5 * MIB))
    Image(path).put(72, 1 << 0 | 1 << 1)
    found = await our_check(path)
    assert (found.is_dirty, found.is_marked_corrupt) == (True, True)

    report = await our_repair(path)
    assert (report.is_dirty, report.is_marked_corrupt, report.refusal) == (False, False, None)
    assert Image(path).get(72) == 0


async def test_marks_stay_when_something_cannot_be_repaired(tmp_path: Path) -> None:
    path = some_data(qemu_img.create(tmp_path / "i.qcow2", 5 * MIB))
    DAMAGES["data past the end"][0](Image(path))
    Image(path).put(72, 1 << 1)

    report = await our_repair(path)
    assert (report.is_marked_corrupt, report.refusal is not None) == (True, True)
    assert Image(path).get(72) == 1 << 1


async def test_image_that_qemu_left_dirty_is_made_clean(tmp_path: Path) -> None:
    path = make_dirty(tmp_path / "i.qcow2")
    content = qemu_img.content(path)
    found = await our_check(path)
    assert found.is_dirty
    assert found.corruptions > 0

    report = await our_repair(path)
    assert (report.is_dirty, report.corruptions) == (False, 0)
    assert_clean(path)
    assert qemu_img.content(path) == content


async def test_more_references_than_a_refcount_can_be_is_said(tmp_path: Path) -> None:
    path = some_data(qemu_img.create(tmp_path / "i.qcow2", 5 * MIB, "refcount_bits=1"))
    image = Image(path)
    image.put(image.l2 + 8, image.get(image.l2))
    before = path.read_bytes()

    report = await our_repair(path)
    assert report.refusal is not None
    assert "2 references are more than its refcount can be" in report.refusal
    assert path.read_bytes() == before


async def test_l2_table_under_data_is_said_although_the_refcount_fits(tmp_path: Path) -> None:
    """QEMU finds nothing wrong with that; the next write to the cluster would destroy the table."""
    path = some_data(qemu_img.create(tmp_path / "i.qcow2", 5 * MIB))
    image = Image(path)
    image.put(image.l2 + 8, image.l2)
    image.put(image.refcount_at(image.l2), 2, 2)
    image.change(image.l1, lambda entry: entry & ~COPIED)

    report = await our_repair(path)
    assert report.corruptions == 1
    assert report.refusal is not None
    assert f"L2 table at {image.l2:#x}: is also used for something else" in report.refusal


# -- images that are opened -------------------------------------------------------------------------------


def make_dirty(path: Path) -> Path:
    """With lazy refcounts, the refcounts on the disk are behind when the process dies."""
    qemu_img.create(path, 5 * MIB, "lazy_refcounts=on")
    commands = ("write -P 1 0 300k", "write -P 2 2M 200k", "flush", "abort")
    words = [word for command in commands for word in ("-c", command)]
    qemu("qemu-io", "-f", "qcow2", *words, path, expect=-signal.SIGABRT)
    return path


async def test_dirty_image_is_repaired_when_it_is_opened_for_writing(tmp_path: Path) -> None:
    path = make_dirty(tmp_path / "i.qcow2")
    content = qemu_img.content(path)
    file = await FileNode.open(str(path), node_name="f", read_only=False)
    image = await Qcow2Image.open(file, node_name="i", read_only=False)
    await image.write(4 * MIB, b"new")
    await image.close()
    await file.close()

    assert_clean(path)
    assert Image(path).get(72) == 0
    assert Image(path).get(80) == 1, "lazy refcounts are still allowed"
    assert qemu_img.content(path) == content[: 4 * MIB] + b"new" + content[4 * MIB + 3 :]


async def test_dirty_image_that_cannot_be_repaired_is_not_written(tmp_path: Path) -> None:
    path = make_dirty(tmp_path / "i.qcow2")
    DAMAGES["data past the end"][0](Image(path))
    before = path.read_bytes()
    file = await FileNode.open(str(path), node_name="f", read_only=False)
    with pytest.raises(ImageError, match=r"was not closed cleanly, and cannot be repaired: .*losing data"):
        await Qcow2Image.open(file, node_name="i", read_only=False)
    await file.close()
    assert path.read_bytes() == before
