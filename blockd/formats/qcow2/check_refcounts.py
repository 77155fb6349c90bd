"""The two sides a check compares: refcounts as stored, and references as counted."""

import sys
from array import array
from collections.abc import Iterator

from blockd.block.node import ProtocolNode
from blockd.formats.qcow2.check_tables import Entries, used_entries
from blockd.formats.qcow2.cluster_counts import COUNT_MAX, ClusterCounts, CountsBudget
from blockd.formats.qcow2.findings import Findings
from blockd.formats.qcow2.header import Header

_TABLE = "refcount table"
_OFFSET_MASK = 0xFFFF_FFFF_FFFF_FE00
_TYPECODES = {3: "B", 4: "H", 5: "I", 6: "Q"}


class Refcounts:
    """What is stored for each host cluster of the file, and how often it is referred to."""

    def __init__(
        self,
        file: ProtocolNode,
        header: Header,
        findings: Findings,
        budget: CountsBudget,
        end: int | None = None,
    ) -> None:
        """`end`: the image is in use, and from there on clusters come and go, so that they are left out."""
        self._file = file
        self._header = header
        self._findings = findings
        self._bits = header.cluster_bits
        self.is_in_use = end is not None
        self.count = -(-(file.size if end is None else end) >> self._bits)
        # Clusters that one refcount block describes.
        self.span = header.cluster_size * 8 >> header.refcount_order
        self.refcount_max = (1 << (1 << header.refcount_order)) - 1
        self._budget = budget
        self.stored = ClusterCounts(budget)
        self.references = ClusterCounts(budget)
        # Clusters of tables that only one thing ever refers to.
        self._exclusive = ClusterCounts(budget)
        # Where each refcount block is, 0 if there is none; blocks that are named but wrong are left out.
        self.blocks = array("Q")
        # Whether table and blocks can only be made anew.
        self.needs_rebuild = False
        # Clusters behind the end of the file have refcounts: a killed writer counted what it did not write.
        self.counts_past_end = False

    def stored_for(self, offset: int) -> int:
        """The stored refcount of the cluster at `offset`, which is inside the file."""
        return self.stored[offset >> self._bits]

    def end_offset(self) -> int:
        """Where the last cluster ends that is used or has a refcount."""
        last = max(self.stored.last(), self.references.last(), 0)
        return (last + 1) << self._bits

    # -- counting -----------------------------------------------------------------------------------

    def refer(self, table: str, entry_offset: int, offset: int, length: int, times: int = 1) -> bool:
        """Count references to every cluster of a range; False when the range is not in the file.

        A last cluster that is only partly in the file is in it.
        """
        first, last = offset >> self._bits, offset + length - 1 >> self._bits
        if self.is_left_out(offset):
            return True
        if last >= self.count:
            self._findings.wrong(
                table,
                entry_offset,
                f"refers to {offset:#x}, past the end of the file at {self._file.size:#x}",
            )
            return False
        if first == last:
            self.references.add(first, times)
        else:
            self.references.add_range(first, last - first + 1, times)
        return True

    def is_left_out(self, offset: int) -> bool:
        """Whether nothing is counted there, as it belongs to whoever uses the image now."""
        return self.is_in_use and offset >> self._bits >= self.count

    def refer_exclusively(self, table: str, entry_offset: int, offset: int, length: int) -> bool:
        """Count the reference to a table that nothing else refers to; False: it cannot be looked at.

        A table that lies over another one is wrong, and never looked at: so the work is bounded by the file.
        """
        first, last = offset >> self._bits, offset + length - 1 >> self._bits
        count = last - first + 1
        if self.is_left_out(offset):
            return True
        if last < self.count and not self._exclusive.are_all(first, count, 0):
            self.references.add_range(first, count)
            self._findings.wrong(table, entry_offset, f"{offset:#x} is inside another table")
            return False
        if not self.refer(table, entry_offset, offset, length):
            return False
        self._exclusive.add_range(first, count)
        return True

    def require_single_use(self, table: str, cluster: int, expected: int) -> None:
        """Find a cluster of a table wrong that is used for something else as well."""
        references = self.references[cluster]
        if references == expected or COUNT_MAX in (references, expected):
            return
        say = self._findings.wrong if references <= self.stored[cluster] else self._findings.obstruct
        say(table, cluster << self._bits, "is also used for something else")

    def check_tables(self) -> Iterator[bool]:
        """Find tables that something else lies over. Needs: all references but the refcounts' own."""
        for cluster, _ in self._exclusive.clusters():
            self.require_single_use("header" if not cluster else "table", cluster, 1)
        yield True

    # -- stored -----------------------------------------------------------------------------------

    def load(self) -> Iterator[bool]:
        """Read all refcount blocks."""
        header = self._header
        start, length = header.refcount_table_offset, header.refcount_table_clusters << self._bits
        if start + length > self._file.size:
            self._mend_by_rebuild(start, "is cut off by the file's end")
            return
        self.blocks = array("Q", bytes(length))
        seen = ClusterCounts(self._budget)
        for entry_offset, entry in used_entries(self._file, Entries(_TABLE, start, length // 8)):
            block = self._check_table_entry(entry_offset, entry)
            if block and seen[block >> self._bits]:
                self._mend_by_rebuild(entry_offset, f"refcount block {block:#x} is used twice")
            elif block:
                seen.add(block >> self._bits)
                index = entry_offset - start >> 3
                self.blocks[index] = block
                self._load_block(block, index * self.span)
                yield True

    def _mend_by_rebuild(self, offset: int, message: str) -> None:
        self.needs_rebuild = True
        self._findings.mendable(_TABLE, offset, message)

    def _check_table_entry(self, entry_offset: int, entry: int) -> int:
        """Check one entry; return the offset of the block it names, 0 when that cannot be read."""
        block = entry & _OFFSET_MASK
        if entry != block:
            self._mend_by_rebuild(entry_offset, f"entry {entry:#x} has reserved bits set")
        wrong = None
        if block % self._header.cluster_size:
            wrong = f"refcount block offset {block:#x} is not cluster aligned"
        elif block + self._header.cluster_size > self._file.size:
            wrong = f"refcount block {block:#x} is past the end of the file at {self._file.size:#x}"
        if wrong:
            self._mend_by_rebuild(entry_offset, wrong)
            return 0
        return block

    def _load_block(self, offset: int, first_cluster: int) -> None:
        count = max(0, min(self.span, self.count - first_cluster))
        block = bytearray(self._header.cluster_size)
        self._file.readinto_blocking(offset, memoryview(block))
        if any(block):
            refcounts = unpack_refcounts(block, self._header.refcount_order)
            self.counts_past_end |= any(refcounts[count:])
            self.stored.put(first_cluster, refcounts[:count])

    # -- the refcounts' own clusters ------------------------------------------------------------------

    def own_clusters(self) -> Iterator[int]:
        """The clusters of the refcount table, as far as they are in the file, and of its blocks."""
        first = self._header.refcount_table_offset >> self._bits
        yield from range(first, min(first + self._header.refcount_table_clusters, self.count))
        clusters = (block >> self._bits for block in self.blocks if block)
        yield from (cluster for cluster in clusters if cluster < self.count)

    def refer_to_own(self) -> Iterator[bool]:
        """Count the references that the refcount structures are themselves."""
        for cluster in self.own_clusters():
            self.references.add(cluster)
        yield True
        start = self._header.refcount_table_offset >> self._bits
        for cluster in range(start, min(start + self._header.refcount_table_clusters, self.count)):
            if self.references[cluster] != 1:
                self.needs_rebuild = True
                if self.references[cluster] <= self.stored[cluster]:
                    self._findings.mendable(_TABLE, cluster << self._bits, "is also used for something else")
        for index, block in enumerate(self.blocks):
            is_counted = block and not self.is_left_out(block)
            references = self.references[block >> self._bits] if is_counted else 1
            if references != 1:
                self._mend_by_rebuild(
                    self._header.refcount_table_offset + index * 8,
                    f"refcount block {block:#x} is used {references} times",
                )
        yield True

    # -- comparing ------------------------------------------------------------------------------------

    def compare(self) -> Iterator[bool]:
        """Report every cluster for which the two sides differ."""
        for clusters in self.stored.ranges_with(self.references):
            stored = self.stored.get(clusters.start, len(clusters))
            references = self.references.get(clusters.start, len(clusters))
            if stored != references or max(references) > min(self.refcount_max, COUNT_MAX - 1):
                for cluster, *found in zip(clusters, stored, references, strict=True):
                    self._compare(cluster << self._bits, *found)
            yield True

    def _compare(self, offset: int, stored: int, references: int) -> None:
        if stored > references:
            self._findings.leak(offset, f"refcount {stored}, {references} references")
        elif stored < references:
            self._findings.mendable("refcounts", offset, f"refcount {stored}, but {references} references")
        if references > self.refcount_max or references == COUNT_MAX:
            self._findings.obstruct(
                "refcounts", offset, f"{references} references are more than its refcount can be"
            )


def unpack_refcounts(block: bytes | bytearray, order: int) -> "array[int]":
    """The refcounts of a block, 1 << order bits each; below a byte the lowest bits come first."""
    if order >= 3:
        refcounts = array(_TYPECODES[order], bytes(block))
        if sys.byteorder == "little":
            refcounts.byteswap()
        return refcounts
    width = 1 << order
    mask = (1 << width) - 1
    return array("B", (byte >> shift & mask for byte in block for shift in range(0, 8, width)))


def pack_refcounts(refcounts: "array[int]", order: int) -> bytes:
    """The other way round."""
    if order >= 3:
        packed = array(_TYPECODES[order], refcounts)
        if sys.byteorder == "little":
            packed.byteswap()
        return packed.tobytes()
    per_byte = 8 >> order
    block = bytearray(-(-len(refcounts) // per_byte))
    for index, refcount in enumerate(refcounts):
        if refcount:
            block[index // per_byte] |= refcount << (index % per_byte << order)
    return bytes(block)
