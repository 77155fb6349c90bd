"""Writing past the page cache: what a stream copies, which nobody is expected to read soon.

It costs less than writing through the cache and evicts nothing that guests need. Two things make
it fast, and each can be missing, on a filesystem or in a container that does not have it:

    O_DIRECT     no copy into the page cache, and no write-back to wait for at the end
    room         space reserved behind the file's end: a filesystem lets writes into it go on side by
                 side, but one at a time when each makes the file longer

Guests that write to the same file meanwhile do not wait for the disk (native_aio.py). What cannot be done
here, or fails, the caller writes the usual way, which reports what is wrong.
"""

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator

from blockd.protocols import native_aio
from blockd.protocols.opening import close_quietly
from blockd.units import GIB, MIB

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

# How many direct writes to one file the disk has at once. It may answer all of them together: let there be
# more copies than this, so that those which have prepared theirs meanwhile go on at once.
DIRECT_WRITE_COUNT = 3
# What O_DIRECT asks of memory, offsets and lengths on every filesystem and device that has it.
DIRECT_ALIGNMENT = 4096
# How much is reserved at first, and at most: each time it is twice as much. What is not used is given back.
ROOM_LENGTH = 64 * MIB
ROOM_LENGTH_MAX = 1 * GIB
# The most of the free space that is reserved at once; others may need it.
FREE_SHARE_MAX = 16
# With less free space than this none is reserved.
FREE_LENGTH_MIN = 1 * GIB
# How much longer a file has become before room is reserved for what is written through the cache, too.
GROWTH_MIN = 1 * MIB

_NOT_OPENED, _NO_DIRECT = -1, -2


class FileEnd:
    """Where a file ends, kept exactly while threads write behind it, and the room behind that.

    Locks:    `_lock` for a few instructions, so that the event loop may take it, or for cutting the
              room off, when `begin_nowait` refuses; `_room_lock` before it, by threads alone.
    """

    def __init__(self, size: int) -> None:
        # Behind the furthest write that is over; the file itself may be longer by the room.
        self.size = self._first_size = size
        self._room_end = 0
        # Room was reserved up to here without an error: the file reaches as far unless somebody cuts it off.
        self._reserved_end = 0
        # How often the file may have become shorter.
        self._cut_count = 0
        self._room_length = ROOM_LENGTH
        self._has_no_room = False
        self._is_room_due = False
        self._is_used = False
        self._growing_count = 0
        # Something was written, or the file made longer or shorter, since the last sync began.
        self.is_changed = False
        self._lock = threading.Lock()
        self._direct_count = 0
        self._clone_count = 0
        self._room_lock = threading.Condition(threading.Lock())

    def begin(self) -> None:
        """Begin a write that may reach behind `size`, to be told to `finish`; meanwhile the room stays."""
        with self._lock:
            self._growing_count += 1

    def begin_nowait(self) -> bool:
        """Like `begin`; False: that would have to wait."""
        if not self._lock.acquire(blocking=False):
            return False
        self._growing_count += 1
        self._lock.release()
        return True

    def begin_in_room_nowait(self, end: int) -> bool:
        """Like `begin_nowait`, for a write up to `end`, inside the room; False: it is not.

        A file that somebody has cut off stays too short, shorter than `least`.
        """
        if not self._lock.acquire(blocking=False):
            return False
        is_inside = self.is_in_room(end)
        self._growing_count += is_inside
        self._lock.release()
        return is_inside

    @property
    def needs_sync(self) -> bool:
        """Whether a sync has something to do."""
        return self.is_changed or bool(self._growing_count)

    def is_in_room(self, end: int) -> bool:
        """Whether a write up to `end` lets the file end where the room does."""
        return end < self._reserved_end

    def least(self) -> tuple[int, int]:
        """How long the file is at least, and which answer this is: the same unless it is made shorter.

        A file that is found shorter after that was cut off by somebody else, unless the second has changed.
        """
        cut_count = self._cut_count
        return max(self.size, self._reserved_end), cut_count

    def finish(self, offset: int, count: int) -> None:
        """A write that began is over: `count` bytes at `offset` are written."""
        with self._lock:
            self._growing_count -= 1
            self.is_changed = True
            if count:
                before, self.size = self.size, max(self.size, offset + count)
                self._is_used = self._is_used or self.size > before

    def reset(self, size: int) -> None:
        """The file was given another length, or opened again.

        Needs:    no write is under way.
        """
        with self._lock:
            self.size = self._first_size = size
            self.is_changed = True
            self._cut_count += 1
            self._room_end = self._reserved_end = 0
            self._room_length = ROOM_LENGTH

    def wants_room_nowait(self, end: int) -> bool:
        """Whether a write up to `end` through the cache should let a thread `reserve_due` room first.

        So it is when the file becomes longer and longer. Only one write is told so: the others go ahead.
        """
        is_growing = end - self._first_size > GROWTH_MIN and self._lacks_room(end)
        if self._is_room_due or self._direct_count or not is_growing:
            return False
        self._is_room_due = True
        return True

    def reserve_due(self, fd: int, length: int) -> None:
        """Have room for `length` more bytes, and some of what follows, if `wants_room_nowait` said so.

        Not while there are direct writes, which it would have to wait for; they take care of it.

        Needs:    between `begin` and `finish`.
        """
        if not self._is_room_due:
            return
        with self._room_lock:
            end = self.size + length
            if self._is_room_due and not self._direct_count and self._lacks_room(end):
                self._is_used = True
                self._reserve_locked(fd, self.size, end)
            self._is_room_due = False

    @contextlib.contextmanager
    def room(self, fd: int, start: int, end: int) -> Iterator[None]:
        """Have room for a direct write from `start` to `end`, and for some of what follows, if there can be.

        Reserving has to wait for all direct writes to the file. Waiting for them here keeps guests out of
        nothing; in the kernel it would keep them from writing.

        Needs:    between `begin` and `finish`.
        """
        with self._room_lock:
            self._is_used = True
            while self._clone_count or (self._direct_count and self._lacks_room(end)):
                self._room_lock.wait()
            if self._lacks_room(end):
                self._reserve_locked(fd, start, end)
            self._direct_count += 1
        try:
            yield
        finally:
            self.leave_room()

    def enter_room_nowait(self, end: int) -> bool:
        """Like `room`, until `leave_room`, when there is some for a write up to `end`; False: not at once.

        Needs:    between `begin` and `finish`.
        """
        if not self._room_lock.acquire(blocking=False):
            return False
        try:
            if self._clone_count or self._lacks_room(end):
                return False
            self._is_used = True
            self._direct_count += 1
            return True
        finally:
            self._room_lock.release()

    def leave_room(self) -> None:
        """The direct write is over. Nobody has the lock for long meanwhile: who needs to waits for this."""
        with self._room_lock:
            self._direct_count -= 1
            self._room_lock.notify_all()

    @contextlib.contextmanager
    def without_direct_writes(self) -> Iterator[None]:
        """Clone into the file, which has to wait for direct writes just as reserving has; later ones wait."""
        with self._room_lock:
            self._clone_count += 1
            try:
                while self._direct_count:
                    self._room_lock.wait()
                yield
            finally:
                self._clone_count -= 1
                self._room_lock.notify_all()

    def _lacks_room(self, end: int) -> bool:
        return end > max(self.size, self._room_end) and not self._has_no_room

    def _reserve_locked(self, fd: int, write_start: int, end: int) -> None:
        start, free = max(self.size, self._room_end), _free_length(fd)
        if write_start - start > ROOM_LENGTH:
            start = write_start  # far behind the end, as the image says: what is between stays a hole
        room_end = end + max(ROOM_LENGTH, min(self._room_length, free // FREE_SHARE_MAX))
        if free < FREE_LENGTH_MIN or _libc.fallocate(fd, 0, start, room_end - start):
            self._has_no_room = True  # there is no such call here, or the disk is nearly full
        else:
            self._reserved_end = room_end
        self._room_end = room_end  # also then: a part of it may have been reserved
        self._room_length = min(2 * self._room_length, ROOM_LENGTH_MAX)

    def give_back(self, fd: int, *, unless_used: bool = False) -> None:
        """Cut unused room off; `unless_used`: not if it was used since this was last asked for."""
        with self._room_lock, self._lock:
            was_used, self._is_used = self._is_used, False
            self._is_room_due = False  # the write that was told so has perhaps failed
            if self._room_end <= self.size or self._growing_count or (unless_used and was_used):
                return
            self._cut_count += 1
            self._reserved_end = 0
            with contextlib.suppress(OSError):  # then the file is longer than it has to be
                if os.fstat(fd).st_size > self.size:  # not if somebody cut it: that must not be filled up
                    os.ftruncate(fd, self.size)
            self._room_end = 0
            self._room_length = ROOM_LENGTH
            self._has_no_room = False


def _free_length(fd: int) -> int:
    try:
        status = os.fstatvfs(fd)
    except OSError:
        return 0
    return status.f_bavail * status.f_frsize


class ColdWriter:
    """Writes to one file past the page cache; any thread."""

    def __init__(self) -> None:
        self._direct_fd = _NOT_OPENED
        self._lock = threading.Lock()
        self._writes = threading.Semaphore(DIRECT_WRITE_COUNT)

    def can_write(self, fd: int, *bounds: int) -> bool:
        """Whether it can be tried: O_DIRECT is there, and these offsets and lengths are right for it."""
        return self.direct_fd(fd, *bounds) is not None

    def direct_fd(self, fd: int, *bounds: int) -> int | None:
        """The file open for direct writes, if it can be and these offsets and lengths are right for that."""
        if any(bound % DIRECT_ALIGNMENT for bound in bounds):
            return None
        if self._direct_fd == _NOT_OPENED:
            with self._lock:
                if self._direct_fd == _NOT_OPENED:
                    self._direct_fd = _open_direct(fd)
        return self.direct_fd_nowait(*bounds)

    def direct_fd_nowait(self, *bounds: int) -> int | None:
        """The same if it is open already."""
        is_right = self._direct_fd >= 0 and not any(bound % DIRECT_ALIGNMENT for bound in bounds)
        return self._direct_fd if is_right else None

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> int:
        """Write `data`; tells how much of it, from its start, was written.

        Needs:    `can_write`, and memory that is a multiple of `DIRECT_ALIGNMENT`, or it is 0.
        """
        view = memoryview(data)
        if not view or view.readonly:
            return 0  # there is no address to be had
        memory = ctypes.c_char.from_buffer(view)
        with self._writes:
            write = native_aio.Write(self._direct_fd, offset, ctypes.addressof(memory), len(view))
            return native_aio.write_blocking(write)

    def close_blocking(self) -> None:
        """Let go of everything; a later write opens it again.

        Needs:    no write is under way.
        """
        if self._direct_fd >= 0:
            close_quietly(self._direct_fd)
        self._direct_fd = _NOT_OPENED


def _open_direct(fd: int) -> int:
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        return _NO_DIRECT
