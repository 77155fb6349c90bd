"""Garbage collection that keeps nobody waiting, however much there is that stays.

A full collection looks at every object, and the event loop waits meanwhile: 40 ms for 500 disks. So what has
survived one is frozen, and the next one looks only at what has come since. A frozen object is freed as any
other when nothing refers to it; but frozen objects that refer to each other would stay. So all are looked at
again now and then, when no guest is at work or it is high time.
"""

import asyncio
import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from blockd.block.accounting import all_guests

# New objects for each collection of the youngest, and how many collections make one of the next due: a full
# collection looks at some 6,000 objects, which takes 1 ms.
THRESHOLDS = (700, 3, 1)
# All is looked at again after so many full collections: if no guest is at work, and in any case.
IDLE_COUNT = 16
COUNT_MAX = 2048


class Collecting:
    """What `gc.callbacks` has while the daemon runs. Any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._count = 0
        self._looks_at_all = False

    def __call__(self, phase: str, info: Mapping[str, Any]) -> None:
        if info["generation"] != 2:
            return
        if phase == "start":
            self._looks_at_all = self._count >= (COUNT_MAX if all_guests.are_at_work else IDLE_COUNT)
            if self._looks_at_all:
                gc.unfreeze()
            return
        gc.freeze()
        self._count = 0 if self._looks_at_all else self._count + 1
        if self._looks_at_all:
            # The next one is due when there is a quarter more than this one has looked at: that is too late.
            self._loop.call_soon_threadsafe(gc.collect)


@contextmanager
def collecting_little() -> Iterator[None]:
    """Collect garbage in this way inside the block; all that is there on entry stays."""
    collecting, before = Collecting(), gc.get_threshold()
    gc.freeze()
    gc.collect()  # of nothing: what the next one is measured by
    gc.callbacks.append(collecting)
    gc.set_threshold(*THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(collecting)
        gc.unfreeze()
