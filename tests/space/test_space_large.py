"""A real image that is too large to be looked through at opening: its leaks are free a while later."""

import asyncio
import random
from pathlib import Path

import pytest

from blockd.protocols.file import FileNode
from blockd.protocols.nbd_client import NbdClient
from blockd.units import GIB, KIB, MIB
from tests import qemu_img
from tests.daemon_process import DaemonProcess
from tests.planted_leaks import plant_leaks
from tests.space.drawing import Space

pytestmark = pytest.mark.slow

# In clusters of 64 KiB; all of it is allocated, and nearly all of it is a hole in the file.
SIZE = 520 * GIB
LENGTH = 64 * KIB


async def write(daemon: DaemonProcess) -> None:
    """Write all the time, in one place after the other."""
    async with await NbdClient.connect_unix(str(daemon.nbd_path), "vda") as guest:
        for number in range(1 << 20):
            offset = number % 16 * (SIZE // 16)
            await guest.write(offset, b"\7" * LENGTH)
            await guest.flush()


async def test_it_is_looked_through_beside_a_guest(tmp_path: Path) -> None:
    path = tmp_path / "large.qcow2"
    qemu_img.qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", path, str(SIZE))
    file = await FileNode.open(str(path), node_name="file", read_only=False)
    count = plant_leaks(file, random.Random(1))
    await file.close()
    assert Space.of(path, "qcow2").leaks == count > 0
    async with DaemonProcess(tmp_path, "--device", f"vda={path}") as daemon:
        async with await NbdClient.connect_unix(str(daemon.nbd_path), "vda") as guest:
            assert await guest.read(0, MIB) == bytes(MIB)
        writing = asyncio.create_task(write(daemon))
        while (await asyncio.to_thread(Space.of, path, "qcow2")).leaks:
            pass
        writing.cancel()
        await asyncio.wait([writing])
        await daemon.stop()
    assert Space.of(path, "qcow2").leaks == 0
    content = qemu_img.qemu("qemu-io", "-r", "-f", "qcow2", "-c", f"read -P 7 0 {LENGTH}", path)
    assert "Pattern verification failed" not in content
