"""How much a stream copies at once: all it can while guests do nothing, less while they wait.

How much may be copied at once without a guest noticing depends on the disk, the processors and on whoever
else uses them, so it is found out as networks do it: as long as guests are answered in time there is a step
more, and whenever they are not there is half as much. While no guest asks for anything it doubles.
"""

from blockd.units import KIB, MIB

# A stream never stands still; else the guest's disk would never be done.
LENGTH_MIN = 256 * KIB
STEP = 1 * MIB


class Leeway:
    """Of one stream, with at most `count_max` copies at once of at most `copy_length_max` bytes.

    Guests' requests are to take `target_s` at most; 0: it does not matter what they take.
    """

    def __init__(self, copy_length_max: int, count_max: int, target_s: float) -> None:
        self._copy_length_max = copy_length_max
        self._length_max = copy_length_max * count_max
        self._length_min = min(LENGTH_MIN, self._length_max)
        self.target_s = target_s
        # In bytes.
        self.length = self._length_max

    @property
    def copy_count(self) -> int:
        """How many copies may run at once: as few as there can be for the length."""
        return max(1, self.length // self._copy_length_max)

    @property
    def copy_length(self) -> int:
        """What one copy may take."""
        return min(self.length, self._copy_length_max)

    def adapt(self, latency_s: float | None) -> None:
        """Take note of how long guests' requests took lately; None: there were none."""
        if latency_s is None:
            length = 2 * self.length
        elif self.target_s and latency_s > self.target_s:
            length = self.length // 2
        else:
            length = self.length + STEP
        self.length = max(self._length_min, min(length, self._length_max))
