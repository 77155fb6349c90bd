"""Sets of ranges, read plans and reads of many pieces, each against what is simple; turns."""

import asyncio
import os
import random
from itertools import pairwise
from pathlib import Path

import pytest

from blockd import aio
from blockd.block.node import Segment
from blockd.block.segments import SourcePlan, clipped
from blockd.extents import RangeSet
from blockd.protocols import vectored
from blockd.protocols.vectored import GAP_LENGTH_MAX, VECTOR_COUNT_MAX, read_together


def test_range_set_is_the_numbers_in_it() -> None:
    rng = random.Random(1)
    for _ in range(200):
        found, numbers = RangeSet(), set[int]()
        for _ in range(rng.randrange(12)):
            start = rng.randrange(60)
            end = start + rng.randrange(8)
            found.add(start, end)
            numbers.update(range(start, end))
        ranges = list(found)
        assert all(start < end for start, end in ranges)
        assert all(before[1] < after[0] for before, after in pairwise(ranges)), "joined"
        assert {number for start, end in ranges for number in range(start, end)} == numbers
        assert bool(found) == bool(numbers)
        for _ in range(20):
            start = rng.randrange(70)
            end = start + rng.randrange(1, 9)
            assert found.touches(start, end) == bool(numbers & set(range(start, end)))
            clipped_numbers = {at for low, high in found.clipped(start, end) for at in range(low, high)}
            assert clipped_numbers == numbers & set(range(start, end))


def test_parts_of_a_plan_are_cut_from_all_of_it() -> None:
    rng = random.Random(2)
    for _ in range(100):
        ranges, plan, whole, offset = [], SourcePlan(), [], 0
        for _ in range(rng.randrange(1, 5)):
            offset += rng.choice((0, 5))
            segments = [
                Segment(rng.randrange(1, 6), None, rng.randrange(100)) for _ in range(rng.randrange(1, 5))
            ]
            length = sum(segment.length for segment in segments)
            plan.add(offset, segments)
            ranges.append((offset, offset + length, segments))
            whole += segments
            offset += length
        for start, end, segments in ranges:
            for _ in range(10):
                low = rng.randrange(start, end)
                high = rng.randrange(low, end) + 1
                assert plan.part(low, high) == clipped(segments, low - start, high - low)
                before = sum(length for length, _, _ in clipped(whole, 0, plan.position(low)))
                assert before == plan.position(low)
        assert plan.gathered([(start, end) for start, end, _ in ranges]).segments == whole
        assert plan.length == sum(segment.length for segment in whole)
        assert plan.part(offset - 1, offset + 9) == plan.part(offset - 1, offset)
        assert plan.part(offset, offset + 9) == []


def test_pieces_that_are_near_are_read_together(tmp_path: Path) -> None:
    rng = random.Random(3)
    content = rng.randbytes(1 << 20)
    path = tmp_path / "source"
    path.write_bytes(content)
    fd = os.open(path, os.O_RDONLY)
    try:
        for gap_max in (1, 4096, 2 * GAP_LENGTH_MAX):
            offset, pieces = 0, []
            while True:
                offset += rng.randrange(gap_max)
                length = rng.randrange(1, 3000)
                if offset + length > len(content):
                    break
                pieces.append((offset, memoryview(bytearray(length))))
                offset += length
            for start, buffer in read_together(fd, pieces):
                os.preadv(fd, [buffer], start)
            assert all(buffer == content[start : start + len(buffer)] for start, buffer in pieces)
    finally:
        os.close(fd)


def test_calls_are_few_and_what_they_take_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "source"
    path.write_bytes(bytes(8192 * 3))
    fd = os.open(path, os.O_RDONLY)
    pieces = [(3 * number, memoryview(bytearray(1))) for number in range(8192)]
    count, first = 0, 0
    while first < len(pieces):
        first, vectors = vectored._neighbours(pieces, first)
        assert len(vectors) <= VECTOR_COUNT_MAX
        count += 1
    assert count <= 2 * len(pieces) // VECTOR_COUNT_MAX + 1
    assert read_together(fd, pieces) == []
    assert read_together(fd, [*pieces[:2], (len(pieces) * 3, memoryview(bytearray(9)))]) != [], "past the end"
    os.close(fd)


@pytest.mark.parametrize(("turn_s", "round_count"), [(0.0, 9), (3600.0, 0)])
async def test_a_turn_is_over_after_a_while(
    monkeypatch: pytest.MonkeyPatch, turn_s: float, round_count: int
) -> None:
    monkeypatch.setattr(aio, "TURN_S", turn_s)
    others = 0

    async def be_others() -> None:
        nonlocal others
        while True:
            await asyncio.sleep(0)
            others += 1

    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(be_others())
        turns = aio.Turns()
        for _ in range(10):
            await turns.pass_on()
        assert others == round_count
        task.cancel()
