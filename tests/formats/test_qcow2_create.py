"""New images: exactly consistent, and refused when they cannot be."""

import json
from pathlib import Path

import pytest

from blockd.errors import RequestError
from blockd.formats.qcow2.check import check
from blockd.formats.qcow2.create import create
from blockd.formats.raw.create import create as create_raw
from blockd.protocols.file import FileNode
from blockd.protocols.new_file import new_file
from blockd.units import GIB, KIB, MIB, TIB
from tests import qemu_img
from tests.qemu_img import qemu


async def make(path: Path, size: int, cluster_size: int = 64 * KIB, backing: str | None = None) -> Path:
    async with new_file(str(path)) as file:
        await create(
            file,
            size,
            cluster_size=cluster_size,
            backing_filename=backing,
            backing_format="raw" if backing else None,
        )
    return path


@pytest.mark.parametrize("cluster_size", [512, 4 * KIB, 64 * KIB, 2 * MIB])
@pytest.mark.parametrize("size", [0, 512, 3 * MIB + 512, 10 * GIB, 128 * GIB])
async def test_new_image_is_exactly_consistent(tmp_path: Path, size: int, cluster_size: int) -> None:
    path = await make(tmp_path / "new.qcow2", size, cluster_size)

    verdict = qemu_img.check(path)
    assert verdict is not None
    assert (verdict.corruptions, verdict.leaks) == (0, 0)
    assert verdict.image_end_offset == path.stat().st_size
    file = await FileNode.open(str(path), node_name="f", read_only=True)
    report = await check(file)
    await file.close()
    assert (report.corruptions, report.leaks, report.findings) == (0, 0, [])
    info = json.loads(qemu("qemu-img", "info", "--output=json", path))
    assert (info["virtual-size"], info["cluster-size"]) == (size, cluster_size)
    assert info["format-specific"]["data"]["refcount-bits"] == 16


@pytest.mark.parametrize("cluster_size", [512, 4 * KIB, 64 * KIB])
async def test_new_image_reads_as_zeroes_in_qemu(tmp_path: Path, cluster_size: int) -> None:
    path = await make(tmp_path / "new.qcow2", 3 * MIB, cluster_size)

    assert qemu_img.content(path) == bytes(3 * MIB)
    qemu_img.write(path, "write -P 7 1M 1M")
    qemu_img.assert_sound(path)


async def test_overlay_reads_its_backing_in_qemu(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"base" * (MIB // 4))
    path = await make(tmp_path / "overlay.qcow2", 2 * MIB, backing="base.raw")

    assert qemu_img.content(path) == b"base" * (MIB // 4) + bytes(MIB)
    info = json.loads(qemu("qemu-img", "info", "--output=json", path))
    assert (info["backing-filename"], info["backing-filename-format"]) == ("base.raw", "raw")


@pytest.mark.parametrize("name", ["b", "b" * 1023, "basis-ü.raw"])
async def test_backing_names_are_kept_as_given(tmp_path: Path, name: str) -> None:
    path = await make(tmp_path / "overlay.qcow2", MIB, backing=name)

    info = json.loads(qemu("qemu-img", "info", "-U", "--output=json", path))
    assert info["backing-filename"] == name


@pytest.mark.parametrize(
    ("size", "cluster_size", "said"),
    [
        (MIB, 256, "between 512 and 2048k"),
        (MIB, 4 * MIB, "between 512 and 2048k"),
        (MIB, 65535, "power of two"),
        (MIB, 0, "power of two"),
        (-512, 65536, "multiple of 512"),
        (1000, 65536, "multiple of 512"),
        (128 * GIB + 512, 512, "at most 137438953472"),
        (3 * 1024 * TIB, 65536, "larger clusters allow more"),
    ],
)
async def test_impossible_sizes_are_refused(tmp_path: Path, size: int, cluster_size: int, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        await make(tmp_path / "new.qcow2", size, cluster_size)
    assert not (tmp_path / "new.qcow2").exists()


@pytest.mark.parametrize(
    ("filename", "backing_format", "cluster_size", "said"),
    [
        ("b" * 1024, "raw", 65536, "more than 1023"),
        ("b" * 1000, "raw", 512, "too long for clusters of 512 bytes"),
        ("base", None, 65536, "needs its format"),
        (None, "raw", 65536, "cannot be used without backing file"),
        ("ba\0se", "raw", 65536, "control characters"),
    ],
)
async def test_impossible_backing_links_are_refused(
    tmp_path: Path, filename: str | None, backing_format: str | None, cluster_size: int, said: str
) -> None:
    with pytest.raises(RequestError, match=said):
        async with new_file(str(tmp_path / "new.qcow2")) as file:
            await create(
                file,
                MIB,
                backing_filename=filename,
                backing_format=backing_format,
                cluster_size=cluster_size,
            )
    assert not (tmp_path / "new.qcow2").exists()


async def test_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_bytes(b"precious")

    with pytest.raises(RequestError, match="exists"):
        await make(path, MIB)
    assert path.read_bytes() == b"precious"


async def test_used_file_becomes_the_new_image(tmp_path: Path) -> None:
    """A block device keeps what was on it; here a file stands in for one."""
    path = tmp_path / "device"
    path.write_bytes(b"\xff" * 8 * MIB)
    file = await FileNode.open(str(path), node_name="f", read_only=False)
    await create(file, 4 * MIB)
    await file.close()

    assert qemu_img.content(path) == bytes(4 * MIB)
    qemu_img.assert_sound(path)


async def test_raw_image_is_all_hole(tmp_path: Path) -> None:
    async with new_file(str(tmp_path / "new.raw")) as file:
        await create_raw(file, 10 * GIB)

    status = (tmp_path / "new.raw").stat()
    assert (status.st_size, status.st_blocks) == (10 * GIB, 0)


async def test_raw_image_has_no_backing(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot have a backing file"):
        async with new_file(str(tmp_path / "new.raw")) as file:
            await create_raw(file, MIB, backing_filename="base", backing_format="raw")
    assert not (tmp_path / "new.raw").exists()
