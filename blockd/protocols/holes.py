"""Where a file holds data and where it has holes, as far as its filesystem can tell (lseek(2))."""

import errno
import os
import sys

from blockd.extents import Extent, Kind

# Extents told at once.
EXTENT_COUNT_MAX = 64


def data_and_holes(fd: int, offset: int, length: int) -> list[Extent]:
    """Data and holes by turns, up to `EXTENT_COUNT_MAX` of them."""
    end = offset + length
    extents: list[Extent] = []
    kind = Kind.DATA
    while offset < end and len(extents) < EXTENT_COUNT_MAX:
        limit = min(_seek(fd, offset, os.SEEK_HOLE if kind is Kind.DATA else os.SEEK_DATA), end)
        if limit > offset:
            extents.append(Extent(offset, limit - offset, kind))
        offset = limit
        kind = Kind.ZERO if kind is Kind.DATA else Kind.DATA
    return extents


def _seek(fd: int, offset: int, whence: int) -> int:
    """Where data, or a hole, begins at or after `offset`; far away if there is none."""
    try:
        return os.lseek(fd, offset, whence)
    except OSError as error:
        if error.errno == errno.ENXIO and whence == os.SEEK_HOLE:
            return offset  # at or past the end of the file: a hole
        # No data follows; or the filesystem cannot tell, then all of it counts as data.
        return sys.maxsize
