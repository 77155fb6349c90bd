"""Writing past the page cache: what a stream copies, which nobody is expected to read soon.

It costs less than writing through the cache and evicts nothing that guests need. Three things make
it fast, and each can be missing, on a filesystem or in a container that does not have it:

    O_DIRECT     no copy into the page cache, and no write-back to wait for at the end
    room         space reserved behind the file's end: a filesystem lets writes into it go on side by
                 side, but one at a time when each makes the file longer
    pages        the pages of another file's cache are handed to the disk as they are, through a pipe,
                 so that no byte of them is touched by the processor

What cannot be done here, or fails, the caller writes the usual way, which reports what is wrong.
"""

import contextlib
import ctypes
import fcntl
import os
import threading

from blockd.units import GIB, MIB

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

# What O_DIRECT asks of memory, offsets and lengths on every filesystem and device that has it.
DIRECT_ALIGNMENT = 4096
# How much is reserved at a time. What is not used is given back.
ROOM_LENGTH = 64 * MIB
# With less free space than this none is reserved: others may need it.
FREE_LENGTH_MIN = 1 * GIB
# What goes through a pipe at once: as much as anybody may put into one (/proc/sys/fs/pipe-max-size).
PIPE_LENGTH = 1 * MIB

_NOT_OPENED, _NO_DIRECT = -1, -2


class FileEnd:
    """Where a file ends, kept exactly while threads write behind it, and the room behind that.

    Locks:    `_lock` for a few instructions, so that the event loop may take it, or for cutting the
              room off, when `begin_nowait` refuses; `_room_lock` before it, by threads alone.
    """

    def __init__(self, size: int) -> None:
        # Behind the furthest write that is over; the file itself may be longer by the room.
        self.size = size
        self._room_end = 0
        self._has_no_room = False
        self._is_used = False
        self._growing_count = 0
        self._lock = threading.Lock()
        self._room_lock = threading.Lock()

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

    def finish(self, offset: int, count: int) -> None:
        """A write that began is over: `count` bytes at `offset` are written."""
        with self._lock:
            self._growing_count -= 1
            if count:
                self.size = max(self.size, offset + count)

    def reset(self, size: int) -> None:
        """The file was given another length, or opened again.

        Needs:    no write is under way.
        """
        with self._lock:
            self.size = size
            self._room_end = 0

    def reserve(self, fd: int, end: int) -> None:
        """See that there is room up to `end` and for some of what follows, if there can be.

        Needs:    between `begin` and `finish`.
        """
        with self._room_lock:
            self._is_used = True
            start, room_end = max(self.size, self._room_end), end + ROOM_LENGTH
            if end <= start or self._has_no_room:
                return
            if _free_length(fd) < FREE_LENGTH_MIN or _libc.fallocate(fd, 0, start, room_end - start):
                self._has_no_room = True  # there is no such call here, or the disk is nearly full
            self._room_end = room_end  # also then: a part of it may have been reserved

    def give_back(self, fd: int, *, unless_used: bool = False) -> None:
        """Cut unused room off; `unless_used`: not if it was used since this was last asked for."""
        with self._room_lock, self._lock:
            was_used, self._is_used = self._is_used, False
            if self._room_end <= self.size or self._growing_count or (unless_used and was_used):
                return
            with contextlib.suppress(OSError):  # then the file is longer than it need be
                if os.fstat(fd).st_size > self.size:  # not if somebody cut it: that must not be filled up
                    os.ftruncate(fd, self.size)
            self._room_end = 0
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
        self._can_pass_pages = True
        self._pipes: list[tuple[int, int]] = []
        self._lock = threading.Lock()

    def can_write(self, fd: int, *bounds: int) -> bool:
        """Whether it can be tried: O_DIRECT is there, and these offsets and lengths are right for it."""
        if any(bound % DIRECT_ALIGNMENT for bound in bounds):
            return False
        if self._direct_fd == _NOT_OPENED:
            with self._lock:
                if self._direct_fd == _NOT_OPENED:
                    self._direct_fd = _open_direct(fd)
        return self._direct_fd != _NO_DIRECT

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> int:
        """Write `data`; tells how much of it, from its start, was written.

        Needs:    `can_write`, and memory that is a multiple of `DIRECT_ALIGNMENT`, or it is 0.
        """
        try:
            return os.pwrite(self._direct_fd, data, offset)
        except OSError:
            return 0

    @property
    def can_pass_pages(self) -> bool:
        """Whether `pass_pages` has not failed so far."""
        return self._can_pass_pages and self._direct_fd != _NO_DIRECT

    def pass_pages(self, offset: int, source_fd: int, source_offset: int, length: int) -> int:
        """Write what another file holds; tells how much of it, from its start, was written.

        Needs:    `can_write`.
        """
        try:
            pipe = self._pipes.pop() if self._pipes else _open_pipe()
        except OSError:
            self._can_pass_pages = False
            return 0
        position = 0
        while position < length:
            count = min(PIPE_LENGTH, length - position)
            if not self._pass_through(pipe, offset + position, source_fd, source_offset + position, count):
                self._can_pass_pages = position > 0 and self._can_pass_pages
                _close_pipe(pipe)  # something may be left in it
                return position
            position += count
        self._pipes.append(pipe)
        return position

    def _pass_through(
        self, pipe: tuple[int, int], offset: int, source_fd: int, source_offset: int, length: int
    ) -> bool:
        """Pass what fits into the pipe on at once, so that the disk gets large writes."""
        read_fd, write_fd = pipe
        filled = written = 0
        try:
            while filled < length:
                count = os.splice(source_fd, write_fd, length - filled, offset_src=source_offset + filled)
                if not count:
                    return False  # the file was cut short
                filled += count
            while written < length:
                written += os.splice(read_fd, self._direct_fd, length - written, offset_dst=offset + written)
        except OSError:
            return False
        return True

    def close_blocking(self) -> None:
        """Let go of everything; a later write opens it again.

        Needs:    no write is under way.
        """
        while self._pipes:
            _close_pipe(self._pipes.pop())
        if self._direct_fd >= 0:
            os.close(self._direct_fd)
        self._direct_fd = _NOT_OPENED


def _open_direct(fd: int) -> int:
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        return _NO_DIRECT


def _open_pipe() -> tuple[int, int]:
    """Open a pipe that takes `PIPE_LENGTH` bytes.

    Raises:   OSError: there is no such pipe for us.
    """
    pipe = os.pipe2(os.O_CLOEXEC)
    try:
        fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, PIPE_LENGTH)
    except OSError:
        _close_pipe(pipe)
        raise
    return pipe


def _close_pipe(pipe: tuple[int, int]) -> None:
    for fd in pipe:
        os.close(fd)
