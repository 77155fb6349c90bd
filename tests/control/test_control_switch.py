"""block_switch: in one step for the guest, and if anything is wrong not at all."""

import asyncio
import errno
from pathlib import Path

import pytest

from blockd.config import MovedDevice
from blockd.errors import StorageError
from blockd.formats.qcow2.image import Qcow2Image
from blockd.protocols.nbd_client import NbdClient
from tests import qemu_img
from tests.chains import Chain, make
from tests.control.running import Running, refusal, running
from tests.qmp_client import QmpClient

LAYERS = ["AB0-A-AB", "-C-C--0-"]
SIZE = len(LAYERS[0]) * 65536


def overlay_of(chain: Chain, size: int | None = None) -> Path:
    return qemu_img.create(chain.active.with_name("copy.qcow2"), size or SIZE, backing=chain.active)


async def switched(client: QmpClient, filename: Path) -> None:
    await client.command("block_switch", device="vda", filename=str(filename))


async def test_live_block_copy(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    copy = overlay_of(chain)
    async with running(tmp_path, "--device", f"vda={chain.active}") as daemon:
        client, guest = await daemon.qmp(), await daemon.guest("vda")
        await guest.write(0, b"before" * 100)
        await switched(client, copy)
        names = {"filename": str(copy), "backing": str(chain.active)}
        assert await client.event("BLOCK_SWITCHED") == {"device": "vda", **names}
        await guest.write(65536, b"behind" * 100)
        await guest.flush()
        old = qemu_img.content(chain.active)
        assert old[:600] == b"before" * 100
        assert old[65536:] == chain.content[65536:]
        await client.command("block_stream", device="vda")
        await client.event("BLOCK_STREAM_COMPLETED")
        expected = bytearray(chain.content)
        expected[:600], expected[65536 : 65536 + 600] = b"before" * 100, b"behind" * 100
        assert await guest.read(0, SIZE) == expected
        nodes = await client.command("query-named-block-nodes")
        assert {node["file"] for node in nodes} == {str(copy)}
    assert daemon.moved == [MovedDevice("vda", str(copy))]
    assert qemu_img.content(copy) == bytes(expected)
    assert qemu_img.content(chain.active) == old
    qemu_img.assert_sound(copy)
    qemu_img.assert_sound(chain.active)


async def test_stream_of_the_copy_down_to_the_old_base(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    copy = overlay_of(chain)
    async with running(tmp_path, "--device", f"vda={chain.active}") as daemon:
        client = await daemon.qmp()
        await switched(client, copy)
        await client.command("block_stream", device="vda", base=str(chain.paths[0]))
        await client.event("BLOCK_STREAM_COMPLETED")
        device = daemon.services.devices.get("vda")
        assert device.active.backing is not None
        assert device.active.backing.filename == str(chain.paths[0])
    assert qemu_img.content(copy) == chain.content


async def test_requests_of_the_guest_are_held_and_none_is_lost(tmp_path: Path) -> None:
    """Guests write through many switches, one overlay on the other, and then everything is there."""
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path, "--device", f"vda={chain.active}") as daemon:
        client, guest = await daemon.qmp(), await daemon.guest("vda")
        expected = bytearray(chain.content)
        is_over = False

        async def write(start: int) -> None:
            turn = 0
            while not is_over:
                turn += 1
                offset = start + (turn * 4096) % 65536
                data = turn.to_bytes(8, "big") * 512
                await guest.write(offset, data)
                expected[offset : offset + 4096] = data

        async with asyncio.TaskGroup() as tasks:
            for start in range(0, 4 * 65536, 65536):
                tasks.create_task(write(start))
            below = chain.active
            for number in range(6):
                path = tmp_path / f"overlay{number}.qcow2"
                await asyncio.to_thread(qemu_img.create, path, SIZE, backing=below)
                await switched(client, path)
                below = path
            is_over = True
        assert await guest.read(0, SIZE) == expected
    assert qemu_img.content(below) == bytes(expected)


async def refused(daemon: Running, client: QmpClient, guest: NbdClient, filename: Path, **more: str) -> str:
    """Refused with this text, and the device is as before: same node and files, the guest writes on."""
    device = daemon.services.devices.get("vda")
    nodes = dict(daemon.services.graph.nodes)
    node = device.node
    error_class, text = await refusal(client, "block_switch", device="vda", filename=str(filename), **more)
    assert error_class == "GenericError"
    assert device.node is device.root.top is device.root.node is node
    assert dict(daemon.services.graph.nodes) == nodes
    assert not node.read_only
    await guest.write(5 * 65536, b"still here")
    assert await guest.read(5 * 65536, 10) == b"still here"
    assert client.events == []
    return text


async def test_refusals_leave_the_device_as_before(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    size = SIZE
    alone = qemu_img.create(tmp_path / "alone.qcow2", size)
    sibling = qemu_img.create(tmp_path / "sibling.qcow2", size, backing=chain.paths[0])
    smaller = qemu_img.create(tmp_path / "smaller.qcow2", size - 65536, backing=chain.active)
    garbage = tmp_path / "garbage.qcow2"
    garbage.write_bytes(b"garbage" * 1000)
    async with running(tmp_path, "--device", f"vda={chain.active}") as daemon:
        client, guest = await daemon.qmp(), await daemon.guest("vda")
        assert "has no backing file" in await refused(daemon, client, guest, alone)
        assert f"not the active image '{chain.active}'" in await refused(daemon, client, guest, sibling)
        assert "fewer than" in await refused(daemon, client, guest, smaller)
        assert "No such file or directory" in await refused(daemon, client, guest, tmp_path / "nope")
        assert "not a qcow2 image" in await refused(daemon, client, guest, garbage)
        assert 'Failed to get "write" lock' in await refused(daemon, client, guest, chain.active)
        assert 'Failed to get "write" lock' in await refused(daemon, client, guest, chain.paths[0])
        assert "Unknown driver 'zap'" in await refused(daemon, client, guest, alone, format="zap")
        assert "has no backing file" in await refused(daemon, client, guest, alone, format="raw")
        before = alone.read_bytes()
        await refused(daemon, client, guest, alone)
        assert alone.read_bytes() == before


async def test_old_image_that_cannot_be_flushed_stays_active(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = await make(tmp_path, LAYERS)
    copy = overlay_of(chain)
    async with running(tmp_path, "--device", f"vda={chain.active}") as daemon:
        client, guest = await daemon.qmp(), await daemon.guest("vda")

        async def flush(self: Qcow2Image) -> None:
            raise StorageError("Could not sync 'disk': No space left on device", errno=errno.ENOSPC)

        with monkeypatch.context() as patch:
            patch.setattr(Qcow2Image, "flush", flush)
            text = await refused(daemon, client, guest, copy)
        assert text == "Could not sync 'disk': No space left on device"
        await switched(client, copy)
        await guest.flush()


async def test_refused_while_a_job_runs_and_nothing_changed(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    copy = overlay_of(chain)
    before = copy.read_bytes()
    async with running(tmp_path, "--device", f"vda={chain.active}") as daemon:
        client = await daemon.qmp()
        await client.command("block_stream", device="vda", speed=65536)
        found = await refusal(client, "block_switch", device="vda", filename=str(copy))
        assert found == ("DeviceInUse", "Device 'vda' is in use")
        assert copy.read_bytes() == before
        await client.command("block-job-set-speed", device="vda", speed=0)
        await client.event("BLOCK_STREAM_COMPLETED")
        await switched(client, copy)
    assert qemu_img.content(copy) == chain.content


async def test_refused_when_copy_on_read_is_in_front(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    copy = overlay_of(chain)
    async with running(tmp_path, "--device", f"vda=blkstream:{chain.active}") as daemon:
        client, guest = await daemon.qmp(), await daemon.guest("vda")
        assert "the filter" in await refused(daemon, client, guest, copy)


async def test_guest_writes_the_last_cluster_as_the_stream_ends_then_switch(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    copy = overlay_of(chain)
    async with running(tmp_path, "--device", f"vda={chain.active}") as daemon:
        client, guest = await daemon.qmp(), await daemon.guest("vda")
        await client.command("block-stream", {"device": "vda", "auto-finalize": False})
        await client.event("BLOCK_JOB_PENDING")
        last = SIZE - 65536
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(guest.write(last + 512, b"last" * 128))
            await client.command("job-finalize", id="vda")
            await switched(client, copy)
            tasks.create_task(guest.write(last, b"copy" * 128))
        expected = bytearray(chain.content)
        expected[last + 512 : last + 1024], expected[last : last + 512] = b"last" * 128, b"copy" * 128
        assert await guest.read(0, SIZE) == expected
    assert qemu_img.content(copy) == bytes(expected)
    assert qemu_img.content(chain.active)[last + 512 : last + 1024] == b"last" * 128
