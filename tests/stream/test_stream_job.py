"""The stream job alone, over disks that are only played."""

import asyncio
import itertools
from collections.abc import Sequence

import pytest

from blockd.aio import task_group
from blockd.block.node import FillCounts
from blockd.errors import StorageError
from blockd.extents import Extent, Kind, Range
from blockd.jobs.stream import COPY_COUNT, COPY_LENGTH, REST_COUNT_MAX, StreamJob
from blockd.units import KIB

CLUSTER = 64 * KIB
SIZE = 4 * CLUSTER


class ForgetfulDisk:
    """A disk that says of its third cluster that it is missing, however often it was copied until then."""

    def __init__(self, copies_needed: int) -> None:
        self.size = SIZE
        self.guest_written = 0
        self.active = self
        self.cluster_size = CLUSTER
        self.copies_apart = False
        self.copies_in_order = False
        self.filename = "top.qcow2"
        self.copies_needed = copies_needed
        self.copy_count = 0
        self.backing_was_changed = False

    async def missing(self, offset: int, length: int) -> list[Extent]:
        if offset < 2 * CLUSTER:
            return [Extent(offset, 2 * CLUSTER - offset, Kind.UNALLOCATED)]
        if offset == 2 * CLUSTER and self.copy_count < self.copies_needed:
            return [Extent(offset, CLUSTER, Kind.DATA)]
        return [Extent(offset, SIZE - offset, Kind.UNALLOCATED)]

    async def populate(self, ranges: Sequence[Range]) -> FillCounts:
        assert list(ranges) == [(2 * CLUSTER, 3 * CLUSTER)]
        self.copy_count += 1
        return FillCounts(CLUSTER, 0, 0)

    async def change_backing(self, _filename: str | None, _format: str | None) -> None:
        self.backing_was_changed = True

    def job(self) -> StreamJob:
        return StreamJob("j", self, base_filename=None, base_format=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("copies_needed", [0, 1, REST_COUNT_MAX - 1])
async def test_last_step_copies_what_is_still_missing(copies_needed: int) -> None:
    disk = ForgetfulDisk(copies_needed)
    await disk.job().commit()
    assert disk.copy_count == copies_needed
    assert disk.backing_was_changed


async def test_last_step_fails_if_something_stays_missing() -> None:
    """Instead of copying it for ever; the image keeps its backing."""
    disk = ForgetfulDisk(REST_COUNT_MAX)
    with pytest.raises(StorageError, match=r"'top\.qcow2' still lacks data at 131072 after it was copied 16"):
        await disk.job().commit()
    assert disk.copy_count == REST_COUNT_MAX
    assert not disk.backing_was_changed


class HastyDisk(ForgetfulDisk):
    """A disk that is all missing, and whose copies wait for nothing."""

    copies_apart = False

    def __init__(self) -> None:
        super().__init__(0)
        self.size = 100 * COPY_LENGTH
        self.guest_waits = self

    async def missing(self, offset: int, length: int) -> list[Extent]:
        return [Extent(offset, length, Kind.DATA)]

    async def populate(self, ranges: Sequence[Range]) -> FillCounts:
        length = sum(end - start for start, end in ranges)
        self.copy_count += 1
        return FillCounts(length, 0, 0)

    async def run_staging(self) -> None:
        await asyncio.Event().wait()

    async def flush(self) -> None:
        pass

    def take(self) -> float | None:
        return None


async def test_guests_have_their_turn_between_copies() -> None:
    disk = HastyDisk()
    counts = [0]

    async def have_turns() -> None:
        while True:
            counts.append(disk.copy_count)
            await asyncio.sleep(0)

    async with task_group() as tasks:
        guest = tasks.create_task(have_turns())
        await disk.job().run()
        guest.cancel()
    assert disk.copy_count == 100
    assert max(after - before for before, after in itertools.pairwise(counts)) <= COPY_COUNT
