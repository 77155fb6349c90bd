"""Requests of guests that do not end keep no other disk from being changed for ever."""

import asyncio
import json
from pathlib import Path

import pytest

from blockd.aio import uninterrupted
from blockd.block.node import BlockNode
from blockd.devices.device import Device
from blockd.errors import StorageError
from blockd.units import MIB
from tests import qemu_img
from tests.control.running import Running, refusal, running, until

ACTION = {"type": "x-block-switch", "data": {"device": "vda", "filename": "FOLDER/new.qcow2"}}
COMMANDS: dict[str, dict[str, object]] = {
    "block_switch": {"device": "vda", "filename": "FOLDER/new.qcow2"},
    "transaction": {"actions": [ACTION]},
    "blockdev-snapshot-sync": {"device": "vda", "snapshot_file": "FOLDER/s.qcow2"},
    "block_stream": {"device": "vda"},
    "change-backing-file": {"device": "n", "image_node_name": "n", "backing_file": "base.qcow2"},
    "block_resize": {"device": "vda", "size": 2 * MIB},
}


async def hanging_read(
    daemon: Running, node: BlockNode, may_end: asyncio.Event, monkeypatch: pytest.MonkeyPatch
) -> "asyncio.Task[bytearray]":
    """Have a guest of vda read from a node that does not answer until it may."""
    has_begun = asyncio.Event()

    @uninterrupted  # as what a thread does is
    async def read(offset: int, length: int) -> bytes:
        has_begun.set()
        await may_end.wait()
        return bytes(length)

    monkeypatch.setattr(node, "read_nowait", lambda *_: None)
    monkeypatch.setattr(node, "read", read)
    guest = await daemon.guest("vda")
    reading = asyncio.create_task(guest.read(0, 512))
    async with asyncio.timeout(60):
        await has_begun.wait()
    return reading


@pytest.mark.parametrize("command", COMMANDS)
async def test_a_command_that_would_have_to_wait_for_them_gives_up(tmp_path: Path, command: str) -> None:
    base = qemu_img.create(tmp_path / "base.qcow2", MIB)
    disk = qemu_img.create(tmp_path / "disk.qcow2", MIB, backing=base)
    qemu_img.create(tmp_path / "new.qcow2", MIB, backing=disk)
    other = qemu_img.create(tmp_path / "other.qcow2", MIB)
    file = f"qcow2,node-name=n,file.driver=file,file.filename={disk}"
    words = ["--blockdev", file, "--device", "id=vda,node-name=n", "--device", f"vdb={other}"]
    arguments = json.loads(json.dumps(COMMANDS[command]).replace("FOLDER", str(tmp_path)))
    async with running(tmp_path, *words) as daemon:
        client, devices = await daemon.qmp(), daemon.services.devices
        root, devices.drain_max_s = devices.get("vda").root, 0.05
        async with root.request() as node:
            _, text = await refusal(client, command, **arguments)
            expected = "Requests of guests to 'vda' have not ended after 0.05 s, so nothing was changed"
            assert expected in text
            assert root.top is node
            assert root.node is node, "guests go on"
            snapshot = {"device": "vdb", "snapshot-file": str(tmp_path / "t.qcow2")}
            async with asyncio.timeout(60):
                await client.command("blockdev-snapshot-sync", snapshot)
        await client.command(command, {name.replace("_", "-"): value for name, value in arguments.items()})


async def test_a_stream_that_ends_meanwhile_leaves_others_their_turn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = qemu_img.create(tmp_path / "base.qcow2", MIB)
    disk = qemu_img.create(tmp_path / "disk.qcow2", MIB, backing=base)
    other = qemu_img.create(tmp_path / "other.qcow2", MIB)
    async with running(tmp_path, "--device", f"vda={disk}", "--device", f"vdb={other}") as daemon:
        client, ending, devices = await daemon.qmp(), await daemon.qmp(), daemon.services.devices
        root, devices.drain_max_s = devices.get("vda").root, 0.05
        await client.command("block-stream", {"device": "vda", "job-id": "j", "auto-finalize": False})
        await client.event("BLOCK_JOB_PENDING")
        async with root.request(), asyncio.timeout(60):
            finalizing = asyncio.create_task(ending.command("job-finalize", id="j"))
            await until(lambda: "a filter cannot be taken away yet" in caplog.text)
            snapshot = {"device": "vdb", "snapshot-file": str(tmp_path / "t.qcow2")}
            await client.command("blockdev-snapshot-sync", snapshot)
            assert (await client.command("query-jobs"))[0]["status"] != "concluded"
            _, text = await refusal(client, "block_stream", device="vda")
            assert "busy" in text or "in use" in text
        await finalizing
        assert "error" not in await client.event("BLOCK_JOB_COMPLETED")
        assert caplog.text.count("a filter cannot be taken away yet") == 1
        again = {"device": "vda", "snapshot-file": str(tmp_path / "u.qcow2")}
        await client.command("blockdev-snapshot-sync", again)
    assert "backing" not in qemu_img.qemu("qemu-img", "info", disk)


@pytest.mark.parametrize("stays", [True, False])
async def test_an_export_that_is_removed_meanwhile_leaves_others_their_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, stays: bool
) -> None:
    """Also when the client that removes it leaves before that is done."""
    disk, other = (qemu_img.create(tmp_path / f"{name}.qcow2", MIB) for name in ("disk", "other"))
    async with running(tmp_path, "--device", f"vda={disk}", "--device", f"vdb={other}") as daemon:
        client, waiting = await daemon.qmp(), await daemon.qmp()
        node = daemon.services.devices.get("vda").node
        may_end = asyncio.Event()
        reading = await hanging_read(daemon, node, may_end, monkeypatch)
        async with asyncio.timeout(60):
            removing = asyncio.create_task(waiting.command("block-export-del", id="vda", mode="hard"))
            await until(lambda: "vda" not in daemon.services.exports._require_server()._by_id)
            found = await refusal(client, "block-export-del", id="vda")
            assert found == ("GenericError", "Export 'vda' is not found")
            await client.command("block-export-del", id="vdb")
            assert not removing.done()
            if not stays:
                removing.cancel()
                await waiting.close()
            may_end.set()
            await asyncio.wait([removing])
            await until(lambda: not list(daemon.services.exports))
            assert await client.command("query-block-exports") == []
            await asyncio.wait([reading])


async def test_an_nbd_server_that_is_stopped_meanwhile_leaves_others_their_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It offers nothing any more, and what is asked for about exports is answered."""
    disk, other = (qemu_img.create(tmp_path / f"{name}.qcow2", MIB) for name in ("disk", "other"))
    async with running(tmp_path, "--device", f"vda={disk}", "--device", f"vdb={other}") as daemon:
        client, waiting = await daemon.qmp(), await daemon.qmp()
        node, server = daemon.services.devices.get("vda").node, daemon.services.exports._require_server()
        may_end = asyncio.Event()
        reading = await hanging_read(daemon, node, may_end, monkeypatch)
        try:
            async with asyncio.timeout(60):
                stopping = asyncio.create_task(waiting.command("nbd-server-stop"))
                await until(lambda: [offer.export.name for offer in daemon.services.exports] == ["vda"])
                assert not server.exports
                for command in ("nbd-server-add", "nbd-server-stop"):
                    arguments = {"device": "vda", "name": "other"} if command == "nbd-server-add" else {}
                    assert (await refusal(client, command, **arguments))[1] == "NBD server not running"
                start = {"addr": {"type": "unix", "data": {"path": str(tmp_path / "early.sock")}}}
                _, text = await refusal(client, "nbd-server-start", **start)
                assert text == "NBD server is being stopped, and waits for requests of its guests"
                assert not stopping.done()
        finally:
            may_end.set()
        await stopping
        await asyncio.wait([reading])
        assert await client.command("query-block-exports") == []
        address = {"type": "unix", "data": {"path": str(tmp_path / "again.sock")}}
        await client.command("nbd-server-start", {"addr": address})
        await client.command("nbd-server-add", {"device": "vda"})


async def test_an_nbd_server_that_cannot_be_stopped_in_order_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes wrong with one disk keeps neither another server from starting nor the daemon from ending."""
    disk, other = (qemu_img.create(tmp_path / f"{name}.qcow2", MIB) for name in ("disk", "other"))
    async with running(tmp_path, "--device", f"vda={disk}", "--device", f"vdb={other}") as daemon:
        client, devices = await daemon.qmp(), daemon.services.devices
        guests = [await daemon.guest(name) for name in ("vda", "vdb")]
        forget = devices.forget_unused

        async def fail_once(device: Device) -> None:
            monkeypatch.setattr(devices, "forget_unused", forget)
            raise StorageError("the disk cannot be let go of")

        monkeypatch.setattr(devices, "forget_unused", fail_once)
        _, text = await refusal(client, "nbd-server-stop")
        assert text == "the disk cannot be let go of"
        assert await client.command("query-block-exports") == []
        for guest in guests:
            with pytest.raises(StorageError):
                await guest.read(0, 512)
        assert not daemon.nbd_path.exists()
        address = {"type": "unix", "data": {"path": str(daemon.nbd_path)}}
        await client.command("nbd-server-start", {"addr": address})
        await client.command("nbd-server-add", {"device": "vda"})
        assert await (await daemon.guest("vda")).read(0, 512) == bytes(512)
