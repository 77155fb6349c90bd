"""Our check against QEMU's, on sound images of every kind and on images damaged in every table."""

import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from blockd.errors import ImageError
from blockd.formats.check_report import FINDING_COUNT_MAX, CheckReport
from blockd.formats.qcow2.check import OFFSET_MASK, Census, Uses, check
from blockd.protocols.file import FileNode
from blockd.units import GIB, KIB, MIB
from tests import qemu_img
from tests.formats.damaged import COPIED, Image
from tests.qemu_img import Verdict, qemu


async def our_check(path: Path) -> CheckReport:
    file = await FileNode.open(str(path), node_name="f", read_only=True)
    try:
        return await check(file)
    finally:
        await file.close()


def as_verdict(report: CheckReport) -> Verdict:
    return Verdict(*(getattr(report, name) for name in Verdict._fields))


def some_data(path: Path, *more: str) -> Path:
    qemu_img.write(
        path, "write -P 1 0 200k", "write -z 300k 200k", "write -P 2 3M 64k", "discard 1M 64k", *more
    )
    return path


OPTIONS = {
    "default": (),
    "version 2": ("compat=0.10",),
    "512-byte clusters": ("cluster_size=512",),
    "2M clusters": ("cluster_size=2M",),
    **{f"{bits}-bit refcounts": (f"refcount_bits={bits}",) for bits in (1, 2, 4, 8, 32, 64)},
    "1-bit refcounts, 512-byte clusters": ("refcount_bits=1", "cluster_size=512"),
    "lazy refcounts": ("lazy_refcounts=on",),
    "extended L2": ("extended_l2=on",),
    "preallocated metadata": ("preallocation=metadata",),
    "preallocated": ("preallocation=falloc",),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
async def test_sound_images_have_the_same_figures(tmp_path: Path, options: tuple[str, ...]) -> None:
    path = some_data(qemu_img.create(tmp_path / "i.qcow2", 5 * MIB, *options))

    report = await our_check(path)
    assert as_verdict(report) == qemu_img.check(path)
    assert report.findings == []


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster_size", [4 * KIB, 64 * KIB, 2 * MIB])
async def test_compressed_images_have_the_same_figures(
    tmp_path: Path, kind: str, cluster_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no step is made for a cluster."""
    raw = tmp_path / "raw"
    raw.write_bytes(b"".join(struct.pack(">Q", i * i) for i in range(300_000)))
    path = tmp_path / "i.qcow2"
    options = f"compression_type={kind},cluster_size={cluster_size}"
    qemu("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, path)
    qemu_img.write(path, "write -P 3 100k 50k")
    looked_at: list[int] = []
    monkeypatch.setattr(Census, "_count_compressed", lambda _, offset, *__: looked_at.append(offset))

    report = await our_check(path)
    assert as_verdict(report) == qemu_img.check(path)
    assert report.compressed_clusters > 0
    assert not looked_at


async def test_snapshots_and_bitmaps_are_counted(tmp_path: Path) -> None:
    path = some_data(qemu_img.create(tmp_path / "i.qcow2", 5 * MIB))
    qemu("qemu-img", "snapshot", "-c", "one", path)
    qemu_img.write(path, "write -P 4 0 100k")
    qemu("qemu-img", "snapshot", "-c", "two", path)
    qemu("qemu-img", "bitmap", "--add", path, "tracks")
    qemu_img.write(path, "write -P 5 3M 1M")

    report = await our_check(path)
    assert as_verdict(report) == qemu_img.check(path)
    assert report.findings == []


@pytest.mark.parametrize("name", ["a", "abcd", "abcdefgh"])
async def test_snapshot_table_at_the_end_of_the_file_has_no_padding(tmp_path: Path, name: str) -> None:
    """QEMU does not write the padding of the last row."""
    path = some_data(qemu_img.create(tmp_path / "i.qcow2", 5 * MIB))
    qemu("qemu-img", "snapshot", "-c", name, path)

    report = await our_check(path)
    assert as_verdict(report) == qemu_img.check(path)
    assert report.findings == []


async def test_data_file_image_is_counted(tmp_path: Path) -> None:
    data_file = tmp_path / "data"
    path = some_data(qemu_img.create(tmp_path / "i.qcow2", 5 * MIB, f"data_file={data_file}"))

    assert as_verdict(await our_check(path)) == qemu_img.check(path)


async def test_huge_empty_image_is_checked_quickly(tmp_path: Path) -> None:
    path = qemu_img.create(tmp_path / "i.qcow2", 1024 * GIB)
    qemu_img.write(path, "write -P 1 1000G 1M")

    assert as_verdict(await our_check(path)) == qemu_img.check(path)


# -- damage ---------------------------------------------------------------------------------------


DAMAGES: dict[str, tuple[Callable[[Image], None], str]] = {
    "refcount too high": (lambda i: i.put(i.refcount_at(i.data_cluster(0)), 2, 2), "L2 table"),
    "refcount zero": (lambda i: i.put(i.refcount_at(i.data_cluster(0)), 0, 2), "refcounts"),
    "refcount of nothing": (lambda i: i.append_cluster(refcount=1), "refcounts"),
    "refcount of the L2 table zero": (lambda i: i.put(i.refcount_at(i.l2), 0, 2), "refcounts"),
    "refcount of the L1 table zero": (lambda i: i.put(i.refcount_at(i.l1), 0, 2), "refcounts"),
    "refcount of the header zero": (lambda i: i.put(i.refcount_at(0), 0, 2), "refcounts"),
    "data past the end": (lambda i: i.put(i.l2, 1 << 40 | COPIED), "L2 table"),
    "data right at the end": (lambda i: i.put(i.l2, len(i.data) + 0xFFFF & ~0xFFFF | COPIED), "L2 table"),
    "data not aligned": (lambda i: i.change(i.l2, lambda entry: entry + 512), "L2 table"),
    "reserved bit in L2": (lambda i: i.change(i.l2, lambda entry: entry | 1 << 4), "L2 table"),
    "high reserved bit in L2": (lambda i: i.change(i.l2, lambda entry: entry | 1 << 57), "L2 table"),
    "copied flag missing in L2": (lambda i: i.change(i.l2, lambda entry: entry & ~COPIED), "L2 table"),
    "two L2 entries, one cluster": (lambda i: i.put(i.l2 + 8, i.get(i.l2)), "refcounts"),
    "data on the L1 table": (lambda i: i.put(i.l2, i.l1 | COPIED), "refcounts"),
    "data on the refcount block": (lambda i: i.put(i.l2, i.refcount_block | COPIED), "refcount table"),
    "reserved bit in L1": (lambda i: i.change(i.l1, lambda entry: entry | 1 << 3), "L1 table"),
    "copied flag missing in L1": (lambda i: i.change(i.l1, lambda entry: entry & ~COPIED), "L1 table"),
    "L2 table past the end": (lambda i: i.put(i.l1, 1 << 40 | COPIED), "L1 table"),
    "refcount block past the end": (lambda i: i.put(i.refcount_table, 1 << 40), "refcount table"),
    "refcount block not aligned": (
        lambda i: i.change(i.refcount_table, lambda entry: entry + 512),
        "refcount table",
    ),
    "reserved bit in the refcount table": (
        lambda i: i.change(i.refcount_table, lambda entry: entry | 1),
        "refcount table",
    ),
    "second refcount block the first": (
        lambda i: i.put(i.refcount_table + 8, i.get(i.refcount_table)),
        "refcount table",
    ),
    "copied flag on a compressed cluster": (
        lambda i: i.put(i.l2, i.data_cluster(0) | 1 << 62 | COPIED),
        "L2 table",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
async def test_damage_is_found_as_qemu_finds_it(tmp_path: Path, name: str) -> None:
    damage, table = DAMAGES[name]
    path = some_data(qemu_img.create(tmp_path / "i.qcow2", 5 * MIB))
    damage(Image(path))

    report = await our_check(path)
    verdict = qemu_img.check(path)
    assert verdict is not None
    assert (report.corruptions > 0) == (verdict.corruptions > 0)
    # A table entry QEMU finds wrong is no reference for it, so that a block it still names counts as leaked.
    assert report.leaks == verdict.leaks or table == "refcount table"
    assert report.corruptions + report.leaks == len(report.findings) > 0
    assert table in {finding.table for finding in report.findings}


async def test_leaks_alone_are_no_corruption(tmp_path: Path) -> None:
    path = some_data(qemu_img.create(tmp_path / "i.qcow2", 5 * MIB))
    image = Image(path)
    image.put(image.l2 + 8 * 48, 0)

    report = await our_check(path)
    assert as_verdict(report) == qemu_img.check(path)
    assert (report.corruptions, report.leaks) == (0, 1)
    assert report.findings[0].is_leak


@pytest.mark.parametrize("seed", range(40))
async def test_random_damage_to_tables_gets_the_same_verdict(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    path = some_data(qemu_img.create(tmp_path / "i.qcow2", 5 * MIB))
    image = Image(path)
    table = rng.choice([image.l1, image.l2, image.refcount_table, image.refcount_block])
    for _ in range(rng.randint(1, 3)):
        image.change(table + 8 * rng.randrange(10), lambda entry: entry ^ 1 << rng.randrange(64))

    report = await our_check(path)
    verdict = qemu_img.check(path)
    if verdict is not None:
        assert report.corruptions > 0 or verdict.corruptions == 0, verdict
        assert verdict.corruptions > 0 or report.corruptions == 0, report.findings


# -- refusals -------------------------------------------------------------------------------------


async def test_metadata_cut_off_by_the_end_is_corrupt(tmp_path: Path) -> None:
    """The last table reaches past the file: QEMU takes what is missing for zeroes, we do not."""
    path = qemu_img.create(tmp_path / "i.qcow2", 5 * MIB)
    qemu_img.write(path, "write -z 0 64k")
    image = Image(path)
    path.write_bytes(image.data[: image.l2 + 4096])

    report = await our_check(path)
    assert [finding.table for finding in report.findings] == ["L1 table"]


async def test_bad_header_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "i.qcow2"
    path.write_bytes(b"no image" * 100)

    with pytest.raises(ImageError, match=r"i\.qcow2' is not a qcow2 image"):
        await our_check(path)


async def test_unknown_feature_is_refused(tmp_path: Path) -> None:
    path = qemu_img.create(tmp_path / "i.qcow2", 5 * MIB)
    Image(path).put(72, 1 << 40)

    with pytest.raises(ImageError, match="features 0x10000000000"):
        await our_check(path)


async def test_absurd_length_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    path = qemu_img.create(tmp_path / "i.qcow2", 5 * MIB, "cluster_size=512")
    with path.open("r+b") as file:
        file.truncate(512 << 27)

    with pytest.raises(ImageError, match="more than 67108864 clusters"):
        await our_check(path)


async def test_findings_are_bounded_but_all_counted(tmp_path: Path) -> None:
    path = qemu_img.create(tmp_path / "i.qcow2", 5 * MIB, "cluster_size=512")
    qemu_img.write(path, "write -P 1 0 2M")
    image = Image(path)
    image.put(image.refcount_table + 16, 0)

    for index in range(8):
        image.put(image.refcount_table + 8 * index, 0)
    report = await our_check(path)
    assert len(report.findings) == FINDING_COUNT_MAX < report.corruptions


async def test_plain_tables_are_counted_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step for an entry that names a cluster with one user, wherever its neighbours are."""
    counted: list[int] = []
    count_run = Census._count_run

    def counting(census: Census, entry_offset: int, entry: int, count: int, uses: Uses) -> bool:
        counted.append(entry)
        return count_run(census, entry_offset, entry, count, uses)

    monkeypatch.setattr(Census, "_count_run", counting)
    path = qemu_img.create(tmp_path / "disk.qcow2", 4 * MIB, "cluster_size=4k")
    rng = random.Random(23)
    clusters = rng.sample(range(1024), 600)
    qemu_img.write(path, *(f"write {number * 4096} 4096" for number in clusters))
    qemu_img.write(path, *(f"write -z -u {number * 4096} 4096" for number in clusters[:20]))
    assert as_verdict(await our_check(path)) == qemu_img.check(path)
    assert counted == []
    image = Image(path)
    table = image.get(image.get(40)) & OFFSET_MASK
    image.change(
        table + 8 * next(n for n in range(512) if image.get(table + 8 * n) & COPIED),
        lambda entry: entry & ~COPIED,
    )
    report = await our_check(path)
    assert report.corruptions == 1
    assert len(counted) > 100, "a table with something odd is looked at entry by entry"
