"""Filling: how a stream or copy-on-read brings clusters into the image that are absent so far.

A cluster has one place, where guests write too. So the slow part, reading the source, holds nothing and
nobody up; then the range is held for as long as it takes to write the copies of those clusters that are
still absent and still wanted, or to clone them, and their bits are set. A guest write that comes before
finds its cluster absent and wins; one that comes meanwhile waits for that write, and then overwrites it.
"""

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from blockd.aio import in_thread
from blockd.block.copy_memory import copy_memory
from blockd.block.file_events import FileEvent
from blockd.block.node import FillCounts, IsWanted
from blockd.block.segments import SourcePlan
from blockd.extents import Range
from blockd.formats.add_cow.bitmap import ABSENT
from blockd.formats.copying import Copy, CopyRun, Target, append_run, source_reader, split_zeroes
from blockd.units import align_up

if TYPE_CHECKING:
    from blockd.formats.add_cow.image import AddCowImage


async def fill(
    overlay: "AddCowImage",
    ranges: Sequence[Range],
    source: SourcePlan,
    is_wanted: IsWanted,
    *,
    keep_cached: bool,
) -> FillCounts:
    """Do what `OverlayNode.fill` promises."""
    await overlay.metadata.relieve()
    absent = [part for start, end in ranges for part in await _absent_ranges(overlay, start, end)]
    if not absent:
        return FillCounts(0, 0, 0)
    with contextlib.ExitStack() as held:
        # New memory takes its time.
        memory = await in_thread(held.enter_context, copy_memory.lent(absent[-1][1] - absent[0][0]))
        target = Target(overlay.image.file, overlay.cluster_size, keep_cached)
        copy = Copy(target, memory, absent[0][0], source, await source_reader(source))
        planned = [CopyRun(*run) for run in split_zeroes(overlay, absent, source)]
        runs = await in_thread(copy.read_blocking, planned)
        target.file.announce(FileEvent.COR_WRITE)
        whole = [(start, align_up(end, overlay.cluster_size)) for start, end in absent]
        async with overlay.writes.ranges.held_together(whole):
            chosen = await _still_wanted(overlay, runs, is_wanted)
            await in_thread(_write_blocking, copy, chosen)
            for run in chosen:
                await overlay.metadata.bitmap.set(*_numbers(overlay, run))
    copied, zeroed = (sum(run.end - run.start for run in chosen if run.is_zero == kind) for kind in (0, 1))
    return FillCounts(copied, zeroed, sum(end - start for start, end in absent) - copied - zeroed)


def _numbers(overlay: "AddCowImage", run: CopyRun) -> tuple[int, int]:
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


def _write_blocking(copy: Copy, runs: list[CopyRun]) -> None:
    for run in runs:
        if run.is_zero:
            copy.target.file.punch_hole_blocking(run.start, run.end - run.start)
        else:
            copy.store_blocking(run, run.start)


async def _still_wanted(overlay: "AddCowImage", runs: list[CopyRun], is_wanted: IsWanted) -> list[CopyRun]:
    """What is to be written, neighbours together: clusters that are absent still, and wanted still.

    Needs:    the range is held.
    """
    chosen: list[CopyRun] = []
    for run in runs:
        for start, end in await _absent_ranges(overlay, run.start, run.end):
            step = end - start if is_wanted(start, end) else overlay.cluster_size
            for low in range(start, end, step):
                high = min(low + step, end)
                if is_wanted(low, high):
                    append_run(chosen, run._replace(start=low, end=high))
    return chosen
