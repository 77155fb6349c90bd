"""Refcounts made from what a census has counted: in their old places, or in new ones.

New tables go where nothing is, by the census and by the old tables' own places, so that the old ones
stay whole until the header names the new ones. They describe themselves, so planning them goes round
until nothing is added any more.
"""

from array import array
from collections.abc import Iterator
from heapq import heappop, heappush
from typing import NamedTuple

from blockd.block.node import ProtocolNode
from blockd.errors import ImageError
from blockd.formats.qcow2.check_refcounts import Refcounts, pack_refcounts, unpack_refcounts
from blockd.formats.qcow2.header import REFCOUNT_TABLE_SIZE_MAX, Header
from blockd.formats.qcow2.mapping import pack_entries


class Structure(NamedTuple):
    """A refcount table, and its blocks by index, in clusters that nothing else uses."""

    table_offset: int
    table_clusters: int
    blocks: dict[int, int]


# -- in the old places ------------------------------------------------------------------------------


def can_rewrite(refcounts: Refcounts) -> bool:
    """Whether the blocks that there are can hold all refcounts."""
    return not refcounts.needs_rebuild and all(
        index < len(refcounts.blocks) and refcounts.blocks[index]
        for index in refcounts.references.used_spans(refcounts.span)
    )


def rewrite_blocks(file: ProtocolNode, header: Header, refcounts: Refcounts) -> Iterator[bool]:
    """Write the blocks with refcounts that are wrong."""
    for index, host_offset in enumerate(refcounts.blocks):
        first = index * refcounts.span
        count = max(0, min(refcounts.span, refcounts.count - first))
        is_at_end = refcounts.counts_past_end and count < refcounts.span
        if not host_offset:
            continue
        stored, wanted = refcounts.stored.get(first, count), refcounts.references.get(first, count)
        if stored == wanted and not is_at_end:
            continue
        block = bytearray(header.cluster_size)
        file.readinto_blocking(host_offset, memoryview(block))
        values = unpack_refcounts(block, header.refcount_order)
        if is_at_end:  # they would be leaks as soon as the file is longer
            values[count:] = array(values.typecode, [0]) * (len(values) - count)
        for number, (old, new) in enumerate(zip(stored, wanted, strict=True)):
            if old != new:
                values[number] = new
        file.write_blocking(host_offset, pack_refcounts(values, header.refcount_order))
        yield True


# -- in new places ----------------------------------------------------------------------------------


def new_structure(header: Header, refcounts: Refcounts) -> Structure:
    """Find places for a new table and new blocks, and count them instead of the old ones.

    Raises:   ImageError: no table can describe a file so large; nothing was counted.
    """
    own = set(refcounts.own_clusters())
    for cluster in own:
        refcounts.references.add(cluster, -1)
    table_clusters = 1
    while table_clusters * header.cluster_size <= REFCOUNT_TABLE_SIZE_MAX:
        plan = _Plan(header, refcounts, own)
        structure = plan.structure(table_clusters)
        needed = -(-(max(structure.blocks) + 1) * 8 // header.cluster_size)
        if needed <= table_clusters:
            for cluster in plan.taken:
                refcounts.references.add(cluster)
            return structure
        table_clusters = max(needed, table_clusters + 1)
    raise ImageError(
        f"the file of {refcounts.count} clusters of {header.cluster_size} bytes is too large for "
        f"{1 << header.refcount_order}-bit refcounts"
    )


class _Plan:
    """Takes free clusters, the first ones first; past the end of the file all are free."""

    def __init__(self, header: Header, refcounts: Refcounts, own: set[int]) -> None:
        self._bits = header.cluster_bits
        self._refcounts = refcounts
        self._own = own
        self._next = 0
        self.taken: set[int] = set()

    def structure(self, table_clusters: int) -> Structure:
        """Place a table of that size and all blocks that are needed then."""
        table = self._take_run(table_clusters)
        span = self._refcounts.span
        seen = {*self._refcounts.references.used_spans(span), *(cluster // span for cluster in self.taken)}
        waiting = sorted(seen)
        blocks: dict[int, int] = {}
        while waiting:
            cluster = self._take_run(1)
            blocks[heappop(waiting)] = cluster << self._bits
            if cluster // span not in seen:  # to describe this block as well
                seen.add(cluster // span)
                heappush(waiting, cluster // span)
        return Structure(table << self._bits, table_clusters, blocks)

    def _take_run(self, count: int) -> int:
        """Take neighbours; returns the first one."""
        first = self._first_free(self._next)
        if count == 1:
            self._next = first + 1
        while (used := self._last_used(first, count)) is not None:
            first = self._first_free(used + 1)
        self.taken.update(range(first, first + count))
        return first

    def _first_free(self, cluster: int) -> int:
        while True:
            cluster = self._refcounts.references.find_zero(cluster)
            if cluster not in self._own and cluster not in self.taken:
                return cluster
            cluster += 1

    def _last_used(self, first: int, count: int) -> int | None:
        for cluster in range(first + count - 1, first - 1, -1):
            if self._refcounts.references[cluster] or cluster in self._own or cluster in self.taken:
                return cluster
        return None


def write_structure(
    file: ProtocolNode, header: Header, refcounts: Refcounts, structure: Structure
) -> Iterator[bool]:
    """Write the new table and blocks; nothing names them yet."""
    table = array("Q", bytes(structure.table_clusters * header.cluster_size))
    end = refcounts.references.last() + 1
    for index, host_offset in structure.blocks.items():
        table[index] = host_offset
        first = index * refcounts.span
        values = refcounts.references.get(first, min(refcounts.span, end - first))
        block = pack_refcounts(values, header.refcount_order)
        file.write_blocking(host_offset, block.ljust(header.cluster_size, b"\0"))
        yield True
    file.write_blocking(structure.table_offset, pack_entries(table))
    yield True
