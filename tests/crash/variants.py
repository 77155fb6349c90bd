"""Sweeps over qcow2 images that are not as blockd makes them by default.

The named workloads run on each variant. With extended L2 entries it is subclusters of 512 bytes that are
allocated, 32 to a cluster. Images with an internal snapshot have a sweep of their own: whatever happens to
the disk, the snapshot stays as it is.
"""

import random
import struct
import tempfile
from dataclasses import replace
from pathlib import Path

from blockd.block.root import Root
from blockd.formats.qcow2 import header as headers
from blockd.formats.qcow2.check import check
from tests import qemu_img
from tests.chains import read_all
from tests.crash.promises import Recorded
from tests.crash.scene import Scene
from tests.crash.workloads import (
    WORKLOADS,
    Workload,
    grow,
    rename_the_backing,
    reuse_freed_clusters,
    switch_and_stream,
    write_then_stream,
)
from tests.guest import Guest, RootDisk
from tests.inline_threads import use_inline_threads
from tests.model import ModelDisk
from tests.recording import RecordingFile
from tests.streaming import open_overlay

Options = tuple[tuple[str, object], ...]

EXTENDED_L2: Options = (("extended_l2", True), ("cluster_size", 32 * 512))
VARIANTS: dict[str, Options] = {
    "version 2": (("compat", "0.10"),),
    "1-bit refcounts": (("refcount_bits", 1),),
    "64-bit refcounts": (("refcount_bits", 64),),
    "extended L2": EXTENDED_L2,
}


async def write_across_clusters(scene: Scene) -> None:
    """Parts of clusters of 32 subclusters, new and used before, and what is zeroed and discarded of them."""
    await scene.write(30.5, 3)
    await scene.flush()
    await scene.write(29.25, 2.5)
    await scene.zero(31, 2)
    await scene.discard(3, 28)
    await scene.flush()
    await scene.write(31.5, 2)
    await scene.write(2.25, 0.5)
    await scene.zero(0, 34)
    await scene.flush()
    await scene.write(20, 20)
    await scene.flush()


async def fill_up_clusters(scene: Scene) -> None:
    """A stream copies what guests have left over of clusters."""
    await scene.write(3.5, 2)
    await scene.discard(30, 4)
    await scene.read(33, 2)
    await scene.stream_step()
    await scene.write(1.25, 3)
    await scene.flush()
    await scene.complete()
    await scene.zero(10, 30)


def _on(variant: str, workload: Workload) -> Workload:
    return replace(workload, options=VARIANTS[variant], variant=variant)


# What changes refcounts.
_ABOUT_REFCOUNTS = (write_then_stream, reuse_freed_clusters, grow, switch_and_stream)


def _is_for(variant: str, workload: Workload) -> bool:
    if variant.endswith("refcounts"):
        return workload.run in _ABOUT_REFCOUNTS
    # Header extensions are the same in every variant.
    return not workload.is_large and workload.run is not rename_the_backing


VARIANT_WORKLOADS = [
    *(_on(variant, workload) for variant in VARIANTS for workload in WORKLOADS if _is_for(variant, workload)),
    _on("extended L2", Workload(write_across_clusters, 44)),
    _on("extended L2", Workload(fill_up_clusters, 44)),
]


# -- internal snapshots -----------------------------------------------------------------------------

SNAPSHOT_OPTIONS: dict[str, tuple[str, ...]] = {
    "512-byte clusters": ("cluster_size=512",),
    "version 2, 1 KiB clusters": ("compat=0.10", "cluster_size=1k"),
    "extended L2": ("extended_l2=on", "cluster_size=16k"),
}


async def sweep_snapshot(*options: str) -> None:
    """What the disk shares with a snapshot is copied before it changes; the snapshot never does."""
    use_inline_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = qemu_img.create(Path(folder) / "i.qcow2", 20 * 1024, *options)
        qemu_img.write(path, "write -P 1 0 12k", "write -z 3k 2k")
        qemu_img.qemu("qemu-img", "snapshot", "-c", "s", path)
        qemu_img.write(path, "write -P 2 1k 1k")
        made, content = path.read_bytes(), qemu_img.content(path)
    snapshot = await _snapshot_content(made)
    assert snapshot != content
    recorded = Recorded(made, ModelDisk(content))
    image = await open_overlay(recorded.file, None)
    guest = Guest(RootDisk(Root(image)), recorded.model, random.Random(1), cluster_size=image.cluster_size)
    await _use(guest)
    await image.close()

    async def judged(file: RecordingFile) -> bytes:
        report = await check(file)
        assert not report.corruptions, report.findings
        assert await _snapshot_content(bytes(file.disk)) == snapshot
        return await read_all(await open_overlay(file, None, read_only=True))

    await recorded.judge(judged)


async def _use(guest: Guest) -> None:
    await guest.write(512, 2048)
    await guest.flush()
    await guest.write(600, 100)
    await guest.zero(4096, 4096)
    await guest.discard(8192, 2048)
    await guest.flush()
    await guest.read_all()
    await guest.write(0, 5 * 1024)
    await guest.write(15 * 1024, 4096)
    await guest.flush()


async def _snapshot_content(disk: bytes) -> bytes:
    """What the first snapshot in an image holds."""
    return await read_all(await open_overlay(RecordingFile(past_disk(disk)), None, read_only=True))


def past_disk(disk: bytes) -> bytes:
    """An image as it was at its first snapshot: with the L1 table and the size of that."""
    header = headers.parse(disk, "i")
    table = header.snapshots_offset
    l1_offset, l1_entry_count = struct.unpack_from(">QI", disk, table)
    past = bytearray(disk)
    struct.pack_into(">IQ", past, headers.L1_FIELDS, l1_entry_count, l1_offset)
    (extra_length,) = struct.unpack_from(">I", disk, table + 36)
    if extra_length >= 16:  # else it is as large as the disk
        past[headers.SIZE_FIELD : headers.SIZE_FIELD + 8] = disk[table + 48 : table + 56]
    return bytes(past)
