"""Looking up many clusters at once, against looking at every entry."""

import random
from array import array
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from blockd.errors import ImageError
from blockd.extents import Extent, Kind, Range, RangeSet, merged
from blockd.formats import entry_runs
from blockd.formats.entry_runs import ENTRY_COUNT_MAX, RUN_COUNT_MAX, labels, packed
from blockd.formats.qcow2.header import SUBCLUSTER_COUNT
from blockd.formats.qcow2.image import Qcow2Image
from blockd.formats.qcow2.lookup import _NOTHING, Lookup, _first_set
from blockd.formats.qcow2.mapping import (
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    RESERVED_MASK,
    STATE_MASK,
    ZERO,
    L2Table,
)
from blockd.formats.qcow2.subcluster_lookup import CLUSTER_COUNT_MAX
from blockd.units import KIB, MIB
from tests.chains import read_all
from tests.nbd.memory_node import MemoryNode
from tests.recording import RecordingFile
from tests.streaming import overlay

# By whether an image has extended L2 entries. A table of the first one maps twice as many clusters as are
# looked at once.
CLUSTER_SIZE = {False: 32 * KIB, True: 16 * KIB}


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


@pytest.mark.parametrize("with_places", [False, True])
async def test_what_is_one_run_has_the_labels_of_its_entries(*, with_places: bool) -> None:
    rng = random.Random(8)
    image = await overlay(RecordingFile(), None, MIB, cluster_size=CLUSTER_SIZE[False])
    assert isinstance(image, Qcow2Image)
    lookup, step = Lookup(image.metadata), CLUSTER_SIZE[False]
    spoilt = 0, 1 << 8, 1 << 9, ZERO, COMPRESSED, COPIED, 1 << 56, 1 << 58, step
    for _ in range(300):
        count, flag, first = rng.choice((1, 2, 17, 512)), rng.choice(spoilt), rng.choice((0, 1, 77))
        entries = array("Q", ((first + index) * step ^ flag for index in range(count)))
        entries[rng.randrange(count)] ^= rng.choice(spoilt)
        table = L2Table(MIB, entries, is_linked=True)
        expected = labels(lookup._flags(packed(entries), count, with_places=with_places), count)
        assert lookup._labels(table, 0, count, with_places=with_places) == expected


class Map:
    """The only table of an image, with random entries, and what each unit of the disk is according to it."""

    def __init__(self, image: Qcow2Image, rng: random.Random, *, is_extended: bool) -> None:
        self.image = image
        self.mapping = image.metadata.mapping
        self.is_extended = is_extended
        self.cluster_size = self.mapping.cluster_size
        self.unit = image.cluster_size
        self.table = self.mapping.add_table(0, 1 << 30)
        count = self.mapping.index_mask + 1
        while len(pairs := self._pairs(rng, count)) < count:
            pass
        self.entries = [entry for entry, _ in pairs[:count]]
        self.bitmaps = [bitmap for _, bitmap in pairs[:count]]
        flat = [number for pair in pairs[:count] for number in pair]
        self.table.entries[:] = array("Q", flat if is_extended else self.entries)

    def _pairs(self, rng: random.Random, count: int) -> list[tuple[int, int]]:
        """Stretches of all lengths and kinds."""
        pairs: list[tuple[int, int]] = []
        place = 0
        while len(pairs) < count:
            kind, alike = rng.choice("-0dzcr"), rng.choice((1, 1, 1, 2, 7, 40, 700))
            alike *= rng.choice((1, 8)) if kind == "-" else 1
            bits = rng.choice([0xFFFF_FFFF, 0, rng.getrandbits(32), 0x5555_5555, 0xFFFF])
            for _ in range(alike):
                place += self.cluster_size * rng.choice((1, 1, 1, 1, 1, 2))
                entry, bitmap = self._entry(rng, kind, place, bits)
                pairs.append((entry | rng.choice((0, COPIED)), bitmap))
        return pairs

    def _entry(self, rng: random.Random, kind: str, place: int, bits: int) -> tuple[int, int]:
        """An entry of a kind, and a bitmap that can be with it."""
        zeroes = (~bits & rng.getrandbits(32)) << SUBCLUSTER_COUNT
        match kind:
            case "0":
                return (0 if self.is_extended else ZERO), bits << SUBCLUSTER_COUNT
            case "z":
                return place | (0 if self.is_extended else ZERO), 0xFFFF_FFFF << SUBCLUSTER_COUNT
            case "c":
                return COMPRESSED | rng.getrandbits(62), rng.getrandbits(64)
            case "d":
                return place, bits | zeroes
            case "r":
                return rng.getrandbits(64) & RESERVED_MASK | place, bits | zeroes
        return 0, 0

    def unit_at(self, offset: int) -> tuple[Kind, int]:
        """The kind of one unit and the entry that is told for it."""
        index = offset // self.cluster_size
        entry, bitmap = self.entries[index] & STATE_MASK, self.bitmaps[index]
        if entry & COMPRESSED:
            return Kind.DATA, entry
        if entry & OFFSET_MASK & (self.cluster_size - 1):
            raise ImageError("not aligned")
        entry &= ~RESERVED_MASK
        if not self.is_extended:
            return Kind.ZERO if entry & ZERO else Kind.DATA if entry else Kind.UNALLOCATED, entry
        number = offset % self.cluster_size // self.unit
        is_present, is_zero = bitmap >> number & 1, bitmap >> number + SUBCLUSTER_COUNT & 1
        if bitmap & bitmap >> SUBCLUSTER_COUNT & 0xFFFF_FFFF or (
            bitmap & 0xFFFF_FFFF and not entry & OFFSET_MASK
        ):
            raise ImageError("cannot be")
        kind = Kind.DATA if is_present else Kind.ZERO if is_zero else Kind.UNALLOCATED
        return kind, entry & ~ZERO if is_present else ZERO if is_zero else 0

    def units(self, offset: int, end: int) -> Iterator[tuple[int, int]]:
        """Start and end of the parts of units in a range."""
        while offset < end:
            unit_end = min(end, offset - offset % self.unit + self.unit)
            yield offset, unit_end
            offset = unit_end

    def expect_runs(self, runs: list[tuple[int, int, int]]) -> None:
        for number, (start, length, entry) in enumerate(runs):
            cluster = start - start % self.cluster_size
            for offset, _ in self.units(start, start + length):
                kind, own = self.unit_at(offset)
                if kind is Kind.DATA and not own & COMPRESSED:
                    assert own == entry + offset - offset % self.cluster_size - cluster
                elif kind is Kind.DATA:
                    assert own == entry
                    assert start + length <= cluster + self.cluster_size
                else:
                    assert kind is self.unit_at(start)[0]
            if number:
                assert start == sum(runs[number - 1][:2]), "no gap"

    def unallocated(self, offset: int, end: int) -> list[Range]:
        kinds = ((*unit, self.unit_at(unit[0])[0]) for unit in self.units(offset, end))
        return [*RangeSet((start, stop) for start, stop, kind in kinds if kind is Kind.UNALLOCATED)]

    def expect_extents(self, extents: list[Extent]) -> None:
        offset = extents[0].offset
        units = self.units(offset, extents[-1].end)
        expected = (Extent(start, end - start, self.unit_at(start)[0]) for start, end in units)
        assert extents == list(merged(expected))


async def _unallocated(image: Qcow2Image, offset: int, end: int) -> AsyncIterator[Range]:
    """All that is unallocated in a range; it may be told in parts."""
    while offset < end:
        ranges, looked_end = await image.unallocated(offset, end - offset)
        assert len(ranges) <= RUN_COUNT_MAX
        assert offset < looked_end <= end
        for span in ranges:
            yield span
        offset = looked_end


async def _map(rng: random.Random, *, is_extended: bool) -> Map:
    cluster_size = CLUSTER_SIZE[is_extended]
    size = cluster_size * (cluster_size // (16 if is_extended else 8))
    options: dict[str, Any] = {"extended_l2": True} if is_extended else {}
    image = await overlay(RecordingFile(), None, size, cluster_size=cluster_size, **options)
    assert isinstance(image, Qcow2Image)
    return Map(image, rng, is_extended=is_extended)


@pytest.mark.parametrize("is_extended", [False, True])
async def test_runs_and_kinds_are_what_each_cluster_is(is_extended: bool) -> None:
    rng = random.Random(65)
    for _ in range(3):
        image_map = await _map(rng, is_extended=is_extended)
        image = image_map.image
        for _ in range(20):
            offset = rng.randrange(0, image.size, 512)
            end = min(image.size, offset + 512 * rng.randrange(1, rng.choice((50, 5_000, 50_000))))
            position = offset
            while position < end:
                runs = await image.runs(position, end - position)
                assert len(runs) <= RUN_COUNT_MAX
                assert runs[0][0] == position
                image_map.expect_runs(runs)
                position = sum(runs[-1][:2])
            assert position == end
            lacking = RangeSet([span async for span in _unallocated(image, offset, end)])
            assert list(lacking) == image_map.unallocated(offset, end)
            while offset < end:
                extents = await image.map(offset, end - offset)
                assert len(extents) <= RUN_COUNT_MAX
                assert extents[0].offset == offset
                image_map.expect_extents(extents)
                offset = extents[-1].end
            assert offset == end


@pytest.mark.parametrize("is_extended", [False, True])
async def test_what_cannot_be_is_found_when_it_is_come_to(is_extended: bool) -> None:
    """What comes before it is told."""
    rng = random.Random(66)
    image_map = await _map(rng, is_extended=is_extended)
    image, size = image_map.image, image_map.cluster_size
    wrong = {"place": (512, 1)} | ({"both": (size, 1 << 32 | 1), "no place": (0, 2)} if is_extended else {})
    for entry, bitmap in wrong.values():
        for index in (0, 1, 5, 1000):
            entries = array("Q", bytes(8 * len(image_map.table.entries)))
            entries[index * (1 + is_extended)] = entry
            if is_extended:
                entries[2 * index + 1] = bitmap
            image_map.table.entries[:] = entries
            for look in (image.runs, image.map):
                if index:
                    found = await look(0, image.size)
                    assert sum(found[-1][:2]) == index * size
                with pytest.raises(ImageError):
                    await look(index * size, image.size - index * size)


@pytest.mark.parametrize("is_extended", [False, True])
async def test_a_look_does_not_take_a_step_for_each_cluster(
    monkeypatch: pytest.MonkeyPatch, is_extended: bool
) -> None:
    """So many entries are taken at once, whatever they are, and each of them once."""
    packed: list[int] = []
    pack = entry_runs.packed

    def counted(entries: "array[int]") -> bytes:
        packed.append(len(entries))
        return pack(entries)

    image_map = await _map(random.Random(67), is_extended=is_extended)
    name = "subcluster_lookup" if is_extended else "lookup"
    monkeypatch.setattr(f"blockd.formats.qcow2.{name}.packed", counted)
    table: L2Table = image_map.table
    count = image_map.mapping.index_mask + 1
    places = [2 * (number + 1) * image_map.cluster_size for number in range(count)]
    data = [number for place in places for number in (place, 0xFFFF_FFFF)]
    table.entries[:] = array("Q", data if is_extended else data[::2])
    extents = await image_map.image.map(0, image_map.image.size)
    expected = CLUSTER_COUNT_MAX if is_extended else ENTRY_COUNT_MAX
    assert extents == [Extent(0, expected * image_map.cluster_size, Kind.DATA)]
    assert packed == [expected] * (1 + is_extended)


@pytest.mark.parametrize("cluster", [0, 1, 511, 512, 700, 1022, 1023, 1024, 2047])
async def test_a_long_look_finds_the_only_cluster_of_extended_tables(cluster: int) -> None:
    """A table of 1,024 clusters has twice as many items."""
    size = 2 * 16 * MIB
    image = await overlay(
        RecordingFile(), MemoryNode(size), size, cluster_size=CLUSTER_SIZE[True], extended_l2=True
    )
    place = cluster * CLUSTER_SIZE[True] + 512
    await image.write(place, b"d" * 512)
    offset, found = 0, []
    while offset < size:
        for extent in await image.map(offset, size - offset):
            assert extent.offset == offset, "no gap"
            offset = extent.end
            found += [extent] if extent.kind is Kind.DATA else []
    assert found == [Extent(place, 512, Kind.DATA)]
    assert (await read_all(image, size)).index(b"d") == place


@pytest.mark.parametrize("copied_from", [0, 40])
async def test_neighbours_are_planned_as_one_without_labels(
    monkeypatch: pytest.MonkeyPatch, copied_from: int
) -> None:
    """As they are nearly always in what a stream reads. What differs in flags only takes the long way."""
    image_map = await _map(random.Random(68), is_extended=False)
    image, size = image_map.image, image_map.cluster_size
    entries = image_map.table.entries
    entries[:] = array("Q", range(size, (len(entries) + 1) * size, size))
    for number in range(copied_from, len(entries)):
        entries[number] |= COPIED
    looks: list[int] = []

    def counted(some: "array[int]") -> bytes:
        looks.append(len(some))
        return some.tobytes()

    monkeypatch.setattr("blockd.formats.qcow2.lookup.packed", counted)
    image.metadata.file.truncate_blocking((len(entries) + 1) * size)
    plan = await image.plan_read(512, 64 * size)
    assert [(segment.length, segment.offset) for segment in plan] == [(64 * size, size + 512)]
    assert (await image.unallocated(512, 64 * size))[0] == []
    assert bool(looks) == bool(copied_from)


@pytest.mark.parametrize("wrong", [1, 30, 62, 63])
async def test_one_that_is_no_neighbour_is_noticed(wrong: int) -> None:
    image_map = await _map(random.Random(69), is_extended=False)
    image, size, entries = image_map.image, image_map.cluster_size, image_map.table.entries
    entries[:] = array("Q", range(size, (len(entries) + 1) * size, size))
    assert image.entry_nowait(0, 64 * size) == size
    entries[wrong] += size
    assert image.entry_nowait(0, 64 * size) < 0
    entries[wrong] -= size - 512  # not aligned
    assert image.entry_nowait(0, 64 * size) < 0
