"""What a sync does before it: data goes to the disk while guests' writes still go on at once."""

import ctypes
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from blockd.errors import StorageError
from blockd.protocols import writeback
from blockd.protocols.file import FileNode


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[FileNode]:
    (tmp_path / "disk.raw").write_bytes(bytes(4096))
    node = await FileNode.open(str(tmp_path / "disk.raw"), node_name="file", read_only=False)
    yield node
    await node.close()


class Kernel:
    """`sync_file_range` that fails with an error."""

    def __init__(self, code: int) -> None:
        self._code = code
        self.count = 0

    def sync_file_range(self, *_: int) -> int:
        self.count += 1
        ctypes.set_errno(self._code)
        return -1


async def test_writes_need_a_thread_only_while_the_file_is_synced(
    node: FileNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once: list[tuple[str, bool]] = []
    real_finish, real_sync = writeback.finish, os.fdatasync

    def finish(fd: int) -> None:
        at_once.append(("write-back", node.write_nowait(0, b"x" * 512)))
        real_finish(fd)

    def fdatasync(fd: int) -> None:
        at_once.append(("sync", node.write_nowait(0, b"y" * 512)))
        real_sync(fd)

    monkeypatch.setattr(writeback, "finish", finish)
    monkeypatch.setattr(os, "fdatasync", fdatasync)
    await node.flush()
    assert at_once == [("write-back", True), ("sync", False)]
    assert node.write_nowait(0, b"z" * 512)


async def test_error_of_write_back_is_one_of_the_sync(
    node: FileNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells it once: the sync after it would succeed, and the data be lost."""
    monkeypatch.setattr(writeback, "_libc", Kernel(errno.EIO))
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    with pytest.raises(StorageError, match="Could not sync"):
        await node.flush()
    assert not synced
    assert not node.write_nowait(0, b"x" * 512)
    with pytest.raises(StorageError, match="Input/output error"):
        await node.flush()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ESPIPE, errno.EINVAL])
async def test_where_there_is_no_write_back_the_sync_does_it(
    node: FileNode, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    kernel = Kernel(code)
    monkeypatch.setattr(writeback, "_libc", kernel)
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    await node.flush()
    assert (kernel.count, len(synced)) == (1, 1)
