"""Standard input, output and error, which whoever starts a program may have closed."""

import errno
import os
import sys

from blockd.errors import RequestError


def open_standard_streams() -> None:
    """Put the null device at those of the descriptors 0, 1 and 2 that are closed.

    Otherwise the files that are opened next get these numbers: an image would receive the log, and going to
    the background would close it.

    Raises:   RequestError: there is no null device.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError as error:
            if error.errno == errno.EBADF:  # others have it open all the same
                _open_null(fd)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def write_out(text: str) -> None:
    """Write to standard output, at once even into a pipe.

    Raises:   BrokenPipeError: nobody reads there any more. RequestError: it cannot be written.
    Fails to: what is written there from now on is lost.
    """
    try:
        print(text, end="", flush=True)
    except OSError as error:
        # What is still in the buffer would be tried again at the end.
        with open(os.devnull, "w") as null:  # noqa: PTH123  (as everywhere here)
            os.dup2(null.fileno(), 1)
        if isinstance(error, BrokenPipeError):
            raise
        raise RequestError(f"Could not write to standard output: {error.strerror}") from error


def _open_null(fd: int) -> None:
    try:
        opened = os.open(os.devnull, os.O_RDWR)
    except OSError as error:
        raise RequestError(f"Could not open '{os.devnull}': {error.strerror}") from error
    assert opened == fd, "the lowest number that is free"
    os.set_inheritable(fd, True)
