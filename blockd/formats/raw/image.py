"""A raw image: guest offsets are file offsets.

It adds nothing to the file but the disk's size in whole sectors, so its fast paths are the file's own.
"""

from collections.abc import Mapping, Sequence
from typing import Final, Self

from blockd.aio import uninterrupted
from blockd.block.file_events import FileEvent
from blockd.block.layers import labels_of_extents
from blockd.block.node import BlockNode, Buffer, Labelled, ProtocolNode, Segment
from blockd.block.permissions import Access
from blockd.errors import ErrorKind, RequestError
from blockd.extents import Extent, Kind
from blockd.units import KIB, SECTOR_SIZE, align_up

# In what units filesystems tell of holes, and how many of them are told at once.
HOLE_UNIT: Final = 4 * KIB
LABEL_COUNT_MAX: Final = 64 * KIB


class RawImage(BlockNode):
    """The bytes of a file as a disk; a last part of a sector is filled up with zeroes."""

    driver = "raw"

    def __init__(self, file: ProtocolNode, *, node_name: str, read_only: bool) -> None:
        super().__init__(node_name, file.filename, align_up(file.size, SECTOR_SIZE), read_only=read_only)
        self._use(file)

    def _use(self, file: ProtocolNode) -> None:
        self.file = file
        self.read_nowait = file.read_nowait  # type: ignore[method-assign]
        self._set_read_only(self.read_only)

    def stand_before(self, child: BlockNode) -> None:
        """Have another file from now on.

        Needs:    no request is in flight; what was written is durable, for flushes go to the new one.
        """
        assert isinstance(child, ProtocolNode), "the bytes of a raw image are in one"
        self.filename, self.size = child.filename, align_up(child.size, SECTOR_SIZE)
        self._use(child)

    def _set_read_only(self, read_only: bool) -> None:
        self.read_only = read_only
        write_nowait = super().write_nowait if read_only else self.file.write_nowait
        self.write_nowait = write_nowait  # type: ignore[method-assign]

    @classmethod
    async def open(cls, file: ProtocolNode, *, node_name: str, read_only: bool) -> Self:
        """Open the whole of `file` as a disk."""
        return cls(file, node_name=node_name, read_only=read_only)

    def children(self) -> Mapping[str, BlockNode]:
        return {"file": self.file}

    def access_to(self, role: str, wanted: Access, *, read_only: bool) -> Access:
        return wanted

    async def read(self, offset: int, length: int) -> Buffer:
        self.file.announce(FileEvent.READ_AIO)
        return await self.file.read(offset, length)

    async def plan_read(self, offset: int, length: int) -> list[Segment]:
        self.file.announce(FileEvent.READ_AIO)
        return [Segment(length, self.file, offset)]

    async def map(self, offset: int, length: int) -> list[Extent]:
        return await self.file.map(offset, length)

    async def labels(
        self, offset: int, length: int, *, with_places: bool, with_holes: bool
    ) -> Labelled | None:
        if not with_holes:
            return Labelled(b"D", 0, offset, offset + length, None)
        return labels_of_extents(await self.file.map(offset, length), HOLE_UNIT, LABEL_COUNT_MAX)

    async def place(self, told: Labelled, ranges: Sequence[tuple[int, int]]) -> list[Segment]:
        file, new = self.file, tuple.__new__  # see layers.py
        file.announce(FileEvent.READ_AIO, len(ranges))
        return [new(Segment, (length, file, offset)) for offset, length in ranges]

    def kind_nowait(self, offset: int, length: int) -> Kind | None:
        return None  # holes are known to the filesystem only

    async def write(self, offset: int, data: Buffer) -> None:
        self._require_writable()
        self.file.announce(FileEvent.WRITE_AIO)
        await self.file.write(offset, data)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        self._require_writable()
        await self.file.write_zeroes(offset, length, unmap=unmap)

    async def discard(self, offset: int, length: int) -> None:
        self._require_writable()
        await self.file.discard(offset, length)

    def needs_flush(self) -> bool:
        return self.file.needs_flush()

    async def flush(self) -> None:
        await self.file.flush()

    @uninterrupted
    async def resize(self, size: int) -> None:
        self._require_writable()
        if size % SECTOR_SIZE:
            raise RequestError(f"The new size must be a multiple of {SECTOR_SIZE}")
        await self.file.resize(size)
        self.size = size

    async def reopen(self, *, read_only: bool) -> None:
        await self.flush()
        self._set_read_only(read_only)

    async def close(self) -> None:
        if self.needs_flush():
            await self.flush()

    def _require_writable(self) -> None:
        """The file may be writable all the same, when it is a node that others use too."""
        if self.read_only:
            raise RequestError(f"'{self.filename}' was opened read-only", kind=ErrorKind.READ_ONLY)
