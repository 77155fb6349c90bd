"""How much one copy takes: as much as its source and target do in a moment, whether they are fast or slow.

Long copies cost less. But a pause, a cancel, another speed wait for those that are under way, and what a
guest wrote to a part of a cluster is kept until its copy is over.
"""

from blockd.units import MIB

LENGTH_MIN = 1 * MIB
SHORT_S = 0.05
LONG_S = 0.25


class Pace:
    """Of one stream, whose copies take `length_max` at most."""

    def __init__(self, length_max: int) -> None:
        self._length_max = length_max
        # In bytes.
        self.length = length_max

    def note(self, length: int, duration_s: float) -> None:
        """A copy of `length` bytes took so long."""
        if duration_s > LONG_S:
            self.length = max(self.length // 2, min(LENGTH_MIN, self._length_max))
        elif duration_s < SHORT_S and length >= self.length:
            self.length = min(2 * self.length, self._length_max)
