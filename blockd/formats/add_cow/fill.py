"""Filling: how a stream or copy-on-read brings clusters into the image that are absent so far.

A cluster has one place, where guests write too. So the slow part, reading the source, holds nothing and
nobody up; then the range is held for as long as it takes to write the copies of those clusters that are
still absent and still wanted, or to clone them, and their bits are set. A guest write that comes before
finds its cluster absent and wins; one that comes meanwhile waits for that write, and then overwrites it.
"""

import contextlib
from typing import TYPE_CHECKING, NamedTuple

from blockd.aio import in_thread
from blockd.block.copy_memory import copy_memory
from blockd.block.file_events import FileEvent
from blockd.block.node import FillCounts, IsWanted, Segment
from blockd.block.segments import clipped
from blockd.block.zero_clusters import zero_clusters
from blockd.formats.add_cow.bitmap import ABSENT
from blockd.formats.copying import Read, Target, source_reader, split_zeroes
from blockd.units import align_up

if TYPE_CHECKING:
    from blockd.formats.add_cow.image import AddCowImage


class Run(NamedTuple):
    """Neighbouring clusters whose copies are alike: all data, all zeroes, or data that is to be cloned."""

    start: int
    end: int
    is_zero: bool = False
    is_cloned: bool = False

    def is_alike(self, other: "Run") -> bool:
        return (self.is_zero, self.is_cloned) == (other.is_zero, other.is_cloned)


async def fill(
    overlay: "AddCowImage",
    offset: int,
    length: int,
    source: list[Segment],
    is_wanted: IsWanted,
    *,
    keep_cached: bool,
) -> FillCounts:
    """Do what `OverlayNode.fill` promises."""
    await overlay.metadata.relieve()
    absent = await _absent_ranges(overlay, offset, offset + length)
    if not absent:
        return FillCounts(0, 0, 0)
    with contextlib.ExitStack() as held:
        memory = await in_thread(held.enter_context, copy_memory.lent(length))  # new memory takes its time
        target = Target(overlay.image.file, overlay.cluster_size, keep_cached)
        copy = _Copy(target, memory, offset, source, await source_reader(offset, source))
        planned = [
            Run(*run) for start, end in absent for run in split_zeroes(overlay, start, end, offset, source)
        ]
        runs = await in_thread(copy.read_blocking, planned)
        target.file.announce(FileEvent.COR_WRITE)
        async with overlay.writes.ranges.held(offset, align_up(offset + length, overlay.cluster_size)):
            chosen = await _still_wanted(overlay, runs, is_wanted)
            await in_thread(copy.write_blocking, chosen)
            for run in chosen:
                await overlay.metadata.bitmap.set(*_numbers(overlay, run))
    copied, zeroed = (sum(run.end - run.start for run in chosen if run.is_zero == kind) for kind in (0, 1))
    return FillCounts(copied, zeroed, sum(end - start for start, end in absent) - copied - zeroed)


def _numbers(overlay: "AddCowImage", run: Run) -> tuple[int, int]:
    return run.start // overlay.cluster_size, -(-run.end // overlay.cluster_size)


async def _absent_ranges(overlay: "AddCowImage", offset: int, end: int) -> list[tuple[int, int]]:
    ranges = []
    while offset < end:
        state, count = await overlay.run(offset, end - offset)
        if state == ABSENT:
            ranges.append((offset, offset + count))
        offset += count
    return ranges


# -- copying ----------------------------------------------------------------------------------


class _Copy(NamedTuple):
    """One copy on its way: `memory` is for the data from `offset` of the disk on."""

    target: Target
    memory: memoryview
    offset: int
    source: list[Segment]
    read: Read

    def read_blocking(self, planned: list[Run]) -> list[Run]:
        """Read the source where it cannot be cloned, and tell where it is zero."""
        runs: list[Run] = []
        for run in planned:
            if run.is_zero:
                _append(runs, run)
                continue
            for start, end, segment in self.target.split(run.start, run.end, self.offset, self.source):
                if segment is not None:
                    _append(runs, Run(start, end, is_cloned=True))
                else:
                    self._read_run(start, end, runs)
        return runs

    def _read_run(self, start: int, end: int, runs: list[Run]) -> None:
        size = self.target.cluster_size
        data = self._memory(start, end)
        self.read(start, data)
        zeroes = set(zero_clusters(data, size))
        for cluster in range(start, end, size):
            _append(runs, Run(cluster, min(cluster + size, end), cluster - start in zeroes))

    def write_blocking(self, runs: list[Run]) -> None:
        for run in runs:
            if run.is_zero:
                self.target.file.punch_hole_blocking(run.start, run.end - run.start)
            elif run.is_cloned:
                self._clone_run(run)
            else:
                self.target.write_blocking(run.start, self._memory(run.start, run.end))

    def _clone_run(self, run: Run) -> None:
        """Clone; what cannot be cloned after all is read only now."""
        start = run.start
        for segment in clipped(self.source, run.start - self.offset, run.end - run.start):
            if not self.target.clone_blocking(segment, start):
                data = self._memory(start, start + segment.length)
                self.read(start, data)
                self.target.write_blocking(start, data)
            start += segment.length

    def _memory(self, start: int, end: int) -> memoryview:
        return self.memory[start - self.offset : end - self.offset]


async def _still_wanted(overlay: "AddCowImage", runs: list[Run], is_wanted: IsWanted) -> list[Run]:
    """What is to be written, neighbours together: clusters that are absent still, and wanted still.

    Needs:    the range is held.
    """
    chosen: list[Run] = []
    for run in runs:
        for start, end in await _absent_ranges(overlay, run.start, run.end):
            step = end - start if is_wanted(start, end) else overlay.cluster_size
            for low in range(start, end, step):
                high = min(low + step, end)
                if is_wanted(low, high):
                    _append(chosen, run._replace(start=low, end=high))
    return chosen


def _append(runs: list[Run], run: Run) -> None:
    if runs and runs[-1].end == run.start and runs[-1].is_alike(run):
        runs[-1] = runs[-1]._replace(end=run.end)
    else:
        runs.append(run)
