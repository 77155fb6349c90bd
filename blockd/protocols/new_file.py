"""A file that exists only when everything about it worked."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from blockd.aio import in_thread
from blockd.errors import RequestError, StorageError
from blockd.protocols.file import FileNode
from blockd.protocols.image_lock import LockMode

_MODE = 0o600


@asynccontextmanager
async def new_file(path: str) -> AsyncIterator[FileNode]:
    """Create a file for an image and hold it open; it and its name are durable after the block.

    Raises:   RequestError: the file exists already, or cannot be created here.
    Fails to: there is no such file: it is removed when the block ends with any exception.
    """
    created: list[FileNode] = []  # filled by the thread: a cancelled wait for it is cleaned up as well
    try:
        await in_thread(_create_exclusively, path, created)
        yield created[0]
        await created[0].flush()
        await in_thread(sync_folder, path)
    except BaseException:
        if created:
            await in_thread(os.unlink, path)
        raise
    finally:
        for node in created:
            await node.close()


def _create_exclusively(path: str, created: list[FileNode]) -> None:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)
    except FileExistsError as error:
        raise RequestError(f"Could not create '{path}': the file exists and is not overwritten") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "the name has a NUL character in it"
        raise RequestError(f"Could not create '{path}': {reason}") from error
    node = FileNode(fd, path, 0, node_name="#new", read_only=False)
    created.append(node)
    node.lock_blocking(LockMode.USUAL)


def sync_folder(path: str) -> None:
    """Make the name of a file durable."""
    try:
        fd = os.open(Path(path).absolute().parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise StorageError.from_os(error, "sync the folder of", path) from error
