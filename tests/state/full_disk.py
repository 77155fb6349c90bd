"""A file system with so much room and no more, for what the state directory is written with."""

import errno
import os
from typing import Any

import pytest

from blockd.daemon import state_dir


class FullDisk:
    """Stands in for `os` in `state_dir`: what makes a file longer takes of `room`; None: there is enough."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room: int | None = None
        monkeypatch.setattr(state_dir, "os", self)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def write(self, fd: int, data: bytes) -> int:
        """Write as much as there is room for."""
        return os.write(fd, data[: self._taken(fd, os.lseek(fd, 0, os.SEEK_CUR) + len(data), len(data))])

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        """Write as much as there is room for."""
        return os.pwrite(fd, data[: self._taken(fd, offset + len(data), len(data))], offset)

    def ftruncate(self, fd: int, length: int) -> None:
        """Cut a file, which makes room."""
        before = os.fstat(fd).st_size
        os.ftruncate(fd, length)
        self._give_back(before - length)

    def unlink(self, name: str, *, dir_fd: int) -> None:
        """Remove a file, which makes room."""
        length = os.stat(name, dir_fd=dir_fd).st_size
        os.unlink(name, dir_fd=dir_fd)
        self._give_back(length)

    def _taken(self, fd: int, end: int, length: int) -> int:
        """How many of `length` bytes up to `end` fit."""
        more = end - os.fstat(fd).st_size
        if self.room is None or more <= 0:
            return length
        if self.room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fits = min(more, self.room)
        self.room -= fits
        return length - more + fits

    def _give_back(self, length: int) -> None:
        if self.room is not None:
            self.room += length
