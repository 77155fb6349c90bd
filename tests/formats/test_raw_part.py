"""A part of a file as a disk: what is outside of it stays as it is."""

import random
from pathlib import Path

import pytest

from blockd.block.chain import chain_map
from blockd.block.node import BlockNode, OverlayNode
from blockd.drivers import NodeGraph
from blockd.errors import RequestError
from blockd.extents import Extent, Kind
from blockd.filters.blkstream import BlkStream
from tests import qemu_img

START, SIZE, LENGTH = 1000, 64 << 10, 128 << 10


async def opened(graph: NodeGraph, path: Path, **options: object) -> BlockNode:
    file = {"driver": "file", "filename": str(path)}
    return await graph.open({"driver": "raw", "node-name": "part", "file": file, **options})


async def test_it_is_a_window_to_the_file(tmp_path: Path) -> None:
    path, rng = tmp_path / "disk.raw", random.Random(17)
    content = bytearray(rng.randbytes(LENGTH))
    path.write_bytes(content)
    graph = NodeGraph()
    part = await opened(graph, path, offset=START, size=SIZE)
    assert part.size == SIZE
    for number in range(100):
        offset = rng.randrange(0, SIZE, 512)
        length = min(rng.choice((512, 4096, 20_480)), SIZE - offset)
        place = slice(START + offset, START + offset + length)
        match number % 4:
            case 0:
                content[place] = data = rng.randbytes(length)
                if not part.write_nowait(offset, data):
                    await part.write(offset, data)
            case 1:
                content[place] = bytes(length)
                await part.write_zeroes(offset, length)
            case 2:
                content[place] = bytes(length)
                await part.discard(offset, length)
            case _:
                segments = await part.plan_read(offset, length)
                assert [segment.offset for segment in segments] == [START + offset]
                assert bytes(await part.read(offset, length)) == content[place]
                assert part.read_nowait(offset, length) in (None, content[place])
    await graph.close()
    assert path.read_bytes() == content


async def test_its_map_is_that_of_the_part(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(LENGTH)
        file.seek(LENGTH - 4096)
        file.write(b"d" * 4096)
    graph = NodeGraph()
    part = await opened(graph, path, offset=8192)
    found = await part.map(0, part.size)
    assert found[0].offset == 0
    assert found[0].kind is Kind.ZERO
    assert found[-1].end == part.size
    assert found[-1].kind is Kind.DATA
    await graph.close()


async def test_one_that_is_read_only_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(LENGTH))
    graph = NodeGraph()
    part = await opened(graph, path, offset=512, **{"read-only": True})
    assert not part.write_nowait(0, b"x" * 512)
    with pytest.raises(RequestError):
        await part.write(0, b"x" * 512)
    await graph.close()


async def test_no_image_records_it(tmp_path: Path) -> None:
    """Whoever opened the name would find another disk."""
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(LENGTH))
    over = qemu_img.create(tmp_path / "over.qcow2", LENGTH, backing=path, backing_format="raw")
    graph = NodeGraph()
    part = await opened(graph, path, offset=512)
    with pytest.raises(RequestError, match="a part of a file"):
        await graph.open_overlay(str(over), "qcow2", part)
    await graph.close()


async def test_a_raw_image_stands_on_any_node(tmp_path: Path) -> None:
    """Here on another one, on a qcow2 image over a backing file."""
    base = tmp_path / "base.raw"
    base.write_bytes(b"b" * LENGTH)
    path = qemu_img.create(tmp_path / "over.qcow2", LENGTH, backing=base, backing_format="raw")
    graph = NodeGraph()
    image = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}}
    inner = {"driver": "raw", "file": image, "size": SIZE, "offset": 4096}
    top = await graph.open({"driver": "raw", "node-name": "top", "file": inner})
    assert top.size == SIZE
    await top.write(512, b"g" * 512)
    assert bytes(await top.read(0, 1536)) == b"b" * 512 + b"g" * 512 + b"b" * 512
    await top.flush()
    await graph.close()
    assert qemu_img.content(path)[4096:5632] == b"b" * 512 + b"g" * 512 + b"b" * 512


async def test_what_is_in_the_backing_file_of_an_image_below_is_no_hole(tmp_path: Path) -> None:
    """A client that skips holes, or a stream, would take it for zeroes."""
    base = tmp_path / "base.raw"
    base.write_bytes(b"b" * LENGTH)
    path = qemu_img.create(tmp_path / "over.qcow2", 2 * LENGTH, backing=base, backing_format="raw")
    top = qemu_img.create(tmp_path / "top.qcow2", 2 * LENGTH)
    graph = NodeGraph()
    image = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}}
    raw = {"driver": "raw", "node-name": "raw", "read-only": True, "file": image}
    await graph.open(raw)
    first, *_ = await chain_map(graph["raw"], 0, 2 * LENGTH)
    assert first == Extent(0, LENGTH, Kind.DATA)
    assert await chain_map(graph["raw"], LENGTH, LENGTH) == [Extent(LENGTH, LENGTH, Kind.ZERO)]
    file = {"driver": "file", "filename": str(top)}
    disk = await graph.open({"driver": "qcow2", "node-name": "top", "file": file, "backing": "raw"})
    assert isinstance(disk, OverlayNode)
    missing = await BlkStream(disk, None, "stream").missing(0, 2 * LENGTH)
    assert missing[0] == Extent(0, LENGTH, Kind.DATA)
    await graph.close()
