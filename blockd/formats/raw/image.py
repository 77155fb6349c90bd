"""A raw image: guest offsets are file offsets.

It adds nothing to the file but the disk's size in whole sectors, so its fast paths are the file's own.
"""

from collections.abc import Mapping
from typing import Self

from blockd.block.file_events import FileEvent
from blockd.block.node import BlockNode, Buffer, ProtocolNode, Segment
from blockd.errors import ErrorKind, RequestError
from blockd.extents import Extent, Kind
from blockd.units import SECTOR_SIZE, align_up


class RawImage(BlockNode):
    """The bytes of a file as a disk; a last part of a sector is filled up with zeroes."""

    driver = "raw"

    def __init__(self, file: ProtocolNode, *, node_name: str, read_only: bool) -> None:
        super().__init__(node_name, file.filename, align_up(file.size, SECTOR_SIZE), read_only=read_only)
        self.file = file
        self.read_nowait = file.read_nowait  # type: ignore[method-assign]
        self._set_read_only(read_only)

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

    async def read(self, offset: int, length: int) -> Buffer:
        self.file.announce(FileEvent.READ_AIO)
        return await self.file.read(offset, length)

    async def plan_read(self, offset: int, length: int) -> list[Segment]:
        self.file.announce(FileEvent.READ_AIO)
        return [Segment(length, self.file, offset)]

    async def map(self, offset: int, length: int) -> list[Extent]:
        return await self.file.map(offset, length)

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

    async def flush(self) -> None:
        await self.file.flush()

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
        await self.flush()

    def _require_writable(self) -> None:
        """The file may be writable all the same, when it is a node that others use too."""
        if self.read_only:
            raise RequestError(f"'{self.filename}' was opened read-only", kind=ErrorKind.READ_ONLY)
