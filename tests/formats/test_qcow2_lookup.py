"""Looking up many clusters at once, against looking at every entry."""

import random
from array import array

from blockd.formats.qcow2.image import Qcow2Image
from blockd.formats.qcow2.lookup import _NOTHING, RUN_CLUSTER_COUNT_MAX, _first_set
from blockd.formats.qcow2.mapping import OFFSET_MASK, STATE_MASK
from blockd.units import KIB
from tests.nbd.memory_node import MemoryNode
from tests.recording import RecordingFile
from tests.streaming import overlay

# A table maps twice as many as are looked at one by one.
CLUSTER = 8 * KIB


def test_first_set_entry_is_found_wherever_it_stands() -> None:
    rng = random.Random(64)
    length = 3 * len(_NOTHING)
    for _ in range(300):
        entries = array("Q", bytes(8 * length))
        for _ in range(rng.randrange(4)):
            entries[rng.randrange(length)] = rng.choice((1, 1 << 63))
        start = rng.randrange(length)
        end = rng.randrange(start, length + 1)
        found = next((index for index in range(start, end) if entries[index]), end)
        assert _first_set(entries, start, end) == found


async def test_runs_are_what_each_cluster_is() -> None:
    """Stretches of all lengths and kinds, also longer than what is looked at one by one."""
    rng = random.Random(65)
    count = 5 * RUN_CLUSTER_COUNT_MAX
    image = await overlay(RecordingFile(), MemoryNode(count * CLUSTER), count * CLUSTER, cluster_size=CLUSTER)
    assert isinstance(image, Qcow2Image)
    position = 0
    while position < count:
        length = min(
            rng.choice((1, 2, 7, RUN_CLUSTER_COUNT_MAX // 2, 2 * RUN_CLUSTER_COUNT_MAX)), count - position
        )
        match rng.choice("-0d"):
            case "0":
                await image.write_zeroes(position * CLUSTER, length * CLUSTER)
            case "d":
                await image.write(position * CLUSTER, bytes(length * CLUSTER))
        position += length
    mapping = image.metadata.mapping
    for _ in range(100):
        offset = rng.randrange(count * CLUSTER)
        end = rng.randrange(offset, count * CLUSTER) + 1
        while offset < end:
            for run_offset, length, entry in await image.runs(offset, end - offset):
                assert run_offset == offset, "no gap"
                for place in range(offset, offset + length, CLUSTER):
                    l1_index, index = (
                        place >> mapping.table_bits,
                        (place >> mapping.cluster_bits) & mapping.index_mask,
                    )
                    table = await mapping.table(l1_index)
                    own = table.entries[index] & STATE_MASK if table is not None else 0
                    distance = place // CLUSTER * CLUSTER - offset // CLUSTER * CLUSTER
                    assert own == (entry + distance if entry & OFFSET_MASK else entry)
                offset += length
        assert offset == end
