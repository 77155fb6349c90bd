"""Keeping writes past the page cache, and those through it, out of each other's folios.

The page cache keeps a file in folios of up to 2 MiB, each dirty or clean as a whole. Before and after a
direct write the kernel drops the folios that overlap it. If one is dirty after the write, because somebody
has written to another part of it through the cache meanwhile, it cannot: the cache then holds what was on the
disk before, and the next sync fails (Linux: "Page cache invalidation failure on direct I/O"). Reads, and what
is read ahead, are not in the way: a clean folio is dropped.

So a write of one kind does not begin while there is one of the other kind in a folio that it touches. Direct
writes give way: they are copies, which may go through the cache as well.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from blockd.units import MIB

# No folio is larger (`MAX_PAGECACHE_ORDER` where pages have 4 KiB), and all begin at a multiple of their
# size.
FOLIO_LENGTH_MAX = 2 * MIB


class Folios:
    """The folios of one file that are being written; any thread."""

    def __init__(self) -> None:
        # How many direct writes there are, by folio.
        self.direct: dict[int, int] = {}
        # The same of writes through the cache, those that wait for direct ones included.
        self._cached: dict[int, int] = {}
        # What the event loop is writing through the cache, from one offset to another.
        self.nowait: tuple[int, int] | None = None
        self._changed = threading.Condition()

    def begin_direct(self, offset: int, length: int) -> bool:
        """Begin a direct write, until `end_direct`; False: others write there through the cache."""
        folios = _folios(offset, offset + length)
        with self._changed:
            _add(self.direct, folios, 1)
            # The loop takes no lock: it says what it writes and looks for direct writes then, so one of the
            # two sees the other.
            if not self._is_written_through_cache(folios):
                return True
        self.end_direct(offset, length)
        return False

    def _is_written_through_cache(self, folios: range) -> bool:
        nowait = self.nowait
        if nowait is not None and not _are_apart(_folios(*nowait), folios):
            return True
        return any(folio in self._cached for folio in folios)

    def end_direct(self, offset: int, length: int) -> None:
        """A direct write is over, or did not begin."""
        with self._changed:
            _add(self.direct, _folios(offset, offset + length), -1)
            self._changed.notify_all()

    @contextmanager
    def past_cache(self, offset: int, length: int) -> Iterator[bool]:
        """Make a direct write; tells whether it may be made."""
        may_begin = self.begin_direct(offset, length)
        try:
            yield may_begin
        finally:
            if may_begin:
                self.end_direct(offset, length)

    def is_direct(self, offset: int, end: int) -> bool:
        """Whether there is a direct write in any folio of a range; for who has set `nowait` to it."""
        return any(folio in self.direct for folio in _folios(offset, end))

    @contextmanager
    def through_cache(self, offset: int, length: int) -> Iterator[None]:
        """Write through the cache in a thread, when the direct writes of before are over."""
        folios = _folios(offset, offset + length)
        with self._changed:
            _add(self._cached, folios, 1)
            while any(folio in self.direct for folio in folios):
                self._changed.wait()
        try:
            yield
        finally:
            with self._changed:
                _add(self._cached, folios, -1)


def _folios(offset: int, end: int) -> range:
    return range(offset // FOLIO_LENGTH_MAX, (end - 1) // FOLIO_LENGTH_MAX + 1)


def _are_apart(one: range, other: range) -> bool:
    return one.stop <= other.start or other.stop <= one.start


def _add(counts: dict[int, int], folios: range, change: int) -> None:
    for folio in folios:
        count = counts.get(folio, 0) + change
        if count:
            counts[folio] = count
        else:
            del counts[folio]
