"""The state directory: one file that is replaced as a whole, and a lock.

    DIR/journal.json        what the daemon shall be after a restart
    DIR/journal.json.new    the next one while it is being written; never read
    DIR/lock                locked by the daemon that uses DIR, and holds its process id

The journal is an object: `blockd-journal` is the version of the format, `state` what is recorded, and
`sha256` the checksum of `state` as `_checksum` writes it down. A new journal gets its name only when its
content is durable, so a crash at any moment leaves the old one or the new one, whole.

All methods block on the file system.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from blockd.errors import ImageError, RequestError, StorageError
from blockd.units import MIB

VERSION = 1
JOURNAL, NEW_JOURNAL, LOCK = "journal.json", "journal.json.new", "lock"
# Thousands of disks need less; what is longer was not written by blockd.
JOURNAL_LENGTH_MAX = 64 * MIB

_DIRECTORY_MODE, _FILE_MODE = 0o700, 0o600
_WRITABLE_BY_OTHERS = 0o002
_START_OVER = "and start with the disks on the command line (find out first which image of each is in use)"


class StateDir:
    """A state directory that is locked for us."""

    def __init__(self, path: str, fd: int, lock_fd: int) -> None:
        self.path = path
        self._fd = fd
        self._lock_fd = lock_fd

    @classmethod
    def open(cls, path: str) -> Self:
        """Make the directory if there is none, and lock it.

        Raises:   RequestError: it cannot be, others may write to it, or another blockd uses it.
        """
        with contextlib.ExitStack() as undo:
            try:
                fd = _open_directory(path)
                undo.callback(os.close, fd)
                lock_fd = os.open(LOCK, os.O_RDWR | os.O_CREAT | _SAFELY, _FILE_MODE, dir_fd=fd)
            except OSError as error:
                raise RequestError(f"Could not use '{path}' as state directory: {error.strerror}") from error
            undo.callback(os.close, lock_fd)
            _lock(lock_fd, path)
            undo.pop_all()
        return cls(path, fd, lock_fd)

    def close(self) -> None:
        """Let another daemon use the directory."""
        os.close(self._lock_fd)
        os.close(self._fd)

    # -- reading ------------------------------------------------------------------------------

    def load(self) -> str | None:
        """The state in the journal, as JSON; None if there is no journal yet.

        Raises:   ImageError: the journal is damaged, or was not written by this version of blockd;
                  StorageError: it cannot be read.
        """
        data = self._read()
        return None if data is None else json.dumps(self._state(data))

    def _read(self) -> bytes | None:
        try:
            fd = os.open(JOURNAL, os.O_RDONLY | os.O_NONBLOCK | _SAFELY, dir_fd=self._fd)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError.from_os(error, "read", self._name) from error
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_size > JOURNAL_LENGTH_MAX:
                raise ImageError(f"'{self._name}' is not a journal of blockd: move it away {_START_OVER}")
            with open(fd, "rb", closefd=False) as file:
                return file.read()
        except OSError as error:
            raise StorageError.from_os(error, "read", self._name) from error
        finally:
            os.close(fd)

    def _state(self, data: bytes) -> object:
        try:
            journal = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ImageError(f"'{self._name}' is damaged: {self._cure}") from error
        if not isinstance(journal, dict) or not isinstance(journal.get("blockd-journal"), int):
            raise ImageError(f"'{self._name}' is not a journal of blockd: move it away {_START_OVER}")
        version = journal["blockd-journal"]
        if version > VERSION:
            raise ImageError(
                f"'{self._name}' was written by a newer blockd (its version is {version}, this one knows "
                f"{VERSION}): start that one, or move the file away {_START_OVER}"
            )
        if version < 1 or journal.get("sha256") != _checksum(journal.get("state")):
            raise ImageError(f"'{self._name}' is damaged, its checksum is wrong: {self._cure}")
        return journal["state"]

    @property
    def _name(self) -> str:
        return os.path.join(self.path, JOURNAL)  # noqa: PTH118  (as the user wrote it)

    @property
    def _cure(self) -> str:
        return f"bring it back from a backup, or move it away {_START_OVER}"

    # -- writing ------------------------------------------------------------------------------

    def write_new(self, state: object) -> None:
        """Write a journal that is not valid yet; it is durable on return.

        Raises:   StorageError: it cannot be written.
        Fails to: the old journal is as it was.
        """
        journal = {"blockd-journal": VERSION, "sha256": _checksum(state), "state": state}
        data = json.dumps(journal, indent=1).encode()
        with self._translated():
            fd = os.open(
                NEW_JOURNAL, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _SAFELY, _FILE_MODE, dir_fd=self._fd
            )
            try:
                position = 0
                while position < len(data):
                    position += os.write(fd, data[position:])
                os.fsync(fd)
            finally:
                os.close(fd)

    def publish(self) -> None:
        """Put the new journal in the place of the old one; a kill leaves it there, a power cut may not.

        Raises:   StorageError: it cannot be done.
        """
        with self._translated():
            os.rename(NEW_JOURNAL, JOURNAL, src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def sync(self) -> None:
        """Make durable which journal is the valid one.

        Raises:   StorageError: a power cut may leave either of the last two.
        """
        with self._translated():
            os.fsync(self._fd)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError.from_os(error, "write", self._name) from error


_SAFELY = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NOCTTY


def _checksum(state: object) -> str:
    text = json.dumps(state, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _open_directory(path: str) -> int:
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, _DIRECTORY_MODE)  # noqa: PTH102
        _sync_directory(os.path.dirname(os.path.abspath(path)))  # noqa: PTH100, PTH120
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    if os.fstat(fd).st_mode & _WRITABLE_BY_OTHERS:
        os.close(fd)
        raise RequestError(
            f"Could not use '{path}' as state directory: everybody can write to it, and it says which files "
            f"to open; protect it with: chmod o-w {path}"
        )
    return fd


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _lock(fd: int, path: str) -> None:
    """Lock the file, which the kernel undoes when we end in whatever way."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(fd, 20, 0).decode(errors="replace").strip()
        raise RequestError(
            f"Could not use '{path}' as state directory: another blockd uses it, process {owner or 'unknown'}"
        ) from error
    except OSError as error:
        raise RequestError(f"Could not lock '{path}/{LOCK}': {error.strerror}") from error
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
