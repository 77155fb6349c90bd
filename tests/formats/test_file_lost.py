"""A file that is removed, replaced, moved or cut off under its user: noticed before more is written."""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from blockd.block.node import BlockNode
from blockd.drivers import NodeGraph
from blockd.errors import StorageError
from blockd.protocols import cold
from blockd.protocols import file as file_module
from blockd.protocols.file import FileNode
from blockd.protocols.file_status import FileStatus, status_of_open
from blockd.units import KIB, MIB
from tests import qemu_img

IMAGE_FORMATS = ("qcow2", "raw")


@pytest.fixture(params=IMAGE_FORMATS)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"disk.{request.param}"
    qemu_img.qemu("qemu-img", "create", "-q", "-f", request.param, path, "1M")
    qemu_img.write(path, "write -P 1 0 512k", image_format=request.param)
    return path


async def opened(path: Path) -> tuple[NodeGraph, BlockNode]:
    graph = NodeGraph()
    return graph, await graph.open_image(str(path), path.suffix[1:], read_only=False)


def remove(path: Path) -> None:
    path.unlink()


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"x" * MIB)
    other.rename(path)


def cut(path: Path) -> None:
    os.truncate(path, 1000)


@pytest.mark.parametrize(
    ("happen", "said"),
    [(remove, "removed or replaced"), (replace, "removed or replaced"), (cut, "cut short to")],
)
async def test_lost_file_is_noticed_before_anything_is_acknowledged(
    path: Path, happen: Callable[[Path], None], said: str
) -> None:
    graph, image = await opened(path)
    happen(path)
    after = path.read_bytes() if path.exists() else None
    with pytest.raises(StorageError, match=f"{path.name}.*{said}"):
        await image.write(600 * KIB, b"new")  # may need a table that was cut off
        await image.flush()
    with pytest.raises(StorageError, match=said):
        await image.flush()
    if happen is replace:
        assert path.read_bytes() == after  # the other file is not touched
    await graph.close()


async def test_growing_does_not_cover_up_that_the_file_was_cut(path: Path) -> None:
    graph, image = await opened(path)
    await image.write(0, b"x" * 512)
    os.truncate(path, 1000)
    with pytest.raises(StorageError, match="cut short to 1000 bytes"):
        await image.resize(4 * MIB)
        for offset in range(2 * MIB, 4 * MIB, 64 * KIB):
            await image.write(offset, b"y" * 64 * KIB)
        await image.flush()
    await graph.close()


@pytest.mark.parametrize(
    ("module", "call", "use"),
    [
        (file_module, "status_of_open", "flush"),
        (file_module, "status_of_open", "write"),
        (os, "preadv", "read"),
    ],
)
async def test_file_that_another_thread_makes_longer_was_not_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType, call: str, use: str
) -> None:
    (tmp_path / "file").touch()
    file = await FileNode.open(str(tmp_path / "file"), node_name="file", read_only=False)
    looked = getattr(module, call)

    def overtaken(*args: object) -> object:
        seen = looked(*args)
        monkeypatch.undo()
        file.write_blocking(0, b"x" * MIB)
        return seen

    monkeypatch.setattr(module, call, overtaken)
    if use == "flush":
        await file.flush()
    elif use == "write":
        await file.write(MIB - 512, b"x" * 512)
    else:
        assert bytes(await file.read(0, 512)) == bytes(512)
    assert file.size == MIB
    await file.close()


@pytest.fixture(autouse=True)
def nearly_full_is_enough() -> Iterator[None]:
    """Room is reserved, however little space is free here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cold, "FREE_LENGTH_MIN", 0)
        yield


async def with_room(folder: Path) -> FileNode:
    """A file that has become longer and longer, so that room is reserved behind its end."""
    (folder / "file").touch()
    file = await FileNode.open(str(folder / "file"), node_name="file", read_only=False)
    file.is_longer_allowed = True
    for offset in range(0, 2 * MIB, 256 * KIB):
        if not file.write_nowait(offset, b"x" * 256 * KIB):
            await file.write(offset, b"x" * 256 * KIB)
    assert (folder / "file").stat().st_size > 2 * MIB == file.size
    return file


async def test_writes_into_the_room_do_not_cover_up_that_the_file_was_cut(tmp_path: Path) -> None:
    """The event loop does not look at the file before it writes there."""
    file = await with_room(tmp_path)
    os.truncate(tmp_path / "file", MIB)
    assert file.write_nowait(2 * MIB, b"y" * MIB)
    with pytest.raises(StorageError, match=f"cut short to {3 * MIB} bytes"):
        await file.flush()
    with pytest.raises(StorageError, match=f"cut short to {3 * MIB} bytes"):
        await file.write(128 * MIB, b"z")
    await file.close()


async def test_the_event_loop_writes_up_to_the_last_byte_of_the_room(tmp_path: Path) -> None:
    """Who writes that one makes the file as long as it was, cut off or not."""
    file = await with_room(tmp_path)
    room_end = (tmp_path / "file").stat().st_size
    assert not file.write_nowait(room_end - KIB, b"y" * KIB)
    assert file.write_nowait(room_end - KIB, b"y" * (KIB - 1))
    await file.close()


async def test_room_that_is_given_back_was_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = await with_room(tmp_path)

    def overtaken(fd: int) -> FileStatus:
        monkeypatch.undo()
        file._end.give_back(fd)
        return status_of_open(fd)

    monkeypatch.setattr(file_module, "status_of_open", overtaken)
    await file.flush()
    assert (tmp_path / "file").stat().st_size == 2 * MIB == file.size
    await file.close()


async def test_the_event_loop_never_looks_at_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = await with_room(tmp_path)

    def look(*_: object) -> None:
        raise AssertionError("it may take as long as its server likes")

    monkeypatch.setattr(file_module, "status_of_open", look)
    monkeypatch.setattr(os, "fstat", look)
    assert file.write_nowait(2 * MIB, b"y" * MIB)
    assert not file.write_nowait(1 << 40, b"y")
    assert file.identity()
    monkeypatch.undo()
    await file.close()


async def test_growing_without_room_does_not_cover_up_that_the_file_was_cut(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    file = await FileNode.open(str(tmp_path / "file"), node_name="file", read_only=False)
    assert file.write_nowait(0, b"x" * MIB)
    os.truncate(tmp_path / "file", KIB)
    assert not file.write_nowait(MIB, b"x")
    with pytest.raises(StorageError, match="cut short to 1024 bytes"):
        await file.write(MIB, b"x")
    await file.close()


class _NoticedLock:
    """A lock that tells when somebody has to wait for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.met = threading.Event()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self.met.set()
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


async def test_threads_that_make_a_file_longer_agree_on_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    file = await FileNode.open(str(tmp_path / "file"), node_name="file", read_only=False)
    lock = _NoticedLock()
    monkeypatch.setattr(file._end, "_lock", lock)

    def write_more() -> None:
        file.write_blocking(0, b"x" * MIB)
        lock.met.set()

    other = threading.Thread(target=write_more)

    def overtaken(one: int, two: int) -> int:
        monkeypatch.delattr(cold, "max")
        larger = max(one, two)
        other.start()
        lock.met.wait()  # the other thread is done, or waits until this one is
        return larger

    monkeypatch.setattr(cold, "max", overtaken, raising=False)
    await file.write(0, b"x" * 512)
    other.join()
    assert file.size == MIB
    await file.close()


async def test_moved_file_stays_in_use_and_is_told_once(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    graph, image = await opened(path)
    moved = path.rename(path.with_name("moved"))
    with caplog.at_level(logging.WARNING):
        for number in range(3):
            await image.write(number * 512, b"y" * 512)
            await image.flush()
    assert caplog.text.count("is not where it was opened any more") == 1
    await graph.close()
    assert qemu_img.content(moved, path.suffix[1:])[:1536] == b"y" * 1536
