"""What a file is at the moment, asked for without its times (statx(2)).

Who asks for the times of a file has the kernel give its next change a time of its own (Linux 6.13,
"multigrain timestamps"), which the next sync then has to write. Each sync looks at the file, and guests sync
often.
"""

import asyncio
import ctypes
import errno
import os
import stat
import struct
from pathlib import Path
from typing import NamedTuple

from blockd.aio import begin_in_thread
from blockd.errors import Operation, StorageError
from blockd.units import SECTOR_SIZE

# None: the C library has no such call.
_call = getattr(ctypes.CDLL(None, use_errno=True), "statx", None)

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_AT_STATX_DONT_SYNC = 0x4000
# Type, number of links, inode, size.
_WANTED = 0x1 | 0x4 | 0x100 | 0x200
# `struct statx` as far as it is needed: links, mode, inode, size, the device that it is, and that it is on.
_STATX = struct.Struct("=16xI8xH2xQQ80xIIII")
_STATX_SIZE = 256
_BIRTH_TIME = 0x800
# The same: what is told, and the time at which the file was made, in seconds and nanoseconds.
_STATX_BIRTH = struct.Struct("=I76xqI")
_NO_SUCH_CALL = (errno.ENOSYS, errno.EPERM, errno.EINVAL)


# Who lists nodes does not wait longer than this for the server of one.
USAGE_TIMEOUT_S = 0.5


class DiskUsage:
    """What an open file takes on its disk, for those who would rather not know than wait."""

    def __init__(self) -> None:
        # The question that is under way, one at a time: it keeps a thread as long as its server is silent.
        self._asked: asyncio.Future[int] | None = None

    async def find(self, fd: int) -> int | None:
        """Bytes; None: it is not to be had, or not soon."""
        if self._asked is None or self._asked.done():
            self._asked = begin_in_thread(_usage_blocking, fd)
        asked = self._asked  # when it is answered somebody else may have put another one
        done, _ = await asyncio.wait([asked], timeout=USAGE_TIMEOUT_S)
        return asked.result() if done and asked.exception() is None else None


def _usage_blocking(fd: int) -> int:
    return os.fstat(fd).st_blocks * SECTOR_SIZE


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


def known_size(fd: int) -> int | None:
    """The size of an open file as this machine knows it, without asking a server; None: it is unknown."""
    try:
        status = _statx(fd, b"", _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC)
    except OSError:
        return None
    return status.size if status is not None else None


def status_of_name(path: str) -> FileStatus:
    """The status of the file that has this name, through symbolic links.

    Raises:   OSError: there is none, or it cannot be looked at.
    """
    return _statx(_AT_FDCWD, os.fsencode(path), 0) or _from_stat(Path(path).stat())


def has_name(filename: str, identity: tuple[int, int]) -> bool:
    """Whether a file of this identity is where `filename` leads, as far as that can be told."""
    try:
        return status_of_name(filename).identity == identity
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True  # its folder cannot be looked at, for whatever reason


def birth_of(fd: int) -> str:
    """What tells an open file from another one that has its name later: its inode, and when that was made.

    The inode's number alone is soon used again. The same on whichever device the filesystem is found; empty
    for what is no file, whose name is its own.

    Raises:   OSError: it is not to be had.
    """
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        return ""
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    if _call is None or _call(fd, b"", _AT_EMPTY_PATH, _BIRTH_TIME, buffer):
        return str(status.st_ino)
    told, seconds, nanoseconds = _STATX_BIRTH.unpack_from(buffer)
    return f"{status.st_ino} {seconds}.{nanoseconds:09}" if told & _BIRTH_TIME else str(status.st_ino)


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


def cut_short(filename: str, action: Operation, end: int) -> StorageError:
    """What is said of a file that somebody else made shorter."""
    return StorageError(
        f"Could not {action} '{filename}': it was cut short to {end} bytes while in use", operation=action
    )
