"""The copier's program: copies between files, piece by piece, in one thread (copier.py is its other side).

While the disk writes a piece the next one is read. It knows files and numbers; what they mean and what
becomes of a copy is the daemon's business. It imports little, so that it is there soon.
"""

import array
import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from blockd import __version__
from blockd.block.copy_memory import LENGTH as PIECE_LENGTH
from blockd.block.copy_memory import copy_memory
from blockd.block.zero_clusters import zero_clusters
from blockd.protocols.native_aio import Write, Writes
from blockd.scheduling import Courtesy, step_back
from blockd.units import KIB

# One is read while the disk has the others.
PIECE_COUNT = 4
# What is read before others may have the processor.
READ_LENGTH = 256 * KIB
# Runs of clusters that the disk has at once; a piece with zeroes in it is several.
WRITE_COUNT = 64
# Without work for so long it ends.
IDLE_TIME_S = 5
# What a message, and the kernel with one, takes at most.
MESSAGE_LENGTH_MAX = 64 * 1024
FILE_COUNT_MAX = 200
# What the daemon and this program have to agree on: the program is read from its file whenever it is started,
# and that may be of another blockd by then. The number goes up when messages change.
EDITION = f"{__version__}-1"
# The first number of what it says.
READY, DONE, FAILED = range(3)
# Stands for a file of zeroes.
ZEROES = -1

_PR_SET_PDEATHSIG = 1

_courtesy = Courtesy()


class Copy:
    """A copy on its way.

    A request is int64 numbers: the cluster size, how much place there is if clusters of zeroes are left out
    of the target (0: their places are), where it goes there; then of each segment the file's number, the
    offset in it, the length. A copy ends before the cluster that there is no place for. Its `files` are the
    target for direct writes, the target as the daemon has locked it, so that the lock lasts as long as
    anything may be written, and the sources.
    """

    def __init__(self, lane: socket.socket, request: "array.array[int]", files: list[int]) -> None:
        self._lane = lane
        self._files = files
        self._cluster_size, self._place_length, self._host_offset, *segments = request
        self._segments = deque(zip(segments[::3], segments[1::3], segments[2::3], strict=True))
        self._length = sum(length for _, _, length in self._segments)
        self._position = 0
        self._zeroes = array.array("q")
        self._is_failed = False
        # What holds it: its being read, and each piece of it that is not written yet.
        self.user_count = 0

    @property
    def length_left(self) -> int:
        """How much is still to be read."""
        return 0 if self._is_failed else self._length - self._position

    def fail(self) -> None:
        """It is not worth going on with: the daemon copies, and finds out what is wrong."""
        self._is_failed = True

    def read(self, data: memoryview) -> Iterator[Write]:
        """Read what comes next; tells what of it is to be written.

        Raises:   OSError: it cannot be read.
        """
        position = 0
        while position < len(data):
            file, offset, length = self._segments.popleft()
            count = min(length, len(data) - position)
            if count < length:
                self._segments.appendleft((file, offset + count, length - count))
            self._read_file(file, offset, data[position : position + count])
            position += count
        start, self._position = self._position, self._position + len(data)
        address = ctypes.addressof(ctypes.c_char.from_buffer(data))
        position = 0
        for zeroes in [*zero_clusters(data, self._cluster_size), len(data)]:
            place, count = self._place(start + position, zeroes - position)
            if count:
                yield Write(self._files[0], place, address + position, count)
            if count < zeroes - position:
                self._length = self._position  # there is no place for the rest
                return
            if zeroes < len(data):
                self._zeroes.append(start + zeroes)
            position = zeroes + self._cluster_size

    def _place(self, position: int, length: int) -> tuple[int, int]:
        """Where a run of clusters goes, and how much of it."""
        if not self._place_length:
            return self._host_offset + position, length
        written = position - len(self._zeroes) * self._cluster_size
        return self._host_offset + written, min(length, self._place_length - written)

    def _read_file(self, file: int, offset: int, data: memoryview) -> None:
        if file == ZEROES:
            data[:] = bytes(len(data))
            return
        while data:
            _courtesy.give_way()
            count = os.preadv(self._files[file], [data[:READ_LENGTH]], offset)
            if not count:
                raise OSError("the file ends")
            offset, data = offset + count, data[count:]

    def answer(self) -> None:
        """Tell the daemon where clusters of zeroes are, which were not written; or that it failed."""
        for file in self._files:
            os.close(file)
        answer = [FAILED] if self._is_failed else [DONE, *self._zeroes]
        self._lane.send(array.array("q", answer))


@dataclass
class Piece:
    """A part of a copy, in memory until it is written."""

    copy: Copy
    memory: memoryview
    # What holds it: its being read, and each write of it.
    user_count: int = 1


class Pump:
    """Copies what it is given, one copy after another; `memory`: for one piece each.

    Raises:   OSError: the kernel does not take requests.
    """

    def __init__(self, memory: list[memoryview]) -> None:
        self._free = memory
        self._writes = Writes(WRITE_COUNT)
        # By number of the write.
        self._pending: dict[int, tuple[Piece, Write]] = {}

    @property
    def is_writing(self) -> bool:
        return bool(self._pending)

    def pump(self, copy: Copy) -> None:
        """Read all of it and give it to the disk."""
        copy.user_count += 1
        while copy.length_left:
            if self._free:
                self._pump_piece(Piece(copy, self._free.pop()))
            else:
                self.wait()  # the copy may have failed then
        self._leave_copy(copy)

    def _pump_piece(self, piece: Piece) -> None:
        copy = piece.copy
        copy.user_count += 1
        try:
            for write in copy.read(piece.memory[: copy.length_left]):
                self._pending[self._submitted(write)] = piece, write
                piece.user_count += 1
        except OSError:
            copy.fail()
        self._leave_piece(piece)

    def _submitted(self, write: Write) -> int:
        while (number := self._writes.submit(write)) is None:
            self.wait()
        return number

    def wait(self) -> None:
        """Wait until writes are over, one at least."""
        for number, written in self._writes.wait():
            piece, write = self._pending.pop(number)
            if written != write.length:
                piece.copy.fail()
            self._leave_piece(piece)

    def _leave_piece(self, piece: Piece) -> None:
        piece.user_count -= 1
        if not piece.user_count:
            self._free.append(piece.memory)
            self._leave_copy(piece.copy)

    def _leave_copy(self, copy: Copy) -> None:
        copy.user_count -= 1
        if not copy.user_count:
            copy.answer()


def main(edition: str, lane_fds: list[int]) -> None:
    """Copy what comes over the lanes, until nobody is at their other ends or nothing has come for a while.

    Not for a daemon of another `edition`: it would mean something else by the same numbers.
    """
    if edition != EDITION:
        sys.exit(f"the blockd that runs ({edition}) is not the one that is installed ({EDITION}): restart it")
    _settle_down()
    lanes = {fd: socket.socket(fileno=fd) for fd in lane_fds}
    requests = select.poll()
    for fd in lanes:
        requests.register(fd, select.POLLIN)
    with contextlib.ExitStack() as held, contextlib.suppress(ConnectionError):
        memory = [held.enter_context(copy_memory.lent(PIECE_LENGTH)) for _ in range(PIECE_COUNT)]
        try:
            pump = Pump(memory)
        except OSError as error:
            sys.exit(f"no room for writes of its own: {error.strerror}")  # as when others have all of them
        lanes[lane_fds[0]].send(array.array("q", [READY]))
        while True:
            ready = requests.poll(0 if pump.is_writing else IDLE_TIME_S * 1000)
            for fd, _ in ready:
                copy = _received(lanes[fd])
                if copy is None:
                    return
                pump.pump(copy)
            if pump.is_writing and not ready:
                pump.wait()
            elif not ready:
                return


def _received(lane: socket.socket) -> Copy | None:
    """What is to be copied; None: the daemon is gone."""
    message, files, _, _ = socket.recv_fds(lane, MESSAGE_LENGTH_MAX, FILE_COUNT_MAX)
    return Copy(lane, array.array("q", message), files) if message else None


def _settle_down() -> None:
    """Leave the processors to the daemon and its guests, and end with it, whatever happens to it."""
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
    ):  # for the daemon, which may still have copies
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    step_back()
