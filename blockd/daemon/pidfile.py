"""The pidfile: says that all sockets are ready, and who holds them."""

import contextlib
import fcntl
import os
from pathlib import Path

from blockd.errors import RequestError

MODE = 0o600


class Pidfile:
    """A locked file with our process id, for as long as the daemon lives."""

    def __init__(self, path: Path, fd: int) -> None:
        self._path = path
        self._fd = fd

    @classmethod
    def create(cls, name: str) -> "Pidfile":
        """Write the file; one that a dead process left behind is taken over.

        Raises:   RequestError: it cannot be written, or a living process holds it.
        """
        path = Path(name).absolute()
        try:
            fd = _open_locked(path)
            os.fchmod(fd, MODE)
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        except BlockingIOError as error:
            raise RequestError(f"--pidfile {name}: another process has locked the file") from error
        except OSError as error:
            raise RequestError(f"--pidfile {name}: {error.strerror}") from error
        return cls(path, fd)

    def remove(self) -> None:
        """Remove the file if it is still ours, and let go of the lock."""
        if _is_at(self._path, self._fd):
            with contextlib.suppress(OSError):
                self._path.unlink()
        os.close(self._fd)


def _open_locked(path: Path) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, MODE)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            raise
        if _is_at(path, fd):
            return fd
        os.close(fd)  # its owner removed it between our opening and locking it: make a new one


def _is_at(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except OSError:
        return False
