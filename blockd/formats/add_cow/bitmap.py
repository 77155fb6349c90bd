"""Which clusters are in the image: one bit each, in pages of which some are in memory.

    bit n    byte n / 8 behind the header, least significant first; 1: in the image, 0: in the backing

A bit is only ever set: what was once written to the image stays there. Memory holds the newest bits;
the disk gets them by checkpoints (checkpoint.py), and a page with bits that the disk does not have
stays in memory until then.
"""

import re
from itertools import islice
from typing import Final, NamedTuple

from blockd.block.file_events import FileEvent
from blockd.block.node import ProtocolNode
from blockd.formats.table_cache import TableCache
from blockd.units import MIB

PAGE_SIZE: Final = 4096
# One page covers 2 GiB of 64 KiB clusters, the cache 8 TiB.
PAGE_CACHE_SIZE_MAX: Final = 16 * MIB
PAGE_COUNT_MAX: Final = PAGE_CACHE_SIZE_MAX // PAGE_SIZE
PAGE_BIT_COUNT: Final = PAGE_SIZE * 8

# So many runs are told at once.
RUN_COUNT_MAX: Final = 512

_ALIKE: Final = re.compile("0+|1+")
_PAGE_SHIFT: Final = PAGE_BIT_COUNT.bit_length() - 1
_BYTE_MASK: Final = PAGE_SIZE - 1

ABSENT: Final = 0
PRESENT: Final = 1
# Some clusters of the range are present and some are not, or a page has to be read to know.
MIXED: Final = -1


class PageWrite(NamedTuple):
    """A page for the disk."""

    number: int
    host_offset: int
    data: bytes


class Bitmap:
    """The bitmap in `file` from `host_offset` on. Ranges are given in clusters, ends exclusive."""

    def __init__(self, file: ProtocolNode, host_offset: int) -> None:
        self._file = file
        self._host_offset = host_offset
        self.cache: TableCache[bytearray] = TableCache(PAGE_COUNT_MAX)
        self._pages = self.cache.tables
        self._changed = self.cache.changed

    # -- looking up ---------------------------------------------------------------------------

    def state_nowait(self, first: int, end: int) -> int:
        """PRESENT or ABSENT if all clusters of a range are, and that is known without waiting; else MIXED."""
        page = self._pages.get(first >> _PAGE_SHIFT)
        if page is None:
            page = self.page_nowait(first >> _PAGE_SHIFT)
            if page is None:
                return MIXED
        count = end - first
        if count == 1:
            return page[first >> 3 & _BYTE_MASK] >> (first & 7) & 1
        if end - 1 >> _PAGE_SHIFT != first >> _PAGE_SHIFT:
            return MIXED
        low = first >> 3 & _BYTE_MASK
        bits = int.from_bytes(page[low : low + (count + 14) // 8], "little") >> (first & 7)
        mask = (1 << count) - 1
        bits &= mask
        return ABSENT if not bits else PRESENT if bits == mask else MIXED

    async def run(self, first: int, end: int) -> tuple[int, int]:
        """PRESENT or ABSENT, and up to where that holds from `first` on; at most to the end of a page."""
        page = await self.page(first >> _PAGE_SHIFT)
        end = min(end, page_end(first))
        low = first >> 3 & _BYTE_MASK
        high = (end - 1 >> 3 & _BYTE_MASK) + 1
        bits = int.from_bytes(page[low:high], "little") >> (first & 7)
        state = bits & 1
        other = ~bits if state else bits
        other &= (1 << (end - first)) - 1
        return state, first + (other & -other).bit_length() - 1 if other else end

    async def runs(self, first: int, end: int) -> list[tuple[int, int]]:
        """PRESENT or ABSENT by turns, and up to where each holds, from `first` on.

        May stop before the end: after a page, or many runs.
        """
        page = await self.page(first >> _PAGE_SHIFT)
        end = min(end, page_end(first))
        low = first >> 3 & _BYTE_MASK
        high = (end - 1 >> 3 & _BYTE_MASK) + 1
        bits = int.from_bytes(page[low:high], "little") >> (first & 7)
        digits = format(bits, f"0{end - first}b")[::-1]  # the least significant one is the first cluster
        found = islice(_ALIKE.finditer(digits, 0, end - first), RUN_COUNT_MAX)
        return [(PRESENT if digits[run.start()] == "1" else ABSENT, first + run.end()) for run in found]

    def page_nowait(self, number: int) -> bytearray | None:
        """A page if it is in memory, or in the page cache."""
        return self.cache.load_nowait(number, lambda: self._read_nowait(number))

    def _read_nowait(self, number: int) -> bytearray | None:
        data = self._file.read_nowait(self._host_offset + number * PAGE_SIZE, PAGE_SIZE)
        return None if data is None else bytearray(data)

    async def page(self, number: int) -> bytearray:
        """A page, read if need be.

        Needs:    what is done with it is done before anything else is waited for: it may be evicted then.
        """
        page = self._pages.get(number)
        return await self.cache.load(number, lambda: self._read(number)) if page is None else page

    async def _read(self, number: int) -> bytearray:
        self._file.announce(FileEvent.L2_LOAD)
        return bytearray(await self._file.read(self._host_offset + number * PAGE_SIZE, PAGE_SIZE))

    # -- changing -----------------------------------------------------------------------------

    async def set(self, first: int, end: int) -> None:
        """Say that clusters are in the image now.

        Fails to: some of them may be, from the first on.
        """
        while first < end:
            await self.page(first >> _PAGE_SHIFT)
            piece_end = min(end, page_end(first))
            self.set_nowait(first, piece_end)
            first = piece_end

    def set_nowait(self, first: int, end: int) -> None:
        """Say that clusters of one page are in the image now.

        Needs:    the page was looked up without waiting for anything since.
        """
        number = first >> _PAGE_SHIFT
        page = self._pages[number]
        low, high = first >> 3 & _BYTE_MASK, (end - 1 >> 3 & _BYTE_MASK) + 1
        added = ((1 << end - first) - 1) << (first & 7)
        bits = int.from_bytes(page[low:high], "little")
        if bits | added != bits:
            page[low:high] = (bits | added).to_bytes(high - low, "little")
            self._changed.add(number)

    def take_changes(self) -> list[PageWrite]:
        """Hand out every page with bits that the disk does not have, and count them as written."""
        return [
            PageWrite(number, self._host_offset + number * PAGE_SIZE, bytes(self._pages[number]))
            for number in self.cache.take_changed()
        ]

    def changes_written(self, writes: list[PageWrite]) -> None:
        """The disk has these pages now."""
        self.cache.write_succeeded(write.number for write in writes)

    def changes_failed(self, writes: list[PageWrite]) -> None:
        """The disk may or may not have these pages: they have to be written again."""
        self.cache.write_failed([write.number for write in writes])


def page_end(cluster: int) -> int:
    """The first cluster whose bit is on the page behind that of `cluster`."""
    return ((cluster >> _PAGE_SHIFT) + 1) << _PAGE_SHIFT
