"""Opening a file leaves nothing behind, whatever happens to the one who waits for it."""

import asyncio
import threading
from pathlib import Path

import pytest

from blockd.protocols import opening
from blockd.protocols.file import FileNode


def open_count(path: Path) -> int:
    """How many descriptors this process has of a file."""
    descriptors = list(Path("/proc/self/fd").iterdir())
    return sum(descriptor.exists() and descriptor.samefile(path) for descriptor in descriptors)


async def test_cancelled_open_closes_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"x" * 512)
    is_opened, may_return = threading.Event(), threading.Event()
    real_size = opening._size

    def held(fd: int) -> int:
        is_opened.set()
        assert may_return.wait(10)
        return real_size(fd)

    monkeypatch.setattr(opening, "_size", held)
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(FileNode.open(str(path), node_name="file", read_only=True))
        await asyncio.to_thread(is_opened.wait, 10)
        assert open_count(path) == 2  # found, and opened
        task.cancel()
        may_return.set()

    assert task.cancelled()
    assert open_count(path) == 0
