"""What options make of guests' requests leaves the same images with qemu-storage-daemon and with blockd."""

import json
from contextlib import suppress
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest

from blockd.units import KIB, MIB
from tests import qemu_img
from tests.differential.pair import blockd
from tests.programs import run
from tests.qmp_client import QmpClient
from tests.qsd import qsd

CLUSTER = 64 * KIB
DAEMONS = {"theirs": qsd, "blockd": blockd}
# How discard and detect-zeroes are set.
SETTINGS = [("unmap", "off"), ("ignore", "off"), ("ignore", "on"), ("unmap", "on"), ("unmap", "unmap")]
REQUESTS = (
    "write -P 7 0 1M",
    "write -P 0 64k 128k",  # clusters of zeroes
    "write -P 0 260k 8k",  # a part of one
    "write -P 0 512k 64k",
    "write -P 5 516k 4k",  # no zeroes any more
    "write -P 0 1M 128k",  # where nothing is
    "write -P 0 1288k 8k",
    "discard 640k 64k",
    "write -z -u 768k 64k",
    "write -z 896k 64k",
    "flush",
)


def stored(path: Path, image_format: str) -> list[tuple[Any, int]]:
    """What QEMU finds in an image, and how many clusters of it follow; of a raw one, what space it takes."""
    if image_format == "raw":
        return [("clusters", path.stat().st_blocks * 512 // CLUSTER)]
    extents = json.loads(qemu_img.qemu("qemu-img", "map", "--output=json", "-f", image_format, path))
    kinds = [
        (tuple(extent[name] for name in ("depth", "zero", "data")), extent["length"]) for extent in extents
    ]
    groups = groupby(kinds, key=itemgetter(0))
    return [(kind, sum(length for _, length in group) // CLUSTER) for kind, group in groups]


async def written(owner: str, folder: Path, image_format: str, options: dict[str, object]) -> Path:
    """Export an image of 2 MiB with some options, behind a throttle, and do the requests."""
    folder.mkdir()
    path = folder / "disk"
    (folder / "base").write_bytes(b"b" * (2 * MIB))
    backing = ("-b", "base", "-F", "raw") if image_format == "qcow2" else ()
    qemu_img.qemu("qemu-img", "create", "-q", "-f", image_format, *backing, path, "2M")
    file = {"driver": "file", "filename": str(path)}
    async with DAEMONS[owner](folder) as socket, await QmpClient.connect(socket) as client:
        await client.command("object-add", {"qom-type": "throttle-group", "id": "group"})
        image = {"driver": image_format, "file": file, **options}
        node = {"driver": "throttle", "throttle-group": "group", "node-name": "top", "file": image}
        await client.command("blockdev-add", {**node, "discard": "unmap"})
        address = {"type": "unix", "data": {"path": str(folder / "nbd")}}
        await client.command("nbd-server-start", {"addr": address})
        export = {"type": "nbd", "id": "e", "node-name": "top", "writable": True}
        await client.command("block-export-add", export)
        commands = [word for request in REQUESTS for word in ("-c", request)]
        await run("qemu-io", "-f", "raw", *commands, f"nbd+unix:///top?socket={folder / 'nbd'}")
        # QSD may be gone before its reply is read; that it has ended is waited for in any case.
        with suppress(ConnectionError):
            await client.command("quit")
    return path


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize(("discard", "detect"), SETTINGS)
async def test_the_images_are_the_same(image_format: str, discard: str, detect: str, tmp_path: Path) -> None:
    options: dict[str, object] = {"discard": discard, "detect-zeroes": detect}
    theirs, ours = [await written(owner, tmp_path / owner, image_format, options) for owner in DAEMONS]
    assert stored(ours, image_format) == stored(theirs, image_format)
    qemu_img.qemu("qemu-img", "compare", "-q", "-f", image_format, "-F", image_format, theirs, ours)
