"""What the options of every node say of its requests: QEMU's cache, discard and detect-zeroes.

What a node is not told of its cache it has from the node above, as in QEMU.
"""

from enum import StrEnum
from typing import NamedTuple


class DetectZeroes(StrEnum):
    """What becomes of a guest's write whose data is all zeroes."""

    OFF = "off"
    # Written as zeroes that keep their space.
    ON = "on"
    # Written as zeroes whose space is given back.
    UNMAP = "unmap"


class Cache(NamedTuple):
    """How a node is told to treat its writes."""

    # Reported only: blockd reads and writes through the page cache, whatever it is told.
    is_direct: bool = False
    # Nothing is brought to the disk by a flush: what was written may be lost, and the image with it.
    is_unsafe: bool = False


class Settings(NamedTuple):
    """What the options of a node say of its requests."""

    cache: Cache = Cache()
    detect_zeroes: DetectZeroes = DetectZeroes.OFF
    # Cleared by the option `discard=ignore`.
    discards: bool = True


DEFAULTS = Settings()
