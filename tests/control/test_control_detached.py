"""blockdev-reopen takes the backing from a running disk and gives it back; zeroes of guests stay zeroes."""

import asyncio
from pathlib import Path

import pytest

from blockd.protocols.nbd_client import NbdClient
from blockd.units import KIB, SECTOR_SIZE
from tests import qemu_img
from tests.conftest import StartDaemon
from tests.daemon_process import DaemonProcess
from tests.qmp_client import QmpClient

CLUSTER = 64 * KIB
COUNT = 12
SIZE = COUNT * CLUSTER
FORMATS = {
    "qcow2": ("qcow2", "cluster_size=64k"),
    "extended L2": ("qcow2", "cluster_size=64k,extended_l2=on"),
    "QED": ("qed", "cluster_size=64k"),
}
# What guests zero, beginning where the disk has nothing of its own, but for DATA.
RANGES = {
    "whole clusters": (CLUSTER, 2 * CLUSTER),
    "a part": (4 * CLUSTER + 4096, 8192),
    "across": (5 * CLUSTER + 32 * KIB, CLUSTER),
    "data": (8 * CLUSTER, CLUSTER),
    "the end": (SIZE - 4096, 4096),
}
DATA = RANGES["data"]


class Disk:
    """A disk in a daemon, its guest, and what is to be read there with its backing."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.format, options = FORMATS[kind]
        self.base, self.image = folder / "base.raw", folder / f"disk.{self.format}"
        self.content = bytearray(b"base" * (SIZE // 4))
        self.base.write_bytes(self.content)
        link = ("-b", self.base, "-F", "raw")
        qemu_img.qemu("qemu-img", "create", "-q", "-f", self.format, "-o", options, *link, self.image)
        offset, length = DATA
        qemu_img.write(self.image, f"write -P 7 {offset} {length}", image_format=self.format)
        self.content[offset : offset + length] = bytes([7]) * length
        # Of these clusters a part was written while the backing was away: the rest was zeroes then, and may
        # be either from then on.
        self.partly_written: set[int] = set()
        self.daemon: DaemonProcess
        self.qmp: QmpClient
        self.guest: NbdClient

    async def start(self, start_daemon: StartDaemon) -> None:
        self.daemon = await start_daemon()
        self.qmp = await self.daemon.qmp()
        base = {"driver": "file", "filename": str(self.base)}
        below = {"driver": "raw", "node-name": "base", "read-only": True, "file": base}
        await self.qmp.command("blockdev-add", below)
        file = {"driver": "file", "node-name": "file", "filename": str(self.image)}
        await self.qmp.command("blockdev-add", file)
        await self.qmp.command("blockdev-add", self._options("base"))
        export = {"type": "nbd", "id": "e", "node-name": "disk", "writable": True}
        await self.qmp.command("block-export-add", export)
        self.guest = await NbdClient.connect_unix(str(self.daemon.nbd_path), "disk")

    def _options(self, backing: str | None) -> dict[str, object]:
        return {"driver": self.format, "node-name": "disk", "file": "file", "backing": backing}

    async def reopen(self, backing: str | None) -> None:
        await self.qmp.command("blockdev-reopen", options=[self._options(backing)])

    async def zero(self, offset: int, length: int, *, no_hole: bool) -> None:
        await self.guest.write_zeroes(offset, length, no_hole=no_hole)
        self._note(offset, bytes(length))

    async def write(self, offset: int, data: bytes) -> None:
        await self.guest.write(offset, data)
        self._note(offset, data)

    def _note(self, offset: int, data: bytes) -> None:
        end = offset + len(data)
        self.content[offset:end] = data
        for cluster in (offset // CLUSTER, (end - 1) // CLUSTER):
            if offset > cluster * CLUSTER or end < (cluster + 1) * CLUSTER:
                self.partly_written.add(cluster)

    async def assert_right(self) -> None:
        found = bytes(await self.guest.read(0, SIZE))
        for cluster in self.partly_written:
            for at in range(cluster * CLUSTER, (cluster + 1) * CLUSTER, SECTOR_SIZE):
                if not any(found[at : at + SECTOR_SIZE]):
                    self.content[at : at + SECTOR_SIZE] = bytes(SECTOR_SIZE)
        assert found == self.content

    async def stop(self) -> None:
        await self.guest.disconnect()
        assert await self.daemon.stop() == 0
        assert qemu_img.content(self.image, self.format) == self.content
        qemu_img.assert_sound(self.image, self.format)


@pytest.fixture(params=list(FORMATS))
async def disk(request: pytest.FixtureRequest, tmp_path: Path, start_daemon: StartDaemon) -> Disk:
    disk = Disk(tmp_path, request.param)
    await disk.start(start_daemon)
    return disk


@pytest.mark.parametrize("no_hole", [False, True])
async def test_zeroes_written_while_the_backing_is_away(disk: Disk, no_hole: bool) -> None:
    await disk.assert_right()
    await disk.reopen(None)
    for offset, length in RANGES.values():
        await disk.zero(offset, length, no_hole=no_hole)
    offset, _ = RANGES["whole clusters"]
    assert bytes(await disk.guest.read(0, offset)) == bytes(offset), "nothing shows from below"
    await disk.reopen("base")
    await disk.assert_right()
    await disk.stop()


async def test_data_and_discards_while_the_backing_is_away(disk: Disk) -> None:
    """What is discarded reads as zeroes, and nothing of the backing comes up there later."""
    await disk.reopen(None)
    await disk.write(2 * CLUSTER + 4096, b"guest---" * 64)
    offset, length = DATA
    await disk.guest.trim(offset, length)
    assert bytes(await disk.guest.read(offset, length)) == bytes(length)
    disk.content[offset : offset + length] = bytes(length)
    await disk.reopen("base")
    await disk.assert_right()
    await disk.stop()


async def test_zeroes_at_every_moment_of_detaching_and_attaching(disk: Disk) -> None:
    """The guest goes on while the backing goes and comes back."""

    async def make_zero() -> None:
        for number in range(0, SIZE // 4096, 2):
            await disk.zero(number * 4096, 4096, no_hole=bool(number % 3))

    zeroing = asyncio.create_task(make_zero())
    while not zeroing.done():
        await disk.reopen(None)
        await disk.reopen("base")
    await zeroing
    await disk.assert_right()
    await disk.stop()
