"""Bringing a file's data to the disk, by itself: nothing that tells where it is (sync_file_range(2)).

It is no substitute for a sync, and makes one short. Where there is no such call a sync does it all.
"""

import ctypes
import errno
import os

_libc = ctypes.CDLL(None, use_errno=True)
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]

_WRITE = 2
_WRITE_AND_WAIT = 7
_NO_SUCH_CALL = (errno.ENOSYS, errno.EINVAL, errno.ESPIPE, errno.EPERM)


def start(fd: int, offset: int, length: int) -> None:
    """Have the kernel begin with a range; promises nothing."""
    _libc.sync_file_range(fd, offset, length, _WRITE)


def finish(fd: int, offset: int = 0, length: int = 0) -> None:
    """Return when what is in memory only by now has been written; a length of 0 is up to the end.

    Raises:   OSError: it has not. The kernel tells that once, so the next sync may know nothing of it.
    """
    if _libc.sync_file_range(fd, offset, length, _WRITE_AND_WAIT):
        code = ctypes.get_errno()
        if code not in _NO_SUCH_CALL:
            raise OSError(code, os.strerror(code))
