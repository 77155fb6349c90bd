"""Disks of qcow2 images that get smaller, as qemu-img makes them."""

import asyncio
import logging
import shutil
from pathlib import Path

import pytest

from blockd.errors import RequestError, StorageError
from blockd.formats.qcow2.writes import GuestWrites
from blockd.units import KIB, MIB
from tests import qemu_img
from tests.chains import Chain, opened, read_all
from tests.formats.test_qcow2_features import assert_no_leaks, features

SIZE = 4 * MIB
# In the middle of a cluster, and at its end.
SMALLER = [MIB + 512, 2 * MIB]


def chain_of(path: Path, backing: Path | None = None) -> Chain:
    paths = [path] if backing is None else [backing, path]
    return Chain(paths, ["qcow2"] * len(paths), 64 * KIB, b"")


def shrunk_by_qemu(path: Path, size: int) -> Path:
    copy = path.with_name("by-qemu.qcow2")
    shutil.copyfile(path, copy)
    qemu_img.qemu("qemu-img", "resize", "-q", "--shrink", copy, str(size))
    return copy


def assert_as_by_qemu(path: Path, by_qemu: Path, size: int) -> None:
    """The same disk, also when QEMU makes both larger again.

    Of a cluster that was cut, QEMU shows all that was there before.
    """
    assert_no_leaks(path)
    assert len(qemu_img.content(path)) == size
    qemu_img.assert_same(path, "qcow2", by_qemu, "qcow2")
    if size % (64 * KIB):
        return
    for image in (path, by_qemu):
        qemu_img.qemu("qemu-img", "resize", "-q", image, str(SIZE))
    qemu_img.assert_same(path, "qcow2", by_qemu, "qcow2")
    assert_no_leaks(path)


@features
@pytest.mark.parametrize("size", SMALLER)
async def test_image_of_every_kind_gets_smaller(tmp_path: Path, options: tuple[str, ...], size: int) -> None:
    path = qemu_img.create(tmp_path / "i.qcow2", SIZE, *options)
    qemu_img.write(path, "write -P 1 0 3M", "write -P 2 3968k 100k")
    before = path.stat().st_blocks
    by_qemu = shrunk_by_qemu(path, size)
    async with opened(chain_of(path)) as image:
        await image.resize(size)
        assert image.size == size
        assert await read_all(image) == b"\1" * size
        await image.resize(SIZE)
        assert await read_all(image) == b"\1" * size + bytes(SIZE - size)
        await image.write(SIZE - 512, b"x" * 512)
        await image.resize(size)
    assert path.stat().st_blocks <= before - (SIZE - size - MIB) // 2 // 512
    assert_as_by_qemu(path, by_qemu, size)


@pytest.mark.parametrize("size", SMALLER)
async def test_what_the_backing_has_behind_the_end_does_not_come_back(tmp_path: Path, size: int) -> None:
    base = qemu_img.create(tmp_path / "base.qcow2", SIZE)
    qemu_img.write(base, "write -P 7 0 4M")
    path = qemu_img.create(tmp_path / "top.qcow2", SIZE, backing=base)
    qemu_img.write(path, "write -P 1 1M 2M")
    by_qemu = shrunk_by_qemu(path, size)
    expected = b"\7" * MIB + b"\1" * (size - MIB)
    async with opened(chain_of(path, base)) as image:
        await image.resize(size)
        assert await read_all(image) == expected
        await image.resize(SIZE)
        assert await read_all(image) == expected + bytes(SIZE - size)
        await image.resize(size)
    assert_as_by_qemu(path, by_qemu, size)


@pytest.mark.parametrize("options", [(), ("extended_l2=on",)], ids=str)
async def test_snapshots_keep_what_they_have(tmp_path: Path, options: tuple[str, ...]) -> None:
    path = qemu_img.create(tmp_path / "i.qcow2", SIZE, *options)
    qemu_img.write(path, "write -P 1 0 4M")
    qemu_img.qemu("qemu-img", "snapshot", "-c", "s", path)
    async with opened(chain_of(path)) as image:
        await image.resize(MIB)
        assert await read_all(image) == b"\1" * MIB
    assert_no_leaks(path)
    qemu_img.qemu("qemu-img", "snapshot", "-a", "s", path)
    assert qemu_img.content(path) == b"\1" * SIZE
    assert_no_leaks(path)


async def test_compressed_clusters_behind_the_end_go(tmp_path: Path) -> None:
    source = qemu_img.create(tmp_path / "source.qcow2", SIZE)
    qemu_img.write(source, "write -P 1 0 4M")
    path = tmp_path / "i.qcow2"
    qemu_img.qemu("qemu-img", "convert", "-q", "-c", "-f", "qcow2", "-O", "qcow2", source, path)
    by_qemu = shrunk_by_qemu(path, MIB)
    async with opened(chain_of(path)) as image:
        await image.resize(MIB)
    assert_as_by_qemu(path, by_qemu, MIB)


async def test_a_disk_of_many_empty_tables_gets_smaller_at_once(tmp_path: Path) -> None:
    path = qemu_img.create(tmp_path / "i.qcow2", 1 << 46)
    async with opened(chain_of(path)) as image:
        await image.write((1 << 46) - 512, b"x" * 512)
        async with asyncio.timeout(60):
            await image.resize(MIB)
    assert_no_leaks(path)
    assert len(qemu_img.content(path)) == MIB


async def test_the_disk_is_smaller_even_if_its_space_cannot_be_freed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = qemu_img.create(tmp_path / "i.qcow2", SIZE)
    qemu_img.write(path, "write -P 1 0 4M")

    async def fail(writes: GuestWrites, start: int, end: int) -> None:
        raise StorageError("No space left on device", errno=28)

    async with opened(chain_of(path)) as image:
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            patch.setattr(GuestWrites, "forget", fail)
            await image.resize(MIB)
        assert "takes more space than it needs: No space left on device" in caplog.text
        assert await read_all(image) == b"\1" * MIB
    assert_no_leaks(path)
    async with opened(chain_of(path)) as image:
        await image.resize(SIZE)
        assert await read_all(image) == b"\1" * MIB + bytes(SIZE - MIB)
    assert_no_leaks(path)


async def test_what_is_no_size(tmp_path: Path) -> None:
    path = qemu_img.create(tmp_path / "i.qcow2", SIZE)
    async with opened(chain_of(path)) as image:
        with pytest.raises(RequestError, match="The new size must be a multiple of 512"):
            await image.resize(SIZE - 1)
        assert image.size == SIZE
        await image.resize(0)
        assert image.size == 0
    assert qemu_img.content(path) == b""
