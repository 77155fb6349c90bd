"""Files that another program makes larger or smaller while nobody here uses them."""

import os
from pathlib import Path

import pytest

from tests import qemu_img
from tests.control.running import refusal, running
from tests.iotests_ideas.nodes import Options, add, export, file, qcow2, throttle
from tests.qmp_client import QmpClient

SIZE = 1 << 20
PART_START = 4096
SIZES = pytest.mark.parametrize("size", [2 * SIZE, SIZE // 2])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "base.raw"
    path.write_bytes(b"b" * SIZE)
    return path


def raw(name: str, below: object, **more: object) -> Options:
    return qcow2(name, below, **more) | {"driver": "raw"}


def content(size: int) -> bytes:
    return (b"b" * SIZE)[:size] + bytes(max(0, size - SIZE))


async def add_with_group(client: QmpClient, *nodes: Options) -> None:
    await client.command("object-add", {"qom-type": "throttle-group", "id": "g"})
    await add(client, *nodes)


DISKS: dict[str, list[Options]] = {
    "raw": [raw("disk", "f")],
    "raw on a throttle": [throttle("t", "f", "g"), raw("disk", "t")],
    "throttle on raw": [raw("r", "f"), throttle("disk", "r", "g")],
    "the rest of a file": [raw("disk", "f", offset=PART_START)],
    "the file": [throttle("disk", "f", "g")],
}


@SIZES
@pytest.mark.parametrize("kind", DISKS)
async def test_the_disk_is_as_large_as_its_file_for_the_next_guest(path: Path, kind: str, size: int) -> None:
    start = PART_START if kind == "the rest of a file" else 0
    async with running(path.parent) as daemon:
        client = await daemon.qmp()
        await add_with_group(client, file(path, node_name="f"), *DISKS[kind])
        for _ in range(2):
            await export(client, "disk")
            await client.command("block-export-del", id="export-disk")
            os.truncate(path, size)
        await export(client, "disk")
        guest = await daemon.guest("disk")
        assert guest.size == size - start
        assert await guest.read(0, guest.size) == content(size)[start:]
        await guest.write(guest.size - 512, b"e" * 512)
        await guest.flush()
    assert path.read_bytes() == content(size)[:-512] + b"e" * 512


@SIZES
@pytest.mark.parametrize("how", ["snapshot", "inside an overlay"])
async def test_the_backing_is_as_large_as_its_file(path: Path, how: str, size: int) -> None:
    overlay = qemu_img.create(path.with_name("over.qcow2"), 2 * SIZE, backing=path, backing_format="raw")
    async with running(path.parent) as daemon:
        client = await daemon.qmp()
        await add(client, file(path, node_name="f"))
        if how == "snapshot":
            await add(client, raw("r", "f"), qcow2("over", overlay, backing=None))
            os.truncate(path, size)
            await client.command("blockdev-snapshot", node="r", overlay="over")
        else:
            os.truncate(path, size)
            backing = raw("r", "f", read_only=True)
            await add(client, qcow2("over", overlay, backing=backing))
        await export(client, "over")
        assert daemon.services.graph["r"].size == size
        assert await (await daemon.guest("over")).read(0, 2 * SIZE) == content(size).ljust(2 * SIZE, b"\0")


async def test_a_part_that_is_not_there_any_more_is_not_used(path: Path) -> None:
    async with running(path.parent) as daemon:
        client = await daemon.qmp()
        await add(client, file(path, node_name="f"), raw("disk", "f", offset=PART_START, size=SIZE // 2))
        os.truncate(path, SIZE // 2)
        for _ in range(2):
            arguments = {"type": "nbd", "id": "e", "node_name": "disk", "writable": True}
            _, text = await refusal(client, "block-export-add", **arguments)
            assert "has to be smaller or equal" in text
        os.truncate(path, SIZE)
        await export(client, "disk")
        assert (await daemon.guest("disk")).size == SIZE // 2
