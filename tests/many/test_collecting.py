"""Garbage collection looks at what is new, however much there is; what is garbage goes nevertheless."""

import asyncio
import gc
import time
import weakref

import pytest

from blockd.block.accounting import all_guests
from blockd.daemon.collecting import IDLE_COUNT, THRESHOLDS, collecting_little

# What a full collection looks at: what has come since the last one, of which some may be looked at twice.
LOOKED_AT_MAX = 2 * THRESHOLDS[0] * (THRESHOLDS[1] + 1) * (THRESHOLDS[2] + 1)


class Ring:
    """Refers to itself, so that counting does not free it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def busy_guests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(all_guests, "last_ns", time.monotonic_ns() + 10**12)


@pytest.fixture
def idle_guests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(all_guests, "last_ns", 0)


@pytest.mark.usefixtures("busy_guests")
async def test_a_full_collection_looks_at_what_is_new() -> None:
    looked_at: list[int] = []

    def count(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and info["generation"] == 2:
            looked_at.append(sum(len(gc.get_objects(generation)) for generation in range(3)))

    gc.callbacks.append(count)
    try:
        with collecting_little():
            stays = [[number] for number in range(40 * LOOKED_AT_MAX)]
    finally:
        gc.callbacks.remove(count)
    assert len(stays) == 40 * LOOKED_AT_MAX
    # The first one is that of `collecting_little`; by then all that the tests have is frozen.
    assert len(looked_at) > 20
    assert max(looked_at) <= LOOKED_AT_MAX


@pytest.mark.usefixtures("idle_guests")
async def test_what_was_frozen_and_is_garbage_goes_when_guests_are_idle() -> None:
    with collecting_little():
        ring = Ring()
        is_there = weakref.ref(ring)
        gc.collect()
        del ring
        gc.collect()
        assert is_there(), "it was frozen"
        for _ in range(IDLE_COUNT):
            gc.collect()
        assert not is_there()
        await asyncio.sleep(0)  # for the look at nothing


@pytest.mark.usefixtures("busy_guests")
async def test_it_waits_while_guests_are_at_work() -> None:
    with collecting_little():
        ring = Ring()
        is_there = weakref.ref(ring)
        gc.collect()
        del ring
        for _ in range(2 * IDLE_COUNT):
            gc.collect()
        assert is_there()
    gc.collect()
    assert not is_there()
