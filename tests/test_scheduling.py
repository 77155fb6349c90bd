"""Who gets a processor first, as the kernel tells it."""

import ctypes
import os
import platform
import threading
import time
from collections.abc import Callable

import pytest

from blockd import scheduling
from blockd.scheduling import (
    ATTRIBUTES,
    COPIER_NICE,
    KEPT_INTERVAL_S,
    KEPT_S,
    SHORT_TURN_NS,
    Courtesy,
    step_back,
    take_short_turns,
)

SCHED_GETATTR = {"x86_64": 315, "aarch64": 275, "riscv64": 275}.get(platform.machine())
KERNEL = tuple(map(int, platform.release().split(".")[:2]))


def attributes() -> tuple[int, int, int]:
    """Policy, nice and length of a turn of this thread; 0: the kernel does not tell that."""
    buffer = ctypes.create_string_buffer(ATTRIBUTES.size)
    assert SCHED_GETATTR is not None
    assert not ctypes.CDLL(None).syscall(ctypes.c_long(SCHED_GETATTR), 0, buffer, ATTRIBUTES.size, 0)
    _, policy, _, nice, _, turn_ns, _, _ = ATTRIBUTES.unpack(buffer.raw)
    return policy, nice, turn_ns


def in_new_thread(call: Callable[[], None]) -> None:
    """Call in a thread that leaves nothing behind."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    for error in errors:
        raise error


def test_short_turns_are_of_one_thread_and_change_nothing_else() -> None:
    def check() -> None:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        os.setpriority(os.PRIO_PROCESS, 0, 3)
        usual = attributes()
        take_short_turns()
        assert attributes()[:2] == (os.SCHED_BATCH, 3)
        assert attributes()[2] == (SHORT_TURN_NS if KERNEL >= (6, 12) else usual[2])

        def check_other() -> None:
            assert attributes() == usual

        in_new_thread(check_other)

    in_new_thread(check)


def test_copier_steps_back() -> None:
    def check() -> None:
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        step_back()
        assert attributes()[:2] == (os.SCHED_BATCH, min(19, nice + COPIER_NICE))

    in_new_thread(check)


@pytest.mark.parametrize("number", [None, 1 << 20])
def test_where_there_is_no_such_call_all_goes_on(monkeypatch: pytest.MonkeyPatch, number: int | None) -> None:
    monkeypatch.setattr(scheduling, "_SCHED_SETATTR", number)
    usual = attributes()
    take_short_turns()
    assert attributes() == usual


def test_who_keeps_a_processor_is_given_way_to_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    gave_way_at: list[float] = []

    def sched_yield() -> None:
        nonlocal now
        gave_way_at.append(now)
        now += kept_s

    monkeypatch.setattr(os, "sched_yield", sched_yield)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    courtesy = Courtesy()
    kept_s = KEPT_S / 2
    for _ in range(3):
        courtesy.give_way()
    assert len(gave_way_at) == 3
    kept_s = 2 * KEPT_S
    for _ in range(3000):
        courtesy.give_way()
        now += 0.0001
    assert len(gave_way_at) == 3 + 3
    assert gave_way_at[5] - gave_way_at[4] >= KEPT_INTERVAL_S
