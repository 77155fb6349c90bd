"""Runs of table entries that are alike, found in whole tables at once.

Each entry (or each part of what it maps) gets one byte, its label:

    -    nothing: the backing decides
    0    reads as zeroes
    D d  stored in the file; d: where the entry before it would have it, so that they are neighbours
    C c  compressed; c: the same cluster as the one before
    X    cannot be

A regular expression finds the runs of labels. No step in Python is made for an entry: the first bytes of all
entries are taken as one string (every 8th byte of the table), the second ones, and so on; such columns are
translated by tables, and put together as large integers.
"""

import re
import sys
from array import array
from collections.abc import Iterable
from functools import cache, lru_cache
from typing import Final

from blockd.extents import Kind

# What one look tells about at most, so that it takes less than a millisecond or so: this many entries are
# looked at, and this many runs told.
ENTRY_COUNT_MAX: Final = 2048
RUN_COUNT_MAX: Final = 512

# Runs of what is alike, and in the same place where it has one; and runs of the same kind.
PLACED_RUNS: Final = re.compile(rb"-+|0+|[Dd]d*|[Cc]c*|X")
KIND_RUNS: Final = re.compile(rb"-+|0+|[DdCc]+|X")
NOTHING_RUNS: Final = re.compile(rb"-+")
KINDS: Final = dict.fromkeys(b"DdCc", Kind.DATA) | {ord("-"): Kind.UNALLOCATED, ord("0"): Kind.ZERO}

# Flags of an entry, of which the label follows.
STORED: Final = 1
ZEROES: Final = 2
COMPRESSED: Final = 4
IMPOSSIBLE: Final = 8
APART: Final = 16  # not where the entry before would have it
CONTENT: Final = 32  # a part of what the entry maps is said to be stored

ENTRY_SIZE: Final = 8


def _label(flags: int) -> bytes:
    if flags & COMPRESSED:
        return b"C"
    if flags & IMPOSSIBLE:
        return b"X"
    if flags & ZEROES:
        return b"0"
    if flags & STORED:
        return b"D" if flags & APART else b"d"
    return b"-"


_LABELS: Final = b"".join(map(_label, range(256)))
# By flag: a table that makes it of any byte but 0.
_SET: Final = {flag: bytes([0]) + bytes([flag]) * 255 for flag in (STORED, IMPOSSIBLE, APART, CONTENT)}


@cache
def bit_table(mask: int, flag: int) -> bytes:
    """A table for `bytes.translate` that makes a flag of bytes with a bit of `mask`, and 0 of others."""
    return bytes(flag if byte & mask else 0 for byte in range(256))


def packed(entries: "array[int]") -> bytes:
    """Entries with the least significant byte first, whatever the processor has."""
    if sys.byteorder == "big":
        entries = entries[:]
        entries.byteswap()
    return entries.tobytes()


def columns(table: bytes) -> list[bytes]:
    """The bytes of all entries by significance, least first."""
    return [table[position::ENTRY_SIZE] for position in range(ENTRY_SIZE)]


def united(strings: "Iterable[bytes | bytearray]", length: int) -> bytes:
    """Strings of the same length on top of each other: each byte has the bits that it has in any of them."""
    bits = 0
    for string in strings:
        bits |= int.from_bytes(string, "little")
    return bits.to_bytes(length, "little")


def flagged(strings: Iterable[bytes], length: int, flag: int) -> bytes:
    """A flag where any of the strings has a byte other than 0."""
    return united(strings, length).translate(_SET[flag])


def apart(table: bytes, place_mask: int, step: int) -> bytes:
    """A flag for entries whose place is not `step` behind that of the entry before; always for the first."""
    count = len(table) // ENTRY_SIZE
    places = int.from_bytes(table, "little") & _repeated(place_mask, count)
    # All entries move by one: each meets what the one before lets expect.
    expected = (places + _repeated(step, count)) << 8 * ENTRY_SIZE
    difference = (places ^ expected | 1).to_bytes(len(table) + ENTRY_SIZE, "little")
    return flagged(columns(difference[: len(table)]), count, APART)


def follow(entries: "array[int]", first: int, step: int) -> bool:
    """Whether each of these entries is `step` more than the one before; `first` comes before them."""
    last = first + len(entries) * step
    if entries[-1] != last:
        return False
    expected = array("Q", range(first + step, last + 1, step)) if step else array("Q", [first]) * len(entries)
    return entries == expected


def is_one_run(entries: "array[int]", step: int) -> bool:
    """Whether each of these entries is `step` more than the one before: much faster than to look for runs."""
    count, first = len(entries), entries[0]
    if entries[-1] != first + (count - 1) * step:
        return False
    expected = first * _repeated(1, count) + _steps(step, count)
    return int.from_bytes(packed(entries), "little") == expected


@lru_cache(maxsize=8)
def _steps(step: int, count: int) -> int:
    return int.from_bytes(packed(array("Q", range(0, count * step, step))), "little")


def labels(flags: "Iterable[bytes | bytearray]", length: int) -> bytes:
    """The labels of entries with all these flags."""
    return united(flags, length).translate(_LABELS)


@lru_cache(maxsize=8)
def _repeated(value: int, count: int) -> int:
    return int.from_bytes(value.to_bytes(ENTRY_SIZE, "little") * count, "little")
