"""Socket files: never take a live one away from its owner, never leave one behind.

A name may lead to a server that does not answer, so what looks at it is done in threads.
"""

import contextlib
import logging
import os
import socket
import stat
from pathlib import Path
from typing import Self

from blockd.aio import in_thread
from blockd.errors import RequestError, printable
from blockd.filenames import absolute, check_path

log = logging.getLogger(__name__)

MODE = 0o600
# Clients that may wait to be accepted; beyond it the kernel refuses them.
BACKLOG = 128


class SocketFile:
    """A listening unix socket and its name in the filesystem."""

    def __init__(self, listener: socket.socket, path: Path, identity: tuple[int, int]) -> None:
        self.listener = listener
        self._path = path
        self._identity = identity

    @classmethod
    async def create(cls, path: str) -> Self:
        """Listen on `path`, readable and writable by our user only; replaces the file of a dead socket.

        Raises:   RequestError: the name is taken by a live socket or by something else, or is no good.
        """
        created: list[Self] = []  # filled by the thread, also when nobody waits for it any more
        try:
            await in_thread(lambda: created.append(cls._create_blocking(path)))
        except BaseException:
            for socket_file in created:
                socket_file.listener.close()
                await socket_file.remove()
            raise
        return created[0]

    @classmethod
    def _create_blocking(cls, path: str) -> Self:
        try:
            full_path = Path(absolute(check_path(path)))
        except RequestError as error:
            raise RequestError(f"Failed to bind socket to '{printable(path)}': {error.message}") from error
        with contextlib.ExitStack() as undo:
            try:
                _remove_dead(path)
                listener = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                listener.bind(path)
                undo.callback(_remove_quietly, path)
                # Nobody can connect before listen(), so nobody slips in between.
                Path(path).chmod(MODE)
                listener.listen(BACKLOG)
                listener.setblocking(False)
                made = cls(listener, full_path, _identity(path))
            except (OSError, ValueError) as error:
                raise RequestError(f"Failed to bind socket to {path}: {_reason(error)}") from error
            undo.pop_all()
        return made

    async def remove(self) -> None:
        """Remove the file if it is still ours; if that cannot be done, the log says so."""
        await in_thread(self._remove_blocking)

    def _remove_blocking(self) -> None:
        try:
            if _identity(self._path) == self._identity:
                self._path.unlink()
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning("could not remove the socket '%s': %s", printable(str(self._path)), error.strerror)


def _identity(path: str | Path) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def _reason(error: OSError | ValueError) -> str:
    """Python's own errors, such as of a name that is too long, have no number."""
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)


def _remove_quietly(path: str) -> None:
    with contextlib.suppress(OSError):
        Path(path).unlink()


def _remove_dead(path: str) -> None:
    """Remove a socket file that nobody answers on."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise RequestError(f"Failed to bind socket to {path}: the file exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.setblocking(False)
        try:
            client.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink(missing_ok=True)
            return
        except BlockingIOError:
            pass  # alive: its backlog is full
    raise RequestError(f"Failed to bind socket to {path}: another process listens on it")
