"""Sweeps about what only QED images have: the need-check bit, repair, clusters larger than a buffer.

The named workloads of other formats run on QED images as well.
"""

import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

from blockd.formats.check_report import Repair
from blockd.formats.qed import fill, large_clusters, writes
from blockd.formats.qed import header as headers
from blockd.formats.qed.check import check
from blockd.formats.qed.header import Header
from blockd.formats.qed.image import QedImage
from blockd.formats.qed.repair import repair
from tests.chains import read_all
from tests.crash.creation import sweep_qed_creation
from tests.crash.judge import Judge
from tests.crash.promises import Recorded, Sweep
from tests.crash.scene import Scene
from tests.crash.workloads import WORKLOADS, Workload, detach, write_parts
from tests.inline_threads import use_inline_threads
from tests.model import ModelDisk, stamp
from tests.recording import RecordingFile, Timeline
from tests.streaming import overlay

CLUSTER = 4096
# Clusters that one table of one cluster maps.
TABLE_SPAN = CLUSTER // 8


async def write_across_qed_tables(scene: Scene) -> None:
    await scene.write(TABLE_SPAN - 1.5, 2)
    await scene.flush()
    await scene.zero(TABLE_SPAN - 1, 3)
    await scene.write(TABLE_SPAN + 4.5, 1)
    await scene.flush()


async def grow_into_another_table(scene: Scene) -> None:
    await scene.write(2.5, 0.25)
    await scene.resize(TABLE_SPAN + 5)
    await scene.write(TABLE_SPAN + 2, 2)
    await scene.flush()


async def write_without_a_backing(scene: Scene) -> None:
    """After the stream the image needs a check until it is closed."""
    await scene.complete()
    await scene.grow(4)
    await scene.write(scene.cluster_count + 0.5, 2)
    await scene.flush()
    await scene.close()
    await scene.zero(1, 2)
    await scene.write(scene.cluster_count + 3, 0.5)
    await scene.flush()


def _on_qed(workload: Workload) -> Workload:
    return replace(workload, cluster_size=CLUSTER, image_format="qed")


_SMALL_TABLES = (("table_size", 1),)
QED_WORKLOADS = [
    *(_on_qed(workload) for workload in WORKLOADS if workload.is_for_all),
    _on_qed(Workload(write_without_a_backing)),
    _on_qed(Workload(write_across_qed_tables, TABLE_SPAN + 8, options=_SMALL_TABLES)),
    _on_qed(Workload(grow_into_another_table, options=_SMALL_TABLES)),
]


@contextmanager
def small_buffers() -> Iterator[None]:
    """Let clusters of 16 KiB be too large to be held in memory whole."""
    with (
        patch.object(large_clusters, "BUFFER_LENGTH", CLUSTER),
        patch.object(writes, "BUFFER_LENGTH", CLUSTER),
        patch.object(fill, "BUFFER_LENGTH", CLUSTER),
    ):
        yield


async def sweep_large_clusters() -> None:
    """Clusters that are copied in pieces: with a guest's edges around its data, and by a stream."""
    with small_buffers():
        for run in (write_parts, detach):
            async with Scene(4 * CLUSTER, 8, image_format="qed").running() as scene:
                await run(scene)
                await scene.guest.read_all()
            await Judge(rerun_every=4).sweep(scene, subset_count=4)


# -- the need-check bit -----------------------------------------------------------------------------


async def sweep_need_check() -> None:
    """Without a backing file the bit is there whenever tables are not as a clean close left them."""
    use_inline_threads()
    made = RecordingFile()
    await (await _without_backing(made)).close()
    recorded = Recorded(bytes(made.disk), ModelDisk(bytes(16 * CLUSTER)))
    clean_counts = {0}
    for first in (1, 7):
        image = await QedImage.open(recorded.file, node_name="qed", read_only=False)
        await _use(image, recorded.model, first)
        durable = recorded.model.begin_flush()
        await image.close()
        recorded.model.finish_flush(durable)
        clean_counts.add((await check(recorded.file)).allocated_clusters)

    async def content(file: RecordingFile) -> bytes:
        report = await check(file)
        assert report.corruptions == 0
        assert report.is_dirty or report.allocated_clusters in clean_counts, (
            "the image does not ask for a check"
        )
        found = await read_all(await QedImage.open(file, node_name="qed", read_only=True))
        again = await QedImage.open(file, node_name="qed", read_only=False)
        assert await read_all(again) == found, "the check has changed something"
        assert not (await check(file)).is_dirty
        return found

    await recorded.judge(content)
    *_, (_, what, [disk]) = Timeline([recorded.file]).states(random.Random(1), subset_count=0)
    report = await check(RecordingFile(disk))
    assert (report.is_dirty, report.leaks) == (False, 0), what


async def _without_backing(file: RecordingFile) -> QedImage:
    image = await overlay(file, None, 16 * CLUSTER, cluster_size=CLUSTER, image_format="qed")
    assert isinstance(image, QedImage)
    return image


async def _use(image: QedImage, model: ModelDisk, first: int) -> None:
    for offset, length in ((first * CLUSTER + 512, 2 * CLUSTER), ((first + 4) * CLUSTER, 512)):
        data = model.new_data(offset, length)
        model.begin_write(offset, data)
        await image.write(offset, data)
        model.finish_write(offset, data)
        durable = model.begin_flush()
        await image.flush()
        model.finish_flush(durable)


# -- repair -----------------------------------------------------------------------------------------


async def damaged() -> bytes:
    """An image that a crash has left: entries name what is not there, clusters at the end nobody names."""
    file = RecordingFile()
    image = await _without_backing(file)
    await image.write(0, stamp(1, 0, 4 * CLUSTER))
    await image.close()
    disk = bytearray(file.disk)
    header = headers.parse(bytes(disk[:512]), "image")
    l2_offset = struct.unpack_from("<Q", disk, header.l1_offset)[0]
    disk.extend(bytes(3 * CLUSTER))
    _put(disk, l2_offset + 8 * 8, len(disk) + CLUSTER)  # behind the end
    _put(disk, l2_offset + 9 * 8, 3 * CLUSTER + 512)  # not aligned
    _put(disk, header.l1_offset + 3 * 8, len(disk) - CLUSTER)  # a table that is cut off
    _mark(disk, header)
    return bytes(disk)


def _put(disk: bytearray, offset: int, entry: int) -> None:
    struct.pack_into("<Q", disk, offset, entry)


def _mark(disk: bytearray, header: Header) -> None:
    _put(disk, headers.FEATURES_FIELD, header.features | headers.FEATURE_NEED_CHECK)


async def sweep_repair() -> None:
    """While an image is repaired it asks for a check until nothing is wrong with it any more."""
    use_inline_threads()
    before = await damaged()
    expected = await read_all(
        await QedImage.open(RecordingFile(before, "qed"), node_name="qed", read_only=False)
    )
    file = RecordingFile(before)
    await repair(file, Repair.ALL)
    outcomes = set()
    for position, what, [disk] in Timeline([file]).states(random.Random(1), subset_count=4):
        report = await check(RecordingFile(disk))
        is_clean = report.corruptions == 0
        assert is_clean or report.is_dirty, f"{what} at {position}: {report.findings}"
        if position == len(file.log):
            assert (is_clean, report.is_dirty, report.leaks) == (True, False, 0), what
        again = await QedImage.open(RecordingFile(disk), node_name="qed", read_only=False)
        assert await read_all(again) == expected
        outcomes.add(is_clean)
    assert outcomes == {True, False}


async def sweep_recovery() -> None:
    """An image that was opened for writing is durably repaired before anything is written to it."""
    use_inline_threads()
    file = RecordingFile(await damaged())
    await QedImage.open(file, node_name="qed", read_only=False)
    for position, what, [disk] in Timeline([file]).states(random.Random(1), subset_count=4):
        report = await check(RecordingFile(disk))
        assert report.corruptions == 0 or report.is_dirty, what
        if position == len(file.log):
            assert (report.corruptions, report.is_dirty) == (0, False), what


QED_SWEEPS: list[Sweep] = [
    sweep_need_check,
    sweep_repair,
    sweep_recovery,
    sweep_qed_creation,
]
