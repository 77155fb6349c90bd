"""A cache of an image's tables: bounded memory, one way in.

Metadata that memory holds only a part of is in one of these: L2 tables, refcount blocks, pages of bitmaps.
Each has a number. The file may have an older state of a table than memory, and a load takes time: a
thread reads the bytes, and other tasks run before the one that asked for them does. So:

- What is being loaded can be had in no other way, not from the page cache either: it would be changed there,
  and then the load would put the older bytes over the change. Whoever wants it waits for that load.
- What a load brings is dropped if the table was put into the cache meanwhile, whatever became of it since.
- A table that the disk does not have as it is in memory stays: while it is `changed`, and while it is
  being `written`. So the file never has an older state of a table that is not in memory.

Looking a table up leaves no trace, as it is done for each request. The one that came first is set aside
when another one comes. Whoever wants it finds it there, and it is as good as new; otherwise it is forgotten
after a while. So those that are used stay, whatever else is read once.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")

# One of so many tables is set aside.
_ASIDE_SHARE = 4
# At how many tables one call looks that finds another one's place.
_LOOK_COUNT_MAX = 8


class TableCache(Generic[T]):
    """At most `count_max` tables, and those that the disk lacks.

    `tables` is for looking up what is in memory, at the cost of a dict.
    """

    def __init__(self, count_max: int) -> None:
        self.count_max = count_max
        self.tables: OrderedDict[int, T] = OrderedDict()
        # What goes next unless it is wanted; the disk has these tables.
        self._aside: OrderedDict[int, T] = OrderedDict()
        # Numbers of tables in memory that the disk does not have so; add to it what is changed.
        self.changed: set[int] = set()
        # Those that a checkpoint is writing, as they were when it began.
        self.written: set[int] = set()
        self._loads: dict[int, asyncio.Future[None]] = {}

    # -- coming in ----------------------------------------------------------------------------

    def load_nowait(self, number: int, read: Callable[[], T | None]) -> T | None:
        """The table, if it is in memory or `read` has it at once; None while it is being loaded."""
        table = self._found(number)
        if table is None and number not in self._loads and (table := read()) is not None:
            self._insert(number, table)
        return table

    async def load(self, number: int, read: Callable[[], Awaitable[T]]) -> T:
        """The table, from memory, or read by this call or by one that came before.

        Needs:    what is done with it is done before anything else is waited for: it may be evicted then.
        Fails to: whoever waits for the same table reads it.
        """
        while (table := self._found(number)) is None:
            if (load := self._loads.get(number)) is not None:
                await asyncio.wait([load])
                continue
            load = self._loads[number] = asyncio.get_running_loop().create_future()
            try:
                table = await read()
                if self._loads.get(number) is load:
                    self._insert(number, table)
            finally:
                self._end_load(number, load)
        return table

    def put(self, number: int, table: T, *, is_changed: bool = True) -> None:
        """Take a table that was made in memory, in the place of any other."""
        if (load := self._loads.get(number)) is not None:
            self._end_load(number, load)
        if is_changed:
            self.changed.add(number)
        self._insert(number, table)

    def _end_load(self, number: int, load: "asyncio.Future[None]") -> None:
        if self._loads.get(number) is load:
            del self._loads[number]
        if not load.done():
            load.set_result(None)

    def _found(self, number: int) -> T | None:
        """The table, if it is in memory; from now on it is not one that goes next."""
        table = self.tables.get(number)
        if table is None and (table := self._aside.get(number)) is not None:
            self._insert(number, table)
        return table

    def _insert(self, number: int, table: T) -> None:
        self._aside.pop(number, None)
        if number not in self.tables:
            self._make_room()
        self.tables[number] = table

    def _make_room(self) -> None:
        """Set the oldest aside; those that the disk lacks count as new, and are not met each time."""
        aside_count = self.count_max // _ASIDE_SHARE
        for _ in range(min(_LOOK_COUNT_MAX, len(self.tables))):
            if len(self.tables) < self.count_max - aside_count:
                return
            number = next(iter(self.tables))
            if number in self.changed or number in self.written:
                self.tables.move_to_end(number)
                continue
            self._aside[number] = self.tables.pop(number)
            if len(self._aside) > aside_count:
                self._aside.popitem(last=False)

    # -- going to the disk --------------------------------------------------------------------

    @property
    def is_under_pressure(self) -> bool:
        """Whether so many tables wait for a checkpoint that one should come now."""
        return len(self.changed) * 2 > self.count_max

    def take_changed(self) -> list[int]:
        """Count what is changed as being written, which it is until one of the next two is called."""
        numbers = sorted(self.changed)
        self.changed.clear()
        self.written.update(numbers)
        return numbers

    def write_succeeded(self, numbers: Iterable[int]) -> None:
        """The disk has these tables as they were taken."""
        self.written.difference_update(numbers)

    def write_failed(self, numbers: Iterable[int]) -> None:
        """The disk may or may not have these tables: they have to be written again."""
        self.written.difference_update(numbers)
        self.changed.update(numbers)
