"""Going to the background: the process that was started ends when the daemon is ready."""

import contextlib
import os
from collections.abc import Callable

from blockd.errors import BlockdError


def fork_to_background() -> Callable[[], None]:
    """Go on in a child process; what is returned there tells the waiting parent that all is ready.

    The parent ends with status 0 then, or with the child's status if that ends first. Until it is
    ready the child keeps standard error, so that whoever started it reads what went wrong.

    Needs:    no threads and no event loop yet; the descriptors 0, 1 and 2 are open.
    Raises:   BlockdError: there can be no such process.
    """
    try:
        read_end, write_end = os.pipe()
        child = os.fork()
    except OSError as error:
        raise BlockdError(f"Could not go to the background: {error.strerror}") from error
    if child:
        os.close(write_end)
        is_ready = bool(os.read(read_end, 1))
        os._exit(0 if is_ready else os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or 1)
    os.close(read_end)
    os.setsid()

    def tell_ready() -> None:
        try:
            null = os.open(os.devnull, os.O_RDWR)
            for fd in range(3):
                os.dup2(null, fd)
            os.close(null)
        except OSError as error:
            raise BlockdError(f"Could not go to the background: {error.strerror}") from error
        with contextlib.suppress(OSError):  # the process that waited has been killed
            os.write(write_end, b"\n")
        os.close(write_end)

    return tell_ready
