"""Who gets a processor first (sched(7)): the event loop, for which guests wait, before what copies.

Nothing here takes a privilege, and nothing depends on it: where it cannot be, guests wait longer.
"""

import contextlib
import ctypes
import os
import struct
import time

# `struct sched_attr`: its size, policy, flags, nice, priority, runtime, deadline, period.
ATTRIBUTES = struct.Struct("=IIQiIQQQ")
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274, "riscv64": 274}.get(os.uname().machine)
_RESET_ON_FORK = 1

# The shortest turn there is.
SHORT_TURN_NS = 100_000
# With it, who competes with somebody else for a processor has a tenth of it.
COPIER_NICE = 10
# Who keeps a processor for longer than that is no guest; such a one is given way to so often only.
KEPT_S = 0.002
KEPT_INTERVAL_S = 0.1


def take_short_turns() -> None:
    """Let this thread, when it wakes up, come before others, as their turns are longer.

    Threads that it starts have the usual ones. Needs Linux 6.12.
    """
    policy = os.sched_getscheduler(0)
    if _SCHED_SETATTR is None or policy not in (os.SCHED_OTHER, os.SCHED_BATCH):
        return
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    attributes = ATTRIBUTES.pack(ATTRIBUTES.size, policy, _RESET_ON_FORK, nice, 0, SHORT_TURN_NS, 0, 0)
    ctypes.CDLL(None).syscall(ctypes.c_long(_SCHED_SETATTR), 0, attributes, 0)


def step_back() -> None:
    """Let this process have what others leave of the processors, or a little at least, in long turns."""
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        os.nice(COPIER_NICE)


class Courtesy:
    """Giving way to whoever waits for this thread's processor, of which the kernel takes its time."""

    def __init__(self) -> None:
        self._next = 0.0

    def give_way(self) -> None:
        """Let others have their turn; to be called between pieces of work of some 50 µs."""
        started = time.monotonic()
        if started < self._next:
            return
        os.sched_yield()
        finished = time.monotonic()
        if finished - started > KEPT_S:
            self._next = finished + KEPT_INTERVAL_S
