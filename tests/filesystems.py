"""Filesystems whose content is in a file, where they can be mounted; and what files share there."""

import contextlib
import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from blockd.units import MIB
from tests.missing import skip_without

# What mkfs.xfs asks for is 300 MiB.
SIZE = 512 * MIB
# Stands for no filesystem of its own.
FOLDER = "folder"
# Has no file with its content, and cannot be written to past its pages.
TMPFS = "tmpfs"

_FIEMAP = 0xC020660B
_FIEMAP_HEADER = struct.Struct("QQIII4x")
_FIEMAP_EXTENT = struct.Struct("QQQ16xI12x")
_FIEMAP_SYNC = 0x1
_EXTENT_SHARED = 0x2000
_EXTENT_COUNT_MAX = 4096


class Place(NamedTuple):
    """A folder, and the file with the filesystem that it is on; None: it is on that of all tests."""

    path: Path
    content: Path | None

    @property
    def is_mounted(self) -> bool:
        return self.content is not None

    def after_power_cut(self, copy: Path) -> None:
        """Copy the filesystem as it is on its disk now, without what it has in memory."""
        assert self.content is not None, "it is mounted"
        _run("cp", "--sparse=always", self.content, copy)


@contextmanager
def mounted(kind: str, folder: Path) -> Iterator[Place]:
    """A new filesystem, or for `FOLDER` just `folder`; where it cannot be mounted, the test is skipped."""
    if kind == FOLDER:
        yield Place(folder, None)
        return
    if kind == TMPFS:
        with _tmpfs(folder / kind) as path:
            yield Place(path, None)
        return
    if shutil.which(f"mkfs.{kind}") is None:
        skip_without(f"mkfs.{kind} is not installed")
    content = folder / f"{kind}.filesystem"
    with content.open("wb") as opened:
        opened.truncate(SIZE)
    with contextlib.ExitStack() as stack:
        try:
            _run(f"mkfs.{kind}", "-q", content)
            path = stack.enter_context(mounted_again(content))
        except (OSError, subprocess.CalledProcessError) as error:
            skip_without(f"{kind} cannot be mounted here: {error}")
        yield Place(path, content)


@contextmanager
def read_only(path: Path) -> Iterator[None]:
    """Nothing can be written to what is mounted here, nor is anybody writing."""
    _run("mount", "-o", "remount,ro", path)
    try:
        yield
    finally:
        _run("mount", "-o", "remount,rw", path)


@contextmanager
def _tmpfs(path: Path) -> Iterator[Path]:
    path.mkdir()
    try:
        _run("mount", "-t", TMPFS, "-o", f"size={SIZE}", TMPFS, path)
    except (OSError, subprocess.CalledProcessError) as error:
        skip_without(f"{TMPFS} cannot be mounted here: {error}")
    try:
        yield path
    finally:
        _run("umount", "--lazy", path)


@contextmanager
def mounted_again(content: Path) -> Iterator[Path]:
    """The filesystem in a file, mounted."""
    path = content.with_suffix("")
    path.mkdir()
    _run("mount", "-o", "loop", content, path)
    try:
        yield path
    finally:
        _run("umount", "--lazy", path)  # also when a test that failed has left files open


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True)


def shared_bytes(path: Path) -> int:
    """How much of a file is in blocks that another one has, too."""
    request = bytearray(_FIEMAP_HEADER.size + _EXTENT_COUNT_MAX * _FIEMAP_EXTENT.size)
    _FIEMAP_HEADER.pack_into(request, 0, 0, 2**64 - 1, _FIEMAP_SYNC, 0, _EXTENT_COUNT_MAX)
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, _FIEMAP, request)
    finally:
        os.close(fd)
    _, _, _, count, _ = _FIEMAP_HEADER.unpack_from(request)
    assert count < _EXTENT_COUNT_MAX, "there may be more of them"
    extents = [
        _FIEMAP_EXTENT.unpack_from(request, _FIEMAP_HEADER.size + number * _FIEMAP_EXTENT.size)
        for number in range(count)
    ]
    return sum(length for _, _, length, flags in extents if flags & _EXTENT_SHARED)
