"""The two sides a check compares: refcounts as stored, and references as counted."""

import sys
from array import array
from collections.abc import Iterator

from blockd.block.node import ProtocolNode
from blockd.formats.qcow2.check_tables import Findings, read_entries
from blockd.formats.qcow2.header import Header

_TABLE = "refcount table"
_OFFSET_MASK = 0xFFFF_FFFF_FFFF_FE00
_REFCOUNT_MAX = 0xFFFF_FFFF  # larger ones are kept as this: no image has as many references
_TYPECODES = {3: "B", 4: "H", 5: "I", 6: "Q"}
# Clusters compared at a time before looking at single ones.
_STRETCH = 4096


class Refcounts:
    """What is stored for each host cluster of the file, and how often it is referred to."""

    def __init__(self, file: ProtocolNode, header: Header, findings: Findings) -> None:
        self._file = file
        self._header = header
        self._findings = findings
        self._bits = header.cluster_bits
        self._count = -(-file.size >> self._bits)
        self._stored = array("I", bytes(4 * self._count))
        self._references = array("I", bytes(4 * self._count))
        self._blocks: list[tuple[int, int]] = []  # offset of the table entry, offset of the block

    def stored_for(self, offset: int) -> int:
        """The stored refcount of the cluster at `offset`, which is inside the file."""
        return self._stored[offset >> self._bits]

    def end_offset(self) -> int:
        """Where the last cluster ends that is used or has a refcount."""
        last = self._count - 1
        while last > 0 and not self._stored[last] and not self._references[last]:
            last -= 1
        return (last + 1) << self._bits

    def refer(self, table: str, entry_offset: int, offset: int, length: int) -> bool:
        """Count a reference to every cluster of a range; False when the range is not in the file.

        A last cluster that is only partly in the file is in it.
        """
        first, last = offset >> self._bits, offset + length - 1 >> self._bits
        if last >= self._count:
            self._findings.add_corruption(
                table,
                entry_offset,
                f"refers to {offset:#x}, past the end of the file at {self._file.size:#x}",
            )
            return False
        for cluster in range(first, last + 1):
            self._references[cluster] += 1
        return True

    # -- stored -----------------------------------------------------------------------------------

    def load(self) -> Iterator[None]:
        """Read all refcount blocks."""
        start = self._header.refcount_table_offset
        length = self._header.refcount_table_clusters << self._bits
        if start + length > self._file.size:
            self._findings.add_corruption(_TABLE, start, "is cut off by the file's end")
            return
        block_entry_count = self._header.cluster_size * 8 >> self._header.refcount_order
        for index, entry in enumerate(read_entries(self._file, start, length // 8)):
            block = self._check_table_entry(start + index * 8, entry) if entry else 0
            if block:
                self._load_block(block, index * block_entry_count)
                yield

    def _check_table_entry(self, entry_offset: int, entry: int) -> int:
        """Check one entry; return the offset of the block it names, 0 when that cannot be read."""
        block = entry & _OFFSET_MASK
        if entry != block:
            self._findings.add_corruption(_TABLE, entry_offset, f"entry {entry:#x} has reserved bits set")
        wrong = None
        if block % self._header.cluster_size:
            wrong = f"refcount block offset {block:#x} is not cluster aligned"
        elif block + self._header.cluster_size > self._file.size:
            wrong = f"refcount block {block:#x} is past the end of the file at {self._file.size:#x}"
        if wrong:
            self._findings.add_corruption(_TABLE, entry_offset, wrong)
            return 0
        self._blocks.append((entry_offset, block))
        return block

    def _load_block(self, offset: int, first_cluster: int) -> None:
        block = bytearray(self._header.cluster_size)
        self._file.readinto_blocking(offset, memoryview(block))
        refcounts = _unpack(block, self._header.refcount_order)[: max(0, self._count - first_cluster)]
        if self._header.refcount_order == 6:
            refcounts = array("Q", (min(count, _REFCOUNT_MAX) for count in refcounts))
        self._stored[first_cluster : first_cluster + len(refcounts)] = array("I", refcounts)

    # -- counted ----------------------------------------------------------------------------------

    def require_single_use(self, table: str, offset: int, length: int) -> None:
        """Report clusters of a table that is never shared but that have a refcount for other users too."""
        end = min(self._count, -(-(offset + length) >> self._bits))
        for cluster in range(offset >> self._bits, end):
            if 1 < self._references[cluster] <= self._stored[cluster]:
                self._findings.add_corruption(table, cluster << self._bits, "is also used for something else")

    def refer_to_own(self) -> Iterator[None]:
        """Count the references that the refcount structures are themselves."""
        start = self._header.refcount_table_offset
        self.refer(_TABLE, start, start, self._header.refcount_table_clusters << self._bits)
        for entry_offset, block in self._blocks:
            self.refer(_TABLE, entry_offset, block, self._header.cluster_size)
            references = self._references[block >> self._bits]
            if references != 1:
                self._findings.add_corruption(
                    _TABLE, entry_offset, f"refcount block {block:#x} is used {references} times"
                )
        yield

    def compare(self) -> Iterator[None]:
        """Report every cluster for which the two sides differ."""
        for start in range(0, self._count, _STRETCH):
            stretch = slice(start, start + _STRETCH)
            if self._stored[stretch] != self._references[stretch]:
                self._compare_stretch(range(*stretch.indices(self._count)))
            yield

    def _compare_stretch(self, clusters: range) -> None:
        for cluster in clusters:
            stored, references = self._stored[cluster], self._references[cluster]
            offset = cluster << self._bits
            if stored > references:
                self._findings.add_leak(offset, f"refcount {stored}, {references} references")
            elif stored < references:
                self._findings.add_corruption(
                    "refcounts", offset, f"refcount {stored}, but {references} references"
                )


def _unpack(block: bytearray, order: int) -> "array[int]":
    """The refcounts of a block, 1 << order bits each; below a byte the lowest bits come first."""
    if order >= 3:
        refcounts = array(_TYPECODES[order], bytes(block))
        if sys.byteorder == "little":
            refcounts.byteswap()
        return refcounts
    width = 1 << order
    mask = (1 << width) - 1
    return array("B", (byte >> shift & mask for byte in block for shift in range(0, 8, width)))
