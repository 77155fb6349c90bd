"""Opening files and block devices."""

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable
from typing import NamedTuple

from blockd.errors import RequestError
from blockd.found_files import Folder, FoundFile, reopenable
from blockd.protocols.file_status import status_of_open
from blockd.protocols.image_lock import NO_CLAIM, Claim, LockMode, change_claim, claim_for

_BLKGETSIZE64 = 0x80081272

Find = Callable[[], FoundFile]


class OpenFile(NamedTuple):
    """A file or block device that was opened."""

    fd: int
    size: int
    # Equal exactly for the same file or device.
    identity: tuple[int, int]


def close_quietly(fd: int) -> None:
    """Close a descriptor of which another error is told; it is closed, whatever the kernel says."""
    with contextlib.suppress(OSError):
        os.close(fd)


class NamedFile(NamedTuple):
    """A file that was found by a name and opened."""

    opened: OpenFile
    folder: Folder
    read_only: bool
    # What others are kept out by.
    lock_mode: LockMode = LockMode.OFF
    claim: Claim = NO_CLAIM

    def close(self) -> None:
        close_quietly(self.opened.fd)
        close_quietly(self.folder.fd)


def find_and_open(
    find: str | Find, read_only: bool, may_be_read_only: bool, lock_mode: LockMode
) -> NamedFile:
    """Open a file by its name, or what `find` finds; if it cannot be written, perhaps to be read.

    It is locked, unless somebody is in the way or it cannot be: whoever asks for the lock again hears why.

    Raises:   RequestError: it cannot be found or opened, or is neither a regular file nor a block device.
    """
    found = FoundFile.find(find) if isinstance(find, str) else find()
    with contextlib.ExitStack() as undo:
        undo.callback(close_quietly, found.folder_fd)
        try:
            if may_be_read_only and not read_only:
                read_only = not os.access(reopenable(found.fd), os.W_OK)
            opened = open_again(found.fd, read_only, found.filename)
        finally:
            close_quietly(found.fd)
        undo.callback(close_quietly, opened.fd)
        claim = claim_for(lock_mode, read_only=read_only)
        try:
            change_claim(opened.fd, found.filename, NO_CLAIM, claim)
        except RequestError:
            lock_mode, claim = LockMode.OFF, NO_CLAIM
        undo.pop_all()
    return NamedFile(opened, Folder(found.filename, found.folder_fd), read_only, lock_mode, claim)


def open_again(fd: int, read_only: bool, name: str) -> OpenFile:
    """Open the file that is open as `fd` once more, `name` in errors, and find out what it is.

    No name leads there, so it is the same file. A FIFO is not waited for: it is refused before.

    Raises:   RequestError: it cannot be opened, or is neither a regular file nor a block device.
    """
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        _require_image_file(os.fstat(fd), name, read_only)
        opened = os.open(reopenable(fd), flags)
    except OSError as error:
        reason = os.strerror(error.errno or errno.EIO)
        raise RequestError(f"Could not open '{name}': {reason}") from error
    with contextlib.ExitStack() as undo:
        undo.callback(close_quietly, opened)
        try:
            file = OpenFile(opened, _size(opened), status_of_open(opened).identity)
        except OSError as error:
            raise RequestError(f"Could not open '{name}': {error.strerror}") from error
        undo.pop_all()
    return file


def _require_image_file(status: os.stat_result, name: str, read_only: bool) -> None:
    if stat.S_ISDIR(status.st_mode) and not read_only:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))  # as the kernel says
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
        raise RequestError(f"Could not open '{name}': not a regular file or block device")


def size_of(fd: int, filename: str) -> int:
    """How large an open file or block device is.

    Raises:   RequestError: that cannot be found out.
    """
    try:
        return _size(fd)
    except OSError as error:
        raise RequestError(f"Could not open '{filename}': {os.strerror(error.errno or errno.EIO)}") from error


def _size(fd: int) -> int:
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode):
        return status.st_size
    return int.from_bytes(fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8)), "little")
