"""Where a file holds data and where holes, as far as its filesystem can tell (lseek(2), fallocate(2))."""

import contextlib
import ctypes
import errno
import os
import sys

from blockd.extents import Extent, Kind

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

_FALLOC_KEEP_SIZE = 0x01
_FALLOC_PUNCH_HOLE = 0x02
# What fallocate answers where a filesystem or device cannot do it.
_NOT_FOR_THIS_FILE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV, errno.EPERM)

# More than any filesystem allocates behind a file's end.
_BEHIND_LENGTH = 1 << 33
# Extents told at once.
EXTENT_COUNT_MAX = 512


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


def punch_hole(fd: int, offset: int, length: int) -> bool:
    """Give the space of a range back, so that it reads as zeroes; False: it cannot be done with this file.

    Raises:   OSError: it can be, and has failed.
    """
    return _fallocate(fd, _FALLOC_PUNCH_HOLE | _FALLOC_KEEP_SIZE, offset, length)


def free_behind(fd: int, end: int) -> None:
    """Give back what the filesystem has allocated behind the end of a file: XFS does, for what may follow."""
    with contextlib.suppress(OSError):  # it is given back some minutes after the file is closed
        punch_hole(fd, end, _BEHIND_LENGTH)


def allocate(fd: int, offset: int, length: int) -> bool:
    """Have space for a range; False and raises as `punch_hole`."""
    return _fallocate(fd, 0, offset, length)


def _fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
    if _libc.fallocate(fd, mode, offset, length) == 0:
        return True
    code = ctypes.get_errno()
    if code not in _NOT_FOR_THIS_FILE:
        raise OSError(code, os.strerror(code))
    return False
