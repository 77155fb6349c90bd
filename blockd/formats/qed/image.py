"""A QED image as a node: how guest requests find their clusters.

Reads never take a lock: a cluster that a map has named stays its guest's for good, so what was looked
up holds. Writes to clusters that there are go straight to the file; everything that changes the map is
in writes.py and fill.py.
"""

from collections.abc import Iterator, Sequence
from collections.abc import Mapping as MappingView
from typing import Self

from blockd.aio import uninterrupted
from blockd.block.file_events import FileEvent
from blockd.block.layers import kinds_told, plan_through
from blockd.block.node import (
    BlockNode,
    Buffer,
    FillCounts,
    IsWanted,
    Labelled,
    OverlayNode,
    ProtocolNode,
    Segment,
)
from blockd.block.segments import SourcePlan, read_segments, zeroes
from blockd.errors import ErrorKind, ImageError, RequestError
from blockd.extents import Extent, Kind, Range
from blockd.formats.entry_runs import follow
from blockd.formats.qed.fill import fill
from blockd.formats.qed.labels import EntryLabels
from blockd.formats.qed.large_clusters import BUFFER_LENGTH
from blockd.formats.qed.mapping import UNALLOCATED, ZERO, Page
from blockd.formats.qed.metadata import Metadata
from blockd.formats.qed.resize import grow
from blockd.formats.qed.writes import GuestWrites
from blockd.formats.scattered import read_clusters_nowait
from blockd.units import MIB, SECTOR_SIZE, align_down

# A range of clusters that differ in where they are, or one that would have to be looked up on disk.
_MIXED = -1

# Larger requests are read with one thread hop: copying this much takes long enough.
NOWAIT_LENGTH_MAX = 1 * MIB
# So few clusters are planned run by run, which is faster than to look at all layers at once.
PLANNED_BY_RUNS_MAX = 16

# How many clusters, one by one or as labels, and L1 entries, are looked up before others get their turn.
RUN_CLUSTER_COUNT_MAX = 512
LABEL_COUNT_MAX = 2048
L1_SCAN_COUNT_MAX = 4096


class QedImage(OverlayNode):
    """A QED image. One that needs a check is checked and repaired when it is opened for writing."""

    driver = "qed"
    request_alignment = SECTOR_SIZE  # as in QEMU

    def __init__(self, metadata: Metadata, *, node_name: str, read_only: bool) -> None:
        super().__init__(node_name, metadata.file.filename, metadata.header.size, read_only=read_only)
        self.file = metadata.file
        self.file.is_longer_allowed = True  # the need-check bit asks who comes after a crash to look for it
        self._use(metadata)
        self._is_closed = False

    def _use(self, metadata: Metadata) -> None:
        """Take over what was read from the file."""
        header = metadata.header
        self.metadata = metadata
        self.size = header.size
        self.cluster_size = header.cluster_size
        self.backing_filename = header.backing_filename
        self.backing_format = header.backing_format
        self._mapping = metadata.mapping
        self._first_cluster = header.first_cluster
        self._cluster_bits = metadata.mapping.cluster_bits
        self._cluster_mask = header.cluster_size - 1
        self._page_bits = metadata.mapping.page_bits
        self._table_bits = metadata.mapping.table_bits
        self._index_mask = metadata.mapping.index_mask
        self._entry_labels = EntryLabels(header.cluster_size, header.first_cluster)
        self._writes = GuestWrites(self, metadata)

    @classmethod
    async def open(cls, file: ProtocolNode, *, node_name: str, read_only: bool) -> Self:
        """Open the image in `file`; the caller opens the backing and puts it into `backing`.

        Raises:   ImageError: not a QED image, or a field that is wrong or not supported.
        """
        metadata = await Metadata.load(file, read_only=read_only)
        return cls(metadata, node_name=node_name, read_only=read_only)

    def children(self) -> MappingView[str, BlockNode]:
        below: dict[str, BlockNode] = {"file": self.file}
        if self.backing is not None:
            below["backing"] = self.backing
        return below

    # -- looking up ---------------------------------------------------------------------------

    def entry_nowait(self, offset: int, length: int) -> int:
        """The map entry of a range whose clusters are alike, and neighbours where they have a place.

        Returns a negative number for any other range, and when a page has to be read first.
        """
        number = offset >> self._page_bits
        last = offset + length - 1
        if last >> self._page_bits != number:
            return _MIXED
        page = self._mapping.pages.get(number) or self._mapping.page_nowait(number)
        if page is None:
            return _MIXED if self._mapping.l1[offset >> self._table_bits] else UNALLOCATED
        index = (offset >> self._cluster_bits) & self._index_mask
        count = (last >> self._cluster_bits) - (offset >> self._cluster_bits)
        entry = page.entries[index]
        if count:
            step = self.cluster_size if entry > ZERO else 0
            if not follow(page.entries[index + 1 : index + 1 + count], entry, step):
                return _MIXED
        if entry > ZERO:
            self._check_place(offset, entry, count + 1)
        return entry

    def _check_place(self, offset: int, entry: int, cluster_count: int) -> None:
        """Refuse to believe an entry that names what cannot be clusters of a guest's data."""
        end = entry + (cluster_count << self._cluster_bits)
        if entry & self._cluster_mask or entry < self._first_cluster or end > self.file.size:
            raise ImageError(
                f"'{self.filename}': the map names {entry:#x} for the data of guest offset {offset:#x}, and "
                "that is not a cluster inside the file; check the image"
            )

    def require_data(self, offset: int, host_offset: int, length: int) -> None:
        """Refuse to write where the image's own tables are."""
        if self._mapping.is_metadata(host_offset, length):
            raise ImageError(
                f"'{self.filename}': the map names {host_offset:#x} for the data of guest offset "
                f"{offset:#x}, and there is the image's own metadata; check the image"
            )

    def kind_nowait(self, offset: int, length: int) -> Kind | None:
        entry = self.entry_nowait(offset, length)
        return None if entry < 0 else _kind(entry)

    async def runs(self, offset: int, length: int) -> list[tuple[int, int, int]]:
        """Look a range up, reading pages as needed: (offset, length, entry) of clusters that are alike.

        May stop before the end of the range: after one page, a stretch without tables, or many clusters.
        """
        number = offset >> self._page_bits
        page = await self._mapping.page(number)
        if page is None:
            return [(offset, self._unmapped_length(offset, length), UNALLOCATED)]
        end = min(offset + length, (number + 1) << self._page_bits)
        end = min(end, align_down(offset, self.cluster_size) + RUN_CLUSTER_COUNT_MAX * self.cluster_size)
        return list(self.page_runs(page, offset, end))

    def page_runs(self, page: Page, offset: int, end: int) -> Iterator[tuple[int, int, int]]:
        """The runs of a range that one page maps."""
        start, first, distance = offset, None, 0
        for cluster_offset in range(align_down(offset, self.cluster_size), end, self.cluster_size):
            entry = page.entries[(cluster_offset >> self._cluster_bits) & self._index_mask]
            if entry > ZERO:
                self._check_place(cluster_offset, entry, 1)
            if first is None or entry != (first + distance if first > ZERO else first):
                if first is not None:
                    yield start, cluster_offset - start, first
                start, first, distance = max(offset, cluster_offset), entry, 0
            distance += self.cluster_size
        if first is not None:
            yield start, end - start, first

    def _unmapped_length(self, offset: int, length: int) -> int:
        end = offset + length
        l1, l1_index = self._mapping.l1, offset >> self._table_bits
        limit = l1_index + L1_SCAN_COUNT_MAX
        while (next_offset := (l1_index + 1) << self._table_bits) < end and l1_index < limit:
            l1_index += 1
            if l1[l1_index]:
                break
        return min(next_offset, end) - offset

    # -- reading ------------------------------------------------------------------------------

    def read_own_nowait(self, offset: int, length: int) -> Buffer | None:
        entry = self.entry_nowait(offset, length)
        if entry <= UNALLOCATED or length > NOWAIT_LENGTH_MAX:
            return None
        if entry == ZERO:
            return zeroes(length)
        return self.file.read_nowait(entry | offset & self._cluster_mask, length)

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        entry = self.entry_nowait(offset, length)
        if entry < 0 and length <= NOWAIT_LENGTH_MAX:
            return read_clusters_nowait(self, offset, length)
        if entry < 0 or length > NOWAIT_LENGTH_MAX:
            return None
        if entry > ZERO:
            return self.file.read_nowait(entry | offset & self._cluster_mask, length)
        if entry == ZERO or self.backing is None:
            return zeroes(length)
        if offset + length > self.backing.size:
            return None
        return self.backing.read_nowait(offset, length)

    async def read(self, offset: int, length: int) -> Buffer:
        return await read_segments(await self.plan_read(offset, length), length)

    async def plan_read(self, offset: int, length: int) -> list[Segment]:
        if length > PLANNED_BY_RUNS_MAX * self.cluster_size:
            entry = self.entry_nowait(offset, length)
            if entry >= 0:
                return await self._plan_run(offset, length, entry)
            return await plan_through(self, offset, length)
        segments: list[Segment] = []
        end = offset + length
        while offset < end:
            backing = self.backing
            for start, count, entry in await self.runs(offset, end - offset):
                if self.backing is not backing:
                    break  # what the map has told is true of the one before: look again
                segments += await self._plan_run(start, count, entry)
                offset = start + count
        return segments

    async def _plan_run(self, offset: int, length: int, entry: int) -> list[Segment]:
        if entry > ZERO:
            self.file.announce(FileEvent.READ_AIO)
            return [Segment(length, self.file, entry | offset & self._cluster_mask)]
        return [Segment(length, None, 0)] if entry == ZERO else await self.plan_backing_read(offset, length)

    async def plan_backing_read(self, offset: int, length: int) -> list[Segment]:
        if self.backing is not None and offset < self.backing.size:
            self.file.announce(FileEvent.READ_BACKING_AIO)
        return await super().plan_backing_read(offset, length)

    async def map(self, offset: int, length: int) -> list[Extent]:
        told = await self.labels(offset, length, with_places=False, with_holes=False)
        return kinds_told(self, told, offset)

    async def labels(self, offset: int, length: int, *, with_places: bool, with_holes: bool) -> Labelled:
        number = offset >> self._page_bits
        page = await self._mapping.page(number)
        if page is None:
            return Labelled(b"-", 0, offset, offset + self._unmapped_length(offset, length), None)
        start = align_down(offset, self.cluster_size)
        end = min(
            offset + length, (number + 1) << self._page_bits, start + LABEL_COUNT_MAX * self.cluster_size
        )
        index = (start >> self._cluster_bits) & self._index_mask
        entries = page.entries[index : index + ((end - 1 - start) >> self._cluster_bits) + 1]
        found = self._entry_labels.of(entries, self.file.size, with_places=with_places)
        if not found:
            self._check_place(offset, entries[0], 1)
        end = min(end, start + len(found) * self.cluster_size)
        return Labelled(found, self.cluster_size, start, end, entries)

    async def place(self, told: Labelled, ranges: Sequence[Range]) -> list[Segment]:
        segments: list[Segment] = []
        assert told.entries is not None or not ranges, "what is stored has entries"
        for offset, length in ranges:
            entry = told.entries[(offset - told.start) >> self._cluster_bits] if told.entries else UNALLOCATED
            segments += await self._plan_run(offset, length, entry)
        return segments

    def announce_backing_read(self) -> None:
        self.file.announce(FileEvent.READ_BACKING_AIO)

    # -- writing ------------------------------------------------------------------------------

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        length = len(data)
        if self._writes.is_in_flight(offset, length) or self.read_only:
            return False
        entry = self.entry_nowait(offset, length)
        if entry > ZERO:
            host_offset = entry | offset & self._cluster_mask
            self.require_data(offset, host_offset, length)
            return self.file.write_nowait(host_offset, data)
        return self._writes.write_new_nowait(offset, data)

    async def write(self, offset: int, data: Buffer) -> None:
        self._require_writable()
        await self._writes.write(offset, memoryview(data))

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        self._require_writable()
        await self._writes.write_zeroes(offset, length, unmap=unmap)

    async def discard(self, offset: int, length: int) -> None:
        self._require_writable()
        await self._writes.discard(offset, length)

    def needs_flush(self) -> bool:
        return self.metadata.is_marked or self.file.needs_flush()

    async def flush(self) -> None:
        if not self.read_only:
            self.file.announce(FileEvent.FLUSH_TO_OS)
            await self.metadata.flush()

    @property
    def copies_apart(self) -> bool:
        return self.cluster_size <= BUFFER_LENGTH and self.file.copies_apart

    async def fill(
        self,
        ranges: Sequence[Range],
        source: SourcePlan,
        is_wanted: IsWanted,
        *,
        keep_cached: bool = False,
    ) -> FillCounts:
        self._require_writable()
        return await fill(self, ranges, source, is_wanted, keep_cached=keep_cached)

    async def require_recordable(self, filename: str | None, backing_format: str | None) -> None:
        await self.metadata.plan_backing(filename, backing_format)

    @uninterrupted
    async def change_backing(self, filename: str | None, backing_format: str | None) -> None:
        self._require_writable()
        await self.metadata.change_backing(filename, backing_format)
        self.backing_filename = self.metadata.header.backing_filename
        self.backing_format = self.metadata.header.backing_format

    async def resize(self, size: int) -> None:
        self._require_writable()
        await grow(self, size)

    async def trim(self) -> None:
        if not self.read_only:
            await self.metadata.trim()

    async def reopen(self, *, read_only: bool) -> None:
        if not self.read_only:
            await self.metadata.settle()
        if not read_only:
            # Read again: the image may be written only if it is as it should be now.
            self._use(await Metadata.load(self.file, read_only=False))
        self.read_only = read_only

    @uninterrupted
    async def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            if not self.read_only and self.needs_flush():
                await self.metadata.settle()

    def _require_writable(self) -> None:
        if self.read_only:
            raise RequestError(f"'{self.filename}' was opened read-only", kind=ErrorKind.READ_ONLY)
        if self.file.failed is not None:
            raise self.file.failed  # also what would only change the map: it could never reach the disk


def _kind(entry: int) -> Kind:
    if entry > ZERO:
        return Kind.DATA
    return Kind.ZERO if entry else Kind.UNALLOCATED
