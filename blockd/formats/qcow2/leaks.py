"""Leaks of an image that was not closed, looked for while guests use it.

To look through a large image takes seconds for each TiB, for which nobody waits who opens it. While it is
looked through it changes, but what there was when it was opened only becomes less:

- nothing is allocated before `end`, where the last cluster in use ended then;
- nothing that a map named is punched (a plan): an L1 or L2 table that is replaced stays as it was.

So whoever reads refcounts and then tables from the disk, one after the other, finds every cluster before
`end` named as often as it is named all the time. One that had more users than that, has as many still, and
is not on its way to lose one, is leaked. Of one that has lost a user meanwhile, the next pass tells.
"""

import asyncio
from typing import TYPE_CHECKING, NamedTuple

from blockd.aio import in_thread, uninterrupted
from blockd.errors import BlockdError
from blockd.extents import Kind
from blockd.formats.qcow2.check import STEPS_TIME_S, Census
from blockd.formats.qcow2.repair import tell_freed, warn_of_leaks
from blockd.freed_memory import give_back_soon

if TYPE_CHECKING:
    from blockd.formats.qcow2.metadata import Metadata

# Between two steps, each of which takes about as long: guests come first.
PAUSE_S = STEPS_TIME_S
# How often the image is looked through while guests overwrite what snapshots share.
PASS_COUNT_MAX = 3
# What waits for a checkpoint is gone through for each range: so many of them are freed between two.
CHECKPOINT_EVERY = 64
# How many clusters are looked at in one go, and how many users too many one has for it to be freed.
CLUSTER_COUNT_MAX = 1024
EXCESS_MAX = 16
# More ranges than this are left for the next time.
RANGE_COUNT_MAX = 1 << 16


class Leak(NamedTuple):
    """Some neighbouring clusters, described by one refcount block, with the same refcount: it is too high."""

    clusters: range
    refcount: int
    # By how much.
    excess: int


class Leaks(NamedTuple):
    """What one pass has found."""

    found: list[Leak]
    are_all: bool


class LeakSearch:
    """The search in one image that is open for writing, whose last cluster in use ends at `end`."""

    def __init__(self, metadata: "Metadata", end: int) -> None:
        self._metadata = metadata
        self._end = end
        self._is_stopped = self._is_done = False
        self._is_over = asyncio.Event()
        self._is_over.set()

    @classmethod
    async def prepare(cls, metadata: "Metadata") -> "LeakSearch":
        """Note what is in use."""
        return cls(metadata, await metadata.allocator.used_end())

    def begin(self) -> None:
        """Keep what is there apart from what comes.

        Needs:    nothing was written since the search was prepared.
        """
        self._metadata.allocator.keep_off(self._end)

    async def run(self) -> None:
        """Look for leaks, and free them; what fails is told, and leaves them for the next time.

        Cancel:   as when it fails.
        """
        if self._is_stopped:
            return
        self._is_over.clear()
        metadata = self._metadata
        try:
            for _ in range(PASS_COUNT_MAX):
                if (leaks := await self._find()) is None:
                    break
                if await self._free(leaks):
                    metadata.is_suspect = False
                    break
        except BlockdError as error:
            warn_of_leaks(metadata.file, error.message)
        finally:
            self._is_done = not self._is_stopped
            metadata.allocator.keep_off(0)
            self._is_over.set()
            give_back_soon()

    def stop_soon(self) -> None:
        """Change nothing any more."""
        self._is_stopped = True

    async def stop(self) -> None:
        """End the search, and return when it has ended."""
        self.stop_soon()
        if self._is_over.is_set():
            self._metadata.allocator.keep_off(0)
        await self._is_over.wait()
        if not self._is_done:
            warn_of_leaks(self._metadata.file, "it is too large to be looked through in so short a time")
            self._is_done = True

    async def _find(self) -> Leaks | None:
        """What seems to be leaked: some of it may have lost a user since; None: nobody can say."""
        file = self._metadata.file
        with self._metadata.allocator.plan():
            census = await Census.begin(file, self._end)
            while await census.advance():
                await asyncio.sleep(PAUSE_S)
                if self._is_stopped:
                    return None
            # A refcount that is too low may be one that has fallen since a table was read.
            if census.findings.obstacle is not None or census.refcounts.needs_rebuild:
                reason = census.findings.obstacle or "refcount blocks are wrong"
                warn_of_leaks(file, f"it is not certain what is leaked: {reason}")
                return None
            return await in_thread(_leaks, census, self._metadata.allocator.block_span)

    async def _free(self, leaks: Leaks) -> bool:
        """Free what is still leaked, durably; False: the search was stopped, or there may be more."""
        metadata, count, are_all = self._metadata, 0, leaks.are_all
        for number, leak in enumerate(leaks.found):
            if number % CHECKPOINT_EVERY == 0 and not self._is_stopped:
                await metadata.flush()
            await asyncio.sleep(0)
            async with metadata.lock:  # no checkpoint is under way
                if self._is_stopped:
                    return False
                freed = await metadata.allocator.free_leaked(*leak)
            count += freed
            # Of those with one user the others are free by now: a leak cannot lose what it does not have.
            are_all &= leak.refcount == 1 or freed == len(leak.clusters)
        if self._is_stopped:
            return False
        await metadata.flush()
        if count:
            tell_freed(metadata.file, count)
        return are_all


@uninterrupted
async def cut_off_room(metadata: "Metadata") -> None:
    """Cut off what was reserved behind the end: it is free, as refcounts tell, and holds no data."""
    file = metadata.file
    offset = end = await metadata.allocator.used_end()
    while offset < file.size:
        for extent in await file.map(offset, file.size - offset):
            offset = extent.end
            end = offset if extent.kind is Kind.DATA else end
    await in_thread(file.trim_blocking, end)
    metadata.kept_end = file.size


def _leaks(census: Census, span: int) -> Leaks:
    """What a census has found, by refcount block of `span` clusters; blocking."""
    found = _too_high(census, span)
    return Leaks(found, are_all=sum(len(leak.clusters) for leak in found) == census.report.leaks)


def _too_high(census: Census, span: int) -> list[Leak]:
    """Clusters with more users than they are named, as far as they are not too many."""
    found: list[Leak] = []
    at_once = min(span, CLUSTER_COUNT_MAX)  # powers of two
    stored, references = census.refcounts.stored, census.refcounts.references
    for clusters in stored.ranges_not_as(references):
        counts = stored.get(clusters.start, len(clusters)), references.get(clusters.start, len(clusters))
        for cluster, refcount, named in zip(clusters, *counts, strict=True):
            if not named < refcount <= named + EXCESS_MAX:
                continue
            what = refcount, refcount - named
            if found and found[-1][1:] == what and cluster == found[-1].clusters.stop and cluster % at_once:
                found[-1] = Leak(range(found[-1].clusters.start, cluster + 1), *what)
            elif len(found) == RANGE_COUNT_MAX:
                return found
            else:
                found.append(Leak(range(cluster, cluster + 1), *what))
    return found
