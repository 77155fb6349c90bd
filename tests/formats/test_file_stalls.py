"""Writes leave the event loop when the disk makes them wait, and only then."""

import os
import select
from pathlib import Path

import pytest

from blockd.block.node import Buffer
from blockd.protocols import file as file_module
from blockd.protocols.file import FileNode
from blockd.protocols.stalls import CLOSED_FACTOR, VERY_SLOW_WRITE_S, WATCHED_FACTOR, Stalls, own_wait_count

SLOW_S = 0.020


class Disk:
    """Time and waits as a test wants them: each write takes `write_s`, and waits if it `waits`."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.write_s = 0.0
        self.waits = False
        self.wait_count = 0
        self.write_count = 0

    def monotonic(self) -> float:
        return self.now

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        self.now += self.write_s
        self.wait_count += self.waits
        self.write_count += 1
        return len(data)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    monkeypatch.setattr(file_module, "time", disk)
    monkeypatch.setattr(os, "pwrite", disk.pwrite)
    return disk


async def opened(tmp_path: Path, disk: Disk) -> FileNode:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(512))
    node = await FileNode.open(str(path), node_name="file", read_only=False)
    node._stalls = Stalls(lambda: disk.wait_count)
    return node


async def test_a_disk_that_makes_writes_wait_gets_one_twentieth_of_the_time(
    tmp_path: Path, disk: Disk
) -> None:
    node = await opened(tmp_path, disk)
    disk.write_s, disk.waits = SLOW_S, True
    assert node.write_nowait(0, bytes(512)), "slow, but perhaps made to stop"
    assert node.write_nowait(0, bytes(512)), "watched: it waits"

    disk.now += CLOSED_FACTOR * SLOW_S * 0.99
    assert not node.write_nowait(0, bytes(512))
    assert disk.write_count == 2

    disk.now += CLOSED_FACTOR * SLOW_S * 0.02
    assert node.write_nowait(0, bytes(512)), "still watched: it waits again"
    assert not node.write_nowait(0, bytes(512))
    await node.close()


async def test_writes_that_are_made_to_stop_stay_on_the_loop(tmp_path: Path, disk: Disk) -> None:
    node = await opened(tmp_path, disk)
    disk.write_s = SLOW_S

    assert all(node.write_nowait(0, bytes(512)) for _ in range(10))
    await node.close()


async def test_a_very_slow_write_is_enough(tmp_path: Path, disk: Disk) -> None:
    node = await opened(tmp_path, disk)
    disk.write_s = VERY_SLOW_WRITE_S * 1.01

    assert node.write_nowait(0, bytes(512))
    assert not node.write_nowait(0, bytes(512))
    await node.close()


async def test_a_slow_write_is_forgotten(tmp_path: Path, disk: Disk) -> None:
    node = await opened(tmp_path, disk)
    disk.write_s, disk.waits = SLOW_S, True
    assert node.write_nowait(0, bytes(512))
    disk.now += WATCHED_FACTOR * SLOW_S * 1.01

    assert node.write_nowait(0, bytes(512)), "as if it were the first one"
    assert node.write_nowait(0, bytes(512))
    assert not node.write_nowait(0, bytes(512))
    await node.close()


def test_the_kernel_counts_waits() -> None:
    def is_wait_counted() -> bool:
        before = own_wait_count()
        select.select([], [], [], 0.001)
        return own_wait_count() > before

    assert any(is_wait_counted() for _ in range(100)), "each is, unless its time is over before it begins"
