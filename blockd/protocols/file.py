"""Bytes in a file or block device of this machine.

Reads take the fast path when the pages are in the page cache (`RWF_NOWAIT`). Buffered writes have no
such flag on ext4, so the fast path for writes is guarded: it is taken only while no sync is under way
on the file and as long as writes do not wait for the disk (stalls.py).
Copies that nobody is expected to read soon go past the page cache (cold.py), or are none where the filesystem
can let files share blocks (reflink.py).
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Self

from blockd.aio import in_thread
from blockd.block.node import Buffer, Segment, Source
from blockd.block.read_buffers import read_buffers
from blockd.block.segments import zeroes
from blockd.errors import RequestError, StorageError, printable
from blockd.extents import Extent
from blockd.found_files import location_of
from blockd.protocols import copier, file_status, vectored, writeback
from blockd.protocols.cold import ColdWriter, FileEnd
from blockd.protocols.file_status import DiskUsage, FileStatus, has_name, known_size, status_of_open
from blockd.protocols.folios import FOLIO_LENGTH_MAX, Folios
from blockd.protocols.holes import allocate, data_and_holes, free_behind, punch_hole
from blockd.protocols.image_lock import Claim, LockMode, change_claim, claim_for, hold, patiently
from blockd.protocols.opening import Find, NamedFile, close_quietly, find_and_open, open_again
from blockd.protocols.reflink import Cloner
from blockd.protocols.stalls import SLOW_WRITE_S, Stalls
from blockd.units import MIB

log = logging.getLogger(__name__)

# More than this at once would itself hold up the loop.
NOWAIT_LENGTH_MAX = 1 * MIB


class FileNode(vectored.FileReads):
    """A regular file or block device, opened for as long as the node lives."""

    driver = "file"
    folio_length = FOLIO_LENGTH_MAX

    def __init__(self, named: NamedFile, *, node_name: str) -> None:
        opened, folder, read_only, self._lock_mode, self._claim = named
        self._end = FileEnd(opened.size)
        super().__init__(node_name, folder.filename, opened.size, read_only=read_only)
        self._end.is_changed = False
        self._fd = opened.fd
        self._identity = opened.identity
        self.folder = folder  # what the names count from that are recorded in the file
        self._usage, self._is_moved = DiskUsage(), False
        self._cold, self._folios, self._cloner = ColdWriter(), Folios(), Cloner()
        self._sync_count, self._stalls = 0, Stalls()

    @classmethod
    async def open(
        cls,
        found: str | Find,
        *,
        node_name: str,
        read_only: bool,
        may_be_read_only: bool = False,
        lock_mode: LockMode = LockMode.USUAL,
        check: Callable[[Self], None] | None = None,
    ) -> Self:
        """Open a regular file or block device by its name or what finds it, and lock it against others.

        `may_be_read_only`: a file that cannot be written is opened read-only. `check` may refuse the file,
        with what it knows better than a lock that others hold.

        Raises:   RequestError: no such file, not allowed, something else, or somebody else is using it.
        """
        opened: list[NamedFile] = []  # filled by the thread, also when nobody waits for it any more
        find = partial(find_and_open, found, read_only, may_be_read_only, lock_mode)
        try:
            await in_thread(lambda: opened.append(find()))
            node = cls(opened[0], node_name=node_name)
            if check is not None:
                check(node)
            if node._lock_mode is not lock_mode:
                await node.lock(lock_mode)
        except BaseException:
            for file in opened:
                await in_thread(file.close)
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
        return self._identity

    def birth_blocking(self) -> str:
        """What tells the file from another one that takes its name later."""
        return file_status.birth_of(self._fd)

    async def disk_usage(self) -> int | None:
        return await self._usage.find(self._fd)

    def location(self) -> str:
        """Where the file is, whatever its name leads to; no disk is asked."""
        return location_of(self._fd, self.filename)

    # -- reading ------------------------------------------------------------------------------

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        if length > NOWAIT_LENGTH_MAX:
            return None
        buffer = read_buffers.get(length)
        try:
            count = os.preadv(self._fd, [buffer], offset, os.RWF_NOWAIT)
        except OSError:
            return None  # would wait, or a real error: the awaitable read finds out and says so
        return buffer if count == length else None

    async def read(self, offset: int, length: int) -> Buffer:
        buffer = read_buffers.get(length)
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
            raise file_status.cut_short(self.filename, "read", os.fstat(self._fd).st_size)

    def require_unchanged_blocking(self) -> None:
        status = self._require_length_blocking()
        if not status.link_count:
            raise StorageError(f"Could not write '{self.filename}': it was removed or replaced while in use")
        if not self._is_moved and not has_name(self.filename, status.identity):
            self._is_moved = True
            log.warning("'%s' is not where it was opened any more; it stays in use", printable(self.filename))

    def _require_length_blocking(self) -> FileStatus:
        while True:
            least = self._end.least()  # of before: another thread may make the file longer at any moment
            try:
                status = status_of_open(self._fd)
            except OSError as error:
                raise StorageError.from_os(error, "look at", self.filename) from error
            if not status.is_regular or status.size >= least[0]:
                return status
            if least == self._end.least():
                raise file_status.cut_short(self.filename, "write", status.size)

    def _require_length_before(self, end: int) -> None:
        """Writing past the end would fill up what was cut off, and nobody would notice any more."""
        if end > self.size:
            self._require_length_blocking()

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
        if is_growing and not self._begin_growing_nowait(end):
            return False
        count, folios, self._folios.nowait = 0, self._folios, (offset, end)
        try:
            # Without room behind its end a direct write keeps all others out, until the disk has it.
            if folios.direct and (not self.is_longer_allowed or folios.is_direct(offset, end)):
                return False
            count = os.pwrite(self._fd, data, offset)
        except OSError:
            return False  # the awaitable write meets the same error and reports it
        finally:
            folios.nowait = None
            if is_growing:
                self._end.finish(offset, count)
        finished, self._end.is_changed = time.monotonic(), True
        if finished - started > SLOW_WRITE_S:
            self._stalls.note_slow_write(started, finished)
        return count == len(data)

    def _begin_growing_nowait(self, end: int) -> bool:
        """Begin a write that reaches behind `size`; False: a thread has to reserve room, or look at the file.

        Who looks at a file may wait for its server. In the room nobody has to, see `begin_in_room_nowait`;
        where there is none, what is known without the server has to do.
        """
        if self.is_longer_allowed:
            return not self._end.wants_room_nowait(end) and self._end.begin_in_room_nowait(end)
        size = known_size(self._fd)
        return size is not None and size >= self.size and self._end.begin_nowait()

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
            with self._folios.through_cache(offset, len(view)):
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
                with self._room(offset, len(data)), self._folios.past_cache(offset, len(data)) as is_alone:
                    written = self._cold.write(offset, data) if is_alone else 0
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
        if not isinstance(source, FileNode) or not self.can_clone_blocking(
            source, source_offset, offset, length
        ):
            return False
        with source._condemned_by_errors():
            writeback.finish(source._fd, source_offset, length)
        self._end.begin()
        is_cloned = False
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
        self, source: list[Segment], offset: int, length: int, cluster_size: int, place_length: int = 0
    ) -> list[int] | None:
        if length < copier.LENGTH_MIN or not self.copies_apart:
            return None
        files = [part.source for part in source if isinstance(part.source, FileNode)]
        fds: dict[Source, int] = {file: file._fd for file in files if file._fd >= 0}
        segments = copier.file_segments(source, length, fds.get)
        if segments is None:
            return None
        place, written, zeroes = (offset, place_length or length, cluster_size), 0, None
        target = self._begin_apart_nowait(files, *place)
        if target is None and await in_thread(self._prepare_apart_blocking, files, *place):
            target = self._begin_apart_nowait(files, *place, whole=True)
        if target is None:
            return None
        try:
            zeroes = await copier.copier.copy(target, offset, segments, cluster_size, place_length)
            if zeroes is not None:
                written = copier.written_end(length, zeroes, cluster_size, place_length)
            return zeroes
        finally:
            self._folios.end_direct(offset, place_length or length)
            if self.is_longer_allowed:
                self._end.leave_room()
            self._end.finish(offset, written)

    def _begin_apart_nowait(
        self, files: "list[FileNode]", offset: int, length: int, cluster_size: int, *, whole: bool = False
    ) -> copier.TargetFile | None:
        """Begin a direct write; None: something is missing for which a thread would have to wait."""
        direct_fd = self._cold.direct_fd_nowait(offset, length, cluster_size)
        if direct_fd is None or self.read_only or self.failed or not copier.copier.is_there:
            return None
        if self.may_clone and not all(self._cloner.is_known_impossible(file.identity()) for file in files):
            return None
        end = offset + length
        is_inside = whole or end <= self.size or self._end.is_in_room(end)
        if not is_inside or not self._end.begin_nowait():
            return None
        if self.is_longer_allowed and not self._end.enter_room_nowait(end):
            self._end.finish(offset, 0)
            return None
        if self._folios.begin_direct(offset, length):
            return copier.TargetFile(direct_fd, self._fd)
        if self.is_longer_allowed:
            self._end.leave_room()
        self._end.finish(offset, 0)
        return None

    def _prepare_apart_blocking(
        self, files: "list[FileNode]", offset: int, length: int, cluster_size: int
    ) -> bool:
        """Provide what many copies need; False: they are not to be made apart."""
        self._require_writable()
        self._require_length_before(offset + length)
        if self._cold.direct_fd(self._fd, offset, length, cluster_size) is None:
            return False
        if self.may_clone and any(self._cloner.can_clone(self._fd, file._fd) for file in files):
            return False  # which is better still
        self._end.begin()
        try:
            with self._room(offset, length):
                return copier.copier.start_blocking()
        finally:
            self._end.finish(offset, 0)

    def _room(self, offset: int, length: int) -> AbstractContextManager[None]:
        is_needed = self.is_longer_allowed
        return self._end.room(self._fd, offset, offset + length) if is_needed else contextlib.nullcontext()

    def start_writeback_blocking(self, offset: int, length: int) -> None:
        writeback.start(self._fd, offset, length)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        self._require_writable()
        await in_thread(self.punch_hole_blocking if unmap else self.write_zeroes_blocking, offset, length)

    def punch_hole_blocking(self, offset: int, length: int) -> None:
        self._require_writable()
        self._end.is_changed = True
        try:
            is_punched = punch_hole(self._fd, offset, length)
        except OSError as error:
            raise StorageError.from_os(error, "punch a hole in", self.filename) from error
        if not is_punched:
            self.write_zeroes_blocking(offset, min(length, self.size - offset))

    def allocate_blocking(self, offset: int, length: int) -> bool:
        self._require_writable()
        self._require_length_before(offset + length)
        allocated = 0
        self._end.begin()
        try:
            if allocate(self._fd, offset, length):
                allocated = length
        except OSError as error:
            raise StorageError.from_os(error, "allocate space in", self.filename) from error
        finally:
            self._end.finish(offset, allocated)
        return bool(allocated)

    def needs_flush(self) -> bool:
        return not self.read_only and self._end.needs_sync

    async def flush(self) -> None:
        if not self.read_only:
            await in_thread(self.sync_blocking)

    def sync_blocking(self) -> None:
        self._require_writable()
        self.require_unchanged_blocking()
        if self.settings.cache.is_unsafe:
            return
        with self._condemned_by_errors():
            writeback.finish(self._fd)  # most of it while guests' writes need no thread
            self._sync_count += 1
            self._end.is_changed = False
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

    def trim_blocking(self, end: int) -> None:
        if end < self.size and self._require_length_blocking().is_regular:
            self.truncate_blocking(end)
        self._end.give_back(self._fd)
        free_behind(self._fd, self.size)

    async def reopen(self, *, read_only: bool) -> None:
        if self.read_only != read_only:
            await self.flush()
            await patiently(lambda: in_thread(self._reopen_blocking, read_only))

    def _claim_once(self, *, read_only: bool) -> Claim:
        return claim_for(self._lock_mode, read_only=read_only)

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
        before, wanted = self._claim, self._claim_once(read_only=read_only)
        with contextlib.ExitStack() as undo:
            fd, size, _ = open_again(self._fd, read_only, self.filename)
            undo.callback(close_quietly, fd)
            change_claim(self._fd, self.filename, before, wanted)
            undo.callback(change_claim, self._fd, self.filename, wanted, before)
            hold(fd, self.filename, wanted)
            try:
                os.dup2(fd, self._fd, inheritable=False)
            except OSError as error:
                raise StorageError.from_os(error, "reopen", self.filename) from error
            undo.pop_all()
        close_quietly(fd)
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
        close_quietly(self.folder.fd)
        try:
            os.close(fd)
        except OSError as error:
            raise StorageError.from_os(error, "close", self.filename) from error
