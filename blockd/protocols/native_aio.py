"""Direct writes that leave the file to others while the disk works.

A write past the page cache that is one call keeps a lock on the file until the disk has answered. A guest's
write to the same file only touches the page cache, but needs that lock too: beside a stream it would wait
for milliseconds. Given to the kernel as a request (`io_submit`) the same write keeps the lock only until the
disk has it; then the thread waits for its end (`io_getevents`), and nobody else does.

Where the kernel does not take requests, as in a container that does not allow it, it is one call after all.
"""

import contextlib
import ctypes
import errno
import os
import threading
from typing import ClassVar, NamedTuple

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.pwrite.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64]
_libc.pwrite.restype = ctypes.c_ssize_t

_PWRITE = 1  # IOCB_CMD_PWRITE


class _Calls(NamedTuple):
    """The numbers of the system calls, for which the C library has no functions."""

    io_setup: int
    io_getevents: int
    io_submit: int


_NEWER = _Calls(0, 4, 2)
_CALLS = {"x86_64": _Calls(206, 208, 209), "aarch64": _NEWER, "riscv64": _NEWER}.get(os.uname().machine)


class _Request(ctypes.Structure):
    """`struct iocb` of a machine whose low bytes come first."""

    _fields_: ClassVar = [
        ("data", ctypes.c_uint64),
        ("key", ctypes.c_uint32),
        ("rw_flags", ctypes.c_uint32),
        ("opcode", ctypes.c_uint16),
        ("priority", ctypes.c_int16),
        ("fd", ctypes.c_uint32),
        ("address", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("offset", ctypes.c_int64),
        ("reserved", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("event_fd", ctypes.c_uint32),
    ]


class _Event(ctypes.Structure):
    """`struct io_event`: how a request ended. `result` is a count of bytes, or an error below 0."""

    _fields_: ClassVar = [
        ("data", ctypes.c_uint64),
        ("request", ctypes.c_uint64),
        ("result", ctypes.c_int64),
        ("second_result", ctypes.c_int64),
    ]


class Write(NamedTuple):
    """Write the `length` bytes of memory at `address`, which has to stay until the write is over."""

    fd: int
    offset: int
    address: int
    length: int


class Writes:
    """Direct writes that the disk has at once, `count_max` at most; of one thread, until the process ends.

    Raises:   OSError: the kernel does not take requests.
    """

    def __init__(self, count_max: int) -> None:
        context = ctypes.c_ulong(0)
        if _CALLS is None or _libc.syscall(
            ctypes.c_long(_CALLS.io_setup), ctypes.c_long(count_max), ctypes.byref(context)
        ):
            raise OSError(ctypes.get_errno(), "the kernel does not take requests")
        self._context, self._calls = context, _CALLS
        self._free = list(range(count_max))
        self._requests = (_Request * count_max)()
        self._events = (_Event * count_max)()

    def submit(self, write: Write) -> int | None:
        """Give the kernel a write; tells its number until it is over. None: there are as many as can be.

        Raises:   OSError: the kernel does not take it.
        """
        if not self._free:
            return None
        number = self._free.pop()
        fd, offset, address, length = write
        request = _Request(data=number, opcode=_PWRITE, fd=fd, address=address, length=length, offset=offset)
        self._requests[number] = request
        requests = (ctypes.POINTER(_Request) * 1)(ctypes.pointer(self._requests[number]))
        if (
            _libc.syscall(ctypes.c_long(self._calls.io_submit), self._context, ctypes.c_long(1), requests)
            != 1
        ):
            self._free.append(number)
            raise OSError(ctypes.get_errno(), "the kernel does not take the write")
        return number

    def wait(self) -> list[tuple[int, int]]:
        """Wait until some are over, one at least: their numbers, and how much of each was written, or < 0.

        Whatever happens meanwhile: until then their memory is in use.

        Needs:    there is one.
        """
        while (count := self._get_events()) < 1:
            assert ctypes.get_errno() == errno.EINTR, "the kernel knows the context"
        over = [(event.data, event.result) for event in self._events[:count]]
        self._free += (number for number, _ in over)
        return over

    def _get_events(self) -> int:
        return int(
            _libc.syscall(
                *(ctypes.c_long(self._calls.io_getevents), self._context, ctypes.c_long(1)),
                *(ctypes.c_long(len(self._events)), self._events, None),
            )
        )


class _Thread(threading.local):
    """What this thread writes with; None: not asked for yet, or, if `is_asked`, there is none."""

    writes: Writes | None = None
    is_asked = False


_thread = _Thread()


def write_blocking(write: Write) -> int:
    """Write; tells how much, from the start, was written.

    Needs:    the file is open for direct I/O, and all numbers are right for that.
    """
    if not _thread.is_asked:
        _thread.is_asked = True
        with contextlib.suppress(OSError):
            _thread.writes = Writes(1)
    if _thread.writes is not None:
        with contextlib.suppress(OSError):
            _thread.writes.submit(write)
            [(_, written)] = _thread.writes.wait()
            return max(0, written)
    return max(0, int(_libc.pwrite(write.fd, write.address, write.length, write.offset)))
