"""A file that exists only when everything about it worked."""

import logging
import os
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress

from blockd.aio import in_thread
from blockd.errors import RequestError, StorageError
from blockd.filenames import basename, check_path, folder_of, why_not
from blockd.found_files import Folder, FoundFile, reopenable
from blockd.protocols.file import FileNode
from blockd.protocols.file_status import status_of_open
from blockd.protocols.image_lock import LockMode
from blockd.protocols.opening import NamedFile, OpenFile, close_quietly

log = logging.getLogger(__name__)

_MODE = 0o600


class MadeFile:
    """A file that was made here, held without being open: whatever becomes of its name, this one is meant."""

    def __init__(self, folder: Folder, fd: int, identity: tuple[int, int]) -> None:
        self._folder = folder
        self._fd = fd
        self._identity = identity

    def find(self) -> FoundFile:
        """The file, to be opened.

        Raises:   RequestError: there are too many open files.
        """
        filename = self._folder.filename
        with ExitStack() as undo:
            try:
                folder_fd = os.dup(self._folder.fd)
                undo.callback(close_quietly, folder_fd)
                found = FoundFile(filename, folder_fd, os.dup(self._fd))
            except OSError as error:
                raise RequestError(f"Could not open '{filename}': {error.strerror}") from error
            undo.pop_all()
        return found

    def remove(self) -> None:
        """Remove it from the folder that it was made in, unless it has gone from there.

        If that cannot be done, the log says so: why it is to be removed is what a client is told.
        """
        try:
            _remove(self._folder, self._identity)
        except OSError as error:
            log.warning("could not remove '%s': %s", self._folder.filename, error.strerror)

    def close(self) -> None:
        """Hold it no more."""
        close_quietly(self._fd)
        close_quietly(self._folder.fd)


class NewFile(FileNode):
    """A file that is being made; `beside`: what was made along with it."""

    def __init__(self, named: NamedFile) -> None:
        super().__init__(named, node_name="#new")
        self.beside: list[MadeFile] = []

    def made_blocking(self) -> list[MadeFile]:
        """All that was made, this one first; the caller closes them.

        Raises:   StorageError: there are too many open files.
        """
        with ExitStack() as undo:
            try:
                folder = Folder(self.filename, os.dup(self.folder.fd))
                undo.callback(close_quietly, folder.fd)
                fd = os.open(reopenable(self._fd), os.O_PATH | os.O_CLOEXEC)
            except OSError as error:
                raise StorageError.from_os(error, "hold", self.filename) from error
            undo.pop_all()
        beside, self.beside = self.beside, []
        return [MadeFile(folder, fd, self.identity()), *beside]


@asynccontextmanager
async def new_file(path: str) -> AsyncIterator[NewFile]:
    """Create a file for an image and hold it open; it and its name are durable after the block.

    Raises:   RequestError: the file exists already, or cannot be created here.
    Fails to: there is no such file: it is removed when the block ends with any exception.
    """
    created: list[NewFile] = []  # filled by the thread: a cancelled wait for it is cleaned up as well
    try:
        await in_thread(_create_exclusively, path, created)
        yield created[0]
        await created[0].flush()
        await in_thread(sync_folder, created[0])
    except BaseException:
        if created:
            with suppress(OSError):  # of two errors the first is told
                await in_thread(_remove, created[0].folder, created[0].identity())
            for beside in created[0].beside:
                await in_thread(beside.remove)
        raise
    finally:
        for node in created:
            for beside in node.beside:
                await in_thread(beside.close)
            await node.close()


def _create_exclusively(path: str, created: list[NewFile]) -> None:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with ExitStack() as undo:
        try:
            folder_fd = os.open(folder_of(check_path(path)) or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            undo.callback(close_quietly, folder_fd)
            fd = os.open(basename(path), flags, _MODE, dir_fd=folder_fd)
            undo.callback(close_quietly, fd)
            undo.callback(_remove_quietly, basename(path), folder_fd)
            identity = status_of_open(fd).identity
        except FileExistsError as error:
            raise RequestError(
                f"Could not create '{path}': the file exists and is not overwritten"
            ) from error
        except OSError as error:
            raise RequestError(f"Could not create '{path}': {why_not(path, error)}") from error
        undo.pop_all()
    opened = OpenFile(fd, 0, identity)
    node = NewFile(NamedFile(opened, Folder(path, folder_fd), read_only=False))
    created.append(node)
    node.lock_blocking(LockMode.USUAL)


def _remove_quietly(name: str, folder_fd: int) -> None:
    with suppress(OSError):
        os.unlink(name, dir_fd=folder_fd)


def _remove(folder: Folder, identity: tuple[int, int]) -> None:
    """Remove a file from the folder that it was made in, unless it has gone from there."""
    name = basename(folder.filename)
    with suppress(FileNotFoundError):
        status = os.stat(name, dir_fd=folder.fd, follow_symlinks=False)
        if (status.st_dev, status.st_ino) == identity:
            os.unlink(name, dir_fd=folder.fd)


def sync_folder(file: FileNode) -> None:
    """Make the name of a file durable."""
    try:
        fd = os.open(reopenable(file.folder.fd), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise StorageError.from_os(error, "sync the folder of", file.filename) from error
