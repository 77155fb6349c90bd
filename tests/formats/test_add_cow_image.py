"""add-cow images: a plain image, a bitmap of what is in it, and a backing for the rest."""

import random
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from blockd.block.image_paths import ImagePaths
from blockd.block.node import BlockNode
from blockd.block.root import Root
from blockd.drivers import NodeGraph
from blockd.errors import BlockdError, ImageError, RequestError
from blockd.extents import Kind
from blockd.formats.add_cow import bitmap
from blockd.formats.add_cow import header as headers
from blockd.formats.add_cow.image import AddCowImage
from blockd.formats.raw.image import RawImage
from tests.chains import read_all
from tests.guest import Guest, RootDisk
from tests.hostile_names import put_name, stand_in
from tests.model import ModelDisk, stamp
from tests.recording import RecordingFile
from tests.streaming import check, open_overlay, overlay

KIB, MIB = 1 << 10, 1 << 20
CLUSTER = 4 * KIB


async def made(
    size: int, backing: BlockNode | None = None, *, cluster_size: int = CLUSTER
) -> tuple[AddCowImage, RecordingFile]:
    """A new image and the file that its data is in."""
    file = RecordingFile(name="disk.add-cow")
    data = file.beside = RecordingFile(name="disk.raw")
    image = await overlay(file, backing, size, cluster_size=cluster_size, image_format="add-cow")
    assert isinstance(image, AddCowImage)
    return image, data


async def raw(content: bytes) -> RawImage:
    return await RawImage.open(RecordingFile(content, "base.raw"), node_name="base", read_only=True)


def file_of(image: AddCowImage) -> RecordingFile:
    assert isinstance(image.file, RecordingFile)
    return image.file


# -- the header -----------------------------------------------------------------------------------


def new_header() -> bytearray:
    return bytearray(headers.pack(headers.new_header(16, "disk.raw", "base.raw", "raw")))


def test_layout_is_that_of_the_specification() -> None:
    data = bytes(new_header())
    assert data[:4] == b"ACOW"
    backing_offset, backing_length, image_offset, image_length, bits = struct.unpack_from("<5I", data, 4)
    assert data[backing_offset : backing_offset + backing_length] == b"base.raw"
    assert data[image_offset : image_offset + image_length] == b"disk.raw"
    assert (bits, struct.unpack_from("<2QI", data, 24)) == (16, (0, 0, 65536))
    assert (data[44:60], data[60:76]) == (b"raw".ljust(16, b"\0"), b"raw".ljust(16, b"\0"))
    assert len(data) == 65536


@pytest.mark.parametrize(
    ("offset", "field", "text"),
    [
        (0, b"QFI\xfb", "is not an add-cow file"),
        (24, b"\x04", "feature that is not supported: unknown feature bit 2"),
        (20, b"\x0b", "cluster_bits 11 is outside 12..21"),
        (20, b"\x16", "cluster_bits 22 is outside 12..21"),
        (40, b"\x00\x20\x00\x00", "header size 8192 does not fit cluster_bits 16"),
        (4, b"\x08\x00\x00\x00", "the backing file name at 8 is outside the header"),
        (4, b"\xff\xff\xff\xff", "is outside the header"),
        (8, b"\xff\xff\x00\x00", "the backing file name is 65535 bytes long, not 1 to 1023"),
        (8, b"\x00\x00\x00\x00", "the backing file name is 0 bytes long"),
        (8, b"\x09\x00\x00\x00", "the backing file name has a NUL character in it"),
        (12, b"\x00\x00\x00\x00", "there is no image file name"),
        (12, b"\x4c\x00\x00\x00", "the image file name and the backing file name are the same"),
        (12, b"\x4d\x00\x00\x00\x04", "the image file name and the backing file name overlap"),
        (44, b"\xff", "the backing format is no text"),
        (60, b"qcow2", "the image format 'qcow2' is not supported; it must be raw"),
    ],
)
def test_header_is_refused_by_name_of_the_field(offset: int, field: bytes, text: str) -> None:
    data = new_header()
    data[offset : offset + len(field)] = field
    with pytest.raises(ImageError) as refused:
        headers.parse(bytes(data), "some file")
    assert text in refused.value.message
    assert "some file" in refused.value.message


def test_header_that_is_cut_short_is_refused() -> None:
    for length in (0, 3, 75, 4096, 65535):
        with pytest.raises(ImageError):
            headers.parse(bytes(new_header()[:length]), "some file")


def test_random_bytes_in_the_header_are_refused_or_make_sense() -> None:
    rng = random.Random(1)
    for _ in range(3000):
        data = new_header()
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(76)] = rng.randrange(256)
        try:
            header = headers.parse(bytes(data), "some file")
        except ImageError:
            continue
        assert header.size <= len(data)
        assert header.image.text != (header.backing and header.backing.text)


def test_names_that_do_not_fit_are_refused() -> None:
    header = headers.new_header(12, "disk.raw", "b" * 1023, "raw")
    again = headers.with_backing(header, "c" * 1023, "qcow2")
    assert again.backing is not None
    assert header.backing is not None
    assert not again.backing.overlaps(header.backing)
    for name, backing_format in [("disk.raw", "raw"), ("", "raw"), ("b" * 1024, "raw"), ("b", "f" * 17)]:
        with pytest.raises(RequestError):
            headers.with_backing(header, name, backing_format)


# -- reading and writing ----------------------------------------------------------------------------


@pytest.mark.parametrize("cluster_size", [4 * KIB, 64 * KIB, 2 * MIB])
@pytest.mark.parametrize("is_slow", [False, True])
async def test_guest_reads_what_it_wrote(cluster_size: int, is_slow: bool) -> None:
    """The disk ends within a cluster, the backing does so before."""
    size = 6 * cluster_size + 2560
    content = stamp(7, 0, 4 * cluster_size + 1536)
    image, data = await made(size, await raw(content), cluster_size=cluster_size)
    file_of(image).is_slow = data.is_slow = is_slow
    model = ModelDisk(content.ljust(size, b"\0"))
    guest = Guest(RootDisk(Root(image)), model, random.Random(1), cluster_size=cluster_size)
    for _ in range(60 if cluster_size < MIB else 10):
        await guest.step()
    await guest.read_all()
    await image.close()
    again = await open_overlay(file_of(image).again(), image.backing, read_only=True)
    assert await read_all(again) == model.content
    assert (await check(file_of(image))).findings == []


async def test_clusters_that_are_there_are_as_fast_as_the_plain_image() -> None:
    image, data = await made(8 * CLUSTER, await raw(b"B" * 8 * CLUSTER))
    assert image.write_nowait(512, b"new" * 100), "into a cluster that is filled up from the backing"
    assert data.disk[:CLUSTER] == b"B" * 512 + b"new" * 100 + b"B" * (CLUSTER - 812)
    assert image.kind_nowait(0, CLUSTER) == image.image.kind_nowait(0, CLUSTER)
    assert image.kind_nowait(CLUSTER, CLUSTER) is Kind.UNALLOCATED
    assert image.read_own_nowait(512, 3) == b"new"
    assert image.read_own_nowait(CLUSTER, 3) is None
    assert image.read_nowait(CLUSTER, 3) == b"BBB"
    assert image.read_nowait(CLUSTER - 3, 6) is None, "a range of both kinds has to be planned"
    assert await image.read(CLUSTER - 3, 6) == b"BBBBBB"
    kinds = [extent.kind for extent in await image.map(0, 8 * CLUSTER)]
    assert kinds == [Kind.DATA, Kind.UNALLOCATED]
    await image.change_backing(None, None)
    image.backing = None
    assert image.is_complete
    assert image.read_nowait == image.image.read_nowait
    assert bytes(data.disk) == b"B" * 512 + b"new" * 100 + b"B" * (CLUSTER - 812) + bytes(7 * CLUSTER)


async def test_what_is_discarded_is_a_hole_and_not_the_backing() -> None:
    image, data = await made(8 * CLUSTER, await raw(b"B" * 8 * CLUSTER))
    await image.write(0, b"x" * 4 * CLUSTER)
    data.log.clear()
    await image.discard(0, 6 * CLUSTER)
    assert bytes(await image.read(0, 8 * CLUSTER)) == bytes(6 * CLUSTER) + b"B" * 2 * CLUSTER
    assert [type(entry).__name__ for entry in data.log] == ["Punch"]


async def test_backing_that_changes_is_recorded_each_time_in_another_place() -> None:
    image, _ = await made(8 * CLUSTER, await raw(bytes(8 * CLUSTER)))
    places = set()
    for name in ("one.raw", "two.raw", "one.raw"):
        await image.change_backing(name, "raw")
        assert (image.backing_filename, image.backing_format) == (name, "raw")
        again = await open_overlay(file_of(image).again(), None, read_only=True)
        assert again.backing_filename == name
        assert image.header.backing is not None
        places.add(image.header.backing.offset)
    assert len(places) == 2
    with pytest.raises(RequestError, match="must differ"):
        await image.change_backing("disk.raw", "raw")


async def test_growing_shows_zeroes_whatever_the_backing_has_there() -> None:
    image, data = await made(4 * CLUSTER + 512, await raw(b"B" * 9 * CLUSTER))
    await image.resize(8 * CLUSTER)
    assert await read_all(image) == (b"B" * (4 * CLUSTER + 512)).ljust(8 * CLUSTER, b"\0")
    assert data.size == 8 * CLUSTER
    for size in (4 * CLUSTER, 9 * CLUSTER + 1):
        with pytest.raises(RequestError):
            await image.resize(size)
    assert image.size == 8 * CLUSTER


async def test_bitmap_needs_little_memory() -> None:
    """Pages come and go; those with bits that the disk lacks stay until a checkpoint, which comes in time."""
    span = bitmap.PAGE_BIT_COUNT * CLUSTER
    file = RecordingFile(name="disk.add-cow")
    file.beside = RecordingFile(name="disk.raw")
    image = await overlay(file, None, 0, cluster_size=CLUSTER, image_format="add-cow")
    assert isinstance(image, AddCowImage)
    bits = bitmap.Bitmap(file, image.header.size)
    bits.cache.count_max = 4
    for page in range(20):
        await bits.set(page * bitmap.PAGE_BIT_COUNT + 5, page * bitmap.PAGE_BIT_COUNT + 9)
        if bits.cache.is_under_pressure:
            for write in (writes := bits.take_changes()):
                file.write_blocking(write.host_offset, write.data)
            bits.changes_written(writes)
        assert len(bits._pages) <= 4
    for page in range(20):
        first = page * bitmap.PAGE_BIT_COUNT
        assert await bits.run(first, first + 20) == (bitmap.ABSENT, first + 5)
        assert await bits.run(first + 5, first + 20) == (bitmap.PRESENT, first + 9)
    assert span == 128 * MIB


async def test_bitmap_that_is_too_short_is_refused() -> None:
    image, _ = await made(8 * CLUSTER)
    short = file_of(image).again()
    short.disk = short.disk[: image.header.size]
    short.size = len(short.disk)
    with pytest.raises(ImageError, match="the bitmap ends at 4096"):
        await open_overlay(short, None)
    report = await check(short)
    assert report.corruptions == 1


# -- files ------------------------------------------------------------------------------------------


@asynccontextmanager
async def opened_graph(*folders: Path) -> AsyncIterator[NodeGraph]:
    graph = NodeGraph(ImagePaths(map(str, folders)))
    try:
        yield graph
    finally:
        await graph.close()


def write_add_cow(path: Path, image: str, backing: str | None = None) -> Path:
    """An add-cow file with any names in it, over nothing that need be there."""
    header = headers.new_header(12, stand_in(image), backing, "raw" if backing else None)
    path.write_bytes(headers.pack(header) + bytes(4096))
    put_name(path, image)
    return path


@pytest.mark.parametrize(
    ("image", "backing", "text"),
    [
        ("elsewhere/secret.raw", None, "the image file"),
        ("/proc/self/mem", None, "the image file"),
        ("missing.raw", None, "No such file"),
        ("nbd:localhost:1", None, "the image file"),
        ("top.add-cow", None, "the same file as"),
        ("a.raw", "link.raw", "the same file as"),
        ("a.raw", "top.add-cow", "the same file as"),
    ],
)
async def test_names_lead_only_where_they_may(
    image: str, backing: str | None, text: str, tmp_path: Path
) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path / "other"
    folder.mkdir()
    elsewhere.mkdir()
    (elsewhere / "secret.raw").write_bytes(bytes(512))
    (folder / "elsewhere").symlink_to(elsewhere)
    (folder / "a.raw").write_bytes(bytes(512))
    (folder / "link.raw").hardlink_to(folder / "a.raw")
    path = write_add_cow(folder / "top.add-cow", image, backing)
    async with opened_graph() as graph:
        with pytest.raises(BlockdError) as refused:
            await graph.open_image(str(path), "add-cow", read_only=False)
        assert text in refused.value.message
        assert not graph.nodes
    assert (elsewhere / "secret.raw").read_bytes() == bytes(512)


async def test_image_that_somebody_else_writes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(bytes(512))
    path = write_add_cow(tmp_path / "top.add-cow", "a.raw")
    async with opened_graph() as graph:
        await graph.open_image(str(tmp_path / "a.raw"), "raw", read_only=False)
        with pytest.raises(RequestError, match='Failed to get "write" lock'):
            await graph.open_image(str(path), "add-cow", read_only=False)


async def test_options_name_the_image_or_leave_it_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(b"a" * 512)
    (tmp_path / "b.raw").write_bytes(b"b" * 512)
    path = write_add_cow(tmp_path / "top.add-cow", "a.raw", "b.raw")
    file = {"driver": "file", "filename": str(path)}
    other = {"driver": "raw", "file": {"driver": "file", "filename": str(tmp_path / "a.raw")}}
    async with opened_graph() as graph:
        node = await graph.open({"driver": "add-cow", "node-name": "one", "file": file})
        assert isinstance(node, AddCowImage)
        assert node.backing is not None
        assert (node.image.filename, node.backing.filename) == (
            str(tmp_path / "a.raw"),
            str(tmp_path / "b.raw"),
        )
        assert await read_all(node) == b"b" * 512
        await graph.remove("one")
        assert not graph.nodes
        told = {"driver": "add-cow", "node-name": "two", "file": file, "image": other, "backing": None}
        node = await graph.open(told)
        assert node.backing is None
        assert await read_all(node) == bytes(512)
        await graph.remove("two")
        plain = {"driver": "file", "filename": str(tmp_path / "b.raw")}
        with pytest.raises(RequestError, match="needs a raw node as its image"):
            await graph.open({"driver": "add-cow", "node-name": "three", "file": file, "image": plain})
