"""A new raw image as the target of a stream that fills it from an empty file.

A raw image cannot say what it lacks. While it is new and nobody uses it, that can be kept in memory:
this is an overlay for the time of one copy, and a plain file afterwards. An image that is in use, or that
has to outlive a crash half copied, needs an add-cow file beside it instead.
"""

from collections.abc import Mapping, Sequence
from itertools import islice

from blockd.block.node import BlockNode, Buffer, FillCounts, IsWanted, OverlayNode, ProtocolNode, Segment
from blockd.block.segments import SourcePlan, read_segments
from blockd.errors import ErrorKind, RequestError
from blockd.extents import Extent, Kind, Range, RangeSet
from blockd.formats.copying import Part, Target, empty_ranges, split_zeroes

CLUSTER_SIZE = 65536

# How many ranges that are there already are told at once.
PRESENT_COUNT_MAX = 512


class RawTarget(OverlayNode):
    """A file of holes, filled once; only a stream writes to it.

    Needs:    the file is new: it reads as zeroes all over.
    """

    driver = "raw"
    cluster_size = CLUSTER_SIZE

    def __init__(self, file: ProtocolNode, backing: BlockNode, *, node_name: str) -> None:
        super().__init__(node_name, file.filename, backing.size, read_only=False)
        self.file = file
        self.backing = backing
        self.backing_filename = backing.filename
        self.backing_format = None
        self._present = RangeSet()

    def children(self) -> Mapping[str, BlockNode]:
        return {"file": self.file}

    # -- reading ------------------------------------------------------------------------------

    def read_own_nowait(self, offset: int, length: int) -> Buffer | None:
        return None

    async def read(self, offset: int, length: int) -> Buffer:
        return await read_segments(await self.plan_read(offset, length), length)

    async def plan_read(self, offset: int, length: int) -> list[Segment]:
        segments: list[Segment] = []
        end = offset + length
        while offset < end:
            extent = (await self.map(offset, end - offset))[0]
            if extent.kind is Kind.DATA or self.backing is None:
                segments.append(Segment(extent.length, self.file, offset))
            else:
                segments += await self.backing.plan_read(offset, extent.length)
            offset = extent.end
        return segments

    async def map(self, offset: int, length: int) -> list[Extent]:
        end, extents = offset + length, []
        for start, stop in islice(self._present.clipped(offset, end), PRESENT_COUNT_MAX):
            if offset < start:
                extents.append(Extent(offset, start - offset, Kind.UNALLOCATED))
            extents.append(Extent(start, stop - start, Kind.DATA))
            offset = stop
        if offset < end and len(extents) < PRESENT_COUNT_MAX:
            extents.append(Extent(offset, end - offset, Kind.UNALLOCATED))
        return extents

    def kind_nowait(self, offset: int, length: int) -> Kind | None:
        return None

    # -- writing ------------------------------------------------------------------------------

    async def fill(
        self,
        ranges: Sequence[Range],
        source: SourcePlan,
        is_wanted: IsWanted,
        *,
        keep_cached: bool = False,
    ) -> FillCounts:
        parts, zeroed = [], 0
        empty = [(start, min(end, self.size)) for start, end in await empty_ranges(self, ranges)]
        for start, end, is_zero in split_zeroes(self, empty, source):
            if is_zero:
                zeroed += end - start  # a hole already
            else:
                parts.append(Part.at([(start, end)], start))
        zero_clusters = await Target(self.file, CLUSTER_SIZE, keep_cached).copy(parts, source)
        for start, end in empty:
            self._present.add(start, end)
        found_zero = sum(min(CLUSTER_SIZE, self.size - cluster) for cluster in zero_clusters)
        copied = sum(part.length for part in parts) - found_zero
        return FillCounts(copied, zeroed + found_zero, 0)

    async def require_recordable(self, filename: str | None, backing_format: str | None) -> None:
        """Nothing is recorded."""

    async def change_backing(self, filename: str | None, backing_format: str | None) -> None:
        await self.flush()
        self.backing_filename, self.backing_format = filename, backing_format

    async def flush(self) -> None:
        await self.file.flush()

    async def write(self, offset: int, data: Buffer) -> None:
        raise self._refusal()

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        raise self._refusal()

    async def discard(self, offset: int, length: int) -> None:
        raise self._refusal()

    def _refusal(self) -> RequestError:
        return RequestError(f"'{self.filename}' is being filled", kind=ErrorKind.READ_ONLY)

    async def close(self) -> None:
        """Nothing is held but the file, which has its own owner."""
