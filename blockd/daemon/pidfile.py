"""The pidfile: says that all sockets are ready, and who holds them."""

import contextlib
import errno
import fcntl
import logging
import os
import re
import stat
from contextlib import AsyncExitStack
from pathlib import Path

from blockd.aio import in_thread
from blockd.errors import RequestError, printable
from blockd.filenames import absolute, check_path

log = logging.getLogger(__name__)

MODE = 0o600
# What a process that died, or a crash, has left: anything else, or anything longer, is no pidfile.
_LEFT_BEHIND = re.compile(rb"\d{,10}\n?\0*")
_LENGTH_MAX = 64


class Pidfile:
    """A locked file with our process id, for as long as the daemon lives."""

    def __init__(self, path: Path, fd: int) -> None:
        self._path = path
        self._fd = fd

    @classmethod
    async def create(cls, name: str, stack: AsyncExitStack) -> None:
        """Write the file, and remove it when `stack` is closed; raises as `create_blocking`."""
        created: list[Pidfile] = []  # filled by the thread, also when nobody waits for it any more

        def remove() -> None:
            for pidfile in created:
                pidfile.remove_blocking()

        stack.push_async_callback(in_thread, remove)
        await in_thread(lambda: created.append(cls.create_blocking(name)))

    @classmethod
    def create_blocking(cls, name: str) -> "Pidfile":
        """Write the file; one that a dead process left behind is taken over.

        Raises:   RequestError: it cannot be written, a living process holds it, or it is something else,
                  which is left alone.
        """
        try:
            path = Path(absolute(check_path(name)))
            pidfile = cls(path, _open_locked(path))
        except BlockingIOError as error:
            raise RequestError(f"--pidfile {name}: another process has locked the file") from error
        except OSError as error:
            raise RequestError(f"--pidfile {name}: {error.strerror}") from error
        try:
            pidfile._write()
        except OSError as error:
            pidfile.remove_blocking()
            raise RequestError(f"--pidfile {name}: {error.strerror}") from error
        return pidfile

    def _write(self) -> None:
        os.fchmod(self._fd, MODE)
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def remove_blocking(self) -> None:
        """Remove the file if it is still ours, and let go of the lock; if that fails, the log says so."""
        try:
            if _is_at(self._path, self._fd):
                self._path.unlink()
        except OSError as error:
            log.warning("could not remove the pidfile '%s': %s", printable(str(self._path)), error.strerror)
        with contextlib.suppress(OSError):  # it is closed, whatever is told
            os.close(self._fd)


def _open_locked(path: Path) -> int:
    while True:
        with contextlib.suppress(FileNotFoundError):
            _require_file(path.stat())  # some devices act when they are opened
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY, MODE)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _require_pidfile(fd)
        except OSError:
            os.close(fd)
            raise
        if _is_at(path, fd):
            return fd
        os.close(fd)  # its owner removed it between our opening and locking it: make a new one


def _require_pidfile(fd: int) -> None:
    """Refuse a device, or somebody's data: it would be cut off now and removed at the end."""
    _require_file(os.fstat(fd))
    content = os.pread(fd, _LENGTH_MAX + 1, 0)
    if len(content) > _LENGTH_MAX or _LEFT_BEHIND.fullmatch(content) is None:
        raise _no_pidfile()


def _require_file(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise _no_pidfile()


def _no_pidfile() -> FileExistsError:
    return FileExistsError(errno.EEXIST, "the file exists and is not a pidfile")


def _is_at(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except OSError:
        return False
