"""Crashes while a qcow2 image is repaired: it is in no more danger than before, and can be repaired again."""

import random
from collections.abc import Callable

from blockd.formats.qcow2 import header as headers
from blockd.formats.qcow2.check import Census
from blockd.formats.qcow2.repair import repair
from tests.chains import read_all
from tests.inline_threads import use_inline_threads
from tests.recording import RecordingFile, Timeline
from tests.streaming import open_overlay, overlay

CLUSTER = 512
_COPIED = 1 << 63
_DIRTY = (headers.INCOMPATIBLE_DIRTY).to_bytes(8, "big")


def _entry(disk: bytes | bytearray, offset: int) -> int:
    return int.from_bytes(disk[offset : offset + 8], "big")


def _change(disk: bytearray, offset: int, change: Callable[[int], int]) -> None:
    disk[offset : offset + 8] = change(_entry(disk, offset)).to_bytes(8, "big")


def _refcounts_behind(disk: bytearray) -> None:
    """As lazy refcounts leave them."""
    block = _entry(disk, CLUSTER)
    disk[block + 8 : block + CLUSTER] = bytes(CLUSTER - 8)
    disk[72:80] = _DIRTY


def _table_lost(disk: bytearray) -> None:
    disk[CLUSTER : 2 * CLUSTER] = bytes(CLUSTER)
    disk[72:80] = _DIRTY


def _table_entry_odd(disk: bytearray) -> None:
    """All refcounts are right, but they can only be written anew."""
    _change(disk, CLUSTER, lambda entry: entry | 1)


def _leaks(disk: bytearray) -> None:
    l2 = _entry(disk, _entry(disk, 40)) & ~_COPIED
    for index in range(4):
        _change(disk, l2 + 8 * index, lambda entry: 0)
    disk[72:80] = _DIRTY


def _flags_wrong(disk: bytearray) -> None:
    l1 = _entry(disk, 40)
    l2 = _entry(disk, l1) & ~_COPIED
    for offset in (l1, *range(l2, l2 + 64, 8)):
        _change(disk, offset, lambda entry: entry & ~_COPIED)


DAMAGES = [_refcounts_behind, _table_lost, _table_entry_odd, _leaks, _flags_wrong]


async def sweep_repair() -> None:
    """Judge every crash while images are repaired.

    Raises:   AssertionError: a crash leaves more wrong than there was, or what is said to be right is not.
    """
    use_inline_threads()
    made = RecordingFile()
    image = await overlay(made, None, 64 * CLUSTER, cluster_size=CLUSTER)
    for offset in (0, 9 * CLUSTER, 30 * CLUSTER):
        await image.write(offset, bytes([1 + offset // CLUSTER]) * 5 * CLUSTER)
    await image.close()
    for damage in DAMAGES:
        disk = bytearray(made.disk)
        damage(disk)
        await _sweep(bytes(disk))


async def _sweep(damaged: bytes) -> None:
    content = await _content(damaged)
    before = await Census.take(RecordingFile(damaged))
    file = RecordingFile(damaged)
    report = await repair(file)
    assert (report.refusal, report.corruptions, report.leaks, report.is_dirty) == (None, 0, 0, False)
    for position, what, [disk] in Timeline([file]).states(random.Random(1), subset_count=4):
        where = f"crash after entry {position}; {what}"
        state = await Census.take(RecordingFile(disk))
        assert state.findings.obstacle is None, where
        assert _endangered(state) <= _endangered(before), where
        is_right = not (state.report.corruptions or state.report.leaks or state.report.is_dirty)
        if position == len(file.log):
            assert is_right, f"{where}: what was repaired is not durable"
        assert is_right or state.report.is_dirty == before.report.is_dirty, f"{where}: no mark, but not right"
        again = RecordingFile(disk)
        report = await repair(again)
        assert (report.refusal, report.corruptions, report.leaks) == (None, 0, 0), where
        assert await _content(bytes(again.disk)) == content, where


def _endangered(census: Census) -> set[int]:
    """The clusters that could be given away although they are in use."""
    refcounts = census.refcounts
    return {cluster for cluster, used in refcounts.references.clusters() if refcounts.stored[cluster] < used}


async def _content(disk: bytes) -> bytes:
    image = await open_overlay(RecordingFile(disk), None, read_only=True)
    return await read_all(image)
