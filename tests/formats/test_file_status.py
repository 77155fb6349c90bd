"""The status of files, asked for in a way that costs their next sync nothing."""

import asyncio
import ctypes
import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from blockd.protocols import file_status
from blockd.protocols.file import FileNode
from blockd.protocols.file_status import DiskUsage, FileStatus, status_of_name, status_of_open

STATX_TIMES = 0x20 | 0x40 | 0x80 | 0x800


@pytest.fixture(params=["there", "not allowed", "not in the C library"])
def call(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With statx, and where a kernel, a container or a C library has none."""
    if request.param == "not allowed":
        monkeypatch.setattr(file_status, "_call", lambda *_: -1)
        monkeypatch.setattr(ctypes, "get_errno", lambda: errno.EPERM)
    elif request.param != "there":
        monkeypatch.setattr(file_status, "_call", None)
    return str(request.param)


def expected_of(status: os.stat_result) -> FileStatus:
    identity = status.st_dev, status.st_ino
    return FileStatus(stat.S_ISREG(status.st_mode), status.st_nlink, status.st_size, identity)


@pytest.mark.usefixtures("call")
def test_files_by_name_and_when_open(tmp_path: Path) -> None:
    path, link = tmp_path / "a", tmp_path / "b"
    path.write_bytes(bytes(12345))
    os.link(path, tmp_path / "c")
    link.symlink_to(path)
    for name in (path, link, tmp_path):
        fd = os.open(name, os.O_RDONLY)
        assert status_of_name(str(name)) == status_of_open(fd) == expected_of(name.stat())
        os.close(fd)
    assert status_of_name(str(path)).link_count == 2


@pytest.mark.usefixtures("call")
def test_devices_are_the_same_under_any_name(tmp_path: Path) -> None:
    """Where nodes of devices cannot be made, one that is there is asked for."""
    devices = [path for path in Path("/dev").iterdir() if path.is_block_device()]
    for device in devices:
        status = status_of_name(str(device))
        assert status.identity == (-1, device.stat().st_rdev)
        assert not status.is_regular
    null = status_of_name("/dev/null")
    assert null.identity == (Path("/dev/null").stat().st_dev, Path("/dev/null").stat().st_ino)


@pytest.mark.usefixtures("call")
@pytest.mark.parametrize("ask", [status_of_name, lambda _: status_of_open(-1)])
def test_errors_are_the_kernels(tmp_path: Path, ask: Callable[[str], FileStatus]) -> None:
    with pytest.raises(OSError, match=r"No such file|Bad file descriptor"):
        ask(str(tmp_path / "missing"))


async def test_a_sync_asks_for_no_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(4096))
    node = await FileNode.open(str(path), node_name="a", read_only=False)
    assert not file_status._WANTED & STATX_TIMES

    def unexpected(*_: object, **__: object) -> os.stat_result:
        raise AssertionError("asks for times")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fstat", unexpected)
        patched.setattr(os, "stat", unexpected)
        await node.write(0, b"x" * 512)
        await node.flush()
    await node.close()


async def test_usage_asked_for_by_several_while_others_ask_again(tmp_path: Path) -> None:
    """One who has waited for an answer gets it, though the next question is under way already."""
    path = tmp_path / "file"
    path.write_bytes(b"x")
    with path.open("rb") as file:
        usage = DiskUsage()

        async def ask() -> None:
            for _ in range(50):
                assert await usage.find(file.fileno()) is not None

        await asyncio.gather(*(ask() for _ in range(8)))
