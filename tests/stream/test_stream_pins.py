"""Two streams in one chain: the end of one does not take away what the other one is reading."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from blockd.block.chain import all_below, chain, unfiltered
from blockd.block.node import BlockNode
from blockd.block.pins import pinned, unpinned
from blockd.devices.stream_request import StreamRequest
from blockd.jobs.job import Job
from blockd.protocols.file import FileNode
from tests import qemu_img
from tests.chains import read_all
from tests.inline_threads import steps
from tests.layers import Disk, opened
from tests.stream.deep_chain import CLUSTER, NAMES, make_chain


@asynccontextmanager
async def disk_of(folder: Path) -> AsyncIterator[Disk]:
    async with opened(folder / NAMES[-1], "qcow2") as disk:
        yield disk


async def start(disk: Disk, nodes: dict[str, BlockNode], name: str, base: str) -> Job:
    # As by `bottom`: what stands below may be the filter of another stream.
    below = [node.backing for node in chain(nodes[name]) if node.backing is not None]
    end = next(node for node in below if unfiltered(node) is nodes[base])
    return await disk.streams.start(StreamRequest(nodes[name], name.partition(".")[0], end))


def nodes_of(disk: Disk, folder: Path) -> dict[str, BlockNode]:
    return {name: disk.layer(folder / name) for name in NAMES}


class HeldRead:
    """The first read of a file, which waits in its thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.is_armed = False
        self.has_begun = threading.Event()
        self.may_end = threading.Event()

    def wait(self, file: FileNode) -> None:
        if self.is_armed and Path(file.filename).name == self._name:
            self.is_armed = False
            self.has_begun.set()
            self.may_end.wait()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldRead]:
    held, real = HeldRead("b1.qcow2"), FileNode.readinto_blocking

    def readinto(file: FileNode, offset: int, buffer: memoryview) -> None:
        held.wait(file)
        real(file, offset, buffer)

    monkeypatch.setattr(FileNode, "readinto_blocking", readinto)
    yield held
    held.may_end.set()


@pytest.mark.usefixtures("without_cloning")
async def test_the_end_of_a_stream_closes_nothing_that_another_one_reads(
    tmp_path: Path, held: HeldRead
) -> None:
    content = make_chain(tmp_path)
    async with disk_of(tmp_path) as disk:
        nodes = nodes_of(disk, tmp_path)
        held.is_armed = True
        upper = await start(disk, nodes, "t.qcow2", "m.qcow2")
        await asyncio.to_thread(held.has_begun.wait)
        lower = await start(disk, nodes, "m.qcow2", "b0.raw")
        ended = asyncio.create_task(lower.wait_ended())
        layer = nodes["b1.qcow2"]
        while layer.node_name in disk.graph.nodes:  # until the end of the lower stream has no more use for it
            await steps(1)
        assert not ended.done(), "it waits for the other one's copy"
        held.may_end.set()
        await ended
        await upper.wait_ended()
        assert (upper.error, lower.error) == (None, None)
        assert await read_all(disk.node, CLUSTER) == content
    assert qemu_img.content(tmp_path / NAMES[-1]) == content


async def test_nodes_are_closed_when_no_plan_names_them(tmp_path: Path) -> None:
    make_chain(tmp_path)
    async with disk_of(tmp_path) as disk:
        nodes: list[BlockNode] = list(all_below(disk.node))
        with pinned(nodes), pinned(nodes[:1]):
            waiting = [asyncio.create_task(unpinned(node)) for node in nodes]
            await steps(3)
            assert not any(task.done() for task in waiting)
        await asyncio.gather(*waiting)
        assert all(node.pins.count == 0 for node in nodes)


@pytest.mark.parametrize("step", range(0, 60, 15))
@pytest.mark.usefixtures("without_cloning")
async def test_the_lower_stream_ends_at_any_await_of_the_upper_one(tmp_path: Path, step: int) -> None:
    content = make_chain(tmp_path)
    async with disk_of(tmp_path) as disk:
        nodes = nodes_of(disk, tmp_path)
        lower = await start(disk, nodes, "m.qcow2", "b0.raw")
        await steps(step)
        upper = await start(disk, nodes, "t.qcow2", "m.qcow2")
        await lower.wait_ended()
        await upper.wait_ended()
        assert (upper.error, lower.error) == (None, None)
        assert await read_all(disk.node, CLUSTER) == content
