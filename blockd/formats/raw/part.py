"""A part of a file as a disk, the options `offset` and `size` of raw images; or the whole of another disk.

No image can record such a disk as its backing file, for a file name says nothing of a part, nor of what is
between a disk and its file; its own name is one of those that are refused there.
"""

import json
from collections.abc import Mapping
from typing import Final, NamedTuple

from blockd.aio import uninterrupted
from blockd.block.chain import chain_map
from blockd.block.file_events import FileEvent
from blockd.block.node import BlockNode, Buffer, ProtocolNode, Segment
from blockd.block.permissions import RESIZE, Access
from blockd.errors import ErrorKind, RequestError
from blockd.extents import Extent, Kind
from blockd.units import SECTOR_SIZE, align_up

NAME_PREFIX: Final = "json:"
_OFFSET_END: Final = 1 << 63


class Part(NamedTuple):
    """Where a part of a file begins, and its size, both in bytes; None: up to the end of the file."""

    start: int
    size: int | None


class RawPart(BlockNode):
    """The bytes of a node from `start` on; a last part of a sector is filled up with zeroes.

    `size` None: up to the end of the file; it moves by `resize` only.
    """

    driver = "raw"

    def __init__(
        self, file: BlockNode, start: int, size: int | None, *, node_name: str, read_only: bool
    ) -> None:
        super().__init__(node_name, "", size or 0, read_only=read_only)
        self._start = start
        self._fixed_size = size
        self.stand_before(file)

    @property
    def part(self) -> Part:
        """Which part of the file it is."""
        return Part(self._start, self._fixed_size)

    def move(self, part: Part) -> None:
        """Be another part of the file from now on.

        Raises:   RequestError: it is not inside the file; all is as before.
        Needs:    no request is in flight.
        """
        _require_inside(self.file, *part)
        self._start, self._fixed_size = part
        if part.size is not None:
            self.size = part.size
        self.stand_before(self.file)

    def stand_before(self, child: BlockNode) -> None:
        """Have another node below from now on.

        Raises:   RequestError: it is too small.
        Needs:    no request is in flight; what was written is durable, for flushes go to the new one.
        """
        start, size = self._start, self._fixed_size
        _require_inside(child, start, size)
        # As in QEMU, what was not told is left out, and members stand in this order.
        told: dict[str, object] = {"offset": start} if start or size is None else {}
        told |= {"driver": self.driver} | ({} if size is None else {"size": size})
        below = {"driver": child.driver, "filename": child.filename}
        self.filename = NAME_PREFIX + json.dumps({**told, "file": below})
        self.file = child
        self._follow_end()

    def _follow_end(self) -> None:
        """Reach to the end of the file, counted in whole sectors as QEMU does, unless the size is fixed."""
        if self._fixed_size is None:
            self.size = align_up(align_up(self.file.size, SECTOR_SIZE) - self._start, SECTOR_SIZE)

    def children(self) -> Mapping[str, BlockNode]:
        return {"file": self.file}

    def access_to(self, role: str, wanted: Access, *, read_only: bool) -> Access:
        if isinstance(self.file, ProtocolNode):
            return wanted
        return Access(wanted.need, wanted.allow & ~RESIZE)

    def _announce(self, event: FileEvent) -> None:
        if isinstance(self.file, ProtocolNode):
            self.file.announce(event)

    # -- reading ------------------------------------------------------------------------------

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        return self.file.read_nowait(self._start + offset, length)

    async def read(self, offset: int, length: int) -> Buffer:
        self._announce(FileEvent.READ_AIO)
        return await self.file.read(self._start + offset, length)

    async def plan_read(self, offset: int, length: int) -> list[Segment]:
        self._announce(FileEvent.READ_AIO)
        return await self.file.plan_read(self._start + offset, length)

    async def map(self, offset: int, length: int) -> list[Extent]:
        # Of its whole chain: what an image below does not hold itself is in its backing file.
        extents = await chain_map(self.file, self._start + offset, length)
        return [Extent(extent.offset - self._start, extent.length, extent.kind) for extent in extents]

    def kind_nowait(self, offset: int, length: int) -> Kind | None:
        return None  # as of other raw images: it is not known without a look

    # -- writing ------------------------------------------------------------------------------

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        return not self.read_only and self.file.write_nowait(self._start + offset, data)

    async def write(self, offset: int, data: Buffer) -> None:
        self._require_writable()
        self._announce(FileEvent.WRITE_AIO)
        await self.file.write(self._start + offset, data)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        self._require_writable()
        await self.file.write_zeroes(self._start + offset, length, unmap=unmap)

    async def discard(self, offset: int, length: int) -> None:
        self._require_writable()
        await self.file.discard(self._start + offset, length)

    async def flush(self) -> None:
        await self.file.flush()

    @uninterrupted
    async def resize(self, size: int) -> None:
        self._require_writable()
        if self._fixed_size is not None:
            raise RequestError("Cannot resize fixed-size raw disks")
        if size >= _OFFSET_END - self._start:
            raise RequestError("Disk size too large for the chosen offset")
        await self.file.resize(self._start + size)
        self._follow_end()

    async def reopen(self, *, read_only: bool) -> None:
        await self.flush()
        self.read_only = read_only

    async def close(self) -> None:
        await self.flush()

    def _require_writable(self) -> None:
        if self.read_only:
            raise RequestError(f"'{self.filename}' was opened read-only", kind=ErrorKind.READ_ONLY)


def _require_inside(file: BlockNode, start: int, size: int | None) -> None:
    if start > file.size:
        raise RequestError(
            f"Offset ({start}) cannot be greater than size of the containing file ({file.size})"
        )
    if size is None:
        return
    if start + size > file.size:
        raise RequestError(
            f"The sum of offset ({start}) and size ({size}) has to be smaller or equal to the  actual size "
            f"of the containing file ({file.size})"
        )
    if size % SECTOR_SIZE:
        raise RequestError(f"Specified size is not multiple of {SECTOR_SIZE}")
