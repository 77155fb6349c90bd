"""The copier: a process that copies between files while guests are at work.

Copies in threads of the daemon keep guests waiting, though not for the disk: for Python's interpreter, and
for processors, which a thread in the kernel gives up only when it has copied its megabytes. One thread in a
process of its own hardly does. It is slower than six threads are; so where no guest asks for anything there
is no such process.

It gets files and numbers over *lanes*, one copy each at a time, and answers when the copy is on the disk. If
it does not, for whatever reason, the caller copies: nothing was in use where it may have written.
"""

import array
import asyncio
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from blockd.aio import process_calls, to_its_end
from blockd.block.accounting import all_guests
from blockd.block.node import Segment, Source
from blockd.block.zero_clusters import packed_end
from blockd.errors import printable
from blockd.protocols import copier_process as process
from blockd.units import MIB

log = logging.getLogger(__name__)

# So many copies at once; who wants more makes them in threads.
LANE_COUNT = 8
# Less than this is copied sooner than it is asked for.
LENGTH_MIN = 1 * MIB
START_TIMEOUT_S = 5.0
THREAD_NAME = "blockd-copier"
# So often it is started again after it did not end by itself; then once after some time.
FAILURE_COUNT_MAX = 3
RECOVERY_TIME_S = 60.0

_ROOT = Path(__file__).parents[2]
_PROGRAM = (
    "import sys; _, root, edition, *lanes = sys.argv; sys.path.append(root); from {} import main; "
    "main(edition, [*map(int, lanes)])"
)
_NUMBER_SIZE = 8


class FileSegment(NamedTuple):
    """`length` bytes from `offset` of the open file `fd`; `process.ZEROES`: zeroes."""

    fd: int
    offset: int
    length: int


class TargetFile(NamedTuple):
    """Where copies go: the file open for direct writes, and as it is locked against others."""

    direct_fd: int
    locked_fd: int


def file_segments(
    source: list[Segment], length: int, fd_of: Callable[[Source], int | None]
) -> list[FileSegment] | None:
    """A plan in terms of open files, `length` bytes of it; None: not all of it is in files as it is."""
    segments = []
    for part in source:
        fd = process.ZEROES if part.source is None else fd_of(part.source)
        if fd is None:
            return None
        segments.append(FileSegment(fd, part.offset if part.source is not None else 0, part.length))
    missing = length - sum(segment.length for segment in segments)
    return [*segments, FileSegment(process.ZEROES, 0, missing)] if missing else segments


class Copier:
    """The process while there is one, and the lanes to it.

    Locks:    `_lock` while the process is started, and by who attends to it: never by the event loop.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # Those that nobody uses.
        self._lanes: list[socket.socket] = []
        # There as long as the process is.
        self._attendant: threading.Thread | None = None
        self._failure_count = 0
        self._failed_at = 0.0
        self._lock = threading.Lock()

    @property
    def is_wanted(self) -> bool:
        """Whether copies should be made here: guests are at work, and it can be."""
        return all_guests.are_at_work and self._may_try()

    def _may_try(self) -> bool:
        """Whether it has not failed so often, or not lately: what was in the way may be gone."""
        if self._failure_count < FAILURE_COUNT_MAX:
            return True
        return self._clock() >= self._failed_at + RECOVERY_TIME_S

    def _note_failures(self, count: int) -> None:
        self._failure_count, self._failed_at = min(count, FAILURE_COUNT_MAX), self._clock()

    @property
    def is_there(self) -> bool:
        """Whether there is a process to ask."""
        return self._attendant is not None and self._attendant.is_alive()

    async def copy(
        self,
        target: TargetFile,
        host_offset: int,
        source: list[FileSegment],
        cluster_size: int,
        place_length: int = 0,
    ) -> list[int] | None:
        """Copy to `host_offset`, but for clusters that are all zeroes; tells at which positions those are.

        `place_length`: the others go one right behind the other, and the copy ends when there is no more
        place (`packed_end`).

        None: it was not done here, or not all of it.

        Needs:    memory of any address can be written directly to all these offsets and lengths.
        Cancel:   takes effect when nothing is written any more.
        """
        request = _request(target, host_offset, source, cluster_size, place_length)
        if request is None or not self.is_there or not self._lanes:
            return None
        under_way = process_calls.begin()
        try:
            answer = await to_its_end(self._asked(*request))
        finally:
            process_calls.finish(under_way)
        return answer[1:].tolist() if answer and answer[0] == process.DONE else None

    def _asked(self, request: "array.array[int]", files: list[int]) -> "asyncio.Future[array.array[int]]":
        """What the process will answer; nothing: it is gone, or has never got the request.

        Needs:    a lane.
        """
        loop, lanes = asyncio.get_running_loop(), self._lanes
        answered: asyncio.Future[array.array[int]] = loop.create_future()
        lane = lanes.pop()

        def take_answer() -> None:
            loop.remove_reader(lane.fileno())
            answer = _received(lane)
            if answer and lanes is self._lanes:
                lanes.append(lane)
            else:
                lane.close()
            answered.set_result(answer)

        try:
            socket.send_fds(lane, [request], files)  # there is room for it in a lane that nobody uses
            loop.add_reader(lane.fileno(), take_answer)
        except OSError:
            lanes.append(lane)
            answered.set_result(array.array("q"))
        return answered

    def start_blocking(self) -> bool:
        """Have a process, and wait until it is there; False: there is none."""
        with self._lock:
            if not self.is_there and self._may_try():
                self._start()
            return self.is_there

    def _start(self) -> None:
        lanes: list[socket.socket] = []
        theirs: list[socket.socket] = []
        try:
            for _ in range(LANE_COUNT):
                pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                lanes.append(pair[0])
                theirs.append(pair[1])
            attendant = threading.Thread(
                target=self._attend, args=(lanes, theirs), name=THREAD_NAME, daemon=True
            )
            attendant.start()
        except (OSError, RuntimeError) as error:
            self._give_up(lanes + theirs, str(error))
            return
        try:
            lanes[0].settimeout(START_TIMEOUT_S)
            if lanes[0].recv(_NUMBER_SIZE):
                lanes[0].settimeout(None)
                _close(self._lanes)  # of one that has ended
                self._lanes, self._attendant = lanes, attendant
                return
            reason = "it ended at once"
        except OSError as error:
            reason = str(error)
        self._give_up(lanes, reason)

    def _give_up(self, lanes: list[socket.socket], reason: str) -> None:
        _close(lanes)
        self._note_failures(FAILURE_COUNT_MAX)
        log.warning("no process could be started that copies beside guests, threads copy: %s", reason)

    def _attend(self, lanes: list[socket.socket], theirs: list[socket.socket]) -> None:
        """Have the process, from start to end. If this thread ended before, the kernel would end it."""
        program = _PROGRAM.format(process.__name__)
        fds = [lane.fileno() for lane in theirs]
        command = [sys.executable, "-I", "-S", "-c", program, str(_ROOT), process.EDITION, *map(str, fds)]
        try:
            with subprocess.Popen(
                command,
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            ) as child:
                _close(theirs)
                _, output = child.communicate()
            # Of a traceback the last line says what went wrong.
            *_, said = output.decode(errors="replace").strip().split("\n")
            reason = f"status {child.returncode}: {said}"
        except OSError as error:
            _close(theirs)
            reason = str(error)
        else:
            if not child.returncode:
                reason = ""
        if reason:
            with self._lock:
                self._note_failures(self._failure_count + 1)
            log.warning("the process that copies beside guests ended, threads copy: %s", printable(reason))


def written_end(length: int, zeroes: list[int], cluster_size: int, place_length: int = 0) -> int:
    """Where the last cluster of a copy ends that is not `zeroes`."""
    if place_length:
        return packed_end(length, zeroes, cluster_size, place_length) - len(zeroes) * cluster_size
    for position in reversed(zeroes):
        if position + cluster_size < length:
            break
        length = position
    return length


def _request(
    target: TargetFile, host_offset: int, source: list[FileSegment], cluster_size: int, place_length: int
) -> "tuple[array.array[int], list[int]] | None":
    """The copy as numbers and files; None: it is too large for that."""
    files = list(target)
    numbers = {process.ZEROES: process.ZEROES}
    request = array.array("q", [cluster_size, place_length, host_offset])
    for fd, offset, length in source:
        if fd not in numbers:
            numbers[fd] = len(files)
            files.append(fd)
        request.extend((numbers[fd], offset, length))
    cluster_count = sum(segment.length for segment in source) // cluster_size
    number_count_max = process.MESSAGE_LENGTH_MAX // _NUMBER_SIZE
    if max(len(request), cluster_count + 2) > number_count_max or len(files) > process.FILE_COUNT_MAX:
        return None
    return request, files


def _received(lane: socket.socket) -> "array.array[int]":
    try:
        return array.array("q", lane.recv(process.MESSAGE_LENGTH_MAX))
    except OSError:
        return array.array("q")


def _close(lanes: list[socket.socket]) -> None:
    for lane in lanes:
        lane.close()


copier = Copier()
