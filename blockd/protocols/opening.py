"""Opening files and block devices."""

import contextlib
import errno
import fcntl
import os
import stat

from blockd.errors import RequestError

_BLKGETSIZE64 = 0x80081272


def open_blocking(path: str, read_only: bool, name: str) -> tuple[int, int]:
    """Open `path`, `name` in errors, and find out its size, without ever waiting on a FIFO."""
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        fd = os.open(path, flags)
    except (OSError, ValueError) as error:
        reason = os.strerror(error.errno or errno.EIO) if isinstance(error, OSError) else "the name has a NUL"
        raise RequestError(f"Could not open '{name}': {reason}") from error
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, fd)
        size = _size(fd, name)
        undo.pop_all()
    return fd, size


def _size(fd: int, name: str) -> int:
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode):
        return status.st_size
    if stat.S_ISBLK(status.st_mode):
        return int.from_bytes(fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8)), "little")
    raise RequestError(f"Could not open '{name}': not a regular file or block device")
