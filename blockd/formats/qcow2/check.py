"""Check a qcow2 image: does every table say what the others say?

The check counts how often each host cluster is really referred to (header, L1 and L2 tables, data,
snapshots, bitmaps, refcount structures) and compares that with the refcount stored for it. It reads
the tables straight from the file and shares no code with what writes them, so that it can judge it.
Nothing is repaired.

    stored > references   a leak: space is lost, nothing else
    stored < references   corruption: the cluster can be given away while it is in use

The numbers in the report mean what `qemu-img check` means by them.

Source:   qcow2 specification, "Host cluster management" and "Cluster mapping".
"""

from collections.abc import Callable, Iterator

from blockd.aio import in_thread
from blockd.block.node import ProtocolNode
from blockd.errors import ImageError
from blockd.formats.check_report import CheckReport
from blockd.formats.qcow2 import header as qcow2_header
from blockd.formats.qcow2.check_refcounts import Refcounts
from blockd.formats.qcow2.check_tables import Directory, Entries, bitmaps, read_entries, snapshots
from blockd.formats.qcow2.header import Header
from blockd.units import SECTOR_SIZE

# What the check keeps in memory is 8 bytes a host cluster; this many are 4 TiB of 64 KiB clusters.
HOST_CLUSTER_COUNT_MAX = 1 << 26

_OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
_L1_RESERVED = 0x7F00_0000_0000_01FF
_L2_RESERVED = 0x3F00_0000_0000_01FE
_COPIED = 1 << 63
_COMPRESSED = 1 << 62
_ZERO = 1
_KNOWN_FEATURES = (
    qcow2_header.INCOMPATIBLE_DIRTY
    | qcow2_header.INCOMPATIBLE_CORRUPT
    | qcow2_header.INCOMPATIBLE_DATA_FILE
    | qcow2_header.INCOMPATIBLE_COMPRESSION
    | qcow2_header.INCOMPATIBLE_EXTENDED_L2
)


async def check(file: ProtocolNode) -> CheckReport:
    """Check the image in `file`, which must not be written meanwhile.

    Raises:   ImageError: the header is so wrong that nothing behind it can be looked at, or the file is
              too large to be checked in bounded memory.
    Cancel:   between two tables.
    """
    steps = _Checker(file, await in_thread(_read_header, file)).steps()
    while True:
        report = await in_thread(next, steps)
        if report is not None:
            return report


def _read_header(file: ProtocolNode) -> Header:
    buffer = bytearray(min(file.size, 1 << qcow2_header.CLUSTER_BITS_MAX))
    file.readinto_blocking(0, memoryview(buffer))
    header = qcow2_header.parse(bytes(buffer), file.filename, supported_only=False)
    unknown = header.incompatible & ~_KNOWN_FEATURES
    if unknown:
        raise ImageError(f"'{file.filename}' cannot be checked: unknown incompatible features {unknown:#x}")
    if file.size >> header.cluster_bits >= HOST_CLUSTER_COUNT_MAX:
        raise ImageError(
            f"'{file.filename}' cannot be checked: {file.size} bytes are more than "
            f"{HOST_CLUSTER_COUNT_MAX} clusters of {header.cluster_size} bytes"
        )
    return header


class _Checker:
    """One run over one image; each step looks at one table, blocking."""

    def __init__(self, file: ProtocolNode, header: Header) -> None:
        self._file = file
        self._header = header
        self._has_data_file = bool(header.incompatible & qcow2_header.INCOMPATIBLE_DATA_FILE)
        self._has_subclusters = bool(header.incompatible & qcow2_header.INCOMPATIBLE_EXTENDED_L2)
        self._report = CheckReport(
            file.filename,
            total_clusters=-(-header.size >> header.cluster_bits),
            is_dirty=bool(header.incompatible & qcow2_header.INCOMPATIBLE_DIRTY),
            is_marked_corrupt=bool(header.incompatible & qcow2_header.INCOMPATIBLE_CORRUPT),
        )
        self._refcounts = Refcounts(file, header, self._report)

    def steps(self) -> Iterator[CheckReport | None]:
        """Go through everything; the last value is the report."""
        header = self._header
        yield from self._refcounts.load()
        self._refer("header", 0, 0, header.cluster_size)
        l1 = Entries("L1 table", header.l1_offset, header.l1_entry_count)
        yield from self._check_l1(l1, is_active=True)
        yield from self._check_directory(snapshots(self._file, header, self._report), self._check_snapshot)
        yield from self._check_directory(bitmaps(self._file, header, self._report), self._check_bitmap)
        yield from self._refcounts.refer_to_own()
        yield from self._refcounts.compare()
        self._refcounts.require_single_use("header", 0, header.cluster_size)
        self._refcounts.require_single_use(l1.name, l1.offset, l1.length)
        self._report.image_end_offset = self._refcounts.end_offset()
        yield self._report

    def _refer(self, table: str, entry_offset: int, offset: int, length: int) -> bool:
        return self._refcounts.refer(table, entry_offset, offset, length)

    # -- mapping --------------------------------------------------------------------------------

    def _check_l1(self, l1: Entries, *, is_active: bool) -> Iterator[None]:
        if not l1.entry_count or not self._refer(l1.name, l1.offset, l1.offset, l1.length):
            return
        entries = read_entries(self._file, l1.offset, l1.entry_count)
        yield
        for index, entry in enumerate(entries):
            if not entry:
                continue
            entry_offset = l1.offset + index * 8
            if self._check_l1_entry(l1.name, entry_offset, entry, is_active):
                self._check_l2(entry & _OFFSET_MASK, is_active)
                yield

    def _check_l1_entry(self, table: str, entry_offset: int, entry: int, is_active: bool) -> bool:
        """Check one entry and count its reference; True when the L2 table it names can be read."""
        if entry & _L1_RESERVED:
            self._report.add_corruption(table, entry_offset, f"entry {entry:#x} has reserved bits set")
        l2_offset = entry & _OFFSET_MASK
        if l2_offset % self._header.cluster_size:
            self._report.add_corruption(
                table, entry_offset, f"L2 table offset {l2_offset:#x} is not cluster aligned"
            )
            return False
        if not self._refer(table, entry_offset, l2_offset, self._header.cluster_size):
            return False
        if l2_offset + self._header.cluster_size > self._file.size:
            self._report.add_corruption(
                table, entry_offset, f"L2 table {l2_offset:#x} is cut off by the file's end"
            )
            return False
        if is_active:
            self._check_copied(table, entry_offset, entry, l2_offset)
        return True

    def _check_copied(self, table: str, entry_offset: int, entry: int, offset: int) -> None:
        refcount = self._refcounts.stored_for(offset)
        if (refcount == 1) != bool(entry & _COPIED):
            self._report.add_corruption(
                table, entry_offset, f"copied flag of entry {entry:#x} contradicts refcount {refcount}"
            )

    def _check_l2(self, l2_offset: int, is_active: bool) -> None:
        stride = 2 if self._has_subclusters else 1
        entries = read_entries(self._file, l2_offset, self._header.cluster_size // 8)
        contiguous = 0
        for index in range(0, len(entries), stride):
            entry = entries[index]
            bitmap = entries[index + 1] if self._has_subclusters else 0
            if not entry and not bitmap:
                continue
            entry_offset = l2_offset + index * 8
            if entry & _COMPRESSED:
                self._check_compressed(entry_offset, entry, bitmap, is_active)
            else:
                contiguous = self._check_standard(entry_offset, entry, bitmap, is_active, contiguous)

    def _check_compressed(self, entry_offset: int, entry: int, bitmap: int, is_active: bool) -> None:
        if entry & _COPIED:
            self._report.add_corruption("L2 table", entry_offset, "copied flag on a compressed cluster")
        if self._has_data_file or bitmap:
            what = "a data file" if self._has_data_file else "a subcluster bitmap"
            self._report.add_corruption("L2 table", entry_offset, f"compressed cluster together with {what}")
            return
        offset_bits = 62 - (self._header.cluster_bits - 8)
        offset = entry & ((1 << offset_bits) - 1)
        sector_count = 1 + ((entry & (_COMPRESSED - 1)) >> offset_bits)
        self._refer("L2 table", entry_offset, offset, sector_count * SECTOR_SIZE - offset % SECTOR_SIZE)
        if is_active:
            self._report.allocated_clusters += 1
            self._report.compressed_clusters += 1
            self._report.fragmented_clusters += 1

    def _check_standard(
        self, entry_offset: int, entry: int, bitmap: int, is_active: bool, contiguous: int
    ) -> int:
        """Check one entry; return where the next cluster of an unfragmented table would be."""
        self._check_flags(entry_offset, entry, bitmap)
        offset = entry & _OFFSET_MASK
        if not offset and not (self._has_data_file and entry & _COPIED):
            return contiguous
        if offset % self._header.cluster_size:
            self._report.add_corruption(
                "L2 table", entry_offset, f"data cluster offset {offset:#x} is not cluster aligned"
            )
        if is_active:
            self._report.allocated_clusters += 1
            self._report.fragmented_clusters += bool(contiguous) and offset != contiguous
        if not self._has_data_file:
            is_inside = self._refer("L2 table", entry_offset, offset, self._header.cluster_size)
            if is_active and is_inside:
                self._check_copied("L2 table", entry_offset, entry, offset)
        return offset + self._header.cluster_size

    def _check_flags(self, entry_offset: int, entry: int, bitmap: int) -> None:
        wrong = None
        if entry & _L2_RESERVED:
            wrong = f"entry {entry:#x} has reserved bits set"
        elif entry & _ZERO and (self._header.version < 3 or self._has_subclusters):
            wrong = f"entry {entry:#x} has the zero flag, which this version of the format does not know"
        elif bitmap & 0xFFFF_FFFF and not entry & _OFFSET_MASK and not self._has_data_file:
            wrong = f"an unallocated cluster has allocated subclusters {bitmap:#x}"
        elif bitmap >> 32 & bitmap:
            wrong = f"subclusters {bitmap:#x} are both allocated and zero"
        if wrong:
            self._report.add_corruption("L2 table", entry_offset, wrong)

    # -- snapshots and bitmaps --------------------------------------------------------------------

    def _check_directory(
        self, directory: Directory, check_table: Callable[[Entries], Iterator[None]]
    ) -> Iterator[None]:
        if directory.length:
            self._refer(directory.name, directory.offset, directory.offset, directory.length)
        for table in directory.tables:
            yield from check_table(table)

    def _check_snapshot(self, l1: Entries) -> Iterator[None]:
        return self._check_l1(l1, is_active=False)

    def _check_bitmap(self, table: Entries) -> Iterator[None]:
        if not self._refer(table.name, table.offset, table.offset, table.length):
            return
        for index, entry in enumerate(read_entries(self._file, table.offset, table.entry_count)):
            offset = entry & _OFFSET_MASK
            if offset:
                self._refer(table.name, table.offset + index * 8, offset, self._header.cluster_size)
        yield
