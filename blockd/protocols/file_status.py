"""What a file is at the moment, asked for without its times (statx(2)).

Who asks for the times of a file has the kernel give its next change a time of its own (Linux 6.13,
"multigrain timestamps"), which the next sync then has to write. Each sync looks at the file, and guests sync
often.
"""

import ctypes
import errno
import os
import stat
import struct
from pathlib import Path
from typing import NamedTuple

# None: the C library has no such call.
_call = getattr(ctypes.CDLL(None, use_errno=True), "statx", None)

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
# Type, number of links, inode, size.
_WANTED = 0x1 | 0x4 | 0x100 | 0x200
# `struct statx` as far as it is needed: links, mode, inode, size, the device that it is, and that it is on.
_STATX = struct.Struct("=16xI8xH2xQQ80xIIII")
_STATX_SIZE = 256
_NO_SUCH_CALL = (errno.ENOSYS, errno.EPERM, errno.EINVAL)


class FileStatus(NamedTuple):
    """What is of interest about a file or device."""

    is_regular: bool
    link_count: int
    # In bytes.
    size: int
    # Equal exactly for the same file or device, by whichever name it was found.
    identity: tuple[int, int]


def status_of_open(fd: int) -> FileStatus:
    """The status of an open file.

    Raises:   OSError: there is none to be had.
    """
    return _statx(fd, b"", _AT_EMPTY_PATH) or _from_stat(os.fstat(fd))


def status_of_name(path: str) -> FileStatus:
    """The status of the file that has this name, through symbolic links.

    Raises:   OSError: there is none, or it cannot be looked at.
    """
    return _statx(_AT_FDCWD, os.fsencode(path), 0) or _from_stat(Path(path).stat())


def _identity(mode: int, device: int, inode: int, special_device: int) -> tuple[int, int]:
    return (-1, special_device) if stat.S_ISBLK(mode) else (device, inode)


def _from_stat(status: os.stat_result) -> FileStatus:
    identity = _identity(status.st_mode, status.st_dev, status.st_ino, status.st_rdev)
    return FileStatus(stat.S_ISREG(status.st_mode), status.st_nlink, status.st_size, identity)


def _statx(fd: int, path: bytes, flags: int) -> FileStatus | None:
    """None: there is no such call."""
    if _call is None:
        return None
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    if _call(fd, path, flags, _WANTED, buffer):
        code = ctypes.get_errno()
        if code in _NO_SUCH_CALL:
            return None
        raise OSError(code, os.strerror(code))
    links, mode, inode, size, *devices = _STATX.unpack_from(buffer)
    special_device, device = os.makedev(*devices[:2]), os.makedev(*devices[2:])
    return FileStatus(stat.S_ISREG(mode), links, size, _identity(mode, device, inode, special_device))
