"""Counts the steps that this process takes: what grows with it shows, whatever else the machine does."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import TraceFunction

PACKAGE = str(Path(__file__).parents[2] / "blockd")


class Steps:
    """How many lines of blockd this thread has run; each turn of a loop counts."""

    def __init__(self) -> None:
        self.count = 0

    def trace(self, frame: FrameType, event: str, argument: object) -> "TraceFunction | None":
        """What `sys.settrace` is given."""
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        self.count += event in ("line", "call")
        return self.trace


@contextmanager
def counted() -> Iterator[Steps]:
    """Count steps inside the block."""
    steps, before = Steps(), sys.gettrace()
    sys.settrace(steps.trace)
    try:
        yield steps
    finally:
        sys.settrace(before)
