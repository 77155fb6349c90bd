"""Filters whose streams have ended while guests' writes were still staged in them.

Such a filter stays in front of its image, and the chain below as it is, for there is the rest of the clusters
of which parts are staged. Nothing more is staged. What is, is merged as soon as source and target allow that;
then the filter goes. Another stream into the image takes the filter over.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field

from blockd.block.node import BlockNode
from blockd.drivers.permissions import Claim
from blockd.errors import BlockdError
from blockd.filters.blkstream import BlkStream

log = logging.getLogger(__name__)

# How often merging is tried again that failed; a guest's flush tries it at once.
RETRY_S = 1.0


@dataclass(kw_only=True, eq=False)
class InsertedFilter:
    """A filter in front of an image for a time, and how things were before."""

    front: BlkStream
    # What nobody else may change: from the active image down.
    layers: list[BlockNode]
    # The active image is writable for this time only.
    was_read_only: bool
    # What the image records when the stream begins, and when it has succeeded.
    first_backing_file: str | None
    final_backing_file: str | None
    claims: list[Claim] = field(default_factory=list)
    # The node that a client named: the active image, or a filter in front of it.
    named: BlockNode | None = None
    # Where an earlier run has kept what is staged here, until the image holds it durably.
    kept: object | None = None

    async def try_merge(self) -> BlockdError | None:
        """Merge what is staged; returns why some of it cannot be, if so."""
        try:
            if self.kept is not None:
                await self.front.flush()
            else:
                await self.front.flush_staged()
        except BlockdError as error:
            return error
        self.kept = None
        return None


# Starts a task that has an owner.
Spawn = Callable[[Coroutine[object, object, None]], asyncio.Task[None]]
Remove = Callable[[InsertedFilter], Awaitable[None]]


class Draining:
    """The filters that stay, by their active images; `remove` takes one away that is not needed any more."""

    def __init__(self, spawn: Spawn, remove: Remove) -> None:
        self._spawn = spawn
        self._remove = remove
        self._filters: dict[BlockNode, InsertedFilter] = {}
        self._tasks: dict[BlockNode, asyncio.Task[None]] = {}

    def __iter__(self) -> Iterator[InsertedFilter]:
        return iter(list(self._filters.values()))

    def get(self, active: BlockNode) -> InsertedFilter | None:
        """The filter that stays in front of an image."""
        return self._filters.get(active)

    def add(self, inserted: InsertedFilter) -> None:
        """Let a filter stay until nothing is staged in it."""
        active = inserted.front.active
        self._filters[active] = inserted
        self._tasks[active] = self._spawn(self._drain(inserted))

    def take(self, active: BlockNode) -> InsertedFilter | None:
        """Hand over the filter in front of an image, if one stays there."""
        inserted = self._filters.pop(active, None)
        if inserted is not None:
            self._tasks.pop(active).cancel()
        return inserted

    def forget(self, inserted: InsertedFilter) -> None:
        """A filter is being removed."""
        del self._filters[inserted.front.active]
        del self._tasks[inserted.front.active]

    def hurry(self, active: BlockNode) -> None:
        """Look at once whether a filter can go."""
        inserted = self.take(active)
        if inserted is not None:
            self.add(inserted)

    async def _drain(self, inserted: InsertedFilter) -> None:
        told = ""
        while (error := await inserted.try_merge()) is not None:
            if error.message != told:
                told = error.message
                front = inserted.front
                log.warning("%s: %d bytes stay staged: %s", front.filename, front.staged_length, told)
            await asyncio.sleep(RETRY_S)
        await self._remove(inserted)
