"""Leaks of an image that was not closed, looked for while guests use it.

To look through a large image takes seconds for each TiB, for which nobody waits who opens it. While it is
looked through it changes, but what there was when it was opened only becomes less:

- nothing is allocated before `end`, where the last cluster in use ended then;
- nothing that a map named is punched (a plan): an L1 or L2 table that is replaced stays as it was.

So whoever reads the tables from the disk, one after the other, finds every cluster before `end` named that a
map names all the time. A cluster that has a user, is not named, and is not on its way to be free, is a leak.
"""

import asyncio
from typing import TYPE_CHECKING

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
# More ranges than this are left for the next time.
RANGE_COUNT_MAX = 1 << 16


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
            if (leaks := await self._find()) is not None and await self._free(leaks):
                metadata.is_suspect = False
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

    async def _find(self) -> list[range] | None:
        """The clusters that seem to be leaked: some may have become free; None: nobody can say."""
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
            return await in_thread(_unnamed, census, self._metadata.allocator.block_span)

    async def _free(self, leaks: list[range]) -> bool:
        """Free what is still leaked, durably; False: the search was stopped, or there is more."""
        metadata, count = self._metadata, 0
        for clusters in leaks[:RANGE_COUNT_MAX]:
            if metadata.needs_relief:
                await metadata.relieve()
            async with metadata.lock:  # no checkpoint is under way
                if self._is_stopped:
                    return False
                count += await metadata.allocator.free_unnamed(clusters)
        await metadata.flush()
        if count:
            tell_freed(metadata.file, count)
        return len(leaks) <= RANGE_COUNT_MAX


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


def _unnamed(census: Census, span: int) -> list[range]:
    """Clusters that have one user and are named by nothing, as ranges in blocks of `span`; blocking."""
    found: list[range] = []
    stored, references = census.refcounts.stored, census.refcounts.references
    for clusters in stored.ranges_not_as(references):
        counts = stored.get(clusters.start, len(clusters)), references.get(clusters.start, len(clusters))
        leaked = (cluster for cluster, *pair in zip(clusters, *counts, strict=True) if pair == [1, 0])
        for cluster in leaked:
            if found and cluster == found[-1].stop and cluster % span:
                found[-1] = range(found[-1].start, cluster + 1)
            else:
                found.append(range(cluster, cluster + 1))
        if len(found) > RANGE_COUNT_MAX:
            break
    return found
