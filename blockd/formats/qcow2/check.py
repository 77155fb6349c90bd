"""Check a qcow2 image: does every table say what the others say?

A census counts how often each host cluster is really referred to (header, L1 and L2 tables, data,
snapshots, bitmaps, refcount structures) and compares that with the refcount stored for it. It reads
the tables straight from the file and shares no code with what writes them, so that it can judge it.
Nothing is changed.

    stored > references   a leak: space is lost, nothing else
    stored < references   corruption: the cluster can be given away while it is in use

Each table is looked at once, however often it is named: an L2 table that many snapshots share counts
as often as it is used. So time and memory are bounded by the file, whatever its tables say.

The numbers in the report mean what `qemu-img check` means by them.

Source:   qcow2 specification, "Host cluster management" and "Cluster mapping".
"""

import re
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple, Self

from blockd.aio import in_thread
from blockd.block.node import ProtocolNode
from blockd.errors import ImageError
from blockd.formats.check_report import CheckReport
from blockd.formats.qcow2 import header as qcow2_header
from blockd.formats.qcow2.check_plain import PlainTables
from blockd.formats.qcow2.check_refcounts import Refcounts
from blockd.formats.qcow2.check_tables import (
    Directory,
    Entries,
    bitmaps,
    read_entries,
    read_header,
    snapshots,
    used_entries,
)
from blockd.formats.qcow2.cluster_counts import ClusterCounts, CountsBudget
from blockd.formats.qcow2.findings import Findings
from blockd.formats.qcow2.header import Header
from blockd.units import SECTOR_SIZE

# This many are 4 TiB of 64 KiB clusters.
HOST_CLUSTER_COUNT_MAX = 1 << 26
# How long a thread works before a check may be cancelled.
STEPS_TIME_S = 0.02

OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
COPIED = 1 << 63
COMPRESSED = 1 << 62
_ZERO = 1
_SET = re.compile(rb"[^\x00]")
_L1_RESERVED = 0x7F00_0000_0000_01FF
_L2_RESERVED = 0x3F00_0000_0000_01FE
_L2 = "L2 table"
_KNOWN_FEATURES = (
    qcow2_header.INCOMPATIBLE_DIRTY
    | qcow2_header.INCOMPATIBLE_CORRUPT
    | qcow2_header.INCOMPATIBLE_DATA_FILE
    | qcow2_header.INCOMPATIBLE_COMPRESSION
    | qcow2_header.INCOMPATIBLE_EXTENDED_L2
)


class Uses(NamedTuple):
    """How often an L2 table is used: in all, and of that by the disk as it is now, not by a snapshot."""

    total: int
    active: int


async def check(file: ProtocolNode) -> CheckReport:
    """Check the image in `file`, which must not be written meanwhile.

    Raises:   ImageError: the header is so wrong that nothing behind it can be looked at, or the file is
              too large to be checked in bounded memory.
    Cancel:   between two tables.
    """
    return (await Census.take(file)).report


class Census:
    """Everything that is in one image, counted."""

    def __init__(self, file: ProtocolNode, header: Header, end: int | None = None) -> None:
        """Count everything in `file`, or of an image in use what is before `end` there."""
        self.file = file
        self.header = header
        self.report = CheckReport(
            file.filename,
            total_clusters=-(-header.size >> header.cluster_bits),
            is_dirty=bool(header.incompatible & qcow2_header.INCOMPATIBLE_DIRTY),
            is_marked_corrupt=bool(header.incompatible & qcow2_header.INCOMPATIBLE_CORRUPT),
        )
        self.findings = Findings(self.report)
        self.has_data_file = bool(header.incompatible & qcow2_header.INCOMPATIBLE_DATA_FILE)
        self._plain_tables = PlainTables(header.cluster_bits)
        budget = CountsBudget(file.filename)
        self.refcounts = Refcounts(file, header, self.findings, budget, end)
        # How often each L2 table is used: by the disk as it is now, and by snapshots.
        self.active_tables = ClusterCounts(budget)
        self.snapshot_tables = ClusterCounts(budget)
        self._steps = self._all_steps()

    @classmethod
    async def take(cls, file: ProtocolNode) -> Self:
        """Count everything; raises what `check` raises."""
        census = await cls.begin(file)
        while await census.advance():
            pass
        return census

    @classmethod
    async def begin(cls, file: ProtocolNode, end: int | None = None) -> Self:
        """Read the header; `advance` does the rest. Both raise what `check` raises."""
        return cls(file, await in_thread(_read_checked_header, file), end)

    async def advance(self) -> bool:
        """Go on for a moment; False: everything is counted."""
        return await in_thread(_make_steps, self._steps)

    def _all_steps(self) -> Iterator[bool]:
        """Go through everything; each step looks at one table, blocking."""
        header, refcounts = self.header, self.refcounts
        yield from refcounts.load()
        refcounts.refer_exclusively("header", 0, 0, header.cluster_size)
        yield from self._count_l1(self.active_l1, self.active_tables)
        directory = self._refer_to(snapshots(self.file, header, self.findings))
        for table in directory.tables:
            yield from self._count_l1(table, self.snapshot_tables)
        directory = self._refer_to(bitmaps(self.file, header, self.findings))
        for table in directory.tables:
            yield from self._count_bitmap(table)
        for l2_offset, uses in self.l2_tables():
            self._count_l2(l2_offset, uses)
            yield True
        for l2_offset, uses in self.l2_tables():
            if not refcounts.is_left_out(l2_offset):
                refcounts.require_single_use(_L2, l2_offset >> header.cluster_bits, uses.total)
        yield from refcounts.check_tables()
        yield from refcounts.refer_to_own()
        yield from refcounts.compare()
        self.report.image_end_offset = refcounts.end_offset()

    @property
    def active_l1(self) -> Entries:
        """The L1 table of the disk as it is now."""
        return Entries("L1 table", self.header.l1_offset, self.header.l1_entry_count)

    def l2_tables(self) -> Iterator[tuple[int, Uses]]:
        """All L2 tables that can be read, in the order of their offsets."""
        for clusters in self.active_tables.ranges_with(self.snapshot_tables):
            active = self.active_tables.get(clusters.start, len(clusters))
            inactive = self.snapshot_tables.get(clusters.start, len(clusters))
            # Tables are few among clusters, so they are not looked for one by one.
            found = {
                match.start() // counts.itemsize
                for counts in (active, inactive)
                for match in _SET.finditer(counts.tobytes())
            }
            for number in sorted(found):
                of_active = active[number]
                uses = Uses(of_active + inactive[number], of_active)
                yield clusters[number] << self.header.cluster_bits, uses

    # -- L1 tables and directories ----------------------------------------------------------------

    def _refer_to(self, directory: Directory) -> Directory:
        if directory.length:
            self.refcounts.refer_exclusively(
                directory.name, directory.offset, directory.offset, directory.length
            )
        return directory

    def _refer_to_table(self, table: Entries) -> bool:
        """Count the reference to a table; whether there is something in it that can be looked at."""
        return table.entry_count > 0 and self.refcounts.refer_exclusively(
            table.name, table.offset, table.offset, table.length
        )

    def _count_l1(self, l1: Entries, tables: ClusterCounts) -> Iterator[bool]:
        if not l1.entry_count or not self.refcounts.refer_exclusively(
            l1.name, l1.offset, l1.offset, l1.length
        ):
            return
        for entry_offset, entry in used_entries(self.file, l1):
            l2_offset = entry & OFFSET_MASK
            if self._check_l1_entry(l1.name, entry_offset, entry):
                tables.add(l2_offset >> self.header.cluster_bits)
                if tables is self.active_tables and not self.refcounts.is_left_out(l2_offset):
                    self._check_copied(l1.name, entry_offset, entry, l2_offset)
        yield True

    def _check_l1_entry(self, table: str, entry_offset: int, entry: int) -> bool:
        """Check one entry and count its reference; True when the L2 table it names can be read."""
        if entry & _L1_RESERVED:
            self.findings.wrong(table, entry_offset, f"entry {entry:#x} has reserved bits set")
        l2_offset = entry & OFFSET_MASK
        if l2_offset % self.header.cluster_size:
            self.findings.wrong(table, entry_offset, f"L2 table offset {l2_offset:#x} is not cluster aligned")
            return False
        if not self.refcounts.refer(table, entry_offset, l2_offset, self.header.cluster_size):
            return False
        if l2_offset + self.header.cluster_size > self.file.size:
            self.findings.wrong(table, entry_offset, f"L2 table {l2_offset:#x} is cut off by the file's end")
            return False
        return True

    def _check_copied(self, table: str, entry_offset: int, entry: int, offset: int) -> None:
        refcount = self.refcounts.stored_for(offset)
        if (refcount == 1) != bool(entry & COPIED):
            self.findings.mendable(
                table, entry_offset, f"copied flag of entry {entry:#x} contradicts refcount {refcount}"
            )

    def _count_bitmap(self, table: Entries) -> Iterator[bool]:
        if not self._refer_to_table(table):
            return
        for entry_offset, entry in used_entries(self.file, table):
            if offset := entry & OFFSET_MASK:
                self.refcounts.refer_exclusively(table.name, entry_offset, offset, self.header.cluster_size)
        yield True

    # -- L2 tables --------------------------------------------------------------------------------

    def _count_l2(self, l2_offset: int, uses: Uses) -> None:
        """Count what an L2 table refers to."""
        entries = read_entries(self.file, l2_offset, self.header.cluster_size // 8)
        if self._count_plain_l2(entries, uses):
            return
        bitmaps = None
        if self.header.has_extended_l2:
            entries, bitmaps = entries[::2], entries[1::2]
        stride = self.header.l2_entry_size
        index = contiguous = 0
        while index < len(entries):
            entry, bitmap = entries[index], bitmaps[index] if bitmaps else 0
            entry_offset = l2_offset + index * stride
            count = 1
            if entry & COMPRESSED:
                self._count_compressed(entry_offset, entry, bitmap, uses)
            elif entry or bitmap:
                self._check_flags(entry_offset, entry, bitmap)
                count = 1 if bitmaps else self._run_length(entries, index)
                is_next = not contiguous or entry & OFFSET_MASK == contiguous
                if self._count_run(entry_offset, entry, count, uses):
                    self.report.fragmented_clusters += 0 if is_next else uses.active
                    contiguous = (entry & OFFSET_MASK) + count * self.header.cluster_size
            index += count

    def _count_plain_l2(self, entries: "array[int]", uses: Uses) -> bool:
        """Count a table that names whole clusters with one user each, or compressed; False: it does not."""
        header, refcounts = self.header, self.refcounts
        if header.has_extended_l2 or self.has_data_file or header.version < qcow2_header.ZERO_VERSION:
            return False
        plain, compressed = self._plain_tables.without_compressed(entries)
        runs = self._plain_tables.runs(plain, are_copied=bool(uses.active))
        hosts = self._hosts_of(compressed)
        if runs is None or hosts is None:
            return False
        if refcounts.is_in_use:
            runs = [run for run in runs if run[0] < refcounts.count]
            hosts = Counter({cluster: count for cluster, count in hosts.items() if cluster < refcounts.count})
        for first, count in runs:
            is_inside = first > 0 and first + count <= refcounts.count
            if not is_inside or (uses.active and not refcounts.stored.are_all(first, count, 1)):
                return False
        for first, count in runs:
            refcounts.references.add_range(first, count, uses.total)
        for cluster, count in hosts.items():
            refcounts.references.add(cluster, count * uses.total)
        self.report.allocated_clusters += uses.active * (sum(count for _, count in runs) + len(compressed))
        self.report.compressed_clusters += uses.active * len(compressed)
        self.report.fragmented_clusters += uses.active * (max(len(runs) - 1, 0) + len(compressed))
        return True

    def _hosts_of(self, compressed: list[int]) -> Counter[int] | None:
        """How many compressed clusters are in each cluster of the file; None: one of them cannot be."""
        if not compressed:
            return Counter()
        if any(map(COPIED.__and__, compressed)):
            return None
        bits, offset_bits = self.header.cluster_bits, 62 - (self.header.cluster_bits - 8)
        mask, sectors = (1 << offset_bits) - 1, COMPRESSED - 1
        firsts = [(entry & mask) >> bits for entry in compressed]
        lasts = [
            (entry & mask | SECTOR_SIZE - 1) + ((entry & sectors) >> offset_bits) * SECTOR_SIZE >> bits
            for entry in compressed
        ]
        if max(lasts) >= self.refcounts.count and not self.refcounts.is_in_use:
            return None
        hosts = Counter(firsts)
        for first, last in zip(firsts, lasts, strict=True):
            if first != last:
                hosts.update(range(first + 1, last + 1))
        return hosts

    def _run_length(self, entries: "array[int]", index: int) -> int:
        """How many entries from `index` on name clusters that are neighbours, and are alike otherwise."""
        step = self.header.cluster_size
        entry = entries[index]
        if not entry & OFFSET_MASK or entry & OFFSET_MASK & step - 1:
            return 1
        end = index + 1
        while end < len(entries) and entries[end] == entry + step:
            entry += step
            end += 1
        return end - index

    def _count_compressed(self, entry_offset: int, entry: int, bitmap: int, uses: Uses) -> None:
        if entry & COPIED:
            self.findings.wrong(_L2, entry_offset, "copied flag on a compressed cluster")
        if self.has_data_file or bitmap:
            what = "a data file" if self.has_data_file else "a subcluster bitmap"
            self.findings.wrong(_L2, entry_offset, f"compressed cluster together with {what}")
            return
        offset_bits = 62 - (self.header.cluster_bits - 8)
        offset = entry & ((1 << offset_bits) - 1)
        sector_count = 1 + ((entry & (COMPRESSED - 1)) >> offset_bits)
        length = sector_count * SECTOR_SIZE - offset % SECTOR_SIZE
        self.refcounts.refer(_L2, entry_offset, offset, length, uses.total)
        self.report.allocated_clusters += uses.active
        self.report.compressed_clusters += uses.active
        self.report.fragmented_clusters += uses.active

    def _count_run(self, entry_offset: int, entry: int, count: int, uses: Uses) -> bool:
        """Count neighbouring clusters; False: the entry names none."""
        offset, step = entry & OFFSET_MASK, self.header.cluster_size
        if not offset and not (self.has_data_file and entry & COPIED):
            return False
        if offset % step:
            self.findings.wrong(_L2, entry_offset, f"data cluster offset {offset:#x} is not cluster aligned")
        self.report.allocated_clusters += uses.active * count
        if not self.has_data_file and not self._count_sound_run(entry, count, uses):
            for number in range(count):
                position = entry_offset + number * self.header.l2_entry_size
                is_inside = self.refcounts.refer(_L2, position, offset + number * step, step, uses.total)
                if uses.active and is_inside and not self.refcounts.is_left_out(offset + number * step):
                    self._check_copied(_L2, position, entry + number * step, offset + number * step)
        return True

    def _count_sound_run(self, entry: int, count: int, uses: Uses) -> bool:
        """Count the clusters of a run all at once, the usual case; False: look at each of them."""
        first = (entry & OFFSET_MASK) >> self.header.cluster_bits
        refcounts = self.refcounts
        if count < 4 or first + count > refcounts.count:
            return False
        if uses.active and not (entry & COPIED and refcounts.stored.are_all(first, count, 1)):
            return False
        refcounts.references.add_range(first, count, uses.total)
        return True

    def _check_flags(self, entry_offset: int, entry: int, bitmap: int) -> None:
        wrong = None
        if entry & _L2_RESERVED:
            wrong = f"entry {entry:#x} has reserved bits set"
        elif entry & _ZERO and (self.header.version < 3 or self.header.has_extended_l2):
            wrong = f"entry {entry:#x} has the zero flag, which this version of the format does not know"
        elif bitmap & 0xFFFF_FFFF and not entry & OFFSET_MASK and not self.has_data_file:
            wrong = f"an unallocated cluster has allocated subclusters {bitmap:#x}"
        elif bitmap >> 32 & bitmap:
            wrong = f"subclusters {bitmap:#x} are both allocated and zero"
        if wrong:
            self.findings.wrong(_L2, entry_offset, wrong)


def _make_steps(steps: Iterator[bool]) -> bool:
    """Make steps for some time, or to the end; a thread of its own for each would cost more than it does."""
    end = time.monotonic() + STEPS_TIME_S
    while next(steps, False):
        if time.monotonic() >= end:
            return True
    return False


def _read_checked_header(file: ProtocolNode) -> Header:
    header = read_header(file)
    unknown = header.incompatible & ~_KNOWN_FEATURES
    if unknown:
        raise ImageError(f"'{file.filename}' cannot be checked: unknown incompatible features {unknown:#x}")
    if file.size >> header.cluster_bits >= HOST_CLUSTER_COUNT_MAX:
        raise ImageError(
            f"'{file.filename}' cannot be checked: {file.size} bytes are more than "
            f"{HOST_CLUSTER_COUNT_MAX} clusters of {header.cluster_size} bytes"
        )
    return header
