"""qcow2 images as killed daemons leave them, which count as too large to be looked through at opening."""

import random
import struct
from array import array
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from blockd.block.node import ProtocolNode
from blockd.formats.qcow2 import check, header, leaks, repair
from blockd.formats.qcow2.check_refcounts import pack_refcounts, unpack_refcounts
from blockd.formats.qcow2.check_tables import read_entries, read_header
from tests.inline_threads import steps

# By so many clusters the file becomes longer; one free cluster of so many is leaked.
_ADDED_COUNT = 24
_SHARE = 3
# How many turns the loop has between two steps of a search.
_TURN_COUNT = 40


def plant_leaks(file: ProtocolNode, rng: random.Random) -> int:
    """Have the image say that it is in use, and that clusters have one user more; returns how many.

    They are free, or shared with a snapshot: an overwritten one of those loses its user later than the map.
    """
    found = read_header(file)
    file.truncate_blocking(file.size + _ADDED_COUNT * found.cluster_size)
    count, found_max = 0, (1 << (1 << found.refcount_order)) - 1
    table_length = found.refcount_table_clusters * found.cluster_size
    for number, offset in enumerate(read_entries(file, found.refcount_table_offset, table_length // 8)):
        if not offset:
            continue
        block = bytearray(found.cluster_size)
        file.readinto_blocking(offset, memoryview(block))
        refcounts = unpack_refcounts(block, found.refcount_order)
        inside = max(0, -(-file.size >> found.cluster_bits) - number * len(refcounts))
        for index in range(min(inside, len(refcounts))):
            is_shared = 2 <= refcounts[index] < found_max
            if (not refcounts[index] or is_shared) and not rng.randrange(_SHARE):
                refcounts[index] += 1
                count += 1
        file.write_blocking(
            offset, pack_refcounts(array(refcounts.typecode, refcounts), found.refcount_order)
        )
    if found.version >= header.ZERO_VERSION:
        field = struct.pack(">Q", found.autoclear | header.AUTOCLEAR_IN_USE)
        file.write_blocking(header.AUTOCLEAR_FIELD, field)
    else:
        file.truncate_blocking(file.size + found.cluster_size)
    return count


@contextmanager
def searched_in_small_steps() -> Iterator[None]:
    """Every image is too large to be looked through while it is opened; others have many turns meanwhile."""
    advance = check.Census.advance

    async def advance_late(census: check.Census) -> bool:
        await steps(_TURN_COUNT)
        return await advance(census)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repair, "ENTRY_COUNT_MAX", -1)
        patch.setattr(check, "STEPS_TIME_S", 0)
        patch.setattr(leaks, "PAUSE_S", 0)
        patch.setattr(check.Census, "advance", advance_late)
        yield
