"""How much of what is copied lately is not zeroes: what places for copies are as large as."""

from blockd.units import MIB

# How much has to be copied without a cluster of zeroes before none are expected.
DENSE_LENGTH = 16 * MIB
# Of how much that was copied lately the density is, and from which one on nothing but data is expected.
DENSITY_LENGTH = 32 * MIB
FULL_SHARE = 0.9


class Density:
    """How much of what was copied lately is not zeroes."""

    def __init__(self) -> None:
        # As if there had been so many zeroes before: a small copy tells little.
        self._length = DENSITY_LENGTH // 8
        self._stored_length = 0
        # So much was copied since there were zeroes.
        self._dense_length = 0

    @property
    def is_full(self) -> bool:
        """Whether there were no zeroes for a while."""
        return self._dense_length >= DENSE_LENGTH

    def expected(self, length: int) -> int:
        """How much of `length` is not zeroes if it is as what was copied lately."""
        share = self._stored_length / self._length
        return length if share > FULL_SHARE else int(length * share)

    def note(self, stored_length: int, length: int) -> None:
        """So much of a copy was not zeroes."""
        self._stored_length += stored_length
        self._length += length
        if self._length > DENSITY_LENGTH:
            self._stored_length //= 2
            self._length //= 2
        self._dense_length = self._dense_length + length if stored_length == length else 0
