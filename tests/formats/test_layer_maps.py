"""What the layers of a chain hold together, against looking at each cluster; and how often they are asked."""

import random
from typing import NoReturn

import pytest

from blockd.block.chain import layer_map, with_layers_below
from blockd.block.node import BlockNode, Buffer
from blockd.cli.image.map import chain_entries
from blockd.extents import Extent, Kind, merged
from blockd.filters.blkstream import BlkStream
from tests.recording import RecordingFile
from tests.streaming import overlay

CLUSTER = 4096
KINDS = {"D": Kind.DATA, "0": Kind.ZERO, "-": Kind.UNALLOCATED}


class DrawnLayer(BlockNode):
    """A layer that is only a map, told a few extents at a time; counts how often, and what it told."""

    driver = "drawn"

    def __init__(
        self, drawing: str, backing: BlockNode | None, *, cluster_size: int = CLUSTER, told_max: int = 512
    ) -> None:
        super().__init__("drawn", "drawn", len(drawing) * cluster_size, read_only=True)
        self.drawing = drawing
        self.backing = backing
        self.cluster_size = cluster_size
        self.told_max = told_max
        self.ask_count = self.told_count = 0

    def kind_at(self, offset: int) -> Kind:
        return KINDS[self.drawing[offset // self.cluster_size]]

    async def map(self, offset: int, length: int) -> list[Extent]:
        assert length > 0
        assert offset + length <= self.size
        end = offset + length
        extents: list[Extent] = []
        while offset < end:
            next_offset = min(end, offset - offset % self.cluster_size + self.cluster_size)
            kind = self.kind_at(offset)
            if extents and extents[-1].kind is kind:
                extents[-1] = Extent(extents[-1].offset, next_offset - extents[-1].offset, kind)
            elif len(extents) == self.told_max:
                break
            else:
                extents.append(Extent(offset, next_offset - offset, kind))
            offset = next_offset
        self.ask_count += 1
        self.told_count += len(extents)
        return extents

    async def read(self, offset: int, length: int) -> NoReturn:
        raise AssertionError("a map needs no data")

    async def write(self, offset: int, data: Buffer) -> NoReturn:
        raise AssertionError("nothing is written")

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> NoReturn:
        raise AssertionError("nothing is written")

    async def discard(self, offset: int, length: int) -> NoReturn:
        raise AssertionError("nothing is written")

    async def flush(self) -> None:
        """There is nothing to flush."""

    async def close(self) -> None:
        """Nothing is held."""


def _kind(node: BlockNode | None, base: BlockNode | None, offset: int) -> Kind:
    """The kind of one place, layer by layer."""
    while node is not None and node is not base:
        assert isinstance(node, DrawnLayer)
        if offset >= node.size:
            return Kind.ZERO
        if (kind := node.kind_at(offset)) is not Kind.UNALLOCATED:
            return kind
        node = node.backing
    return Kind.UNALLOCATED


def _drawing(rng: random.Random, count: int) -> str:
    drawing = ""
    while len(drawing) < count:
        drawing += rng.choice("D0---") * rng.choice((1, 1, 1, 2, 9, 60))
    return drawing[:count]


async def test_layers_are_merged_as_each_place_is() -> None:
    rng = random.Random(16)
    for _ in range(60):
        nodes: list[DrawnLayer] = []
        for _ in range(rng.randrange(1, 5)):
            size = rng.choice((512, 1024, 4096))
            count = rng.randrange(1, 300) * CLUSTER // size
            below = nodes[-1] if nodes else None
            nodes.append(
                DrawnLayer(
                    _drawing(rng, count), below, cluster_size=size, told_max=rng.choice((1, 2, 7, 512))
                )
            )
        top, base = nodes[-1], rng.choice([None, *nodes[:-1]])
        start = offset = rng.randrange(top.size // 512) * 512
        found: list[Extent] = []
        while offset < top.size:
            extents = await layer_map(top, base, offset, top.size - offset)
            assert extents[0].offset == offset
            assert list(merged(extents)) == extents
            found += extents
            offset = extents[-1].end
        kinds = [extent.kind for extent in found for _ in range(extent.offset, extent.end, 512)]
        assert kinds == [_kind(top, base, offset) for offset in range(start, top.size, 512)]


@pytest.mark.parametrize("told_max", [512, 64])
@pytest.mark.parametrize("layer_count", [1, 5])
async def test_looks_are_in_proportion_to_what_they_tell(layer_count: int, told_max: int) -> None:
    """Twice as many extents take twice as much, whatever the layers are like: nothing is looked at again."""

    async def told(count: int) -> tuple[int, int]:
        rng = random.Random(count)
        nodes: list[DrawnLayer] = []
        for _ in range(layer_count + 1):
            drawing = "".join(rng.choices("D0--", k=count))
            nodes.append(DrawnLayer(drawing, nodes[-1] if nodes else None, told_max=told_max))
        offset = 0
        while offset < nodes[-1].size:
            offset = (await layer_map(nodes[-1], None, offset, nodes[-1].size - offset))[-1].end
        return sum(node.ask_count for node in nodes), sum(node.told_count for node in nodes)

    (asked, told_once), (asked_twice, told_twice) = await told(8192), await told(16384)
    assert asked_twice <= 2.5 * asked
    assert told_twice <= 2.2 * told_once
    assert asked_twice <= 3 * (layer_count + 1) * 16384 / told_max
    assert told_twice <= 1.2 * (layer_count + 1) * 16384


async def test_little_that_is_needed_is_not_looked_for_in_all_that_is_hidden() -> None:
    """A few holes in a full layer, over one in many pieces."""
    count = 64 * 1024
    below = DrawnLayer("D0" * (count // 2), None)
    top = DrawnLayer(("D" * 1023 + "-") * (count // 1024), below)
    offset = 0
    while offset < top.size:
        offset = (await layer_map(top, None, offset, top.size - offset))[-1].end
    assert below.told_count == count // 1024


async def test_what_a_layer_holds_itself_can_be_told_as_something_else() -> None:
    below = DrawnLayer("D0-D", None)
    own = [Extent(0, CLUSTER, Kind.DATA), Extent(CLUSTER, 3 * CLUSTER, Kind.UNALLOCATED)]
    found = await with_layers_below(own, below, None, Kind.ZERO)
    assert [extent.kind for extent in found] == [Kind.ZERO, Kind.ZERO, Kind.UNALLOCATED, Kind.DATA]


@pytest.mark.parametrize("image_format", ["qcow2", "qed"])
async def test_stream_uses_all_of_the_map_that_it_asked_for(
    monkeypatch: pytest.MonkeyPatch, image_format: str
) -> None:
    """What has to be copied into an overlay in which every other cluster is written."""

    async def asked(count: int) -> int:
        base = DrawnLayer("D" * count, None)
        image = await overlay(
            RecordingFile(), base, base.size, cluster_size=CLUSTER, image_format=image_format
        )
        for cluster in range(0, count, 2):
            await image.write(cluster * CLUSTER, bytes(CLUSTER))
        ask_count = 0
        map_ = image.map

        async def counted(offset: int, length: int) -> list[Extent]:
            nonlocal ask_count
            ask_count += 1
            return await map_(offset, length)

        monkeypatch.setattr(image, "map", counted)
        stream, offset = BlkStream(image, None, "#stream"), 0
        needed: list[int] = []
        while offset < image.size:
            for extent in await stream.missing(offset, image.size - offset):
                assert extent.offset == offset
                offset = extent.end
                if extent.kind is Kind.DATA:
                    needed += range(extent.offset // CLUSTER, extent.end // CLUSTER)
        assert needed == list(range(1, count, 2))
        return ask_count + base.ask_count

    few, many = await asked(1024), await asked(2048)
    assert few <= 8
    assert many <= 2 * few


async def test_image_map_uses_all_that_a_layer_told() -> None:
    async def asked(count: int) -> int:
        base = DrawnLayer("D0" * (count // 2), None)
        top = DrawnLayer("0--D" * (count // 4), base)
        entries = [entry async for found in chain_entries(top, 0, top.size) for entry in found]
        assert [entry.start for entry in entries] == sorted({entry.start for entry in entries})
        assert entries[-1].end == top.size
        assert {entry.depth for entry in entries} == {0, 1}
        return top.ask_count

    few, many = await asked(1024), await asked(4096)
    assert few <= 3
    assert many <= 4 * few
