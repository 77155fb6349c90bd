"""Zero and sparse: what is zero takes no space, and is asked for once; what is discarded gives space back.

Drawn, one character for 64 KiB: D is data, Z zeroes that take space, - a hole or nothing.
"""

import os
from pathlib import Path

import pytest

from blockd.block.node import Buffer, OverlayNode
from blockd.cli.image.create import NewImage, create_image
from blockd.drivers import FORMATS
from blockd.filters.blkstream import BlkStream
from blockd.protocols.file import FileNode
from blockd.units import KIB
from tests.chains import read_all
from tests.layers import OVERLAY_FORMATS, Disk, Layer, creation_options, opened
from tests.model import stamp
from tests.qemu_img import map_of

CLUSTER = 64 * KIB
SOURCE = "ZD--ZZ-D" * 16
SIZE = len(SOURCE) * CLUSTER
DATA_LENGTH = SOURCE.count("D") * CLUSTER
ALLOCATED = {index for index, kind in enumerate(SOURCE) if kind != "-"}
# Headers, maps, bitmaps, counts of references: more than any of these images needs.
METADATA_LENGTH = 10 * CLUSTER
# What QEMU knows.
QEMU_FORMATS = [name for name in OVERLAY_FORMATS if name != "add-cow"]


def make_source(folder: Path) -> Path:
    """A raw image as drawn."""
    path = folder / "source.raw"
    with path.open("wb") as file:
        file.truncate(SIZE)
        for index, kind in enumerate(SOURCE):
            if kind != "-":
                content = stamp(1, index * CLUSTER, CLUSTER) if kind == "D" else bytes(CLUSTER)
                os.pwrite(file.fileno(), content, index * CLUSTER)
        os.fsync(file.fileno())
    return path


async def make_target(folder: Path, image_format: str, backing: str | None) -> Path:
    path = folder / f"target.{image_format}"
    options = creation_options(path, Layer(image_format, SIZE, CLUSTER))
    await create_image(str(path), NewImage(image_format, SIZE, backing, backing and "raw", options))
    return path


def taken(path: Path) -> int:
    """What the image takes of the disk, all its files together, as `du` counts."""
    return sum(file.stat().st_blocks * 512 for file in path.parent.glob(f"{path.stem}.*"))


class SourceReads:
    """Notes which clusters of the source are read."""

    def __init__(self) -> None:
        self._clusters: set[int] = set()

    def note(self, file: FileNode, offset: int, length: int) -> None:
        if Path(file.filename).name == "source.raw":
            self._clusters.update(range(offset // CLUSTER, -(-(offset + length) // CLUSTER)))

    def take(self) -> set[int]:
        """Those since this was called last; a copy may look at one more than once."""
        taken, self._clusters = self._clusters, set()
        return taken


@pytest.fixture
def source_reads(monkeypatch: pytest.MonkeyPatch) -> SourceReads:
    reads = SourceReads()
    readinto, read_nowait = FileNode.readinto_blocking, FileNode.read_nowait

    def counted_readinto(file: FileNode, offset: int, buffer: memoryview) -> None:
        reads.note(file, offset, len(buffer))
        readinto(file, offset, buffer)

    def counted_read_nowait(file: FileNode, offset: int, length: int) -> Buffer | None:
        data = read_nowait(file, offset, length)
        if data is not None:
            reads.note(file, offset, length)
        return data

    monkeypatch.setattr(FileNode, "readinto_blocking", counted_readinto)
    monkeypatch.setattr(FileNode, "read_nowait", counted_read_nowait)
    return reads


@pytest.mark.usefixtures("without_cloning")
@pytest.mark.parametrize("image_format", OVERLAY_FORMATS)
async def test_a_streamed_image_takes_what_the_data_take(
    tmp_path: Path, image_format: str, source_reads: SourceReads
) -> None:
    content = make_source(tmp_path).read_bytes()
    target = await make_target(tmp_path, image_format, "source.raw")
    async with opened(target, image_format) as disk:
        await disk.stream(None)
        assert source_reads.take() == ALLOCATED
        assert await read_all(disk.node) == content
    assert source_reads.take() == set()
    if image_format not in QEMU_FORMATS:
        assert taken(target) <= DATA_LENGTH + METADATA_LENGTH
    else:
        # Room for clusters that turned out to be zeroes may be left between the others, to be used next.
        assert taken(target) <= taken(tmp_path / "source.raw") + METADATA_LENGTH
        stored = map_of(target, image_format)
        assert sum(extent["length"] for extent in stored if extent["data"]) == DATA_LENGTH
        assert all(extent["zero"] != extent["data"] for extent in stored)


async def copy_on_read(disk: Disk, content: bytes) -> None:
    assert isinstance(disk.node, OverlayNode)
    assert await read_all(BlkStream(disk.node, None, "copy-on-read")) == content


@pytest.mark.parametrize("image_format", OVERLAY_FORMATS)
async def test_zeroes_are_asked_for_once(
    tmp_path: Path, image_format: str, source_reads: SourceReads
) -> None:
    """A guest that reads everything has it copied: the next guest, the stream, the next life ask no more."""
    content = make_source(tmp_path).read_bytes()
    target = await make_target(tmp_path, image_format, "source.raw")
    async with opened(target, image_format) as disk:
        await copy_on_read(disk, content)
        assert source_reads.take() >= ALLOCATED
        await copy_on_read(disk, content)
        assert await read_all(disk.node) == content
    async with opened(target, image_format) as disk:
        await copy_on_read(disk, content)
        await disk.stream(None)
        assert await read_all(disk.node) == content
    assert source_reads.take() == set()
    assert taken(target) <= DATA_LENGTH + METADATA_LENGTH


@pytest.mark.parametrize("image_format", FORMATS)
async def test_a_discard_gives_space_back(tmp_path: Path, image_format: str) -> None:
    target = await make_target(tmp_path, image_format, None)
    before = taken(target)
    async with opened(target, image_format) as disk:
        await disk.node.write(0, stamp(1, 0, SIZE))
        await disk.node.flush()
        full = taken(target)
        assert full >= before + SIZE
        await disk.node.discard(0, SIZE // 2)
        await disk.node.flush()
        assert taken(target) <= full - SIZE // 2 + METADATA_LENGTH
        await disk.node.write_zeroes(SIZE // 2, SIZE // 2, unmap=True)
        await disk.node.flush()
        assert await read_all(disk.node) == bytes(SIZE)
    assert taken(target) <= before + METADATA_LENGTH
