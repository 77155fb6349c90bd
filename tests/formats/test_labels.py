"""Labels of many layers, laid on top of each other, against looking at each place."""

import random
from array import array
from collections.abc import Sequence

import pytest

from blockd.block import layers
from blockd.block.chain import layer_map
from blockd.block.layers import plan_through
from blockd.block.node import BlockNode, Labelled, Segment
from blockd.errors import ImageError
from blockd.extents import Extent, Kind, merged
from blockd.formats.qed.image import QedImage
from blockd.formats.qed.mapping import ZERO
from blockd.formats.raw.image import RawImage
from tests.formats.test_layer_maps import DrawnLayer
from tests.recording import RecordingFile
from tests.streaming import open_overlay, overlay

SECTOR = 512
CLUSTER = 4096


class LabelledLayer(DrawnLayer):
    """A layer that tells its map as labels, so many at a time; each of its clusters is somewhere."""

    def __init__(self, rng: random.Random, backing: BlockNode | None) -> None:
        unit = rng.choice((512, 1024, 4096))
        drawing = ""
        while len(drawing) < rng.randrange(1, 200):
            drawing += rng.choice("D0---") * rng.choice((1, 1, 1, 2, 9, 60))
        super().__init__(drawing, backing, cluster_size=unit)
        self.label_max = rng.choice((1, 7, 100))
        self.label_count = 0
        self.places: list[int] = []
        for _ in drawing:
            follows = bool(self.places) and rng.random() < 0.5
            self.places.append(self.places[-1] + unit if follows else rng.randrange(1 << 20) * unit)

    def _label(self, number: int) -> str:
        follows = number and self.places[number] == self.places[number - 1] + self.cluster_size
        return "d" if self.drawing[number] == "D" and follows else self.drawing[number]

    async def labels(self, offset: int, length: int, *, with_places: bool, with_holes: bool) -> Labelled:
        assert length > 0
        assert offset + length <= self.size
        unit, end = self.cluster_size, offset + length
        first, stop = offset // unit, min((end - 1) // unit + 1, offset // unit + self.label_max)
        self.label_count += stop - first
        end = min(end, stop * unit)
        kinds = set(self.drawing[first:stop])
        if kinds <= set("-0") and len(kinds) == 1:
            return Labelled(kinds.pop().encode(), 0, offset, end, None)
        # The first one begins what is told, wherever it is.
        labels = self._label(first).upper() + "".join(map(self._label, range(first + 1, stop)))
        return Labelled(labels.encode(), unit, first * unit, end, None)

    async def place(self, told: Labelled, ranges: Sequence[tuple[int, int]]) -> list[Segment]:
        return [Segment(length, *self.source_at(offset)) for offset, length in ranges]

    def source_at(self, offset: int) -> tuple[BlockNode | None, int]:
        number, rest = divmod(offset, self.cluster_size)
        return (self, self.places[number] + rest) if self.drawing[number] == "D" else (None, 0)


def _chain(rng: random.Random) -> list[LabelledLayer]:
    nodes: list[LabelledLayer] = []
    for _ in range(rng.randrange(1, 6)):
        nodes.append(LabelledLayer(rng, nodes[-1] if nodes else None))
    return nodes


def _owner(node: BlockNode | None, offset: int) -> LabelledLayer | None:
    """The layer that has a place."""
    while isinstance(node, LabelledLayer) and offset < node.size:
        if node.kind_at(offset) is not Kind.UNALLOCATED:
            return node
        node = node.backing
    return None


async def test_reads_are_planned_as_each_place_is_stored() -> None:
    rng = random.Random(17)
    for _ in range(100):
        top = _chain(rng)[-1]
        start = rng.randrange(top.size // SECTOR) * SECTOR
        segments = await plan_through(top, start, top.size - start)
        assert sum(segment.length for segment in segments) == top.size - start
        position = start
        for segment in segments:
            for distance in range(0, segment.length, SECTOR):
                owner = _owner(top, position)
                source, offset = (None, 0) if owner is None else owner.source_at(position)
                assert segment.source is source
                assert source is None or segment.offset + distance == offset
                position += SECTOR


@pytest.mark.parametrize("is_deep", [False, True])
async def test_kinds_are_merged_as_each_place_is(monkeypatch: pytest.MonkeyPatch, is_deep: bool) -> None:
    """Also where there are more layers than are looked at at once, or layers without labels between."""
    if is_deep:
        monkeypatch.setattr(layers, "LAYER_COUNT_MAX", 2)
    rng = random.Random(18)
    for _ in range(100):
        nodes = _chain(rng)
        top, base = nodes[-1], rng.choice([None, *nodes[:-1]])
        start = offset = rng.randrange(top.size // SECTOR) * SECTOR
        found: list[Extent] = []
        while offset < top.size:
            found += (extents := await layer_map(top, base, offset, top.size - offset))
            assert extents[0].offset == offset
            assert list(merged(extents)) == extents
            offset = extents[-1].end
        kinds = [extent.kind for extent in found for _ in range(extent.offset, extent.end, SECTOR)]
        expected = [_kind(top, base, offset) for offset in range(start, top.size, SECTOR)]
        assert kinds == expected


def _kind(node: BlockNode | None, base: BlockNode | None, offset: int) -> Kind:
    while isinstance(node, LabelledLayer) and node is not base:
        if offset >= node.size:
            return Kind.ZERO
        if (kind := node.kind_at(offset)) is not Kind.UNALLOCATED:
            return kind
        node = node.backing
    return Kind.UNALLOCATED


async def test_qed_labels_are_what_each_cluster_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockd.formats.qed.image.LABEL_COUNT_MAX", 500)
    rng = random.Random(19)
    count = 2048
    file = RecordingFile()
    image = await overlay(file, None, count * CLUSTER, cluster_size=CLUSTER, image_format="qed")
    assert isinstance(image, QedImage)
    await image.write(0, bytes(CLUSTER))
    file.truncate_blocking(100 * count * CLUSTER)
    page = await image._mapping.page(0)
    assert page is not None
    entries, place = [], 64 * CLUSTER
    for _ in range(count):
        place += CLUSTER * rng.choice((1, 1, 2))
        entries.append(rng.choice((0, ZERO, place, place)))
    assert len(page.entries) == count
    page.entries[:] = array("Q", entries)
    segments = await image.plan_read(SECTOR, image.size - SECTOR)
    position = SECTOR
    for segment in segments:
        for distance in range(0, segment.length, SECTOR):
            entry = entries[position // CLUSTER]
            assert (segment.source is file) == (entry > ZERO)
            assert entry <= ZERO or segment.offset + distance == entry + position % CLUSTER
            position += SECTOR
    assert position == image.size
    found: list[Extent] = []
    while not found or found[-1].end < image.size:
        offset = found[-1].end if found else 0
        found += await image.map(offset, image.size - offset)
    kinds = [extent.kind for extent in merged(found) for _ in range(extent.offset, extent.end, CLUSTER)]
    kind_of = {0: Kind.UNALLOCATED, ZERO: Kind.ZERO}
    assert kinds == [kind_of.get(entry, Kind.DATA) for entry in entries]


@pytest.mark.parametrize("wrong", [2, CLUSTER + 1, CLUSTER + SECTOR, 1 << 62, (1 << 40) + 1])
async def test_qed_entry_that_cannot_be_is_found_when_it_is_come_to(wrong: int) -> None:
    image = await overlay(RecordingFile(), None, 4096 * CLUSTER, cluster_size=CLUSTER, image_format="qed")
    assert isinstance(image, QedImage)
    await image.write(0, bytes(CLUSTER))
    page = await image._mapping.page(0)
    assert page is not None
    page.entries[100] = wrong
    extents = await image.map(0, image.size)
    assert extents[-1].end == 100 * CLUSTER
    with pytest.raises(ImageError, match="map names"):
        await image.map(100 * CLUSTER, CLUSTER)
    with pytest.raises(ImageError, match="map names"):
        await image.plan_read(0, image.size)


@pytest.mark.parametrize("image_format", ["qcow2", "qed"])
async def test_plan_takes_steps_for_what_it_tells_not_for_clusters(
    monkeypatch: pytest.MonkeyPatch, image_format: str
) -> None:
    """All that is written in one piece is one segment, found without looking at its clusters one by one."""
    looks = 0
    look_through = layers.look_through

    async def counted(*arguments: object, **options: object) -> object:
        nonlocal looks
        looks += 1
        return await look_through(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(layers, "look_through", counted)

    async def looked(count: int, *, reopened: bool = False) -> int:
        nonlocal looks
        file = RecordingFile()
        image = await overlay(file, None, count * CLUSTER, cluster_size=CLUSTER, image_format=image_format)
        await image.write(0, bytes(count * CLUSTER))
        if reopened:
            await image.flush()
            image = await open_overlay(file, None)
        looks = 0
        segments = await image.plan_read(0, image.size)
        assert sum(segment.length for segment in segments) == image.size
        return looks

    assert await looked(64) <= 2
    # Also where that is more than one table, which memory has, or only the page cache.
    assert await looked(2048) <= 2
    assert await looked(2048, reopened=True) <= 2


async def test_holes_of_a_file_show_through() -> None:
    base = DrawnLayer("DD0D" * 100, None)
    top = LabelledLayer(random.Random(20), base)
    top.drawing, top.cluster_size, top.size = "--D-" * 100, 4096, base.size
    top.places = [0] * 400
    offset, kinds = 0, ""
    while offset < top.size:
        for extent in await layer_map(top, None, offset, top.size - offset):
            kinds += ("0" if extent.kind is Kind.ZERO else "D") * (extent.length // 4096)
            offset = extent.end
    assert kinds == "DDDD" * 100


@pytest.mark.parametrize("tail", [0, 512])
async def test_raw_labels_tell_data_and_holes(tail: int) -> None:
    drawing = "DD00D0000D" + "D0" * 50

    class Holey(RecordingFile):
        async def map(self, offset: int, length: int) -> list[Extent]:
            units = range(offset // 4096, (offset + length - 1) // 4096 + 1)
            kinds = {"D": Kind.DATA, "0": Kind.ZERO}
            parts = []
            for number in units:
                start, end = max(offset, number * 4096), min(offset + length, (number + 1) * 4096)
                parts.append(Extent(start, end - start, kinds[drawing[number]]))
            return list(merged(parts))

    file = Holey()
    file.truncate_blocking(len(drawing) * 4096 - tail)
    image = RawImage(file, node_name="raw", read_only=True)
    for offset in (0, 512, 4096, 3 * 4096):
        told = await image.labels(offset, image.size - offset, with_places=True, with_holes=True)
        assert told is not None
        assert told.end == image.size
        assert told.labels.decode().upper() == drawing[offset // 4096 :]
        assert await image.place(told, [(5 * 4096, 512)]) == [Segment(512, file, 5 * 4096)]
