"""An image with an add-cow file as a node: an overlay whose data is in a plain image.

Guest offsets are offsets in the image, for clusters that are in it; the others are read from the
backing. When all clusters are in it (ALL_ALLOCATED, recorded durably) bitmap and backing are no longer
looked at: the node is then the plain image under another name.
"""

from collections.abc import Mapping, Sequence
from typing import Self

from blockd.aio import uninterrupted
from blockd.block.chain import with_layers_below
from blockd.block.file_events import FileEvent
from blockd.block.node import BlockNode, Buffer, FillCounts, IsWanted, OverlayNode, ProtocolNode, Segment
from blockd.block.segments import SourcePlan, read_segments, zeroes
from blockd.errors import ErrorKind, RequestError
from blockd.extents import Extent, Kind, Range, merged
from blockd.formats.add_cow import header as headers
from blockd.formats.add_cow.bitmap import ABSENT, MIXED, PRESENT
from blockd.formats.add_cow.fill import fill
from blockd.formats.add_cow.header import Header
from blockd.formats.add_cow.metadata import Metadata
from blockd.formats.add_cow.resize import grow
from blockd.formats.add_cow.writes import GuestWrites
from blockd.formats.early_read import read_early
from blockd.formats.raw.image import RawImage


class AddCowImage(OverlayNode):
    """A raw image, the add-cow file beside it, and what is below both.

    Needs:    `attach` after `open`, before anything else; the image is a node of its own and has another
              owner, as the backing has.
    """

    driver = "add-cow"

    image: RawImage

    def __init__(self, file: ProtocolNode, header: Header, *, node_name: str, read_only: bool) -> None:
        super().__init__(node_name, file.filename, 0, read_only=read_only)
        self.file = file
        self.metadata: Metadata
        self.header: Header
        self._use(header)
        self._is_attached = False
        self._is_closed = False

    @classmethod
    async def open(cls, file: ProtocolNode, *, node_name: str, read_only: bool) -> Self:
        """Open the add-cow file; the caller opens the image and attaches it, and the backing.

        Raises:   ImageError: not an add-cow file, or a field that is wrong or not supported.
        """
        return cls(file, await read_header(file), node_name=node_name, read_only=read_only)

    def attach(self, image: RawImage) -> None:
        """Take the image that the add-cow file speaks of.

        Raises:   ImageError: the bitmap is too short for it.
        """
        self.metadata = Metadata.checked(self.file, self.header, image.file, image.size)
        self.image = image
        self._is_attached = True
        self.size = image.size
        self._bitmap = self.metadata.bitmap
        self._writes = GuestWrites(self, self.metadata)
        self._settle()

    def _use(self, header: Header) -> None:
        self.header = header
        self.cluster_size = header.cluster_size
        self._cluster_bits = header.cluster_bits
        self.image_filename = header.image.text
        has_backing = header.backing is not None and not header.is_all_allocated
        self.backing_filename = header.backing.text if header.backing is not None and has_backing else None
        self.backing_format = header.backing_format if has_backing else None

    def _settle(self) -> None:
        """Be the plain image if all is in it, as fast as that is."""
        if self.is_complete:
            self.read_nowait = self.image.read_nowait  # type: ignore[method-assign]
            self.read_own_nowait = self.image.read_nowait  # type: ignore[method-assign]

    @property
    def is_complete(self) -> bool:
        """Whether the image alone is the disk, and the disk knows it."""
        return self.header.is_all_allocated

    def children(self) -> Mapping[str, BlockNode]:
        below: dict[str, BlockNode] = {"file": self.file}
        if self._is_attached:
            below["image"] = self.image
        if self.backing is not None:
            below["backing"] = self.backing
        return below

    # -- looking up ---------------------------------------------------------------------------

    def _state_nowait(self, offset: int, length: int) -> int:
        if self.is_complete:
            return PRESENT
        bits = self._cluster_bits
        return self._bitmap.state_nowait(offset >> bits, (offset + length - 1 >> bits) + 1)

    async def run(self, offset: int, length: int) -> tuple[int, int]:
        """PRESENT or ABSENT, and how much of a range is so from its start on; it may go on as it began."""
        if self.is_complete:
            return PRESENT, length
        bits, end = self._cluster_bits, offset + length
        state, run_end = await self._bitmap.run(offset >> bits, (end - 1 >> bits) + 1)
        return state, min(run_end << bits, end) - offset

    def backing_length(self, offset: int, length: int) -> int:
        """How much of the range of absent clusters the backing has, from its start on; zeroes follow."""
        return max(0, min(length, self.backing.size - offset)) if self.backing is not None else 0

    def kind_nowait(self, offset: int, length: int) -> Kind | None:
        state = self._state_nowait(offset, length)
        if state == PRESENT:
            return self.image.kind_nowait(offset, length)
        return Kind.UNALLOCATED if state == ABSENT else None

    async def map(self, offset: int, length: int) -> list[Extent]:
        if self.is_complete:
            return await self.image.map(offset, length)
        bits, end = self._cluster_bits, offset + length
        own: list[Extent] = []
        for state, run_end in await self._bitmap.runs(offset >> bits, (end - 1 >> bits) + 1):
            next_offset = min(run_end << bits, end)
            # What is present the image knows more about: as a layer below does about what another one lacks.
            kind = Kind.UNALLOCATED if state == PRESENT else Kind.DATA
            own.append(Extent(offset, next_offset - offset, kind))
            offset = next_offset
        return list(merged(await with_layers_below(own, self.image, None, Kind.UNALLOCATED)))

    # -- reading ------------------------------------------------------------------------------

    def read_own_nowait(self, offset: int, length: int) -> Buffer | None:
        if self._state_nowait(offset, length) != PRESENT:
            return None
        return self.image.read_nowait(offset, length)

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        state = self._state_nowait(offset, length)
        if state == PRESENT:
            return self.image.read_nowait(offset, length)
        if state == MIXED:
            return None
        stored = self.backing_length(offset, length)
        if not stored:
            return zeroes(length)
        if stored < length or self.backing is None:
            return None
        return self.backing.read_nowait(offset, length)

    async def read(self, offset: int, length: int) -> Buffer:
        return await read_segments(await self.plan_read(offset, length), length)

    async def plan_read(self, offset: int, length: int) -> list[Segment]:
        segments: list[Segment] = []
        end = offset + length
        while offset < end:
            backing = self.backing
            state, count = await self.run(offset, end - offset)
            if self.backing is not backing:
                continue  # what the bits have told is true of the one before: look again
            if state == PRESENT:
                segments += await self.image.plan_read(offset, count)
            else:
                segments += await self.plan_backing_read(offset, count)
            offset += count
        return segments

    async def plan_backing_read(self, offset: int, length: int) -> list[Segment]:
        if self.backing_length(offset, length):
            self.file.announce(FileEvent.READ_BACKING_AIO)
        return await super().plan_backing_read(offset, length)

    # -- writing ------------------------------------------------------------------------------

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        if self.read_only:
            return False
        if self._state_nowait(offset, len(data)) == PRESENT:
            return self.image.write_nowait(offset, data)
        return not self.has_failed and self._writes.write_new_nowait(offset, data)

    async def write(self, offset: int, data: Buffer) -> None:
        self._require_writable()
        await self._writes.write(offset, memoryview(data))

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        self._require_writable()
        zero = self.image.write_zeroes if self.is_complete else self._writes.write_zeroes
        await zero(offset, length, unmap=unmap)

    async def discard(self, offset: int, length: int) -> None:
        self._require_writable()
        await (self.image if self.is_complete else self._writes).discard(offset, length)

    async def flush(self) -> None:
        if not self.read_only:
            self.file.announce(FileEvent.FLUSH_TO_OS)
            await self.metadata.flush()

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
        if filename is None and backing_format is not None:
            raise RequestError(
                f"'{self.filename}' has to record the backing file that it keeps: an add-cow image "
                "without one is complete"
            )
        headers.with_backing(self.metadata.header, filename, backing_format)

    async def change_backing(self, filename: str | None, backing_format: str | None) -> None:
        """As `OverlayNode.change_backing`; without a backing the image alone is the disk from then on.

        What is not in the image becomes zeroes there, for that is what it reads as without a backing.
        """
        self._require_writable()
        if self.is_complete:
            if filename is not None:
                raise RequestError(f"'{self.filename}' needs no backing file any more: all is in the image")
            return
        if filename is None:
            await self._writes.punch_absent()
        await self._record_backing(filename, backing_format)

    @uninterrupted
    async def _record_backing(self, filename: str | None, backing_format: str | None) -> None:
        await self.metadata.change_backing(filename, backing_format)
        self._use(self.metadata.header)
        self._settle()

    async def resize(self, size: int) -> None:
        self._require_writable()
        await grow(self, size)

    async def reopen(self, *, read_only: bool) -> None:
        await self.flush()
        if not read_only:
            # Read again: the image may be written only if it is as it should be now.
            self._use(await read_header(self.file))
            self.attach(self.image)
        self.read_only = read_only

    @uninterrupted
    async def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            await self.flush()

    @property
    def has_failed(self) -> bool:
        """Whether a sync of one of the files has failed, so that the disk may lack what was written."""
        return self.file.failed is not None or self.image.file.failed is not None

    @property
    def writes(self) -> GuestWrites:
        """What orders changes of one range."""
        return self._writes

    def _require_writable(self) -> None:
        if self.read_only:
            raise RequestError(f"'{self.filename}' was opened read-only", kind=ErrorKind.READ_ONLY)
        for file in (self.file, self.image.file):
            if file.failed is not None:
                raise file.failed  # also what would only change the bitmap: it could never reach the disk


async def read_header(file: ProtocolNode) -> Header:
    """Read the header of an add-cow file.

    Raises:   ImageError: it is none, or a field is wrong or not supported.
    """
    first = await read_early(file, 0, max(1, min(file.size, 1 << headers.CLUSTER_BITS_MAX)))
    return headers.parse(bytes(first), file.filename)
