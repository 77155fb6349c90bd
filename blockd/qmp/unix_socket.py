"""Socket files: never take a live one away from its owner, never leave one behind."""

import contextlib
import os
import socket
import stat
from pathlib import Path

from blockd.errors import RequestError

MODE = 0o600
_BACKLOG = 128


class SocketFile:
    """A listening unix socket and its name in the filesystem."""

    def __init__(self, listener: socket.socket, path: Path, identity: tuple[int, int]) -> None:
        self.listener = listener
        self._path = path
        self._identity = identity

    @classmethod
    def create(cls, path: str) -> "SocketFile":
        """Listen on `path`, readable and writable by our user only; replaces the file of a dead socket.

        Raises:   RequestError: the name is taken by a live socket or by something else, or is no good.
        """
        _remove_dead(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(path)
            # Nobody can connect before listen(), so nobody slips in between.
            Path(path).chmod(MODE)
            listener.listen(_BACKLOG)
        except OSError as error:
            listener.close()
            raise _bind_error(path, error) from error
        listener.setblocking(False)
        return cls(listener, Path(path).absolute(), _identity(path))

    def remove(self) -> None:
        """Remove the file if it is still ours."""
        with contextlib.suppress(FileNotFoundError):
            if _identity(self._path) == self._identity:
                self._path.unlink()


def _identity(path: str | Path) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def _remove_dead(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except OSError:
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
        except OSError as error:
            raise _bind_error(path, error) from error
    raise RequestError(f"Failed to bind socket to {path}: another process listens on it")


def _bind_error(path: str, error: OSError) -> RequestError:
    reason = os.strerror(error.errno) if error.errno else str(error)
    return RequestError(f"Failed to bind socket to {path}: {reason}")
