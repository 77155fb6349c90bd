"""A qcow2 image as a node: how guest requests find their clusters.

Reads never take a lock: they look the map up, and what they planned is kept from being reused
until they are done (`Allocator.plan`). Writes to clusters of their own go straight to the file;
everything that changes the map is in writes.py and fill.py.
"""

from collections.abc import Awaitable, Callable, Sequence
from collections.abc import Mapping as MappingView
from functools import partial
from typing import Self

from blockd.aio import uninterrupted
from blockd.block.file_events import FileEvent
from blockd.block.housekeeping import Housekeeping
from blockd.block.layers import plan_through
from blockd.block.moving import MovableImage, Move
from blockd.block.node import (
    BlockNode,
    Buffer,
    FillCounts,
    IsWanted,
    Labelled,
    ProtocolNode,
    Segment,
)
from blockd.block.segments import SourcePlan, read_segments, zeroes
from blockd.errors import ErrorKind, RequestError
from blockd.extents import Extent, Kind, Range
from blockd.formats.qcow2.compressed import CompressedCluster
from blockd.formats.qcow2.corruption import Corruption, condemning
from blockd.formats.qcow2.fill import fill
from blockd.formats.qcow2.lookup import Lookup, kind_of
from blockd.formats.qcow2.mapping import (
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    STATE_MASK,
    ZERO,
    compressed_extent,
)
from blockd.formats.qcow2.metadata import Metadata
from blockd.formats.qcow2.resize import resize
from blockd.formats.qcow2.subcluster_fill import fill_subclusters
from blockd.formats.qcow2.subcluster_lookup import SubclusterLookup
from blockd.formats.qcow2.subcluster_writes import SubclusterWrites
from blockd.formats.qcow2.writes import GuestWrites
from blockd.formats.scattered import CLUSTERS_NOWAIT_MAX, read_clusters_nowait
from blockd.units import MIB

# Larger requests are read with one thread hop: copying this much takes long enough.
NOWAIT_LENGTH_MAX = 1 * MIB
# So few clusters are planned run by run, which is faster than to look at all layers at once.
PLANNED_BY_RUNS_MAX = 16
# How many folios a refcount block has to describe where copies are made by another process.
APART_SPAN_MIN = 32


class Qcow2Image(MovableImage, Housekeeping):
    """A qcow2 image; with extended L2 entries its `cluster_size` is that of a subcluster."""

    driver = "qcow2"

    def __init__(self, metadata: Metadata, *, node_name: str, read_only: bool) -> None:
        super().__init__(node_name, metadata.file.filename, metadata.header.size, read_only=read_only)
        self._use(metadata)
        self._is_closed = False
        # What was found wrong while the image was writable: nothing is written after it.
        self._corruption: Corruption | None = None

    def _use(self, metadata: Metadata) -> None:
        """Take over what was read from a file."""
        header = metadata.header
        self.metadata, self.file = metadata, metadata.file
        self.file.is_longer_allowed = True  # what is in use the refcounts tell
        self.size = header.size
        self.cluster_size = header.subcluster_size
        self.backing_filename = header.backing_filename
        self.backing_format = header.backing_format
        self._reserved = metadata.reserved
        self._cluster_bits = header.cluster_bits
        self._cluster_mask = header.cluster_size - 1
        lookup = SubclusterLookup(metadata) if header.has_extended_l2 else Lookup(metadata)
        self.entry_nowait, self.runs = lookup.entry_nowait, lookup.runs
        self._map, self._unallocated = lookup.map, lookup.unallocated
        self._labels, self._entries_told = lookup.labels, lookup.entries_told
        self._writes = (SubclusterWrites if header.has_extended_l2 else GuestWrites)(self, metadata)

    @classmethod
    async def open(cls, file: ProtocolNode, *, node_name: str, read_only: bool) -> Self:
        """Open the image in `file`; the caller opens the backing and puts it into `backing`.

        Raises:   ImageError: not a qcow2 image, or a field that is wrong or not supported.
        """
        metadata = await Metadata.load(file, read_only=read_only)
        return cls(metadata, node_name=node_name, read_only=read_only)

    def children(self) -> MappingView[str, BlockNode]:
        below: dict[str, BlockNode] = {"file": self.file}
        if self.backing is not None:
            below["backing"] = self.backing
        return below

    def begin_housekeeping(self) -> Callable[[], Awaitable[None]] | None:
        search = self.metadata.leak_search
        if search is None:
            return None
        search.begin()
        return search.run

    # -- looking up ---------------------------------------------------------------------------

    def misplaced(self, offset: int, host_offset: int) -> Corruption:
        """What to raise when the map puts a guest's data where none can be."""
        what = (
            "the image's own metadata" if host_offset in self._reserved else "nothing: the file ends before"
        )
        return Corruption(
            self.file,
            f"the map names {host_offset:#x} for the data of guest offset {offset:#x}, and there is {what}; "
            "check the image",
        )

    def kind_nowait(self, offset: int, length: int) -> Kind | None:
        entry = self.entry_nowait(offset, length)
        return None if entry < 0 else kind_of(entry)

    # -- reading ------------------------------------------------------------------------------

    def read_own_nowait(self, offset: int, length: int) -> Buffer | None:
        entry = self.entry_nowait(offset, length)
        if entry <= 0 or entry & COMPRESSED or length > NOWAIT_LENGTH_MAX:
            return None
        if entry & ZERO:
            return zeroes(length)
        return self.file.read_nowait((entry & OFFSET_MASK) | offset & self._cluster_mask, length)

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        entry = self.entry_nowait(offset, length)
        if entry < 0 and length <= NOWAIT_LENGTH_MAX:
            return read_clusters_nowait(self, offset, length)
        if entry < 0 or entry & COMPRESSED or length > NOWAIT_LENGTH_MAX:
            return None
        if entry & ZERO:
            return zeroes(length)
        if entry:
            return self.file.read_nowait((entry & OFFSET_MASK) | offset & self._cluster_mask, length)
        if self.backing is None:
            return zeroes(length)
        if offset + length > self.backing.size:
            return None
        return self.backing.read_nowait(offset, length)

    @condemning
    async def read(self, offset: int, length: int) -> Buffer:
        with self.metadata.allocator.plan():
            return await read_segments(await self.plan_read(offset, length), length)

    @condemning
    async def plan_read(self, offset: int, length: int) -> list[Segment]:
        if length > PLANNED_BY_RUNS_MAX * self.cluster_size:
            entry = self.entry_nowait(offset, length)
            if entry >= 0 and not entry & COMPRESSED:
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
        if kind_of(entry) is Kind.UNALLOCATED:
            return await self.plan_backing_read(offset, length)
        return [self._own_segment(offset, length, entry)]

    def _own_segment(self, offset: int, length: int, entry: int) -> Segment:
        """Where a run is stored that this image has itself."""
        if entry & COMPRESSED:
            self.file.announce(FileEvent.READ_COMPRESSED)
            return Segment(length, self._compressed_cluster(entry), offset & self._cluster_mask)
        if entry & ZERO:
            return Segment(length, None, 0)
        if entry & OFFSET_MASK >= self.file.size:
            raise self.misplaced(offset, entry & OFFSET_MASK)
        self.file.announce(FileEvent.READ_AIO)
        return Segment(length, self.file, (entry & OFFSET_MASK) | offset & self._cluster_mask)

    @condemning
    async def labels(
        self, offset: int, length: int, *, with_places: bool, with_holes: bool
    ) -> Labelled | None:
        return await self._labels(offset, length, with_places=with_places)

    @condemning
    async def place(self, told: Labelled, ranges: Sequence[tuple[int, int]]) -> list[Segment]:
        entries = self._entries_told(told, ranges)
        if any(map((COMPRESSED | ZERO).__and__, entries)) or max(entries, default=0) >= self.file.size:
            return [self._own_segment(*run, entry) for run, entry in zip(ranges, entries, strict=True)]
        mask, file, new = self._cluster_mask, self.file, tuple.__new__  # see layers.py
        file.announce(FileEvent.READ_AIO, len(ranges))
        return [
            new(Segment, (length, file, entry | offset & mask))
            for (offset, length), entry in zip(ranges, entries, strict=True)
        ]

    def announce_backing_read(self) -> None:
        self.file.announce(FileEvent.READ_BACKING_AIO)

    @condemning
    async def plan_backing_read(self, offset: int, length: int) -> list[Segment]:
        if self.backing is not None and offset < self.backing.size:
            self.file.announce(FileEvent.READ_BACKING_AIO)
        return await super().plan_backing_read(offset, length)

    def _compressed_cluster(self, entry: int) -> CompressedCluster:
        stored = compressed_extent(entry, self._cluster_bits)
        return CompressedCluster(self.file, *stored, self.metadata.header)

    @condemning
    async def map(self, offset: int, length: int) -> list[Extent]:
        return await self._map(offset, length)

    @condemning
    async def unallocated(self, offset: int, length: int) -> tuple[list[Range], int]:
        return await self._unallocated(offset, length)

    # -- writing ------------------------------------------------------------------------------

    def own_host_offset(self, offset: int, length: int) -> int | None:
        """Where a range may be written in place: mapped, neighbouring clusters with one user each."""
        entry = self.entry_nowait(offset, length, STATE_MASK | COPIED)
        if entry < 0 or entry & (COPIED | COMPRESSED | ZERO) != COPIED:
            return None
        host_offset = entry & OFFSET_MASK
        in_cluster = offset & self._cluster_mask
        for cluster in range(host_offset, host_offset + in_cluster + length, self.cluster_size):
            if cluster in self._reserved or cluster >= self.file.size:
                raise self.misplaced(offset, cluster)
        return host_offset | in_cluster

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        length = len(data)
        if self._writes.is_in_flight(offset, length) or self.read_only or self._corruption is not None:
            return False
        try:
            host_offset = self.own_host_offset(offset, length)
            if host_offset is None:
                return self._write_clusters_nowait(offset, data) or self._writes.write_new_nowait(
                    offset, data
                )
        except Corruption:
            return False  # `write` says so, and marks the image
        return self.file.write_nowait(host_offset, data)

    def _write_clusters_nowait(self, offset: int, data: Buffer) -> bool:
        """Write a few clusters of the image's own, one after the other.

        If one of them would have to wait, those before it are written nevertheless, and once more by `write`.
        """
        size, end = self.cluster_size, offset + len(data)
        stops = range(offset - offset % size + size, end + size, size)
        if not 1 < len(stops) <= CLUSTERS_NOWAIT_MAX:
            return False
        pieces: list[tuple[int, int, int]] = []
        start = offset
        for cluster_end in stops:
            stop = min(cluster_end, end)
            place = self.own_host_offset(start, stop - start)
            if place is None:
                return False
            pieces.append((place, start - offset, stop - offset))
            start = stop
        view, write = memoryview(data), self.file.write_nowait
        return all(write(place, view[first:last]) for place, first, last in pieces)

    @condemning
    async def write(self, offset: int, data: Buffer) -> None:
        self._require_writable()
        await self._writes.write(offset, memoryview(data))

    def discard_nowait(self, offset: int, length: int) -> bool:
        return self._may_change_nowait(offset, length) and self._writes.discard_nowait(offset, length)

    def write_zeroes_nowait(self, offset: int, length: int) -> bool:
        return self._may_change_nowait(offset, length) and self._writes.write_zeroes_nowait(offset, length)

    def _may_change_nowait(self, offset: int, length: int) -> bool:
        is_writable = not self.read_only and self._corruption is None and self.file.failed is None
        return is_writable and not self._writes.is_in_flight(offset, length)

    @condemning
    async def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        self._require_writable()
        await self._writes.write_zeroes(offset, length, unmap=unmap)

    @condemning
    async def discard(self, offset: int, length: int) -> None:
        self._require_writable()
        await self._writes.discard(offset, length)

    def needs_flush(self) -> bool:
        return self.metadata.is_marked or self.file.needs_flush()

    @condemning
    async def flush(self) -> None:
        if not self.read_only:
            self._require_sound()
            self.file.announce(FileEvent.FLUSH_TO_OS)
            await self.metadata.flush()

    @property
    def copies_apart(self) -> bool:
        # Fills of subclusters keep guests from their clusters: not for long. Zeroes are not stored, so that
        # the map has to know them. And there have to be places that are not shared with tables: a refcount
        # block is in the first folio of those that it describes.
        allocator, has_subclusters = self.metadata.allocator, isinstance(self._writes, SubclusterWrites)
        has_places = allocator.block_span >= APART_SPAN_MIN * allocator.folio_clusters
        can_be = has_places and self.metadata.knows_zero and not has_subclusters
        return can_be and self.file.copies_apart

    @condemning
    async def fill(
        self,
        ranges: Sequence[Range],
        source: SourcePlan,
        is_wanted: IsWanted,
        *,
        keep_cached: bool = False,
    ) -> FillCounts:
        self._require_writable()
        if isinstance(self._writes, SubclusterWrites):
            return await fill_subclusters(self._writes, ranges, source, is_wanted, keep_cached=keep_cached)
        return await fill(self, ranges, source, is_wanted, keep_cached=keep_cached)

    def require_streamable(self) -> None:
        if self.metadata.header.snapshot_count:
            raise RequestError(
                f"'{self.filename}' has internal snapshots, which need its backing file too: delete them, or "
                "stream into an overlay of the image",
                kind=ErrorKind.NOT_SUPPORTED,
            )

    async def require_recordable(self, filename: str | None, backing_format: str | None) -> None:
        await self.metadata.plan_backing(filename, backing_format)

    @uninterrupted
    @condemning
    async def change_backing(self, filename: str | None, backing_format: str | None) -> None:
        self._require_writable()
        await self.metadata.change_backing(filename, backing_format)
        self.backing_filename, self.backing_format = filename, backing_format if filename else None

    @condemning
    async def resize(self, size: int) -> None:
        self._require_writable()
        await resize(self, size)

    async def forget(self, start: int, end: int) -> None:
        """Let go of what is stored behind the disk's end, in the whole clusters from `start` to `end`."""
        await self._writes.forget(start, end)

    @condemning
    async def trim(self) -> None:
        if not self.read_only:
            self._require_sound()
            await self.metadata.trim()

    @condemning
    async def _settle(self) -> None:
        if not self.read_only:
            self._require_sound()
            self.file.announce(FileEvent.FLUSH_TO_OS)
            await self.metadata.settle()

    async def prepare_to_move(self) -> None:
        await self._settle()

    async def load_from(self, file: ProtocolNode) -> Move:
        return partial(self._move, await Metadata.load(file, read_only=self.read_only))

    def stay(self) -> Move:
        return partial(self._move, self.metadata)

    def _move(self, metadata: Metadata) -> None:
        self.filename = metadata.file.filename
        self._use(metadata)

    async def reopen(self, *, read_only: bool) -> None:
        await self._settle()
        if not read_only:
            # Read again: the image may be written only if it is as it should be now.
            self._use(await Metadata.load(self.file, read_only=False))
            self._corruption = None
        self.read_only = read_only

    @uninterrupted
    async def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            if self._corruption is None and self.needs_flush():
                await self._settle()

    async def condemn(self, corruption: Corruption) -> None:
        """Write nothing any more, and mark the image: its tables are wrong."""
        if corruption.file is not self.file or self.read_only or self._corruption is not None:
            return
        self._corruption = corruption
        if self.metadata.leak_search is not None:
            self.metadata.leak_search.stop_soon()
        await self.metadata.mark_corrupt()

    def _require_sound(self) -> None:
        if self._corruption is not None:
            raise self._corruption

    def _require_writable(self) -> None:
        if self.read_only:
            raise RequestError(f"'{self.filename}' was opened read-only", kind=ErrorKind.READ_ONLY)
        self._require_sound()
        if self.file.failed is not None:
            raise self.file.failed  # also what would only change the map: it could never reach the disk
