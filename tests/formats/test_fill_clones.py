"""What fills clone into images of each format, what they copy, and that it is the same bytes."""

import random
import threading
from collections.abc import Callable
from typing import NamedTuple

import pytest

from blockd.block import copy_memory as memory_module
from blockd.block.node import BlockNode, FillCounts, IsWanted, OverlayNode, ProtocolNode
from blockd.block.segments import SourcePlan
from blockd.filters.fault_rules import FaultRules
from blockd.filters.faults import FaultsNode
from blockd.formats import copying
from blockd.formats.raw.image import RawImage
from blockd.formats.raw.target import RawTarget
from blockd.units import KIB
from tests.chains import read_all
from tests.doubles import HeldNode
from tests.recording import CloningFile, RecordingFile
from tests.streaming import open_overlay, overlay

CLUSTER = 64 * KIB
CLUSTER_COUNT = 7
# The last cluster is not whole.
SIZE = CLUSTER_COUNT * CLUSTER - 512
WHOLE = (CLUSTER_COUNT - 1) * CLUSTER
CONTENT = random.Random(1).randbytes(SIZE)

FORMATS = ["qcow2", "extended L2", "qed", "add-cow", "raw"]
every_format = pytest.mark.parametrize("image_format", FORMATS)


class Filled(NamedTuple):
    """An image, and the file that its data goes to."""

    image: OverlayNode
    file: CloningFile

    async def fill(self, is_wanted: IsWanted = lambda *_: True, *, keep_cached: bool = False) -> FillCounts:
        plan = await self.image.plan_read(0, SIZE)
        return await self.image.fill([(0, SIZE)], SourcePlan(0, plan), is_wanted, keep_cached=keep_cached)

    async def own_content(self) -> bytes:
        self.image.backing = None
        return await read_all(self.image)


async def make(image_format: str, base: BlockNode) -> Filled:
    """An empty image over `base`."""
    file = CloningFile(name="active")
    if image_format == "raw":
        file.truncate_blocking(SIZE)
        return Filled(RawTarget(file, base, node_name="active"), file)
    if image_format == "extended L2":
        image = await overlay(file, base, SIZE, cluster_size=32 * CLUSTER, extended_l2=True)
        return Filled(image, file)
    head = file
    if image_format == "add-cow":
        head = CloningFile(name="active.add-cow")
        head.beside = file
    return Filled(await overlay(head, base, SIZE, cluster_size=CLUSTER, image_format=image_format), file)


async def raw_base(content: bytes = CONTENT) -> BlockNode:
    return await RawImage.open(RecordingFile(content, "base.raw"), node_name="base", read_only=True)


@every_format
async def test_whole_clusters_are_cloned(image_format: str) -> None:
    image, file = filled = await make(image_format, await raw_base())
    counts = await filled.fill()
    assert file.cloned_bytes == WHOLE
    assert counts in (FillCounts(SIZE, 0, 0), FillCounts(CLUSTER_COUNT * CLUSTER, 0, 0))
    await image.flush()
    assert await filled.own_content() == CONTENT


@every_format
async def test_clones_that_fail_are_copied(image_format: str) -> None:
    image, file = filled = await make(image_format, await raw_base())
    file.is_failing = True
    await filled.fill()
    assert file.cloned_bytes == 0
    await image.flush()
    assert await filled.own_content() == CONTENT


@every_format
async def test_what_the_guest_is_about_to_read_is_copied(image_format: str) -> None:
    """Cloned, it would not be in the page cache."""
    _, file = filled = await make(image_format, await raw_base())
    await filled.fill(keep_cached=True)
    assert file.cloned_bytes == 0
    assert await filled.own_content() == CONTENT


@pytest.mark.parametrize("image_format", [name for name in FORMATS if name != "raw"])
async def test_clusters_that_got_content_meanwhile_stay(image_format: str) -> None:
    image, file = filled = await make(image_format, await raw_base())
    await image.write(2 * CLUSTER, b"g" * CLUSTER)
    await filled.fill(lambda start, end: not start <= 4 * CLUSTER < end)
    expected = bytearray(CONTENT)
    expected[2 * CLUSTER : 3 * CLUSTER] = b"g" * CLUSTER
    assert await read_all(image) == expected
    await image.write(4 * CLUSTER, b"h" * CLUSTER)
    expected[4 * CLUSTER : 5 * CLUSTER] = b"h" * CLUSTER
    await filled.fill()
    assert await filled.own_content() == expected
    assert file.cloned_bytes > 0


async def small_base(cluster_size: int, ranges: list[tuple[int, int]]) -> BlockNode:
    """A base that holds these ranges alone, each in one piece, in this order."""
    file = RecordingFile(name="base.qcow2")
    image = await overlay(file, None, SIZE, cluster_size=cluster_size)
    for start, end in ranges:
        await image.write(start, CONTENT[start:end])
    await image.flush()
    return await open_overlay(file, None, read_only=True)


async def test_segments_that_are_not_whole_clusters_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base in small clusters: its data covers one of the image's, a part of one, and one in two pieces."""
    monkeypatch.setattr(copying, "CLONE_LENGTH_MIN", 0)
    half = 4 * CLUSTER + CLUSTER // 2
    ranges = [(CLUSTER, 2 * CLUSTER), (0, CLUSTER // 2), (half, 5 * CLUSTER), (4 * CLUSTER, half)]
    base = await small_base(4 * KIB, ranges)
    _, file = filled = await make("qcow2", base)
    await filled.fill()
    assert file.cloned_bytes == CLUSTER
    assert await filled.own_content() == await read_all(base)


async def test_short_runs_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "CLONE_LENGTH_MIN", 2 * CLUSTER)
    base = await small_base(CLUSTER, [(0, 2 * CLUSTER), (3 * CLUSTER, 4 * CLUSTER)])
    _, file = filled = await make("qcow2", base)
    await filled.fill()
    assert file.cloned_bytes == 2 * CLUSTER
    assert await filled.own_content() == await read_all(base)


def before_the_file(base: BlockNode) -> BlockNode:
    file = base.children()["file"]
    assert isinstance(file, ProtocolNode)
    faults = FaultsNode(file, FaultRules(), node_name="faults")
    return RawImage(faults, node_name="base", read_only=True)


@pytest.mark.parametrize("put", [before_the_file, HeldNode])
@every_format
async def test_what_is_between_sees_every_byte(
    image_format: str, put: Callable[[BlockNode], BlockNode]
) -> None:
    _, file = filled = await make(image_format, put(await raw_base()))
    await filled.fill()
    assert file.cloned_bytes == 0
    assert await filled.own_content() == CONTENT


async def test_nothing_is_cloned_past_what_is_in_front_of_the_target() -> None:
    file = CloningFile()
    base = await raw_base()
    image = await overlay(
        FaultsNode(file, FaultRules(), node_name="faults"), base, SIZE, cluster_size=CLUSTER
    )
    filled = Filled(image, file)
    await filled.fill()
    assert file.cloned_bytes == 0
    assert await filled.own_content() == CONTENT


@every_format
async def test_the_loop_does_not_wait_for_memory(image_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory takes milliseconds, and longer when another copy gets some."""
    makers: set[threading.Thread] = set()
    new_buffer = memory_module._new_buffer

    def watched(length: int) -> memoryview:
        makers.add(threading.current_thread())
        return new_buffer(length)

    monkeypatch.setattr(memory_module, "_new_buffer", watched)
    monkeypatch.setattr(memory_module.copy_memory, "_free", [])
    await (await make(image_format, await raw_base())).fill(keep_cached=True)
    assert makers
    assert threading.main_thread() not in makers
