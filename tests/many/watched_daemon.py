"""A daemon that watches its own event loop: `python -m tests.many.watched_daemon FILE ARGUMENTS`.

Every callback that keeps the loop for longer than HOLD_S is one line of FILE, as JSON: a `Hold`. What counts
is the processor time of the loop's thread, with the kernel's part: on a busy machine that is somewhat more,
but not any amount. While a callback takes long, a timer samples the stack.

The loop is asyncio's own, whose callbacks can be watched.
"""

import asyncio
import gc
import json
import signal
import sys
import threading
import time
from asyncio import events
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, cast

import blockd
from blockd.cli.daemon import main

HOLD_S = 0.005
# How often the stack is looked at, from when on in a callback, and how much of it is kept.
SAMPLE_INTERVAL_NS = 1_000_000
SAMPLED_FROM_NS = int(HOLD_S * 1e9) // 4
FRAME_COUNT = 16

PACKAGE = str(Path(blockd.__file__).parent)

Stack = tuple[tuple[str, int, str], ...]
Run = Callable[[events.Handle], None]


@dataclass(frozen=True)
class Hold:
    """One callback that took too long; `stacks` are those seen meanwhile, the most frequent one first."""

    cpu_ms: float
    wall_ms: float
    gc_ms: float
    callback: str
    stacks: list[tuple[int, str]]

    @property
    def place(self) -> str:
        """The innermost function of blockd that was seen most often."""
        calls = self.stacks[0][1].splitlines() if self.stacks else []
        return next((call.split()[-1] for call in reversed(calls) if PACKAGE in call), self.callback)

    def __str__(self) -> str:
        times = f"{self.cpu_ms} ms ({self.gc_ms} of them collecting garbage) of {self.wall_ms} ms"
        return "\n".join(
            [f"{times}: {self.callback}", *(f"{count} times in\n{stack}" for count, stack in self.stacks[:2])]
        )


class Watch:
    """Measures callbacks, and notes those that took too long in a file."""

    def __init__(self, path: Path, run: Run) -> None:
        self._path = path
        self._run = run
        self._sample_ns: int | None = None  # from which processor time on to look
        self._gc_ns = 0
        self._stacks: dict[Stack, int] = {}

    def run(self, handle: events.Handle) -> None:
        """Run a callback."""
        wall_ns, cpu_ns = time.monotonic_ns(), time.thread_time_ns()
        self._gc_ns = 0
        self._sample_ns = cpu_ns + SAMPLED_FROM_NS
        self._run(handle)
        self._sample_ns = None
        took_ns = time.thread_time_ns() - cpu_ns
        if took_ns > HOLD_S * 1e9:
            self._note(handle, took_ns / 1e6, (time.monotonic_ns() - wall_ns) / 1e6)
        self._stacks.clear()

    def _note(self, handle: events.Handle, cpu_ms: float, wall_ms: float) -> None:
        stacks = sorted(((count, _told(stack)) for stack, count in self._stacks.items()), reverse=True)
        hold = Hold(round(cpu_ms, 1), round(wall_ms, 1), round(self._gc_ns / 1e6, 1), repr(handle), stacks)
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(hold)) + "\n")

    def sample(self, _: int, frame: FrameType | None) -> None:
        """Look at what the loop's thread does: the handler of a timer's signal."""
        sample_ns = self._sample_ns
        if sample_ns is None or time.thread_time_ns() < sample_ns:
            return
        self._sample_ns = None  # the next signal may come at once
        stack = _stack_of(frame)
        self._stacks[stack] = self._stacks.get(stack, 0) + 1
        self._sample_ns = time.thread_time_ns() + SAMPLE_INTERVAL_NS

    def collected(self, phase: str, _: dict[str, int]) -> None:
        """Count the time of the garbage collector, which has no frames of its own."""
        if threading.current_thread() is not threading.main_thread():
            return
        now_ns = time.thread_time_ns()
        self._gc_ns += now_ns if phase == "stop" else -now_ns


def _stack_of(frame: FrameType | None) -> Stack:
    """The innermost calls, the last one first: cheap, for it is taken on the loop's own time."""
    calls: list[tuple[str, int, str]] = []
    while frame is not None and len(calls) < FRAME_COUNT:
        calls.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_qualname))
        frame = frame.f_back
    return tuple(calls)


def _told(stack: Stack) -> str:
    return "\n".join(f"    {file}:{line} {name}" for file, line, name in reversed(stack))


def watch(path: Path) -> None:
    """Watch the loops of this thread from now on."""
    handle = cast(Any, events.Handle)
    watcher = Watch(path, handle._run)

    def run(self: events.Handle) -> None:
        watcher.run(self)

    handle._run = run
    signal.signal(signal.SIGPROF, watcher.sample)
    signal.setitimer(signal.ITIMER_PROF, SAMPLE_INTERVAL_NS / 1e9, SAMPLE_INTERVAL_NS / 1e9)
    gc.callbacks.append(watcher.collected)
    sys.modules["uvloop"] = cast(Any, SimpleNamespace(new_event_loop=asyncio.new_event_loop))


def holds(path: Path) -> list[Hold]:
    """What was noted in a file."""
    return [Hold(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    watch(Path(sys.argv.pop(1)))
    sys.exit(main())
