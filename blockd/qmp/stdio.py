"""Standard input and output that an event loop cannot wait for, as they are files or /dev/null.

The loop gets one end of a pipe then, and a thread copies between the other end and the file.
"""

import contextlib
import os
import select
import threading

from blockd.units import KIB

_COPY_LENGTH = 64 * KIB


def readable(fd: int) -> int:
    """A new descriptor that has what can be read from `fd`, and that a loop can wait for.

    Raises:   OSError: `fd` is closed.
    """
    if _can_be_waited_for(fd):
        return os.dup(fd)
    reading, writing = os.pipe()
    # Nobody waits for the rest of the file at the end.
    threading.Thread(target=_copy, args=(os.dup(fd), writing), daemon=True).start()
    return reading


def writable(fd: int) -> int:
    """The same for what is to be written to `fd`; the process ends when all of it is there."""
    if _can_be_waited_for(fd):
        return os.dup(fd)
    reading, writing = os.pipe()
    threading.Thread(target=_copy, args=(reading, os.dup(fd))).start()
    return writing


def _can_be_waited_for(fd: int) -> bool:
    with select.epoll() as poll:
        try:
            poll.register(fd, 0)
        except PermissionError:
            return False
    return True


def _copy(source: int, target: int) -> None:
    """Copy until there is no more, or nobody wants it."""
    try:
        with contextlib.suppress(OSError):
            while data := os.read(source, _COPY_LENGTH):
                while data:
                    data = data[os.write(target, data) :]
    finally:
        os.close(source)
        os.close(target)
