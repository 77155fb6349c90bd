"""Copies of many small ranges at once: into overlays that were written here and there before."""

import asyncio
import random
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from blockd.block.chain import plan_below
from blockd.block.node import BlockNode, FillCounts, OverlayNode, Segment
from blockd.block.segments import read_segments
from blockd.extents import Extent, Kind
from blockd.filters.blkstream import BlkStream
from blockd.formats.qcow2.image import Qcow2Image
from blockd.formats.raw.image import RawImage
from blockd.jobs import stream as stream_module
from blockd.range_lock import RangeLock
from tests.chains import read_all
from tests.doubles import HeldNode
from tests.inline_threads import steps
from tests.model import ModelDisk, cluster, drawn
from tests.recording import RecordingFile
from tests.streaming import Streaming, check, open_overlay, overlay, streaming

CLUSTER = 4096
FORMATS = ["qcow2", "extended L2", "qed", "add-cow"]


async def used_overlay(
    file: RecordingFile, below: BlockNode, drawing: str, image_format: str = "qcow2"
) -> OverlayNode:
    """An overlay whose clusters (with extended L2 entries subclusters) are written as drawn."""
    is_extended = image_format == "extended L2"
    cluster_size = 32 * CLUSTER if is_extended else CLUSTER
    options: dict[str, Any] = {"extended_l2": True} if is_extended else {"image_format": image_format}
    if image_format == "add-cow":
        file.beside = RecordingFile(name="data")
    image = await overlay(file, below, len(drawing) * CLUSTER, cluster_size=cluster_size, **options)
    for index, kind in enumerate(drawing):
        offset = index * CLUSTER
        if kind == "0":
            await image.write_zeroes(offset, CLUSTER)
        elif kind != "-":
            await image.write(offset, cluster(kind, index, CLUSTER))
    await image.flush()
    return image


async def raw_base(content: bytes) -> BlockNode:
    return await RawImage.open(RecordingFile(content, "base.raw"), node_name="base", read_only=True)


def drawing_of(rng: random.Random, kinds: str, count: int) -> str:
    """Stretches of all lengths, most of them short."""
    drawing = ""
    while len(drawing) < count:
        drawing += rng.choice(kinds) * rng.choice((1, 1, 1, 2, 3, 17))
    return drawing[:count]


class CountedFills:
    """How often an image is filled, and in how many ranges."""

    def __init__(self, image: OverlayNode, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fill_count = self.range_count = 0
        fill = image.fill

        async def counted(ranges: list[tuple[int, int]], *arguments: object, **options: object) -> FillCounts:
            self.fill_count += 1
            self.range_count += len(ranges)
            return await fill(ranges, *arguments, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(image, "fill", counted)


@pytest.mark.parametrize("image_format", FORMATS)
async def test_used_overlay_is_filled_up(image_format: str) -> None:
    rng = random.Random(16)
    for count in (1, 33, 700):
        layers = [drawing_of(rng, "AB0", count), drawing_of(rng, "CD-0", count)]
        file = RecordingFile()
        image = await used_overlay(file, await raw_base(drawn(layers[:1], CLUSTER)), layers[1], image_format)
        async with streaming(image) as disk:
            job = await disk.start()
            await job.wait_ended()
            assert job.error is None
        report = await check(file.again())
        assert (report.corruptions, report.leaks) == (0, 0), report.findings
        alone = await open_overlay(file.again(), None, read_only=True)
        assert await read_all(alone) == drawn(layers, CLUSTER)


@pytest.mark.parametrize("image_format", FORMATS)
async def test_many_small_ranges_are_few_copies(monkeypatch: pytest.MonkeyPatch, image_format: str) -> None:
    """Twice as many ranges take twice as many copies: as many as their length asks for, not their number."""

    async def fills(count: int) -> tuple[int, int, int]:
        base = await raw_base(drawn(["A" * count], CLUSTER))
        image = await used_overlay(RecordingFile(), base, "B-" * (count // 2), image_format)
        fills = CountedFills(image, monkeypatch)
        async with streaming(image) as disk:
            job = await disk.start()
            await job.wait_ended()
        assert job.error is None
        assert job.counters.copied == count // 2 * CLUSTER
        return fills.fill_count, fills.range_count, job.counters.copied

    (few, few_ranges, _), (many, many_ranges, _) = await fills(512), await fills(2048)
    assert (few_ranges, many_ranges) == (256, 1024)
    assert few <= 2
    assert many <= 4 * few


async def test_what_is_between_the_ranges_is_not_copied() -> None:
    """Down to a base: what is the base's stays there, also between what is not."""
    rng = random.Random(17)
    layers = [drawing_of(rng, kinds, 400) for kinds in ("AB0", "C-", "D--")]
    base = await raw_base(drawn(layers[:1], CLUSTER))
    middle = await used_overlay(RecordingFile(name="middle"), base, layers[1])
    middle.read_only = True
    active = await used_overlay(RecordingFile(), middle, layers[2])
    async with streaming(active) as disk:
        job = await disk.start(base)
        await job.wait_ended()
        assert job.error is None
    offset, kinds = 0, ""
    while offset < active.size:
        for extent in await active.map(offset, active.size - offset):
            kinds += {Kind.DATA: "D", Kind.UNALLOCATED: "-", Kind.ZERO: "0"}[extent.kind] * (
                extent.length // CLUSTER
            )
            offset = extent.end
    both = zip(layers[2], layers[1], strict=True)
    assert kinds == "".join("-" if over == under == "-" else "D" for over, under in both)
    assert await read_all(active) == drawn(layers, CLUSTER)


# -- guests beside a copy of many ranges ------------------------------------------------------------


class Scene:
    """A copy of clusters 1, 3, 5 and 7; the others are the image's own."""

    def __init__(self, disk: Streaming, node: BlkStream, source: HeldNode) -> None:
        self.disk, self.node, self.source = disk, node, source
        self.model = ModelDisk(drawn(["AAAAAAAA", "B-B-B-B-"], CLUSTER))

    async def write(self, offset: int, length: int) -> None:
        data = self.model.new_data(offset, length)
        self.model.begin_write(offset, data)
        await self.node.write(offset, data)
        self.model.finish_write(offset, data)

    async def map(self) -> str:
        extents: list[Extent] = await self.disk.active.map(0, self.disk.active.size)
        return "".join(
            ("D" if extent.kind is Kind.DATA else "-") * (extent.length // CLUSTER) for extent in extents
        )


@asynccontextmanager
async def copy_of_every_other(image_format: str) -> AsyncIterator[Scene]:
    """The copy has asked its source and waits for the answer; it is over after the block."""
    source = HeldNode(await raw_base(drawn(["A" * 8], CLUSTER)))
    file = RecordingFile()
    active = await used_overlay(file, source, "B-B-B-B-", image_format)
    for each in (file, file.beside):
        if each is not None:
            each.is_slow = True  # no write is answered at once
    node = BlkStream(active, None, "#filter")
    async with streaming(active) as disk:
        disk.root.replace(node)
        scene = Scene(disk, node, source)
        source.hold()
        async with asyncio.TaskGroup() as tasks:
            ranges = [(index * CLUSTER, (index + 1) * CLUSTER) for index in (1, 3, 5, 7)]
            copy = tasks.create_task(node.populate(ranges))
            await source.reached.wait()
            yield scene
            source.release()
            await copy
        assert await scene.map() == "DDDDDDDD"
        scene.model.check_read(0, await read_all(node))


@pytest.mark.parametrize("image_format", ["qcow2", "qed", "add-cow"])
async def test_guest_writes_between_the_ranges_without_waiting(image_format: str) -> None:
    async with copy_of_every_other(image_format) as scene:
        await scene.write(2 * CLUSTER, CLUSTER)
        await scene.write(4 * CLUSTER + 512, 512)


@pytest.mark.parametrize("image_format", ["qcow2", "qed", "add-cow"])
async def test_guest_write_cancels_only_the_clusters_that_it_covers(image_format: str) -> None:
    async with copy_of_every_other(image_format) as scene:
        await scene.write(3 * CLUSTER, CLUSTER)
        await scene.write(4 * CLUSTER, 2 * CLUSTER)


@pytest.mark.parametrize("image_format", ["qcow2", "qed", "add-cow"])
async def test_guest_write_to_a_part_of_what_is_copied_waits_for_it(image_format: str) -> None:
    async with copy_of_every_other(image_format) as scene, asyncio.TaskGroup() as tasks:
        write = tasks.create_task(scene.write(2 * CLUSTER, CLUSTER + 512))
        await steps(20)
        assert not write.done()
        scene.source.release()


async def test_guest_makes_fragments_while_the_stream_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes single clusters, whole and in part, just ahead of the copies and into them."""
    monkeypatch.setattr(stream_module, "COPY_LENGTH", 16 * CLUSTER)
    count = 600
    rng = random.Random(18)
    content = drawn([drawing_of(rng, "ABC0", count)], CLUSTER)
    file = RecordingFile()
    image = await used_overlay(file, await raw_base(content), "-" * count)
    file.is_slow = True
    model = ModelDisk(content)
    async with streaming(image) as disk:
        job = await disk.start()
        while job.offset < job.length and job.error is None:
            index = min(count - 1, job.offset // CLUSTER + rng.randrange(40))
            offset, length = index * CLUSTER, rng.choice((512, CLUSTER, CLUSTER, 1024))
            data = model.new_data(offset, length)
            async with disk.root.request() as node:
                model.begin_write(offset, data)
                await node.write(offset, data)
                model.finish_write(offset, data)
            await steps(rng.randrange(3))
        await job.wait_ended()
        assert job.error is None
        await image.flush()
    report = await check(file.again())
    assert (report.corruptions, report.leaks) == (0, 0), report.findings
    model.check_read(0, await read_all(await open_overlay(file.again(), None, read_only=True)))


# -- ranges held together ---------------------------------------------------------------------------


async def test_ranges_held_together_leave_out_what_is_between_them() -> None:
    lock = RangeLock()
    async with lock.held_together([(0, 2), (6, 8)]):
        assert lock.overlaps(1, 7)
        assert not lock.overlaps(2, 6)
        async with lock.held(3, 5):
            assert lock.overlaps(0, 4)
        waiting = asyncio.ensure_future(lock.wait(7, 9))
        await steps(2)
        assert not waiting.done()
    await waiting
    assert not lock


async def test_ranges_are_had_all_at_once() -> None:
    lock = RangeLock()

    async def hold(*ranges: tuple[int, int]) -> None:
        async with lock.held_together(ranges):
            await steps(1)

    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        for _ in range(3):
            tasks.create_task(hold((0, 1), (4, 5)))
            tasks.create_task(hold((2, 3), (4, 6)))
            tasks.create_task(hold((0, 3)))
    assert not lock


async def test_where_many_ranges_of_a_chain_are_stored_is_found_by_one_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where there are more pieces than ranges, and with as much between them as a copy may pass over."""
    rng, count = random.Random(7), 1024
    drawings = [drawing_of(rng, kinds, count) for kinds in ("C-", "D-", "A---")]
    node: BlockNode = await raw_base(drawn("B" * count, CLUSTER))
    for drawing in drawings:
        node = await used_overlay(RecordingFile(), node, drawing)
    assert isinstance(node, OverlayNode)
    content = await read_all(node)
    empty = [(run.start() * CLUSTER, run.end() * CLUSTER) for run in re.finditer("-+", drawings[-1])]
    ranges = empty[::2]
    looks: list[int] = []
    plan_read = Qcow2Image.plan_read

    async def counted(self: Qcow2Image, offset: int, length: int) -> list[Segment]:
        looks.append(offset)
        return await plan_read(self, offset, length)

    monkeypatch.setattr(Qcow2Image, "plan_read", counted)
    source = await plan_below(node, ranges)
    assert len(source.gathered(ranges).segments) > len(ranges) > 16
    assert len(looks) == 1
    for start, end in ranges:
        segments = source.part(start, end)
        assert bytes(await read_segments(segments, end - start)) == content[start:end]
