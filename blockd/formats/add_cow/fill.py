"""Filling: how a stream or copy-on-read brings clusters into the image that are absent so far.

A cluster has one place, where guests write too. So the slow part, reading the source, holds nothing and
nobody up; then the range is held for as long as it takes to write the copies of those clusters that are
still absent and still wanted, and their bits are set. A guest write that comes before finds its cluster
absent and wins; one that comes meanwhile waits for that write, and then overwrites it.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from blockd.aio import in_thread
from blockd.block.file_events import FileEvent
from blockd.block.node import FillCounts, ProtocolNode, Segment
from blockd.block.segments import can_read_blocking, clipped, read_segments, readinto_segments_blocking
from blockd.formats.add_cow.bitmap import ABSENT
from blockd.formats.copy_memory import copy_memory
from blockd.formats.copying import split_zeroes
from blockd.units import align_up

if TYPE_CHECKING:
    from blockd.formats.add_cow.image import AddCowImage

Write = Callable[[int, memoryview], None]


class Buffer(NamedTuple):
    """Memory for the data from `offset` of the disk on."""

    offset: int
    view: memoryview

    def part(self, start: int, end: int) -> memoryview:
        return self.view[start - self.offset : end - self.offset]


class Run(NamedTuple):
    """Neighbouring clusters whose copies are alike: all data, or all zeroes."""

    start: int
    end: int
    is_zero: bool


async def fill(
    overlay: "AddCowImage",
    offset: int,
    length: int,
    source: list[Segment],
    is_wanted: Callable[[int], bool],
    *,
    keep_cached: bool,
) -> FillCounts:
    """Do what `OverlayNode.fill` promises."""
    await overlay.metadata.relieve()
    absent = await _absent_ranges(overlay, offset, offset + length)
    if not absent:
        return FillCounts(0, 0, 0)
    with copy_memory.lent(length) as memory:
        buffer = Buffer(offset, memory)
        runs = await _read(overlay, absent, source, buffer)
        file = overlay.image.file
        file.announce(FileEvent.COR_WRITE)
        async with overlay.writes.ranges.held(offset, align_up(offset + length, overlay.cluster_size)):
            chosen = await _still_wanted(overlay, runs, is_wanted)
            write = file.write_blocking if keep_cached else file.write_cold_blocking
            await in_thread(_write, chosen, file, write, buffer)
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


# -- reading ----------------------------------------------------------------------------------


async def _read(
    overlay: "AddCowImage", absent: list[tuple[int, int]], source: list[Segment], buffer: Buffer
) -> list[Run]:
    """Bring the source's data for the absent ranges into `buffer`, and tell where it is zero."""
    offset = buffer.offset
    planned = [
        Run(*run) for start, end in absent for run in split_zeroes(overlay, start, end, offset, source)
    ]
    data: memoryview | None = None
    if not can_read_blocking(source):
        data = memoryview(await read_segments(source, len(buffer.view)))

    def read(start: int, end: int) -> None:
        if data is not None:
            buffer.part(start, end)[:] = data[start - offset : end - offset]
        else:
            readinto_segments_blocking(clipped(source, start - offset, end - start), buffer.part(start, end))

    return await in_thread(_read_blocking, planned, read, buffer, overlay.cluster_size)


def _read_blocking(
    planned: list[Run], read: Callable[[int, int], None], buffer: Buffer, cluster_size: int
) -> list[Run]:
    runs: list[Run] = []
    zero_cluster = bytes(cluster_size)
    for run in planned:
        if run.is_zero:
            _append(runs, run)
            continue
        read(run.start, run.end)
        for start in range(run.start, run.end, cluster_size):
            end = min(start + cluster_size, run.end)
            is_zero = zero_cluster.startswith(buffer.part(start, end))
            _append(runs, Run(start, end, is_zero=is_zero))
    return runs


# -- writing ----------------------------------------------------------------------------------


async def _still_wanted(
    overlay: "AddCowImage", runs: list[Run], is_wanted: Callable[[int], bool]
) -> list[Run]:
    """What is to be written, neighbours together: clusters that are absent still, and wanted still.

    Needs:    the range is held.
    """
    chosen: list[Run] = []
    for run in runs:
        for start, end in await _absent_ranges(overlay, run.start, run.end):
            for cluster in range(start, end, overlay.cluster_size):
                if is_wanted(cluster):
                    _append(chosen, Run(cluster, min(cluster + overlay.cluster_size, end), run.is_zero))
    return chosen


def _append(runs: list[Run], run: Run) -> None:
    if runs and runs[-1].end == run.start and runs[-1].is_zero == run.is_zero:
        runs[-1] = runs[-1]._replace(end=run.end)
    else:
        runs.append(run)


def _write(runs: list[Run], file: ProtocolNode, write: Write, buffer: Buffer) -> None:
    for run in runs:
        if run.is_zero:
            file.punch_hole_blocking(run.start, run.end - run.start)
        else:
            write(run.start, buffer.part(run.start, run.end))
