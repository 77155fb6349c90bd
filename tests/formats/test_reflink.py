"""Cloning: what is there afterwards, on filesystems that can do it and on those that cannot."""

import errno
import os
import random
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from blockd.errors import RequestError, StorageError
from blockd.filters.fault_rules import FaultRules
from blockd.filters.faults import FaultsNode
from blockd.protocols import cold, reflink, writeback
from blockd.protocols.file import FileNode
from blockd.units import MIB
from tests.filesystems import Place, shared_bytes

BLOCK = reflink.CLONE_ALIGNMENT


@asynccontextmanager
async def files(folder: Path, source: bytes, target: bytes = b"") -> AsyncIterator[tuple[FileNode, FileNode]]:
    """Two files with that content; the source is read-only."""
    nodes = []
    for name, content, read_only in (("source", source, True), ("target", target, False)):
        path = folder / name
        path.write_bytes(content)
        nodes.append(await FileNode.open(str(path), node_name=name, read_only=read_only))
    yield nodes[0], nodes[1]
    for node in nodes:
        await node.close()


def clone_or_copy(source: FileNode, target: FileNode, source_offset: int, offset: int, length: int) -> bool:
    """What those do that fill images: clone, or else copy."""
    if target.clone_blocking(source, source_offset, offset, length):
        return True
    buffer = memoryview(bytearray(length))
    source.readinto_blocking(source_offset, buffer)
    target.write_blocking(offset, buffer)
    return False


async def test_clone_shares_blocks_until_one_side_is_written(reflink_place: Place) -> None:
    content = random.Random(1).randbytes(MIB)
    async with files(reflink_place.path, content, b"before") as (source, target):
        is_cloned = clone_or_copy(source, target, BLOCK, 4 * BLOCK, MIB - BLOCK)
        assert is_cloned == reflink_place.is_mounted
        await target.flush()
        cloned = bytes(await target.read(4 * BLOCK, MIB - BLOCK))
        assert cloned == content[BLOCK:]
        assert bytes(await target.read(0, 4 * BLOCK)) == b"before".ljust(4 * BLOCK, b"\0")
        if is_cloned:
            assert shared_bytes(reflink_place.path / "target") == MIB - BLOCK

        await target.write(4 * BLOCK, b"the target's")
        with (reflink_place.path / "source").open("r+b") as opened:
            opened.seek(3 * BLOCK)
            opened.write(b"the source's")
        await target.flush()
        changed = b"the target's" + content[BLOCK + 12 :]
        assert bytes(await target.read(4 * BLOCK, MIB - BLOCK)) == changed
        assert bytes(await source.read(0, 3 * BLOCK)) == content[: 3 * BLOCK]
        if is_cloned:
            assert 0 < shared_bytes(reflink_place.path / "target") < MIB - BLOCK


async def test_clone_makes_the_file_longer_within_its_room(
    reflink_place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room that a direct write has reserved is given back behind what was cloned, not before."""
    monkeypatch.setattr(cold, "FREE_LENGTH_MIN", 0)
    content = random.Random(2).randbytes(MIB)
    path = reflink_place.path / "target"
    async with files(reflink_place.path, content) as (source, target):
        target.is_longer_allowed = True
        target.write_cold_blocking(0, memoryview(bytearray(BLOCK)))
        assert path.stat().st_size > 2 * MIB, "there is room"
        clone_or_copy(source, target, 0, BLOCK, MIB)
        assert target.size == MIB + BLOCK
        await target.flush()
        clone_or_copy(source, target, 0, 2 * MIB, MIB)
        assert target.size == 3 * MIB
        await target.flush()
    assert path.stat().st_size == 3 * MIB
    found = path.read_bytes()
    assert found == bytes(BLOCK) + content + bytes(MIB - BLOCK) + content


async def test_what_cannot_be_cloned_does_not_keep_other_ranges_from_it(reflink_place: Place) -> None:
    content = random.Random(3).randbytes(16 * BLOCK)
    async with files(reflink_place.path, content) as (source, target):
        for source_offset, offset, length in ((512, 0, BLOCK), (0, 512, BLOCK), (0, 0, 512)):
            assert not clone_or_copy(source, target, source_offset, offset, length)
            part = bytes(await target.read(offset, length))
            assert part == content[source_offset : source_offset + length]
        assert not target.clone_blocking(source, 15 * BLOCK, 0, 2 * BLOCK), "the source ends before"
        assert clone_or_copy(source, target, 0, 0, 16 * BLOCK) == reflink_place.is_mounted
        assert bytes(await target.read(0, 16 * BLOCK)) == content


async def test_source_on_another_filesystem_is_copied(reflink_place: Place, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    content = random.Random(4).randbytes(MIB)
    async with files(reflink_place.path, b"") as (_, target), files(other, content) as (source, _):
        assert not clone_or_copy(source, target, 0, 0, MIB) or not reflink_place.is_mounted
        assert bytes(await target.read(0, MIB)) == content


async def test_files_that_may_not_be_written_are_not_cloned_into(tmp_path: Path) -> None:
    async with files(tmp_path, bytes(MIB), bytes(MIB)) as (source, target):
        with pytest.raises(RequestError, match="read-only"):
            source.clone_blocking(target, 0, 0, MIB)
        os.truncate(tmp_path / "target", BLOCK)
        with pytest.raises(StorageError, match="cut short"):
            target.clone_blocking(source, 0, MIB, MIB)


# -- without such a filesystem ----------------------------------------------------------------


class Kernel:
    """Answers requests to clone: first what they ask for, then each time the same error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, first_answer: int, answer: int) -> None:
        self.answers = [first_answer]
        self.answer = answer
        self.asked: list[int] = []
        monkeypatch.setattr(reflink, "_clone_range", self._clone_range)

    def _clone_range(self, _fd: int, offset: int, _source_fd: int, source_offset: int, _length: int) -> int:
        self.asked.append(source_offset)
        return self.answers.pop() if self.answers else self.answer


async def test_what_the_kernel_cannot_do_it_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for code in (errno.EOPNOTSUPP, errno.EXDEV, errno.ENOTTY, errno.EPERM):
        kernel = Kernel(monkeypatch, code, 0)
        async with files(tmp_path, b"s" * 2 * BLOCK) as (source, target):
            assert not clone_or_copy(source, target, 0, 0, BLOCK)
            assert not clone_or_copy(source, target, BLOCK, BLOCK, BLOCK)
            assert bytes(await target.read(0, 2 * BLOCK)) == b"s" * 2 * BLOCK
        assert len(kernel.asked) == 1


async def test_node_in_front_of_a_file_is_no_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch, errno.EINVAL, 0)
    async with files(tmp_path, bytes(BLOCK)) as (source, target):
        faults = FaultsNode(source, FaultRules(), node_name="faults")
        assert not target.can_clone_blocking(faults, 0, BLOCK)
        assert not target.clone_blocking(faults, 0, 0, BLOCK)
    assert kernel.asked == []


async def test_clone_that_fails_is_the_last_one_from_that_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel(monkeypatch, errno.EINVAL, errno.ENOSPC)
    async with files(tmp_path, bytes(4 * BLOCK)) as (source, target):
        assert target.can_clone_blocking(source, 0, BLOCK)
        assert not target.clone_blocking(source, BLOCK, 0, BLOCK)
        assert target.size == 0
        assert not target.can_clone_blocking(source, 0, BLOCK)
        assert not target.clone_blocking(source, 2 * BLOCK, 0, BLOCK)
    assert kernel.asked[1:] == [BLOCK]


async def test_clone_behind_the_end_of_its_source_is_not_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel(monkeypatch, errno.EINVAL, errno.EINVAL)
    async with files(tmp_path, bytes(4 * BLOCK)) as (source, target):
        assert not target.clone_blocking(source, 3 * BLOCK, 0, 2 * BLOCK)
        kernel.answer = 0
        assert target.clone_blocking(source, 0, 0, 4 * BLOCK)
        assert target.size == 4 * BLOCK


def test_what_is_no_file_is_not_cloned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Kernel(monkeypatch, errno.EINVAL, errno.EINVAL)
    with (tmp_path / "target").open("w+b") as target, Path("/dev/null").open("rb") as device:
        cloner = reflink.Cloner()
        assert cloner.can_clone(target.fileno(), target.fileno())
        assert not cloner.can_clone(target.fileno(), device.fileno())


async def test_cloning_waits_for_direct_writes_here_and_not_in_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There it would keep guests from writing meanwhile. Direct writes that come later wait for it."""
    order: list[str] = []
    waits = threading.Semaphore(0)

    def clone_range(_fd: int, _offset: int, _source_fd: int, source_offset: int, _length: int) -> int:
        if source_offset:
            return errno.EINVAL
        order.append("clone")
        return 0

    monkeypatch.setattr(reflink, "_clone_range", clone_range)
    async with files(tmp_path, bytes(BLOCK)) as (source, target):
        end = target._end
        real_wait = end._room_lock.wait

        def wait() -> None:
            waits.release()
            real_wait()

        def write() -> None:
            with end.room(target._fd, 0, BLOCK):
                order.append("later write")

        monkeypatch.setattr(end._room_lock, "wait", wait)
        clone = threading.Thread(target=target.clone_blocking, args=(source, 0, 0, BLOCK))
        threads = [clone, threading.Thread(target=write)]
        with end.room(target._fd, 0, BLOCK):
            for thread in threads:
                thread.start()
                assert waits.acquire(timeout=10)
            order.append("write")
        for thread in threads:
            thread.join()
    assert order == ["write", "clone", "later write"]


async def test_source_that_cannot_be_written_back_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells it once; a later sync of the source would know nothing of it."""

    def fail(*_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    async with files(tmp_path, bytes(BLOCK)) as (source, target):
        monkeypatch.setattr(target._cloner, "can_clone", lambda *_: True)
        monkeypatch.setattr(writeback, "finish", fail)
        with pytest.raises(StorageError, match=r"Could not sync .*source"):
            target.clone_blocking(source, 0, 0, BLOCK)
        assert source.failed is not None
        monkeypatch.undo()
