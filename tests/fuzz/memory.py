"""How much memory a run takes."""

import re
from pathlib import Path

from blockd.units import KIB


def peak_memory() -> int:
    """The most that this process had in memory, in bytes.

    Not `ru_maxrss`, which counts the process that this one was forked from as well.
    """
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    assert found is not None
    return int(found[1]) * KIB
