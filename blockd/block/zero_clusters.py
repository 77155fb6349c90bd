"""Looking for clusters of zeroes at memory speed."""

from collections.abc import Iterator

_WORD_SIZE = 8


def zero_clusters(buffer: memoryview, cluster_size: int) -> Iterator[int]:
    """The positions of all-zero clusters in `buffer`; the last one may be shorter.

    One call looks at the first words of all of them: few begin with zeroes and go on with something else.
    """
    words = buffer[: len(buffer) // _WORD_SIZE * _WORD_SIZE].cast("Q")
    first_words = words[:: cluster_size // _WORD_SIZE].tolist()
    if len(buffer) % cluster_size and len(buffer) % cluster_size < _WORD_SIZE:
        first_words.append(0)
    zero_cluster = bytes(cluster_size) if 0 in first_words else b""
    for number, first_word in enumerate(first_words):
        position = number * cluster_size
        if not first_word and zero_cluster.startswith(buffer[position : position + cluster_size]):
            yield position


def packed_end(length: int, zeroes: list[int], cluster_size: int, place_length: int) -> int:
    """How much of a copy without its `zeroes` was made: all, or what there was place for."""
    return min(length, place_length + len(zeroes) * cluster_size)
