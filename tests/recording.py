"""A file in memory that remembers in which order it was changed, and can be cut off at any moment.

What was written before the last completed sync is on the disk. Of what came after it, any part may
be, in any order, each 512-byte sector old or new, and the file may be as long as it was or longer.
"""

import random
import threading
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, ParamSpec

from blockd.aio import in_thread
from blockd.block.node import Buffer, ProtocolNode, Source
from blockd.units import SECTOR_SIZE, align_down, align_up

P = ParamSpec("P")


@dataclass(frozen=True)
class Write:
    """Bytes written at an offset."""

    offset: int
    data: bytes

    def apply(self, disk: bytearray) -> None:
        end = self.offset + len(self.data)
        if len(disk) < end:
            disk.extend(bytes(end - len(disk)))
        disk[self.offset : end] = self.data


@dataclass(frozen=True)
class Punch:
    """A hole made into the file; its length stays."""

    offset: int
    length: int

    def apply(self, disk: bytearray) -> None:
        end = min(self.offset + self.length, len(disk))
        if self.offset < end:
            disk[self.offset : end] = bytes(end - self.offset)


@dataclass(frozen=True)
class Truncate:
    """Another length of the file."""

    size: int

    def apply(self, disk: bytearray) -> None:
        del disk[self.size :]
        disk.extend(bytes(self.size - len(disk)))


@dataclass(frozen=True)
class Sync:
    """All entries before this one are on the disk."""


Change = Write | Punch | Truncate
Entry = Change | Sync


Disks = tuple[bytes, ...]
Tape = list[tuple["RecordingFile", Entry]]


class RecordingFile(ProtocolNode):
    """A file as a protocol node, with a log. `on_entry` is called before every entry, in any thread."""

    driver = "recording"

    def __init__(self, content: bytes = b"", name: str = "recorded.qcow2") -> None:
        super().__init__("#recording", name, len(content), read_only=False)
        self.initial = bytes(content)
        self.disk = bytearray(content)
        self.log: list[Entry] = []
        # The log of all files that are recorded together; by default this one alone.
        self.tape: Tape = []
        self.on_entry: Callable[[], None] = lambda: None
        # Nothing is answered at once, as if it were not in the page cache; threads have to do it.
        self.is_slow = False
        # Whether an answer at once is refused though the file is not slow.
        self.would_wait: Callable[[], bool] = lambda: False
        # Without a log nothing can be cut off, and a long life needs no memory.
        self.has_log = True
        # The file of the image that an add-cow file speaks of.
        self.beside: RecordingFile | None = None
        self._lock = threading.Lock()

    def again(self) -> "RecordingFile":
        """Another file with what this one holds now, and with another one beside it."""
        file = RecordingFile(bytes(self.disk), self.filename)
        file.beside = self.beside and self.beside.again()
        return file

    def _record(self, entry: Entry) -> None:
        with self._lock:
            self.before_change(entry)
            self.on_entry()
            if isinstance(entry, Write) and self.has_log:
                entry = self._whole_sectors(entry)
            if not isinstance(entry, Sync):
                entry.apply(self.disk)
                self.size = len(self.disk)
            if self.has_log:
                self.log.append(entry)
                self.tape.append((self, entry))

    def before_change(self, change: Entry) -> None:
        """For doubles that fail: raise, and nothing has happened."""

    def readinto_blocking(self, offset: int, buffer: memoryview) -> None:
        with self._lock:
            data = self.disk[offset : offset + len(buffer)]
        buffer[:] = data.ljust(len(buffer), b"\0")

    def write_blocking(self, offset: int, data: Buffer) -> None:
        self._record(Write(offset, bytes(data)))

    def _whole_sectors(self, write: Write) -> Write:
        """What the page cache sends to the disk for a write: the sectors it touches, as they are then."""
        end = write.offset + len(write.data)
        start, stop = align_down(write.offset, SECTOR_SIZE), align_up(end, SECTOR_SIZE)
        head, tail = self.disk[start : write.offset], self.disk[end:stop]
        return Write(start, bytes(head).ljust(write.offset - start, b"\0") + write.data + bytes(tail))

    def start_writeback_blocking(self, offset: int, length: int) -> None:
        """Nothing to do: no promise is made."""

    def punch_hole_blocking(self, offset: int, length: int) -> None:
        self._record(Punch(offset, length))

    def sync_blocking(self) -> None:
        self._record(Sync())

    def truncate_blocking(self, size: int) -> None:
        self._record(Truncate(size))

    def trim_blocking(self, end: int) -> None:
        if end < self.size:
            self.truncate_blocking(end)

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        if self.is_slow or offset + length > self.size or self.would_wait():
            return None
        buffer = bytearray(length)
        self.readinto_blocking(offset, memoryview(buffer))
        return buffer

    async def read(self, offset: int, length: int) -> Buffer:
        buffer = bytearray(length)
        await self._run(self.readinto_blocking, offset, memoryview(buffer))
        return buffer

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        if self.is_slow or self.would_wait():
            return False
        self.write_blocking(offset, data)
        return True

    async def write(self, offset: int, data: Buffer) -> None:
        await self._run(self.write_blocking, offset, data)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        await self._run(self.punch_hole_blocking, offset, length)

    async def discard(self, offset: int, length: int) -> None:
        await self.write_zeroes(offset, length)

    async def flush(self) -> None:
        await self._run(self.sync_blocking)

    async def resize(self, size: int) -> None:
        await self._run(self.truncate_blocking, size)

    async def _run(self, call: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        if self.is_slow or self.would_wait():
            await in_thread(call, *args, **kwargs)
        else:
            call(*args, **kwargs)

    async def close(self) -> None:
        """The memory stays for the test."""


class CloningFile(RecordingFile):
    """A recorded file that shares blocks with others; until the next sync, clones can be lost as writes."""

    def __init__(self, content: bytes = b"", name: str = "cloned.qcow2") -> None:
        super().__init__(content, name)
        self.cloned_bytes = 0
        # Clones fail though all said that they can be.
        self.is_failing = False

    def can_clone_blocking(self, source: Source, *bounds: int) -> bool:
        return isinstance(source, RecordingFile)

    def clone_blocking(self, source: Source, source_offset: int, offset: int, length: int) -> bool:
        assert isinstance(source, RecordingFile), "it was asked for others too"
        data = bytes(source.disk[source_offset : source_offset + length])
        if self.is_failing or len(data) < length:
            self.write_blocking(offset, bytes(length // 2))  # anything may be there now
            return False
        self.cloned_bytes += length
        self.write_blocking(offset, data)
        return True


class Timeline:
    """Goes through the tape of some files entry by entry and builds the disks a crash there could leave."""

    def __init__(self, files: Sequence[RecordingFile], tape: Tape | None = None) -> None:
        self._files = {file: index for index, file in enumerate(files)}
        self._tape = files[0].tape if tape is None else tape
        self._durable = [file.initial for file in files]
        self._pending: list[_Placed] = []

    def states(
        self, rng: random.Random, *, subset_count: int, positions: Container[int] | None = None
    ) -> Iterator[tuple[int, str, Disks]]:
        """For every position on the tape, each different state once: (entries so far, which crash, disks)."""
        for position in range(len(self._tape) + 1):
            seen: set[Disks] = set()
            is_chosen = positions is None or position in positions
            for what, disks in self._states_here(rng, subset_count) if is_chosen else ():
                if disks not in seen:
                    seen.add(disks)
                    yield position, what, disks
            if position < len(self._tape):
                self._step(*self._tape[position])

    def _step(self, file: RecordingFile, entry: Entry) -> None:
        index = self._files[file]
        if isinstance(entry, Sync):
            self._durable[index] = self._with(self._pending)[index]
            self._pending = [placed for placed in self._pending if placed.file_index != index]
        else:
            self._pending.append(_Placed(index, entry))

    def _states_here(self, rng: random.Random, subset_count: int) -> Iterator[tuple[str, Disks]]:
        pending = self._pending
        newest = self._with(pending)
        yield "all so far", newest
        yield "up to the last sync", tuple(self._durable)
        if not pending:
            return
        yield from self._shorter(newest)
        if len(pending) > 1:
            yield from self._single(rng, subset_count)
        for number in range(subset_count):
            part = [placed for placed in pending if rng.random() < 0.5]
            yield f"random subset {number}", self._with(part)
            yield f"torn subset {number}", self._with([_torn(placed, rng) for placed in part])
        yield "the last one torn", self._with([*pending[:-1], _torn(pending[-1], rng)])

    def _shorter(self, newest: Disks) -> Iterator[tuple[str, Disks]]:
        """Files that are not extended yet, and with several files each one ahead of the others."""
        yield (
            "the file not extended",
            tuple(disk[: len(durable)] for disk, durable in zip(newest, self._durable, strict=True)),
        )
        for index in range(len(newest)) if len(newest) > 1 else ():
            yield (
                f"all of file {index}",
                (*self._durable[:index], newest[index], *self._durable[index + 1 :]),
            )

    def _single(self, rng: random.Random, subset_count: int) -> Iterator[tuple[str, Disks]]:
        """Each alone and all but each; of very many pending entries the newest and a few others."""
        count = len(self._pending)
        older = range(count - 4)
        chosen = {*rng.sample(older, min(len(older), 2 * subset_count)), *range(max(0, count - 4), count)}
        for index in sorted(chosen):
            yield f"only pending entry {index}", self._with([self._pending[index]])
            yield (
                f"all but pending entry {index}",
                self._with(self._pending[:index] + self._pending[index + 1 :]),
            )

    def _with(self, changes: list["_Placed"]) -> Disks:
        disks: dict[int, bytearray] = {}
        for index, change in changes:
            disk = disks.get(index)
            if disk is None:
                disk = disks[index] = bytearray(self._durable[index])
            change.apply(disk)
        return tuple(bytes(disks.get(index, durable)) for index, durable in enumerate(self._durable))


class _Placed(NamedTuple):
    """A change and the file it was made to."""

    file_index: int
    change: Change


def _torn(placed: _Placed, rng: random.Random) -> _Placed:
    """A write of which only the first sectors arrived."""
    change = placed.change
    if not isinstance(change, Write) or len(change.data) <= SECTOR_SIZE:
        return placed
    sector_count = rng.randrange(1, -(-len(change.data) // SECTOR_SIZE))
    return placed._replace(change=Write(change.offset, change.data[: SECTOR_SIZE * sector_count]))
