"""Looking up where an L1 table goes on, against looking at every entry."""

import random
from array import array

from blockd.formats.qcow2.lookup import _NOTHING, _first_set


def test_first_set_entry_is_found_wherever_it_stands() -> None:
    rng = random.Random(64)
    length = 3 * len(_NOTHING)
    for _ in range(300):
        entries = array("Q", bytes(8 * length))
        for _ in range(rng.randrange(4)):
            entries[rng.randrange(length)] = rng.choice((1, 1 << 63))
        start = rng.randrange(length)
        end = rng.randrange(start, length + 1)
        found = next((index for index in range(start, end) if entries[index]), end)
        assert _first_set(entries, start, end) == found
