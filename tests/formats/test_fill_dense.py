"""Where no zeroes were found for a while, copies get their clusters before they are read: one thread hop."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from blockd.aio import in_thread
from blockd.block.node import BlockNode, FillCounts, OverlayNode
from blockd.block.segments import SourcePlan
from blockd.formats import density
from blockd.formats.qcow2 import fill as filling
from blockd.formats.qcow2.image import Qcow2Image
from blockd.formats.raw.image import RawImage
from blockd.units import KIB
from tests.chains import read_all
from tests.recording import RecordingFile
from tests.streaming import overlay

CLUSTER = 64 * KIB
PART_COUNT = 8
PART = 8 * CLUSTER
SIZE = PART_COUNT * PART
DATA = random.Random(1).randbytes(SIZE)

ZEROES = {
    "nowhere": set[int](),
    "a cluster in a part": {5 * 8 + 3},
    "a part": set(range(5 * 8, 6 * 8)),
    "the end": set(range(5 * 8, 8 * 8)),
    "every other part": {number for number in range(64) if number // 8 % 2},
}


def content(zero_clusters: set[int]) -> bytes:
    data = bytearray(DATA)
    for number in zero_clusters:
        data[number * CLUSTER : (number + 1) * CLUSTER] = bytes(CLUSTER)
    return bytes(data)


async def make(base: bytes) -> tuple[Qcow2Image, RecordingFile]:
    below: BlockNode = await RawImage.open(RecordingFile(base, "base.raw"), node_name="base", read_only=True)
    file = RecordingFile(name="active")
    image: OverlayNode = await overlay(file, below, SIZE, cluster_size=CLUSTER)
    assert isinstance(image, Qcow2Image)
    return image, file


async def fill(image: Qcow2Image, start: int) -> FillCounts:
    plan = await image.plan_read(start, PART)
    return await image.fill([(start, start + PART)], SourcePlan(start, plan), lambda *_: True)


@pytest.fixture
def hops(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The calls that fills make in threads; two parts without zeroes are a while."""
    monkeypatch.setattr(density, "DENSE_LENGTH", 2 * PART)
    calls: list[object] = []

    async def counted(call: Callable[..., Any], *arguments: Any) -> Any:
        calls.append(call)
        return await in_thread(call, *arguments)

    monkeypatch.setattr(filling, "in_thread", counted)
    return calls


@pytest.mark.parametrize("zeroes", ZEROES)
async def test_copies_are_right_and_take_no_more_room(zeroes: str, hops: list[object]) -> None:
    base = content(ZEROES[zeroes])
    image, file = await make(base)
    for start in range(0, SIZE, PART):
        counts = await fill(image, start)
        zero_count = len([number for number in ZEROES[zeroes] if number // 8 == start // PART])
        assert counts == FillCounts(PART - zero_count * CLUSTER, zero_count * CLUSTER, 0)
    await image.flush()
    await image.trim()
    image.backing = None
    assert await read_all(image) == base
    data_count = SIZE // CLUSTER - len(ZEROES[zeroes])
    # The header, a refcount table and block, a table of each level.
    assert file.size == (data_count + 5) * CLUSTER


async def test_copies_without_zeroes_are_one_hop(hops: list[object]) -> None:
    image, _ = await make(DATA)
    for start in range(0, SIZE, PART):
        before = len(hops)
        await fill(image, start)
        assert len(hops) - before == (2 if start < 2 * PART else 1)


async def test_a_zero_ends_it_for_a_while(hops: list[object]) -> None:
    image, _ = await make(content({3 * 8 + 1}))
    counts = []
    for start in range(0, SIZE, PART):
        before = len(hops)
        await fill(image, start)
        counts.append(len(hops) - before)
    assert counts == [2, 2, 1, 2, 2, 2, 1, 1]


async def test_what_was_allocated_for_a_copy_that_fails_is_given_back(hops: list[object]) -> None:
    image, file = await make(DATA)
    for start in range(0, 3 * PART, PART):
        await fill(image, start)
    end = await image.metadata.allocator.used_end()
    plan = await image.plan_read(3 * PART, PART)

    def fail(offset: int, data: object) -> None:
        raise OSError

    file.write_cold_blocking = fail  # type: ignore[method-assign]
    with pytest.raises(OSError):
        await image.fill([(3 * PART, 4 * PART)], SourcePlan(3 * PART, plan), lambda *_: True)
    assert await image.metadata.allocator.used_end() == end
