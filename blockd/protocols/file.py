"""Bytes in a file or block device of this machine.

Reads take the fast path when the pages are in the page cache (`RWF_NOWAIT`). Buffered writes have no
such flag on ext4, so the fast path for writes is guarded: it is taken only while no sync is under way
on the file and as long as writes do not wait for the disk (stalls.py).
Copies that nobody is expected to read soon go past the page cache (cold.py), or are none where the filesystem
can let files share blocks (reflink.py).
"""

import contextlib
import ctypes
import errno
import logging
import os
import stat
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Self

from blockd.aio import in_thread
from blockd.block.node import Buffer, ProtocolNode, Segment, Source
from blockd.block.segments import zeroes
from blockd.errors import RequestError, StorageError, printable
from blockd.extents import Extent
from blockd.protocols import copier, writeback
from blockd.protocols.cold import ColdWriter, FileEnd
from blockd.protocols.copier_process import ZEROES
from blockd.protocols.file_status import FileStatus, status_of_name, status_of_open
from blockd.protocols.holes import data_and_holes
from blockd.protocols.image_lock import NO_CLAIM, LockMode, change_claim, claim_for, hold, patiently
from blockd.protocols.opening import open_blocking
from blockd.protocols.read_buffers import ReadBuffers
from blockd.protocols.reflink import Cloner
from blockd.protocols.stalls import SLOW_WRITE_S, Stalls
from blockd.units import MIB

log = logging.getLogger(__name__)

_buffers = ReadBuffers()

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

_FALLOC_KEEP_SIZE = 0x01
_FALLOC_PUNCH_HOLE = 0x02
# What fallocate answers where a filesystem or device cannot do it.
_NOT_FOR_THIS_FILE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV, errno.EPERM)

# More than this at once would itself hold up the loop.
NOWAIT_LENGTH_MAX = 1 * MIB
# Zeroes written at a time where the filesystem cannot punch holes.
_ZERO_CHUNK = 1 * MIB


class FileNode(ProtocolNode):
    """A regular file or block device, opened for as long as the node lives."""

    driver = "file"

    def __init__(self, fd: int, filename: str, size: int, *, node_name: str, read_only: bool) -> None:
        self._end = FileEnd(size)
        super().__init__(node_name, filename, size, read_only=read_only)
        self._fd = fd
        self._is_moved = False
        self._lock_mode = LockMode.OFF
        self._claim = NO_CLAIM
        self._cold = ColdWriter()
        self._cloner = Cloner()
        self._sync_count = 0
        self._stalls = Stalls()

    @classmethod
    async def open(
        cls, path: str, *, node_name: str, read_only: bool, lock_mode: LockMode = LockMode.USUAL
    ) -> Self:
        """Open an existing regular file or block device, and lock it against other processes.

        Raises:   RequestError: no such file, not allowed, something else than a file or block device, or
                  somebody else is using it.
        """
        opened: list[tuple[int, int]] = []  # filled by the thread, also when nobody waits for it any more
        try:
            await in_thread(lambda: opened.append(open_blocking(path, read_only, path)))
            [(fd, size)] = opened
            node = cls(fd, path, size, node_name=node_name, read_only=read_only)
            await node.lock(lock_mode)
        except BaseException:
            for fd, _ in opened:
                os.close(fd)
            raise
        return node

    async def lock(self, mode: LockMode) -> None:
        """Keep other processes out, and other nodes of this one, as far as `mode` says.

        Raises:   RequestError: somebody else is using the file.
        Fails to: the file is locked as before.
        """
        await patiently(lambda: in_thread(self.lock_blocking, mode))

    def lock_blocking(self, mode: LockMode) -> None:
        wanted = claim_for(mode, read_only=self.read_only)
        change_claim(self._fd, self.filename, self._claim, wanted)
        self._lock_mode, self._claim = mode, wanted

    @property
    def size(self) -> int:
        return self._end.size

    @size.setter
    def size(self, size: int) -> None:
        self._end.reset(size)

    def identity(self) -> tuple[int, int]:
        """Equal exactly for the same file or device."""
        return status_of_open(self._fd).identity

    # -- reading ------------------------------------------------------------------------------

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        if length > NOWAIT_LENGTH_MAX:
            return None
        buffer = _buffers.get(length)
        try:
            count = os.preadv(self._fd, [buffer], offset, os.RWF_NOWAIT)
        except OSError:
            return None  # would wait, or a real error: the awaitable read finds out and says so
        return buffer if count == length else None

    async def read(self, offset: int, length: int) -> Buffer:
        buffer = bytearray(length)
        await in_thread(self.readinto_blocking, offset, memoryview(buffer))
        return buffer

    def readinto_blocking(self, offset: int, buffer: memoryview) -> None:
        position = 0
        size = self.size  # of before: another thread may make the file longer at any moment
        try:
            while position < len(buffer):
                count = os.preadv(self._fd, [buffer[position:]], offset + position)
                if not count:
                    self._require_end(offset + position, size)
                    buffer[position:] = zeroes(len(buffer) - position)
                    return
                position += count
        except OSError as error:
            raise StorageError.from_os(error, "read", self.filename) from error

    def _require_end(self, offset: int, size: int) -> None:
        """Zeroes follow the end of a file, but not where somebody else has cut it off."""
        if offset < size:
            raise self._cut_short("read", os.fstat(self._fd).st_size)

    def _cut_short(self, action: str, end: int) -> StorageError:
        return StorageError(
            f"Could not {action} '{self.filename}': it was cut short to {end} bytes while in use",
            operation=action,
        )

    def require_unchanged_blocking(self) -> None:
        size = self.size  # of before: another thread may make the file longer at any moment
        status = status_of_open(self._fd)
        if status.is_regular and status.size < size:
            raise self._cut_short("write", status.size)
        if not status.link_count:
            raise StorageError(f"Could not write '{self.filename}': it was removed or replaced while in use")
        if not self._is_moved and not self._has_its_name(status):
            self._is_moved = True
            log.warning("'%s' is not where it was opened any more; it stays in use", printable(self.filename))

    def _has_its_name(self, status: FileStatus) -> bool:
        try:
            return status_of_name(self.filename).identity == status.identity
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True  # its folder cannot be looked at, for whatever reason

    def _require_length(self) -> None:
        size = self.size
        status = os.fstat(self._fd)  # guests wait for this: three times as fast as `status_of_open`
        if stat.S_ISREG(status.st_mode) and status.st_size < size:
            raise self._cut_short("write", status.st_size)

    def _require_length_before(self, end: int) -> None:
        """Writing past the end would fill up what was cut off, and nobody would notice any more."""
        if end > self.size:
            self._require_length()

    async def map(self, offset: int, length: int) -> list[Extent]:
        return await in_thread(data_and_holes, self._fd, offset, length)

    # -- writing ------------------------------------------------------------------------------

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        if self.read_only or self._sync_count or self.failed or len(data) > NOWAIT_LENGTH_MAX:
            return False
        started = time.monotonic()
        if started < self._stalls.watched_until and not self._stalls.may_write(started):
            return False
        end = offset + len(data)
        is_growing = end > self._end.size
        if is_growing and (self._wants_room_nowait(end) or not self._end.begin_nowait()):
            return False
        count = 0
        try:
            if is_growing:
                self._require_length()
            count = os.pwrite(self._fd, data, offset)
        except (OSError, StorageError):
            return False  # the awaitable write meets the same error and reports it
        finally:
            if is_growing:
                self._end.finish(offset, count)
        finished = time.monotonic()
        if finished - started > SLOW_WRITE_S:
            self._stalls.note_slow_write(started, finished)
        return count == len(data)

    async def write(self, offset: int, data: Buffer) -> None:
        self._require_writable()
        await in_thread(self.write_blocking, offset, data)

    def write_blocking(self, offset: int, data: Buffer) -> None:
        self._require_writable()
        view = memoryview(data)
        self._require_length_before(offset + len(view))
        position = 0
        self._end.begin()
        try:
            self._end.reserve_due(self._fd, len(view))
            while position < len(view):
                position += os.pwrite(self._fd, view[position:], offset + position)
        except OSError as error:
            raise StorageError.from_os(error, "write", self.filename) from error
        finally:
            self._end.finish(offset, position)

    def write_cold_blocking(self, offset: int, data: Buffer) -> None:
        """Write past the page cache where that can be.

        Needs:    for that, memory, offset and length are multiples of `cold.DIRECT_ALIGNMENT`.
        """
        self._require_writable()
        self._require_length_before(offset + len(data))
        written = 0
        self._end.begin()
        try:
            if self._cold.can_write(self._fd, offset, len(data)):
                with self._room(offset, len(data)):
                    written = self._cold.write(offset, data)
        finally:
            self._end.finish(offset, written)
        if written < len(data):
            super().write_cold_blocking(offset + written, memoryview(data)[written:])

    def can_clone_blocking(self, source: Source, *bounds: int) -> bool:
        if not self.may_clone or not isinstance(source, FileNode):
            return False
        return self._cloner.can_clone(self._fd, source._fd, *bounds)

    def clone_blocking(self, source: Source, source_offset: int, offset: int, length: int) -> bool:
        self._require_writable()
        self._require_length_before(offset + length)
        if not isinstance(source, FileNode):
            return False
        if not self.can_clone_blocking(source, source_offset, offset, length):
            return False
        with source._condemned_by_errors():
            writeback.finish(source._fd, source_offset, length)
        is_cloned = False
        self._end.begin()
        try:
            with self._end.without_direct_writes():
                is_cloned = self._cloner.clone(self._fd, offset, source._fd, source_offset, length)
        finally:
            self._end.finish(offset, length if is_cloned else 0)
        return is_cloned

    @property
    def copies_apart(self) -> bool:
        return copier.copier.is_wanted

    async def copy_apart(
        self, source: list[Segment], offset: int, length: int, cluster_size: int
    ) -> list[int] | None:
        wanted = length >= copier.LENGTH_MIN and self.copies_apart
        segments = _file_segments(source, length) if wanted else None
        if segments is None:
            return None
        place = offset, length, cluster_size
        target = self._begin_apart_nowait(segments, *place)
        if target is None and await in_thread(self._prepare_apart_blocking, segments, *place):
            target = self._begin_apart_nowait(segments, *place)
        if target is None:
            return None
        written, zeroes = 0, None
        try:
            zeroes = await copier.copier.copy(target, offset, segments, cluster_size)
            if zeroes is not None:
                written = copier.written_end(length, zeroes, cluster_size)
        finally:
            if self.is_longer_allowed:
                self._end.leave_room()
            self._end.finish(offset, written)
        return zeroes

    def _begin_apart_nowait(
        self, segments: list[copier.FileSegment], offset: int, length: int, cluster_size: int
    ) -> copier.TargetFile | None:
        """Begin a direct write; None: something is missing for which a thread would have to wait."""
        direct_fd = self._cold.direct_fd_nowait(offset, length, cluster_size)
        if direct_fd is None or self.read_only or self.failed or not copier.copier.is_there:
            return None
        if self.may_clone and not all(map(self._cloner.is_known_impossible, _sources(segments))):
            return None
        try:
            self._require_length_before(offset + length)
        except StorageError:
            return None  # `_prepare_apart_blocking` meets the same error
        if not self._end.begin_nowait():
            return None
        if self.is_longer_allowed and not self._end.enter_room_nowait(offset + length):
            self._end.finish(offset, 0)
            return None
        return copier.TargetFile(direct_fd, self._fd)

    def _prepare_apart_blocking(
        self, segments: list[copier.FileSegment], offset: int, length: int, cluster_size: int
    ) -> bool:
        """Provide what many copies need; False: they are not to be made apart."""
        self._require_writable()
        self._require_length_before(offset + length)
        if self._cold.direct_fd(self._fd, offset, length, cluster_size) is None:
            return False
        if self.may_clone and any(self._cloner.can_clone(self._fd, fd) for fd in _sources(segments)):
            return False  # which is better still
        self._end.begin()
        try:
            with self._room(offset, length):
                return copier.copier.start_blocking()
        finally:
            self._end.finish(offset, 0)

    def _wants_room_nowait(self, end: int) -> bool:
        return self.is_longer_allowed and self._end.wants_room_nowait(end)

    def _room(self, offset: int, length: int) -> AbstractContextManager[None]:
        if not self.is_longer_allowed:
            return contextlib.nullcontext()
        return self._end.room(self._fd, offset, offset + length)

    def start_writeback_blocking(self, offset: int, length: int) -> None:
        writeback.start(self._fd, offset, length)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        self._require_writable()
        await in_thread(self.punch_hole_blocking if unmap else self._write_zeroes_blocking, offset, length)

    async def discard(self, offset: int, length: int) -> None:
        await self.write_zeroes(offset, length)

    def punch_hole_blocking(self, offset: int, length: int) -> None:
        self._require_writable()
        mode = _FALLOC_PUNCH_HOLE | _FALLOC_KEEP_SIZE
        if _libc.fallocate(self._fd, mode, offset, length) == 0:
            return
        code = ctypes.get_errno()
        if code not in _NOT_FOR_THIS_FILE:
            raise StorageError.from_os(OSError(code, ""), "punch a hole in", self.filename)
        self._write_zeroes_blocking(offset, length)

    def allocate_blocking(self, offset: int, length: int) -> None:
        self._require_writable()
        self._require_length_before(offset + length)
        allocated = 0
        self._end.begin()
        try:
            if _libc.fallocate(self._fd, 0, offset, length) == 0:
                allocated = length
                return
            code = ctypes.get_errno()
        finally:
            self._end.finish(offset, allocated)
        if code not in _NOT_FOR_THIS_FILE:
            raise StorageError.from_os(OSError(code, ""), "allocate space in", self.filename)
        super().allocate_blocking(offset, length)

    def _write_zeroes_blocking(self, offset: int, length: int) -> None:
        end = min(offset + length, self.size)
        while offset < end:
            count = min(_ZERO_CHUNK, end - offset)
            self.write_blocking(offset, zeroes(count))
            offset += count

    async def flush(self) -> None:
        if not self.read_only:
            await in_thread(self.sync_blocking)

    def sync_blocking(self) -> None:
        self._require_writable()
        self.require_unchanged_blocking()
        with self._condemned_by_errors():
            writeback.finish(self._fd)  # most of it while guests' writes need no thread
            self._sync_count += 1
            try:
                self._end.give_back(self._fd, unless_used=True)
                os.fdatasync(self._fd)
            finally:
                self._sync_count -= 1

    @contextlib.contextmanager
    def _condemned_by_errors(self) -> Iterator[None]:
        """The kernel tells of what it could not write once, so an error inside is final."""
        try:
            yield
        except OSError as error:
            self.failed = self.failed or StorageError.from_os(error, "sync", self.filename)
            raise self.failed from error

    async def resize(self, size: int) -> None:
        await in_thread(self.truncate_blocking, size)

    def truncate_blocking(self, size: int) -> None:
        self._require_writable()
        self._require_length_before(size)
        before, self.size = self.size, min(self.size, size)  # never more than there is
        try:
            os.ftruncate(self._fd, size)
        except OSError as error:
            self.size = before
            raise StorageError.from_os(error, "resize", self.filename) from error
        self.size = size

    async def reopen(self, *, read_only: bool) -> None:
        if self.read_only != read_only:
            await self.flush()
            await in_thread(self._reopen_blocking, read_only)

    def _reopen_blocking(self, read_only: bool) -> None:
        """Open the same file again, wherever its name leads by now, and put it under the same descriptor.

        A call that is reading meanwhile goes on with the file as it was opened before. Locks belong to what
        was opened: the old one becomes what the new one has to be, asking others, and goes only when the
        new one has the same.
        """
        if self.failed is not None:
            raise self.failed
        if self._lock_mode is LockMode.FORCE_SHARE and not read_only:
            raise RequestError("force-share=on can only be used with read-only images")
        self._end.give_back(self._fd)
        before, wanted = self._claim, claim_for(self._lock_mode, read_only=read_only)
        with contextlib.ExitStack() as undo:
            fd, size = open_blocking(f"/proc/self/fd/{self._fd}", read_only, self.filename)
            undo.callback(os.close, fd)
            change_claim(self._fd, self.filename, before, wanted)
            undo.callback(change_claim, self._fd, self.filename, wanted, before)
            hold(fd, self.filename, wanted)
            os.dup2(fd, self._fd, inheritable=False)
            undo.pop_all()
        os.close(fd)
        self.size, self._claim = size, wanted
        self._cold.close_blocking()
        self.read_only = read_only

    async def close(self) -> None:
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        await in_thread(self._close_blocking, fd)

    def _close_blocking(self, fd: int) -> None:
        self._end.give_back(fd)
        self._cold.close_blocking()
        os.close(fd)


def _file_segments(source: list[Segment], length: int) -> list[copier.FileSegment] | None:
    """A plan in terms of open files, `length` bytes of it; None: not all of it is in files as it is."""
    segments = []
    for part in source:
        if part.source is None:
            segments.append(copier.FileSegment(ZEROES, 0, part.length))
        elif isinstance(part.source, FileNode):
            segments.append(copier.FileSegment(part.source._fd, part.offset, part.length))
        else:
            return None
    missing = length - sum(segment.length for segment in segments)
    return [*segments, copier.FileSegment(ZEROES, 0, missing)] if missing else segments


def _sources(segments: list[copier.FileSegment]) -> set[int]:
    return {segment.fd for segment in segments} - {ZEROES}
