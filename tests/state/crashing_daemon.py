"""A daemon that kills itself at a certain step of writing its journal.

The steps are counted over the whole run; the file ``crash-at`` in the current folder says which one is not
reached any more. Without the file nothing is different.
"""

import os
import signal
import sys
from itertools import count
from pathlib import Path
from typing import Any

from blockd.cli.daemon import main
from blockd.daemon import state_dir

STEPS = ("open", "write", "pwrite", "fsync", "rename", "unlink")
CRASH_AT = Path("crash-at")


class CrashingSystem:
    """Stands in for `os`."""

    def __init__(self, crash_at: int) -> None:
        self._crash_at = crash_at
        self._numbers = count(1)

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in STEPS:
            return real

        def step(*arguments: Any, **named: Any) -> Any:
            if next(self._numbers) == self._crash_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)

        return step


if __name__ == "__main__":
    if CRASH_AT.exists():
        state_dir.os = CrashingSystem(int(CRASH_AT.read_text()))  # type: ignore[assignment,attr-defined]
    sys.exit(main())
