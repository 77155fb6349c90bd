"""Crashes while an image is made: there is none, or all of it."""

import random
from collections.abc import Mapping
from typing import Any

from blockd.drivers import FORMATS
from blockd.errors import ImageError
from tests.chains import read_all
from tests.recording import RecordingFile, Timeline
from tests.streaming import open_overlay, overlay

LARGE_SIZE = 8 << 20
PREALLOCATED = (
    {"preallocation": "metadata", "compat": "0.10"},
    {"preallocation": "falloc", "refcount_bits": 1},
    {"preallocation": "full", "refcount_bits": 64},
)
# Longer than a sector, so that it cannot be replaced at once.
LONG_NAME = "folder/" * 80 + "base.raw"


async def sweep_creation() -> None:
    """Judge every crash while qcow2 images are made.

    Raises:   AssertionError: an image is there by half, or not durable when it was said to be.
    """
    await _sweep_format("qcow2", 512, "base.raw", PREALLOCATED)


async def sweep_qed_creation() -> None:
    """The same of QED images, which keep the name outside the sector that makes them an image."""
    await _sweep_format("qed", 4096, LONG_NAME, ())


async def _sweep_format(
    image_format: str, cluster_size: int, backing_name: str, variants: tuple[dict[str, Any], ...]
) -> None:
    size = 8 * cluster_size
    link = {"backing_filename": backing_name, "backing_format": "raw"}
    for before in (b"", b"\xff" * 64 * 512, await _used_image(image_format, cluster_size)):
        for disk_size, options in [(size, link), (LARGE_SIZE, link), *((size, more) for more in variants)]:
            await _sweep(before, disk_size, image_format, {"cluster_size": cluster_size, **options})


async def _used_image(image_format: str, cluster_size: int) -> bytes:
    """A device that held an image until now, as large as a device."""
    file = RecordingFile()
    image = await overlay(file, None, 64 << 10, cluster_size=cluster_size, image_format=image_format)
    await image.write(0, b"old" * 8192)
    await image.close()
    return bytes(file.disk).ljust(256 << 10, b"\0")


async def _sweep(before: bytes, size: int, image_format: str, options: Mapping[str, Any]) -> None:
    """Until the old image is gone it may be there still, but whole."""
    file = RecordingFile(before)
    entry = FORMATS[image_format]
    assert entry.check is not None
    await entry.create(file, size, **options)
    outcomes = set()
    for position, what, [disk] in Timeline([file]).states(random.Random(1), subset_count=4):
        state = RecordingFile(disk)
        try:
            report = await entry.check(state)
        except ImageError:
            outcomes.add("no image")
            assert position < len(file.log), "what was created is not durable"
            continue
        if disk == before:
            continue
        outcomes.add("image")
        assert (report.corruptions, report.leaks) == (0, 0), f"{what} at {position}: {report.findings}"
        image = await open_overlay(state, None, read_only=True)
        link = (options.get("backing_filename"), options.get("backing_format"))
        assert (image.size, image.backing_filename, image.backing_format) == (size, *link)
        assert await read_all(image) == bytes(size)
    assert outcomes == {"no image", "image"}
