"""What is kept of clusters, by itself: pieces are joined, counted and found."""

import random

import pytest

from blockd.filters.staged_writes import PIECE_COST, StagedCluster, StagedWrites
from tests.many.steps import counted


def test_pieces_are_joined_and_the_newest_is_on_top() -> None:
    cluster = StagedCluster(100)
    for offset, data in [(110, b"aaaa"), (120, b"bb"), (112, b"cccc"), (116, b"dddd"), (121, b"e")]:
        cluster.put(offset, data)
    assert list(cluster.pieces(0, 1000)) == [(110, b"aaccccddddbe")]
    assert list(cluster.pieces(111, 114)) == [(111, b"acc")]
    assert cluster.cost == 12 + PIECE_COST
    cluster.put(100, b"f" * 10)
    assert cluster.covers(122)
    assert not cluster.covers(123)


def test_what_is_kept_is_counted_and_found() -> None:
    kept = StagedWrites(128)
    for offset in (10, 130, 180, 390):
        kept.put(offset, b"x" * 20)
    assert kept.runs(1000) == [(0, 256), (384, 512)]
    assert kept.runs(128) == [(0, 128), (128, 256), (384, 512)]
    ranges = [(0, 1), (256, 384), (250, 257), (300, 385), (511, 512), (512, 9999)]
    assert [kept.touches(*each) for each in ranges] == [True, False, True, True, True, False]
    assert [offset for offset, _ in kept.pieces(20, 380)] == [20, 130, 180, 390]
    assert kept._cost == 4 * (20 + PIECE_COST)
    kept.drop(128, 256)
    assert kept._cost == 2 * (20 + PIECE_COST)
    kept.drop(0, 10**12)
    assert not kept
    assert kept._cost == 0


@pytest.mark.parametrize("seed", range(20))
def test_pieces_are_what_was_written(seed: int) -> None:
    rng, length = random.Random(seed), 200
    cluster, expected, is_there = StagedCluster(1000), bytearray(length), bytearray(length)
    for number in range(1, 60):
        start = rng.randrange(length)
        end = rng.randint(start + 1, min(length, start + 30))
        data = bytes([number]) * (end - start)
        cluster.put(1000 + start, memoryview(data))
        expected[start:end], is_there[start:end] = data, b"1" * len(data)
        found = list(cluster.pieces(1000, 1000 + length))
        runs = bytes(is_there).split(b"\0")
        assert [len(piece) for _, piece in found] == [len(run) for run in runs if run]
        for offset, piece in found:
            assert piece == expected[offset - 1000 : offset - 1000 + len(piece)]
        assert cluster.length == is_there.count(b"1")
        assert cluster.cost == cluster.length + PIECE_COST * len(found)
        assert cluster.covers(1000 + length) == (cluster.length == length)
        low = rng.randrange(length)
        high = rng.randint(low, length)
        part = b"".join(bytes(piece) for _, piece in cluster.pieces(1000 + low, 1000 + high))
        assert part == bytes(expected[at] for at in range(low, high) if is_there[at])


def test_a_piece_costs_the_same_beside_many() -> None:
    costs = []
    for count in (100, 10_000):
        kept = StagedWrites(1 << 20)
        for number in range(count):
            kept.put(number * 10, b"x")
        with counted() as steps:
            kept.put(5, b"y")
            kept.put(count * 10 - 15, b"y")
            assert kept.pieces(count * 5, 1)
        costs.append(steps.count)
        kept.drop(0, 1 << 20)
    assert costs[0] == costs[1]
