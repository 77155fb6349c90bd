"""The state directory: one file that is continued or replaced as a whole, and a lock.

    DIR/journal.json        what the daemon shall be after a restart; see journal.py
    DIR/journal.json.new    the next one while it is being written; never read
    DIR/staged-CHECKSUM     what guests wrote to parts of clusters, if the journal names it
    DIR/staged.new          the next one while it is being written; never read
    DIR/lock                locked by the daemon that uses DIR, and holds its process id

A journal that is written as a whole gets its name only when its content is durable, so a crash at any
moment leaves the old one or the new one, whole. What changes is added to it, as lines, until they are longer
than the rest; then a journal without lines takes its place.

On a full file system a line may fit where a second journal does not. So a line that could not be written is
taken away again, and what it would have told is added with the next one; and lines are added as long as
a journal cannot be written as a whole.

All methods block on the file system.
"""

import contextlib
import errno
import fcntl
import logging
import os
import stat
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from blockd.daemon import journal
from blockd.daemon.changes import Changes, Json
from blockd.errors import RequestError, StorageError, printable
from blockd.filenames import absolute, check_path

log = logging.getLogger(__name__)

JOURNAL, NEW_JOURNAL, LOCK = "journal.json", "journal.json.new", "lock"
STAGED, NEW_STAGED = "staged-", "staged.new"

_DIRECTORY_MODE, _FILE_MODE = 0o700, 0o600
_WRITABLE_BY_OTHERS = 0o002


class StateDir:
    """A state directory that is locked for us."""

    def __init__(self, path: str, fd: int, lock_fd: int) -> None:
        self.path = path
        self._fd = fd
        self._lock_fd = lock_fd
        # The name that the directory was given meanwhile, as far as the log has told.
        self._told_place: str | None = None
        # Why the journal was not written as a whole, as far as the log has told.
        self._told_failure: str | None = None
        # What changes are added to; None: there is no journal, or it is not known to be whole.
        self._base: _Base | None = None
        self._next: _Base | bytes | None = None

    @classmethod
    def open(cls, path: str) -> Self:
        """Make the directory if there is none, and lock it.

        Raises:   RequestError: it cannot be, others may write to it, or another blockd uses it.
        """
        with contextlib.ExitStack() as undo:
            try:
                fd = _open_directory(path)
                undo.callback(_close, fd)
                lock_fd = _open_lock(fd)
            except OSError as error:
                raise RequestError(f"Could not use '{path}' as state directory: {error.strerror}") from error
            undo.callback(_close, lock_fd)
            _lock(lock_fd, path)
            undo.pop_all()
        return cls(path, fd, lock_fd)

    def close(self) -> None:
        """Let another daemon use the directory."""
        self._forget_base()
        _close(self._lock_fd)
        _close(self._fd)

    # -- reading ------------------------------------------------------------------------------

    def load(self) -> Json | None:
        """The state in the journal, which is gone on with; None if there is no journal yet.

        Raises:   ImageError: the journal is damaged, or was not written by this version of blockd;
                  StorageError: it cannot be read.
        """
        data = self._read()
        if data is None:
            return None
        state, written = journal.parse_journal(data, self._name)
        self._base = _Base(written, whole_from=-1, is_found=True)
        return state

    def _read(self) -> bytes | None:
        try:
            fd = os.open(JOURNAL, os.O_RDONLY | os.O_NONBLOCK | _SAFELY, dir_fd=self._fd)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError.from_os(error, "read", self._name) from error
        try:
            status = os.fstat(fd)
            _require_ours(status, self._name)
            if not stat.S_ISREG(status.st_mode) or status.st_size > journal.LENGTH_MAX:
                raise journal.not_a_journal(self._name)
            with open(fd, "rb", closefd=False) as file:
                return file.read()
        except OSError as error:
            raise StorageError.from_os(error, "read", self._name) from error
        finally:
            _close(fd)

    @property
    def _name(self) -> str:
        return os.path.join(self.path, JOURNAL)  # noqa: PTH118  (as the user wrote it)

    # -- writing ------------------------------------------------------------------------------

    @property
    def needs_whole(self) -> bool:
        """Whether the next journal has to be written as a whole, or has become long enough for that."""
        return self._base is None or self._base.is_due

    @property
    def has_changes(self) -> bool:
        """Whether the journal is not written as a whole."""
        return self._base is None or self._base.written.number > 0

    def prepare(
        self, changes: Changes, state: Callable[[], Mapping[str, Json]], *, is_whole: bool = False
    ) -> None:
        """Have `publish` write a state: what has changed since the last one, or all of it.

        `is_whole`: rather all of it, as it is when changes have become long.

        Raises:   StorageError: neither can be.
        Fails to: the old journal is as it was.
        """
        line = self._line(changes)
        if line is None or is_whole or self.needs_whole:
            try:
                self.write_new(state())
                return
            except StorageError as error:
                if line is None:
                    raise
                self._put_off(error)
        self._next = line

    def _line(self, changes: Changes) -> bytes | None:
        """What adds changes to the journal; None: they cannot be added."""
        if self._base is None:
            return None
        line = self._base.written.line(changes)
        return line if self._base.written.end + len(line) <= journal.LENGTH_MAX else None

    def _put_off(self, error: StorageError) -> None:
        """Go on with lines, for a while."""
        assert self._base is not None, "there is a journal to go on with"
        if error.message != self._told_failure:
            log.warning("%s: not as a whole; what changes is added to it as long as that fits", error.message)
        self._told_failure = error.message
        self._base.put_off()

    def write_new(self, state: Mapping[str, Json]) -> None:
        """Write a journal that is not valid yet; it is durable on return.

        Raises:   StorageError: it cannot be written.
        Fails to: the old journal is as it was.
        """
        written, data = journal.serialized(state)
        if len(data) > journal.LENGTH_MAX:
            raise StorageError(
                f"Could not write '{self._name}': it would be {len(data)} bytes long, and no more than "
                f"{journal.LENGTH_MAX} are read: remove nodes, exports or jobs"
            )
        with self._translated(JOURNAL):
            self._write(NEW_JOURNAL, data)
        self._next = _Base.new(written)

    def _write(self, name: str, data: bytes) -> None:
        """Write a file that is durable on return, but for its name; or leave none."""
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _SAFELY, _FILE_MODE, dir_fd=self._fd)
        try:
            try:
                position = 0
                while position < len(data):
                    position += os.write(fd, data[position:])
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError:
            with contextlib.suppress(OSError):  # on a full file system it is in the way of all else
                os.unlink(name, dir_fd=self._fd)
            raise

    def publish(self) -> None:
        """Put the new journal in the place of the old one; a kill leaves it there, a power cut may not.

        Raises:   StorageError: it cannot be done; the old journal is as it was.
        """
        with self._translated(JOURNAL):
            if isinstance(self._next, bytes):
                self._append(self._next)
            else:
                self._forget_base()
                os.rename(NEW_JOURNAL, JOURNAL, src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def _append(self, line: bytes) -> None:
        base = self._base
        assert base is not None, "there is a journal to go on with"
        written = base.written
        if base.fd is None:
            try:
                base.fd = os.open(JOURNAL, os.O_WRONLY | _SAFELY, dir_fd=self._fd)
            except OSError:
                self._forget_base()
                raise
        if not self._is_journal(base.fd, written.end + written.torn_length):
            self._forget_base()
            raise StorageError(
                f"Could not write '{self._name}': it was removed, replaced or changed by somebody else; "
                "the next change writes it anew"
            )
        if written.torn_length:
            os.ftruncate(base.fd, written.end)
            written.torn_length = 0
        position = end = written.end
        try:
            while position < end + len(line):
                position += os.pwrite(base.fd, line[position - end :], position)
        except BaseException:
            self._cut_back(base.fd, end)
            raise

    def _cut_back(self, fd: int, end: int) -> None:
        """Take away what is half written; the next journal is a whole one if that cannot be."""
        try:
            os.ftruncate(fd, end)
        except OSError:
            self._forget_base()

    def _is_journal(self, fd: int, length: int) -> bool:
        """Whether the file that changes are added to still is the journal, as it was left."""
        try:
            status = os.stat(JOURNAL, dir_fd=self._fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(status, os.fstat(fd)) and status.st_size == length

    def _forget_base(self) -> None:
        if self._base is not None and self._base.fd is not None:
            _close(self._base.fd)
        self._base = None

    def sync(self) -> None:
        """Make durable which journal is the valid one.

        Raises:   StorageError: a power cut may leave either of the last two.
        """
        base, new = self._base, self._next
        try:
            with self._translated(JOURNAL):
                if not isinstance(new, bytes):
                    os.fsync(self._fd)
                    self._base, self._told_failure = new, None
                else:
                    assert base is not None and base.fd is not None, "it was published"
                    os.fsync(base.fd)
                    if base.is_found:
                        os.fsync(self._fd)  # whoever has written it may have been killed before that
                        base.is_found = False
                    base.written.add(new)
        except StorageError:
            self._forget_base()
            raise
        self._look_for_moves()

    def _look_for_moves(self) -> None:
        """Say it when the directory has another name by now: the one that is locked stays in use."""
        place = self._place()
        if place is not None and place != self._told_place:
            log.warning(
                "the state directory '%s' was renamed or removed: the journal goes on in '%s', and a start "
                "that is given the old name will not find it",
                *(self.path, printable(place)),
            )
        self._told_place = place

    def _place(self) -> str | None:
        """What the directory is called now; None: as it was."""
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(self.path), os.fstat(self._fd)):  # noqa: PTH116
                return None
        with contextlib.suppress(OSError):
            return os.readlink(f"/proc/self/fd/{self._fd}")  # noqa: PTH115
        return "?"

    @contextmanager
    def _translated(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError.from_os(error, "write", os.path.join(self.path, name)) from error  # noqa: PTH118

    # -- staged writes ------------------------------------------------------------------------

    def write_staged(self, name: str, content: bytes) -> None:
        """Write a file that the next journal will name; durable on return.

        Raises:   StorageError: it cannot be written.
        """
        with self._translated(name):
            self._write(NEW_STAGED, content)
            os.rename(NEW_STAGED, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
            os.fsync(self._fd)

    def read_staged(self, name: str) -> bytes:
        """Read a file that the journal names; whether it is whole its checksum says.

        Raises:   StorageError: it cannot be read.
        """
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK | _SAFELY, dir_fd=self._fd)
            with open(fd, "rb") as file:  # noqa: PTH123  (it is open already)
                return file.read()
        except OSError as error:
            raise StorageError.from_os(error, "read", os.path.join(self.path, name)) from error  # noqa: PTH118

    def remove_unused(self, named: Container[str]) -> None:
        """Remove files of staged writes that the journal does not name; one that cannot be does no harm."""
        for name in os.listdir(self._fd):  # noqa: PTH208  (it is open already)
            if name.startswith(STAGED) and name not in named:
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=self._fd)


_SAFELY = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NOCTTY


@dataclass
class _Base:
    """The journal that changes are added to; it is durable, unless an earlier run has written it."""

    written: journal.Written
    # From which length of its changes on it is written as a whole.
    whole_from: int
    is_found: bool = False
    fd: int | None = None

    @classmethod
    def new(cls, written: journal.Written) -> Self:
        return cls(written, _many(written))

    @property
    def is_due(self) -> bool:
        """Whether its changes have become long."""
        return self.written.changes_length > self.whole_from

    def put_off(self) -> None:
        """Have as many changes be added before it is due again."""
        self.whole_from = self.written.changes_length + _many(self.written)


def _many(written: journal.Written) -> int:
    """The length of changes with which a journal is better written as a whole."""
    return max(written.length, journal.CHANGES_LENGTH_MIN)


def _open_directory(path: str) -> int:
    is_new = False
    absolute(check_path(path))  # or it says that the working folder is gone
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, _DIRECTORY_MODE)  # noqa: PTH102
        is_new = True
    with contextlib.ExitStack() as undo:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        undo.callback(os.close, fd)
        if is_new:
            _sync_parent(fd)
        status = os.fstat(fd)
        _require_ours(status, path)
        if status.st_mode & _WRITABLE_BY_OTHERS:
            raise RequestError(
                f"Could not use '{path}' as state directory: everybody can write to it, and it says which "
                f"files to open; protect it with: chmod o-w {path}"
            )
        undo.pop_all()
    return fd


def _require_ours(status: os.stat_result, path: str) -> None:
    """Refuse what somebody else owns, who could write there; root can write everywhere anyway."""
    if status.st_uid not in (os.geteuid(), 0):
        raise RequestError(
            f"Could not use '{path}': it belongs to the user with id {status.st_uid}, and it says which "
            f"files to open; give it to the user that blockd runs as, whose id is {os.geteuid()}"
        )


def _sync_parent(directory: int) -> None:
    fd = os.open("..", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _open_lock(directory: int) -> int:
    """Open the file that is locked, on a file system that has become read-only as it is."""
    try:
        return os.open(LOCK, os.O_RDWR | os.O_CREAT | _SAFELY, _FILE_MODE, dir_fd=directory)
    except OSError as error:
        if error.errno == errno.EROFS:
            with contextlib.suppress(OSError):
                return os.open(LOCK, os.O_RDONLY | _SAFELY, dir_fd=directory)
        raise


def _lock(fd: int, path: str) -> None:
    """Lock the file, which the kernel undoes when we end in whatever way."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = _owner(fd)
        raise RequestError(
            f"Could not use '{path}' as state directory: another blockd uses it, process {owner or 'unknown'}"
        ) from error
    except OSError as error:
        raise RequestError(f"Could not lock '{path}/{LOCK}': {error.strerror}") from error
    with contextlib.suppress(OSError):  # it is locked whether or not there is room to say by whom
        os.ftruncate(fd, os.pwrite(fd, f"{os.getpid()}\n".encode(), 0))


def _owner(fd: int) -> str:
    with contextlib.suppress(OSError):
        return os.pread(fd, 20, 0).decode(errors="replace").strip()
    return ""


def _close(fd: int) -> None:
    """Close a descriptor to which nothing is written any more; it is closed, whatever the kernel says."""
    with contextlib.suppress(OSError):
        os.close(fd)
