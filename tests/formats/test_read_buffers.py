"""Buffers of reads are used again, and never while anybody holds them."""

import pytest

from blockd.block import read_buffers
from blockd.block.node import Segment, Source
from blockd.block.read_buffers import LENGTH_MIN, ReadBuffers
from blockd.block.segments import read_segments
from tests.formats.test_layer_maps import DrawnLayer
from tests.recording import RecordingFile


def test_a_buffer_that_nobody_holds_is_used_again() -> None:
    buffers = ReadBuffers()
    first = id(buffers.get(LENGTH_MIN))

    assert id(buffers.get(LENGTH_MIN)) == first


def test_a_held_buffer_is_not_handed_out_again() -> None:
    buffers = ReadBuffers()
    held = buffers.get(LENGTH_MIN)
    in_a_list = [buffers.get(LENGTH_MIN)]
    view = memoryview(buffers.get(LENGTH_MIN))[1:2]

    other = buffers.get(LENGTH_MIN)

    assert other is not held
    assert other is not in_a_list[0]
    assert other is not view.obj


def test_a_buffer_is_used_again_when_the_last_holder_is_gone() -> None:
    buffers = ReadBuffers()
    view = memoryview(buffers.get(LENGTH_MIN))
    part = view[1:2]
    first = id(view.obj)
    view.release()
    assert id(buffers.get(LENGTH_MIN)) != first, "a part of it is still held"

    part.release()

    assert id(buffers.get(LENGTH_MIN)) == first


def test_buffers_are_as_long_as_asked_for() -> None:
    buffers = ReadBuffers()
    lengths = [LENGTH_MIN, LENGTH_MIN + 1, LENGTH_MIN - 1, 1, LENGTH_MIN]

    assert [len(buffers.get(length)) for length in lengths] == lengths


def test_no_more_is_kept_than_allowed() -> None:
    buffers = ReadBuffers()
    for number in range(read_buffers.KEPT_COUNT_MAX + 1):
        buffers.get(LENGTH_MIN + number)
    assert len(buffers._kept) == read_buffers.KEPT_COUNT_MAX

    buffers.get(read_buffers.KEPT_SIZE_MAX)
    assert [len(kept) for kept in buffers._kept] == [read_buffers.KEPT_SIZE_MAX]
    buffers.get(read_buffers.KEPT_SIZE_MAX + 1)
    assert [len(kept) for kept in buffers._kept] == [read_buffers.KEPT_SIZE_MAX]


class Awaited(DrawnLayer):
    """What no thread can read by itself."""

    async def read(self, offset: int, length: int) -> bytes:  # type: ignore[override]
        return b"D" * length


SOURCES = {"thread": RecordingFile(b"D" * LENGTH_MIN), "awaited": Awaited("D", None)}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
async def test_planned_reads_use_memory_again_and_fill_it(source: Source) -> None:
    half = LENGTH_MIN // 2
    plan = [Segment(half, source, 0), Segment(half, None, 0)]
    before = read_buffers.read_buffers.get(LENGTH_MIN)
    before[:] = b"X" * LENGTH_MIN
    address = id(before)
    del before

    content = await read_segments(plan, LENGTH_MIN)
    assert content == b"D" * half + bytes(half)
    assert id(content) == address
    # Never what somebody holds.
    assert id(await read_segments(plan, LENGTH_MIN)) != address
