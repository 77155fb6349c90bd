"""A qcow2 image as a node: how guest requests find their clusters.

Reads never take a lock: they look the map up, and what they planned is kept from being reused
until they are done (`Allocator.plan`). Writes to clusters of their own go straight to the file;
everything that changes the map is in writes.py and fill.py.
"""

from collections.abc import Mapping as MappingView
from typing import Self

from blockd.block.file_events import FileEvent
from blockd.block.node import BlockNode, Buffer, FillCounts, IsWanted, OverlayNode, ProtocolNode, Segment
from blockd.block.segments import read_segments, zeroes
from blockd.errors import ErrorKind, RequestError
from blockd.extents import Extent, Kind, merged
from blockd.formats.qcow2.compressed import CompressedCluster
from blockd.formats.qcow2.corruption import Corruption, condemning
from blockd.formats.qcow2.fill import fill
from blockd.formats.qcow2.lookup import Lookup
from blockd.formats.qcow2.mapping import (
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    STATE_MASK,
    ZERO,
    compressed_extent,
)
from blockd.formats.qcow2.metadata import Metadata
from blockd.formats.qcow2.resize import grow
from blockd.formats.qcow2.subcluster_fill import fill_subclusters
from blockd.formats.qcow2.subcluster_lookup import SubclusterLookup
from blockd.formats.qcow2.subcluster_writes import SubclusterWrites
from blockd.formats.qcow2.writes import GuestWrites
from blockd.units import MIB

# Larger requests are read with one thread hop: copying this much takes long enough.
NOWAIT_LENGTH_MAX = 1 * MIB


class Qcow2Image(OverlayNode):
    """A qcow2 image; with extended L2 entries its `cluster_size` is that of a subcluster."""

    driver = "qcow2"

    def __init__(self, metadata: Metadata, *, node_name: str, read_only: bool) -> None:
        super().__init__(node_name, metadata.file.filename, metadata.header.size, read_only=read_only)
        self.file = metadata.file
        self.file.is_longer_allowed = True  # what is in use the refcounts tell
        self._use(metadata)
        self._is_closed = False
        # What was found wrong while the image was writable: nothing is written after it.
        self._corruption: Corruption | None = None

    def _use(self, metadata: Metadata) -> None:
        """Take over what was read from the file."""
        header = metadata.header
        self.metadata = metadata
        self.size = header.size
        self.cluster_size = header.subcluster_size
        self.backing_filename = header.backing_filename
        self.backing_format = header.backing_format
        self._reserved = metadata.reserved
        self._cluster_bits = header.cluster_bits
        self._cluster_mask = header.cluster_size - 1
        lookup = SubclusterLookup(metadata) if header.has_extended_l2 else Lookup(metadata)
        self.entry_nowait, self.runs = lookup.entry_nowait, lookup.runs
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
        return None if entry < 0 else _kind(entry)

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
        segments: list[Segment] = []
        end = offset + length
        while offset < end:
            for start, count, entry in await self.runs(offset, end - offset):
                segments += await self._plan_run(start, count, entry)
                offset = start + count
        return segments

    async def _plan_run(self, offset: int, length: int, entry: int) -> list[Segment]:
        kind = _kind(entry)
        if entry & COMPRESSED:
            self.file.announce(FileEvent.READ_COMPRESSED)
            return [Segment(length, self._compressed_cluster(entry), offset & self._cluster_mask)]
        if kind is Kind.DATA:
            if entry & OFFSET_MASK >= self.file.size:
                raise self.misplaced(offset, entry & OFFSET_MASK)
            self.file.announce(FileEvent.READ_AIO)
            return [Segment(length, self.file, (entry & OFFSET_MASK) | offset & self._cluster_mask)]
        backing = self.backing
        if kind is Kind.ZERO or backing is None or offset >= backing.size:
            return [Segment(length, None, 0)]
        self.file.announce(FileEvent.READ_BACKING_AIO)
        stored = min(length, backing.size - offset)
        below = await backing.plan_read(offset, stored)
        return below if stored == length else [*below, Segment(length - stored, None, 0)]

    def _compressed_cluster(self, entry: int) -> CompressedCluster:
        stored = compressed_extent(entry, self._cluster_bits)
        return CompressedCluster(self.file, *stored, self.metadata.header)

    @condemning
    async def map(self, offset: int, length: int) -> list[Extent]:
        runs = await self.runs(offset, length)
        return list(merged(Extent(start, count, _kind(entry)) for start, count, entry in runs))

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
                return self._writes.write_new_nowait(offset, data)
        except Corruption:
            return False  # `write` says so, and marks the image
        return self.file.write_nowait(host_offset, data)

    @condemning
    async def write(self, offset: int, data: Buffer) -> None:
        self._require_writable()
        await self._writes.write(offset, memoryview(data))

    @condemning
    async def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        self._require_writable()
        await self._writes.write_zeroes(offset, length, unmap=unmap)

    @condemning
    async def discard(self, offset: int, length: int) -> None:
        self._require_writable()
        await self._writes.discard(offset, length)

    @condemning
    async def flush(self) -> None:
        if not self.read_only:
            self._require_sound()
            self.file.announce(FileEvent.FLUSH_TO_OS)
            await self.metadata.flush()

    @property
    def copies_apart(self) -> bool:
        # Fills of subclusters keep guests from their clusters: not for long.
        return self.file.copies_apart and not isinstance(self._writes, SubclusterWrites)

    @condemning
    async def fill(
        self,
        offset: int,
        length: int,
        source: list[Segment],
        is_wanted: IsWanted,
        *,
        keep_cached: bool = False,
    ) -> FillCounts:
        self._require_writable()
        if isinstance(self._writes, SubclusterWrites):
            writes = self._writes
            return await fill_subclusters(writes, offset, length, source, is_wanted, keep_cached=keep_cached)
        return await fill(self, offset, length, source, is_wanted, keep_cached=keep_cached)

    def require_streamable(self) -> None:
        if self.metadata.header.snapshot_count:
            raise RequestError(
                f"'{self.filename}' has internal snapshots, which need its backing file too: delete them, or "
                "stream into an overlay of the image",
                kind=ErrorKind.NOT_SUPPORTED,
            )

    @condemning
    async def change_backing(self, filename: str | None, backing_format: str | None) -> None:
        self._require_writable()
        await self.metadata.change_backing(filename, backing_format)
        self.backing_filename, self.backing_format = filename, backing_format if filename else None

    @condemning
    async def resize(self, size: int) -> None:
        self._require_writable()
        await grow(self, size)

    async def reopen(self, *, read_only: bool) -> None:
        await self.flush()
        if not read_only:
            # Read again: the image may be written only if it is as it should be now.
            self._use(await Metadata.load(self.file, read_only=False))
            self._corruption = None
        self.read_only = read_only

    async def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            if self._corruption is None:
                await self.flush()

    async def condemn(self, corruption: Corruption) -> None:
        """Write nothing any more, and mark the image: its tables are wrong."""
        if corruption.file is not self.file or self.read_only or self._corruption is not None:
            return
        self._corruption = corruption
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


def _kind(entry: int) -> Kind:
    if entry & COMPRESSED:
        return Kind.DATA
    if entry & ZERO:
        return Kind.ZERO
    return Kind.DATA if entry else Kind.UNALLOCATED
