"""Whole L2 tables looked at together: the same runs as entry by entry, and None for what is not plain."""

import random
from array import array

import pytest

from blockd.formats.qcow2.check_plain import PlainTables

COPIED, COMPRESSED, ZERO = 1 << 63, 1 << 62, 1
OFFSET_MAX = 1 << 56
COUNT = 512


def drawn(rng: random.Random, cluster_size: int, flag: int) -> "array[int]":
    """Runs of neighbours, zero clusters and nothing."""
    entries: list[int] = []
    offset = cluster_size
    while len(entries) < COUNT:
        length = rng.choice([1, 1, 2, 30])
        kind = rng.choice(["neighbours", "elsewhere", "zero", "nothing"])
        if kind in ("zero", "nothing"):
            entries += [ZERO if kind == "zero" else 0] * length
            continue
        if kind == "elsewhere":
            offset = rng.randrange(cluster_size, rng.choice([1 << 30, OFFSET_MAX >> 1]), cluster_size)
        for _ in range(length):
            entries.append(offset | flag)
            offset += cluster_size
    return array("Q", entries[:COUNT])


def one_by_one(entries: "array[int]", cluster_size: int) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for entry in entries:
        cluster = (entry & ~COPIED) // cluster_size
        if entry <= ZERO:
            continue
        if runs and sum(runs[-1]) == cluster:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((cluster, 1))
    return runs


@pytest.mark.parametrize("cluster_bits", [9, 12, 16, 21])
def test_runs_are_those_of_the_entries(cluster_bits: int) -> None:
    tables, rng = PlainTables(cluster_bits), random.Random(cluster_bits)
    for flag in [0, COPIED] * 20:
        entries = drawn(rng, 1 << cluster_bits, flag)
        expected = one_by_one(entries, 1 << cluster_bits)
        assert tables.runs(entries, are_copied=False) == expected
        assert tables.runs(entries, are_copied=True) == (expected if flag or not expected else None)


@pytest.mark.parametrize("cluster_bits", [9, 12, 16, 21])
@pytest.mark.parametrize("flag", [0, COPIED])
def test_a_table_of_one_run(cluster_bits: int, flag: int) -> None:
    tables, step = PlainTables(cluster_bits), 1 << cluster_bits
    for first in (1, 2, 12345, (OFFSET_MAX >> cluster_bits) - COUNT):
        entries = array("Q", (first + index << cluster_bits | flag for index in range(COUNT)))
        for are_copied in (False, True):
            expected = [(first, COUNT)] if flag or not are_copied else None
            assert tables.runs(entries, are_copied=are_copied) == expected
        for spoilt in (
            entries[0] | 1 << 8,
            entries[0] | 1 << 56,
            entries[0] | 1 << 62,
            entries[0] + step // 2,
        ):
            wrong = array("Q", (spoilt + index * step for index in range(COUNT)))
            assert tables.runs(wrong, are_copied=bool(flag)) is None
    past_end = array("Q", (OFFSET_MAX - step * 9 + index * step | flag for index in range(COUNT)))
    assert tables.runs(past_end, are_copied=bool(flag)) is None


@pytest.mark.parametrize("cluster_bits", [9, 12, 16, 21])
def test_what_is_not_plain(cluster_bits: int) -> None:
    tables, rng = PlainTables(cluster_bits), random.Random(cluster_bits)
    cluster_size = 1 << cluster_bits
    wrong = [
        ZERO | cluster_size,
        ZERO | COPIED,
        COMPRESSED | cluster_size,
        1 << 56,
        1 << 61,
        2,
        cluster_size // 2,
    ]
    for entry in wrong:
        entries = drawn(rng, cluster_size, COPIED)
        entries[rng.randrange(COUNT)] = entry
        assert tables.runs(entries, are_copied=False) is None, hex(entry)


def test_compressed_clusters_are_set_apart() -> None:
    tables, rng = PlainTables(16), random.Random(1)
    entries = drawn(rng, 1 << 16, COPIED)
    assert tables.without_compressed(entries) == (entries, [])
    mixed = entries[:]
    numbers = sorted(rng.sample(range(COUNT), 100))
    for number in numbers:
        mixed[number] = COMPRESSED | rng.randrange(COMPRESSED)
        entries[number] = 0
    assert tables.without_compressed(mixed) == (entries, [mixed[number] for number in numbers])


def test_a_flag_that_is_missing_once() -> None:
    tables, rng = PlainTables(16), random.Random(1)
    entries = drawn(rng, 1 << 16, COPIED)
    index = next(index for index, entry in enumerate(entries) if entry > ZERO)
    entries[index] &= ~COPIED
    assert tables.runs(entries, are_copied=True) is None
    assert tables.runs(entries, are_copied=False) == one_by_one(entries, 1 << 16)
