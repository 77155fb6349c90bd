"""A file in memory of which little is in the page cache: it is sparse, has no log, and lives long."""

import random
from collections.abc import Callable

from blockd.block.node import Buffer, OverlayNode
from blockd.extents import Extent, Kind, merged
from blockd.formats.add_cow.image import AddCowImage
from blockd.formats.qcow2.image import Qcow2Image
from blockd.formats.qed.image import QedImage
from tests.recording import RecordingFile

_PAGE_BITS = 12
_PAGE = 1 << _PAGE_BITS
_NOTHING = bytes(_PAGE)


class ColdFile(RecordingFile):
    """A file whose answers at once are refused as often as `would_wait` says; the others are of threads."""

    def __init__(self, name: str, would_wait: Callable[[], bool], content: bytes = b"") -> None:
        super().__init__(name=name)
        self.has_log = False
        self.would_wait = would_wait
        self._pages: dict[int, bytearray] = {}
        if content:
            self.write_blocking(0, content)

    def again(self) -> "ColdFile":
        file = ColdFile(self.filename, self.would_wait)
        file._pages = {number: page[:] for number, page in self._pages.items()}
        file.size = self.size
        file.beside = self.beside and self.beside.again()
        return file

    @property
    def content(self) -> bytes:
        """All of it; for small files."""
        return b"".join(
            bytes(self._pages.get(number, _NOTHING)) for number in range(self.size + _PAGE - 1 >> 12)
        )[: self.size]

    def readinto_blocking(self, offset: int, buffer: memoryview) -> None:
        position, length = 0, len(buffer)
        while position < length:
            number, start = divmod(offset + position, _PAGE)
            count = min(_PAGE - start, length - position)
            page = self._pages.get(number, _NOTHING)
            buffer[position : position + count] = page[start : start + count]
            position += count

    def write_blocking(self, offset: int, data: Buffer) -> None:
        position, length = 0, len(data)
        while position < length:
            number, start = divmod(offset + position, _PAGE)
            count = min(_PAGE - start, length - position)
            page = self._pages.get(number)
            if page is None:
                page = self._pages[number] = bytearray(_PAGE)
            page[start : start + count] = data[position : position + count]
            position += count
        self.size = max(self.size, offset + length)

    def punch_hole_blocking(self, offset: int, length: int) -> None:
        end = min(offset + length, self.size)
        for number in range(offset >> _PAGE_BITS, (end + _PAGE - 1) >> _PAGE_BITS):
            if (page := self._pages.get(number)) is not None:
                start = number << _PAGE_BITS
                low, high = max(offset, start) - start, min(end, start + _PAGE) - start
                if high - low == _PAGE:
                    del self._pages[number]
                else:
                    page[low:high] = bytes(high - low)

    def sync_blocking(self) -> None:
        """Nothing is ever lost."""

    def truncate_blocking(self, size: int) -> None:
        if size < self.size:
            self.punch_hole_blocking(size, self.size - size)
        self.size = size

    async def map(self, offset: int, length: int) -> list[Extent]:
        end, found = offset + length, list[Extent]()
        for number in sorted(self._pages):
            low, high = max(offset, number << _PAGE_BITS), min(end, number + 1 << _PAGE_BITS)
            if low < high:
                if offset < low:
                    found.append(Extent(offset, low - offset, Kind.ZERO))
                found.append(Extent(low, high - low, Kind.DATA))
                offset = high
        if offset < end:
            found.append(Extent(offset, end - offset, Kind.ZERO))
        return list(merged(found))


def coldness(rng: random.Random, share: float) -> Callable[[], bool]:
    """Say "would wait" so often: 1 is always."""
    if share >= 1:
        return lambda: True
    draw = rng.random
    return lambda: draw() < share


def hold_few_tables(image: OverlayNode) -> None:
    """Let the caches of an image hold two tables."""
    if isinstance(image, Qcow2Image):
        image.metadata.mapping.cache.count_max = image.metadata.allocator.cache.count_max = 2
    elif isinstance(image, QedImage):
        image.metadata.mapping.cache.count_max = 2
    elif isinstance(image, AddCowImage):
        image.metadata.bitmap.cache.count_max = 2
