"""Zeroes in a part of a cluster leave what QEMU leaves: a zero cluster, if the rest of it reads as zeroes."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from blockd.drivers import NodeGraph
from tests import qemu_img

KIB = 1024
SIZE = 1024 * KIB + 3 * KIB
BACKINGS = ("raw", "qcow2")
# Options of qemu-img. Not QED: there QEMU stores zeroes as data more often than blockd does.
OVERLAYS = {
    "clusters of 64 KiB": "cluster_size=64k",
    "small clusters": "cluster_size=4k",
    "subclusters": "cluster_size=64k,extended_l2=on",
    "version 2": "cluster_size=64k,compat=0.10",
}


def make_base(path: Path, backing_format: str) -> None:
    """Data in a few places, holes elsewhere; it ends before the disk does."""
    qemu_img.qemu("qemu-img", "create", "-q", "-f", backing_format, path, "896k")
    qemu_img.write(
        path, *(f"write -P 7 {start}k 8k" for start in (0, 40, 200, 320, 452)), image_format=backing_format
    )


def what_is_there(path: Path) -> list[tuple[int, int, int, bool, bool]]:
    """All but where it is in the file."""
    extents: Any = json.loads(qemu_img.qemu("qemu-img", "map", "--output=json", "-f", "qcow2", path))
    return [
        tuple(extent[name] for name in ("start", "length", "depth", "zero", "data")) for extent in extents
    ]


@pytest.mark.parametrize("backing", BACKINGS)
@pytest.mark.parametrize("name", OVERLAYS)
async def test_it_is_as_with_qemu(name: str, backing: str, tmp_path: Path) -> None:
    make_base(tmp_path / f"base.{backing}", backing)
    theirs, ours = (tmp_path / f"{owner}.img" for owner in ("theirs", "ours"))
    link = ("-b", f"base.{backing}", "-F", backing)
    qemu_img.qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", OVERLAYS[name], *link, theirs, str(SIZE))
    qemu_img.write(theirs, "write -P 1 640k 4k", "write -z 704k 64k")
    shutil.copy(theirs, ours)
    rng = random.Random(name + backing)
    commands = [zeroes(rng) for _ in range(24)]
    qemu_img.write(theirs, *(f"write -z {start} {length}" for start, length in commands))
    graph = NodeGraph()
    image = await graph.open_image(str(ours), "qcow2", read_only=False)
    for start, length in commands:
        await image.write_zeroes(start, length, unmap=False)
    await graph.close()
    assert what_is_there(ours) == what_is_there(theirs)
    qemu_img.qemu("qemu-img", "compare", "-q", "-f", "qcow2", "-F", "qcow2", theirs, ours)
    qemu_img.qemu("qemu-img", "check", "-q", "-f", "qcow2", ours)


def zeroes(rng: random.Random) -> tuple[int, int]:
    """Start and length: mostly a part of one cluster."""
    length = rng.choice((512, 2 * KIB, 8 * KIB, 30 * KIB, 100 * KIB))
    start = rng.choice((rng.randrange(0, SIZE, 512), rng.randrange(0, SIZE, 32 * KIB), SIZE - length))
    return start, min(length, SIZE - start)
