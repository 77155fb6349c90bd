"""Direct writes that leave the file to others while the disk works.

A write past the page cache that is one call keeps a lock on the file until the disk has answered. A guest's
write to the same file only touches the page cache, but needs that lock too: beside a stream it would wait
for milliseconds. Given to the kernel as a request (`io_submit`) the same write keeps the lock only until the
disk has it; then the thread waits for its end (`io_getevents`), and nobody else does.

Where the kernel does not take requests, as in a container that does not allow it, it is one call after all.
"""

import ctypes
import errno
import platform
import threading
from typing import ClassVar, NamedTuple

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.pwrite.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64]
_libc.pwrite.restype = ctypes.c_ssize_t

_PWRITE = 1  # IOCB_CMD_PWRITE
_COUNT_MAX = 1


class _Calls(NamedTuple):
    """The numbers of the system calls, for which the C library has no functions."""

    io_setup: int
    io_getevents: int
    io_submit: int


_NEWER = _Calls(0, 4, 2)
_CALLS = {"x86_64": _Calls(206, 208, 209), "aarch64": _NEWER, "riscv64": _NEWER}.get(platform.machine())


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


class _Thread(threading.local):
    """What this thread gives its requests to; None: not asked for yet, 0: there is none."""

    context: int | None = None


_thread = _Thread()


def write_blocking(fd: int, offset: int, address: int, length: int) -> int:
    """Write the memory at `address`; tells how much of it, from its start, was written.

    Needs:    the file is open for direct I/O, and all numbers are right for that; the memory stays.
    """
    if _thread.context is None:
        _thread.context = _new_context()
    if _thread.context:
        request = _Request(opcode=_PWRITE, fd=fd, address=address, length=length, offset=offset)
        if _submit(_thread.context, request):
            return max(0, _result(_thread.context))
    return max(0, int(_libc.pwrite(fd, address, length, offset)))


def _new_context() -> int:
    """Return what requests are given to; 0 if there is no such thing here. It ends with the process."""
    context = ctypes.c_ulong(0)
    if _CALLS is None or _libc.syscall(
        ctypes.c_long(_CALLS.io_setup), ctypes.c_long(_COUNT_MAX), ctypes.byref(context)
    ):
        return 0
    return context.value


def _submit(context: int, request: _Request) -> bool:
    """Give the kernel a request; False: it does not take it."""
    assert _CALLS is not None, "without calls there is no context"
    requests = (ctypes.POINTER(_Request) * 1)(ctypes.pointer(request))
    submitted = _libc.syscall(
        ctypes.c_long(_CALLS.io_submit), ctypes.c_ulong(context), ctypes.c_long(1), requests
    )
    return bool(submitted == 1)


def _result(context: int) -> int:
    """Wait until the one request is over, whatever happens meanwhile: until then its memory is in use."""
    assert _CALLS is not None, "without calls there is no context"
    event = _Event()
    while (
        _libc.syscall(
            *(ctypes.c_long(_CALLS.io_getevents), ctypes.c_ulong(context), ctypes.c_long(1)),
            *(ctypes.c_long(1), ctypes.byref(event), None),
        )
        != 1
    ):
        assert ctypes.get_errno() == errno.EINTR, "the kernel knows the context"
    return int(event.result)
