"""A disk of nothing: it takes everything, is zeroes, and needs the time it is told."""

import asyncio
from collections.abc import Mapping

import pytest

from blockd.block.node import BlockNode
from blockd.drivers import NodeGraph
from blockd.errors import RequestError
from blockd.extents import Extent, Kind
from tests.virtual_time import run

SIZE = 1 << 20


async def opened(graph: NodeGraph, **more: object) -> BlockNode:
    options: Mapping[str, object] = {"driver": "null-co", "node-name": "n", "size": SIZE}
    return await graph.open({**options, **more})


async def test_writes_are_forgotten() -> None:
    graph = NodeGraph()
    node = await opened(graph)
    assert node.write_nowait(0, b"x" * 512)
    await node.write(0, b"x" * 512)
    await node.flush()
    assert await node.read(0, 512) == node.read_nowait(0, 512) == bytes(512)
    with pytest.raises(RequestError):
        await node.resize(2 * SIZE)
    await graph.close()


@pytest.mark.parametrize(("reads_zeroes", "kind"), [(False, Kind.DATA), (True, Kind.ZERO)])
async def test_the_map_tells_zeroes_if_told_to(reads_zeroes: bool, kind: Kind) -> None:
    graph = NodeGraph()
    node = await opened(graph, **{"read-zeroes": reads_zeroes})
    assert await node.map(0, SIZE) == [Extent(0, SIZE, kind)]
    await graph.close()


def test_a_request_takes_the_time_that_is_told() -> None:
    async def work() -> float:
        graph = NodeGraph()
        node = await opened(graph, **{"latency-ns": 500_000_000})
        assert node.read_nowait(0, 512) is None
        assert not node.write_nowait(0, b"x" * 512)
        await node.read(0, 512)
        await node.write(0, b"x" * 512)
        return asyncio.get_running_loop().time()

    assert run(work()) == pytest.approx(1.0)
