"""The map of a raw image that is being filled, against what was filled."""

import random

from blockd.block.node import Segment
from blockd.block.segments import SourcePlan
from blockd.extents import Extent, Kind, merged
from blockd.formats.raw.target import CLUSTER_SIZE, RawTarget
from tests.formats.test_layer_maps import DrawnLayer
from tests.nbd.memory_node import MemoryNode
from tests.recording import RecordingFile


async def test_map_tells_what_is_filled() -> None:
    rng = random.Random(5)
    count = 40
    size = count * CLUSTER_SIZE - 512
    target = RawTarget(RecordingFile(), MemoryNode(size), node_name="target")
    filled: set[int] = set()
    for _ in range(12):
        first = rng.randrange(count)
        last = min(count, first + rng.choice((1, 1, 2, 5)))
        start, end = first * CLUSTER_SIZE, min(last * CLUSTER_SIZE, size)
        await target.fill([(start, end)], SourcePlan(start, [Segment(end - start, None, 0)]), lambda *_: True)
        filled.update(range(first, last))
        start, end = 512 * rng.randrange(size // 1024), size
        expected = [
            Extent(offset, stop - offset, Kind.DATA if number in filled else Kind.UNALLOCATED)
            for number in range(count)
            if (offset := max(start, number * CLUSTER_SIZE)) < (stop := min(end, (number + 1) * CLUSTER_SIZE))
        ]
        assert await target.map(start, end - start) == list(merged(expected))


async def test_size_costs_nothing() -> None:
    """What was filled is kept, not what is left: a target may be as large as a file can be."""
    size = 1 << 62
    target = RawTarget(RecordingFile(), DrawnLayer("-", None, cluster_size=size), node_name="target")
    assert await target.map(0, size) == [Extent(0, size, Kind.UNALLOCATED)]
