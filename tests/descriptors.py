"""What this process has open: a test that leaves a file open is told which."""

import os
from contextlib import suppress
from pathlib import Path

OPEN = Path("/proc/self/fd")


def open_files() -> set[tuple[str, str]]:
    """Each open descriptor's number and what it leads to.

    A set, not a count: what an earlier test has left may be collected, and so closed, at any moment.
    """
    files = set()
    for name in os.listdir(OPEN):  # noqa: PTH208 (its own descriptor is closed when the names are there)
        with suppress(FileNotFoundError):
            files.add((name, str((OPEN / name).readlink())))
    return files
