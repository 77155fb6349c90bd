"""Crashes while an image is made: there is none, or all of it."""

import random
from collections.abc import Mapping
from typing import Any

from blockd.errors import ImageError
from blockd.formats.qcow2.check import check
from blockd.formats.qcow2.create import create
from tests.chains import read_all
from tests.recording import RecordingFile, Timeline
from tests.streaming import open_overlay, overlay

SIZES = (4096, 8 << 20)
PREALLOCATED = (
    {"preallocation": "metadata", "compat": "0.10"},
    {"preallocation": "falloc", "refcount_bits": 1},
    {"preallocation": "full", "refcount_bits": 64},
)


async def sweep_creation() -> None:
    """Judge every crash while images are made.

    Raises:   AssertionError: an image is there by half, or not durable when it was said to be.
    """
    link = {"backing_filename": "base.raw", "backing_format": "raw"}
    for before in (b"", b"\xff" * 64 * 512, await _used_image()):
        for size in SIZES:
            await _sweep(before, size, link)
        for options in PREALLOCATED:
            await _sweep(before, SIZES[0], options)


async def _used_image() -> bytes:
    """A device that held an image until now, as large as a device."""
    file = RecordingFile()
    image = await overlay(file, None, 64 << 10, cluster_size=512)
    await image.write(0, b"old" * 8192)
    await image.close()
    return bytes(file.disk).ljust(256 << 10, b"\0")


async def _sweep(before: bytes, size: int, options: Mapping[str, Any]) -> None:
    """Until the old image is gone it may be there still, but whole."""
    file = RecordingFile(before)
    await create(file, size, cluster_size=512, **options)
    outcomes = set()
    for position, what, [disk] in Timeline([file]).states(random.Random(1), subset_count=4):
        state = RecordingFile(disk)
        try:
            report = await check(state)
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
