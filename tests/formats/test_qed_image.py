"""QED images between blockd and QEMU: what the one writes, the other reads."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from blockd.block.node import BlockNode
from blockd.block.root import Root
from blockd.extents import Kind
from blockd.formats.qed.check import check
from blockd.formats.qed.create import create
from blockd.formats.qed.image import QedImage
from blockd.protocols.file import FileNode
from blockd.protocols.new_file import new_file
from tests import qemu_img
from tests.chains import read_all
from tests.guest import Guest, RootDisk
from tests.model import ModelDisk
from tests.qemu_img import qemu

KIB, MIB = 1 << 10, 1 << 20


@asynccontextmanager
async def opened(
    path: Path, backing: BlockNode | None = None, *, read_only: bool = False
) -> AsyncIterator[QedImage]:
    """Open an image as a daemon does; in the end it is closed."""
    file = await FileNode.open(str(path), node_name="file", read_only=read_only)
    image = await QedImage.open(file, node_name="image", read_only=read_only)
    image.backing = backing
    try:
        yield image
    finally:
        await image.close()
        await file.close()


async def made(path: Path, size: int, *, cluster_size: int = 64 * KIB, table_size: int = 4) -> Path:
    async with new_file(str(path)) as file:
        await create(file, size, cluster_size=cluster_size, table_size=table_size)
    return path


def check_in_qemu(path: Path) -> None:
    """QEMU finds neither corruption nor leaks."""
    qemu("qemu-img", "check", "-q", "-f", "qed", path)


def content_in_qemu(path: Path) -> bytes:
    return qemu_img.content(path, "qed")


# QEMU makes images with a table size of 1, but cannot open them.
GEOMETRIES = [(4 * KIB, 2), (4 * KIB, 16), (64 * KIB, 4), (1 * MIB, 2), (4 * MIB, 2)]


@pytest.mark.parametrize(("cluster_size", "table_size"), GEOMETRIES)
async def test_image_that_qemu_filled_reads_equal(cluster_size: int, table_size: int, tmp_path: Path) -> None:
    size = max(5 * cluster_size, 5 * MIB) + 1536
    path = tmp_path / "disk.qed"
    options = f"cluster_size={cluster_size},table_size={table_size}"
    qemu("qemu-img", "create", "-q", "-f", "qed", "-o", options, path, str(size))
    qemu_img.write(
        path,
        f"write -P 1 512 {cluster_size}",
        f"write -P 2 {size - 4096} 4096",
        f"write -z {2 * cluster_size} {cluster_size}",
        f"write -P 3 {3 * cluster_size + 512} 1024",
        image_format="qed",
    )
    async with opened(path, read_only=True) as image:
        assert image.size == size
        assert await read_all(image) == content_in_qemu(path)
        [extent, *_] = await image.map(2 * cluster_size, cluster_size)
        assert extent.kind is Kind.ZERO
    async with opened(path) as image:
        await image.write(3 * cluster_size - 700, b"x" * 1000)
    check_in_qemu(path)


@pytest.mark.parametrize(("cluster_size", "table_size"), GEOMETRIES)
async def test_what_a_guest_writes_reads_equal_in_qemu(
    cluster_size: int, table_size: int, tmp_path: Path
) -> None:
    size = 8 * cluster_size + 2560
    path = await made(tmp_path / "disk.qed", size, cluster_size=cluster_size, table_size=table_size)
    check_in_qemu(path)
    model = ModelDisk(bytes(size))
    async with opened(path) as image:
        guest = Guest(RootDisk(Root(image)), model, random.Random(cluster_size), cluster_size=cluster_size)
        for _ in range(60 if cluster_size < 4 * MIB else 15):
            await guest.step()
        await guest.read_all()
    check_in_qemu(path)
    assert content_in_qemu(path) == model.content
    async with opened(path) as image:
        assert (await check(image.file)).findings == []
        assert await read_all(image) == model.content
