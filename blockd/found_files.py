"""Files that are found by name once, and from then on are what was found, whatever the name leads to later.

Whoever owns a folder may put another file or link in the place of a name at any moment. So a name is
resolved in one walk, and a descriptor that can do nothing (O_PATH) holds what it leads to: no FIFO is waited
for and no device is woken. That descriptor tells what the file is and where it is, and so whether it is
allowed. Then the file is opened through /proc/self/fd, where no name is resolved.

The folder that the name leads through is held too: names that are recorded in the file count from it.

Source:   open(2) "O_PATH", openat2(2), proc(5) "/proc/pid/fd".
"""

import ctypes
import errno
import os
import struct
from types import TracebackType
from typing import NamedTuple, Self

from blockd.errors import RequestError, printable
from blockd.filenames import basename, beside, check_path, folder_of, why_not

AT_FDCWD = -100

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t]
_syscall.restype = ctypes.c_long
_SYS_OPENAT2 = 437
# struct open_how: flags, mode, resolve.
_OPEN_HOW = struct.Struct("=QQQ")
_NO_MAGIC_LINKS = 0x02
# What kernels before 5.6, and sandboxes that do not know the call, answer.
_NO_SUCH_CALL = (errno.ENOSYS, errno.EPERM)


class Folder(NamedTuple):
    """The folder of a file: names that the file records count from it."""

    # The name of the file, as it was given.
    filename: str
    # AT_FDCWD: the folder is not held, and found by the file's name.
    fd: int

    @property
    def location(self) -> str:
        """Where the folder is.

        Raises:   RequestError: it is not there.
        """
        if self.fd != AT_FDCWD:
            return location_of(self.fd, self.filename)
        with FoundFile.find(folder_of(self.filename) or ".") as found:
            return found.location


class FoundFile:
    """A file as it was found; `filename` is for people, and for finding it again in another run."""

    def __init__(self, filename: str, folder_fd: int, fd: int) -> None:
        self.filename = filename
        self.folder_fd = folder_fd
        self.fd = fd

    @classmethod
    def find(cls, path: str) -> Self:
        """Find the file that a user has named.

        Raises:   RequestError: there is none.
        """
        return cls._walk(path, check_path(path), AT_FDCWD, limits=0)

    @classmethod
    def find_recorded(cls, path: str, folder: Folder) -> Self:
        """Find the file that an image in `folder` names; no links of /proc to open files are followed.

        Raises:   RequestError: there is none.
        """
        filename = beside(folder.filename, path)
        walked = filename if folder.fd == AT_FDCWD else check_path(path)
        return cls._walk(filename, walked, folder.fd, limits=_NO_MAGIC_LINKS)

    @classmethod
    def _walk(cls, filename: str, path: str, start: int, limits: int) -> Self:
        try:
            folder_fd = _open_path(folder_of(path) or ".", start, os.O_DIRECTORY, limits)
            try:
                return cls(filename, folder_fd, _open_path(basename(path) or ".", folder_fd, 0, limits))
            except BaseException:
                os.close(folder_fd)
                raise
        except OSError as error:
            reason = why_not(path if start == AT_FDCWD else "/", error)
            raise RequestError(f"Could not open '{printable(filename)}': {reason}") from error

    @property
    def location(self) -> str:
        """Where the file is; no links are on the way there."""
        return location_of(self.fd, self.filename)

    @property
    def folder_location(self) -> str:
        """Where the folder is that the name led through."""
        return location_of(self.folder_fd, self.filename)

    def close(self) -> None:
        """Let go of both."""
        os.close(self.fd)
        os.close(self.folder_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def reopenable(fd: int) -> str:
    """A name for what is open as `fd`, to open it once more."""
    return f"/proc/self/fd/{fd}"


def location_of(fd: int, filename: str) -> str:
    """Where the kernel says that an open file is.

    Raises:   RequestError: it does not say.
    """
    try:
        return os.readlink(reopenable(fd))  # noqa: PTH115  (a name may have any bytes)
    except OSError as error:
        raise RequestError(
            f"Could not open '{printable(filename)}': /proc does not tell where it is"
        ) from error


def _open_path(path: str, start: int, flags: int, limits: int) -> int:
    """A descriptor for what is at `path`, through symbolic links, without opening it."""
    flags |= os.O_PATH | os.O_CLOEXEC
    how = _OPEN_HOW.pack(flags, 0, limits)
    fd: int = _syscall(_SYS_OPENAT2, start, os.fsencode(path), how, len(how))
    if fd >= 0:
        return fd
    code = ctypes.get_errno()
    if code not in _NO_SUCH_CALL:
        raise OSError(code, os.strerror(code))
    return os.open(path, flags, dir_fd=None if start == AT_FDCWD else start)
