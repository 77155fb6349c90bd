"""The NBD server, exports and nodes over QMP: texts, shapes, and who uses what."""

import json
from pathlib import Path

import pytest

from tests import qemu_img
from tests.chains import make
from tests.control.running import refusal, running
from tests.programs import run
from tests.qmp_client import QmpClient

LAYERS = ["AB0-", "-C--"]
SIZE = len(LAYERS[0]) * 65536


async def add_node(client: QmpClient, path: Path, name: str, **more: object) -> None:
    file = {"driver": "file", "filename": str(path)}
    await client.command("blockdev-add", {"driver": "qcow2", "node-name": name, "file": file, **more})


async def export(client: QmpClient, node_name: str, export_id: str, **more: object) -> None:
    arguments = {"type": "nbd", "id": export_id, "node-name": node_name, **more}
    await client.command("block-export-add", arguments)


async def test_exports_in_order(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add_node(client, chain.active, "top")
        await export(client, "top", "e", writable=True)
        await export(client, "top", "f", name="second")
        expected = {"type": "nbd", "node-name": "top", "shutting-down": False}
        exports = await client.command("query-block-exports")
        assert exports == [{"id": "f", **expected}, {"id": "e", **expected}]
        # Both are one disk.
        guest, other = await daemon.guest("top"), await daemon.guest("second")
        await guest.write(0, b"hello")
        assert await other.read(0, 5) == b"hello"
        assert await refusal(client, "blockdev-del", node_name="top") == (
            "GenericError",
            "Node top is in use",
        )
        await guest.disconnect()
        await client.command("block-export-del", id="e", mode="hard")
        assert await client.event("BLOCK_EXPORT_DELETED") == {"id": "e"}
        for command, argument in (("block-export-del", "id"), ("nbd-server-remove", "name")):
            found = await refusal(client, command, **{argument: "f"})
            assert found == ("GenericError", "export 'f' still in use")
        await client.command("block-export-del", id="f", mode="hard")
        assert await client.command("query-block-exports") == []
        await client.command("blockdev-del", {"node-name": "top"})
        assert await client.command("query-named-block-nodes") == []
    assert qemu_img.content(chain.active)[:5] == b"hello"


async def test_a_client_that_is_alone_is_not_told_to_come_with_others(tmp_path: Path) -> None:
    """nbdcopy opens several connections where it may, and waits for all of them."""
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add_node(client, chain.active, "top")
        await client.command("nbd-server-stop")
        for count, allows_many in [(1, False), (2, True)]:
            path = str(tmp_path / "one.nbd")
            place = {"type": "unix", "data": {"path": path}}
            await client.command("nbd-server-start", {"addr": place, "max-connections": count})
            await export(client, "top", "e")
            copied = tmp_path / f"copied{count}"
            await run("nbdcopy", f"nbd+unix:///top?socket={path}", copied)
            assert copied.read_bytes() == chain.content
            info = json.loads(await run("nbdinfo", "--json", f"nbd+unix:///top?socket={path}"))
            assert info["exports"][0]["can_multi_conn"] is allows_many
            await client.command("nbd-server-stop")


async def test_refused_exports(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add_node(client, chain.paths[0], "base", **{"read-only": True})
        await add_node(client, chain.active, "top", backing="base")
        await export(client, "top", "e")
        cases: list[tuple[str, str, dict[str, object], str]] = [
            ("e", "top", {"name": "x"}, "Block export id 'e' is already in use"),
            ("f", "top", {}, "NBD server already has export named 'top'"),
            ("f", "nope", {}, "Cannot find device='' nor node-name='nope'"),
            ("f f", "top", {"name": "x"}, "Invalid block export id"),
            ("f", "base", {"writable": True}, "Cannot export read-only node as writable"),
        ]
        for export_id, node_name, more, text in cases:
            found = await refusal(
                client, "block-export-add", type="nbd", id=export_id, node_name=node_name, **more
            )
            assert found == ("GenericError", text)
        found = await refusal(client, "block-export-del", id="nope")
        assert found == ("GenericError", "Export 'nope' is not found")
        found = await refusal(client, "nbd-server-start", addr={"type": "unix", "data": {"path": "x"}})
        assert found == ("GenericError", "NBD server already running")
        assert len(await client.command("query-block-exports")) == 1


async def test_a_backing_cannot_be_exported_writable(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add_node(client, chain.paths[0], "base")
        await add_node(client, chain.active, "top", backing="base")
        arguments = {"type": "nbd", "id": "e", "node_name": "base"}
        found = await refusal(client, "block-export-add", **arguments, writable=True)
        text = (
            "Permission conflict on node 'base': permissions 'write' are both required by an unnamed block "
            "device (uses node 'base' as 'root' child) and unshared by node 'top' (uses node 'base' as "
            "'backing' child)."
        )
        assert found == ("GenericError", text)
        await export(client, "base", "e")
        assert await refusal(client, "blockdev-del", node_name="base") == (
            "GenericError",
            "Node 'base' is busy: node is used as backing hd of 'top'",
        )


async def test_server_stops_and_starts(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path, "--device", f"vda={chain.active}") as daemon:
        client = await daemon.qmp()
        await daemon.guest("vda")
        await client.command("nbd-server-stop")
        assert await client.event("BLOCK_EXPORT_DELETED") == {"id": "vda"}
        assert not daemon.nbd_path.exists()
        found = await refusal(client, "nbd-server-stop")
        assert found == ("GenericError", "NBD server not running")
        found = await refusal(client, "nbd-server-add", device="vda")
        assert found == ("GenericError", "NBD server not running")
        taken = {"type": "unix", "data": {"path": str(chain.active)}}
        assert "is not a socket" in (await refusal(client, "nbd-server-start", addr=taken))[1]
        address = {"type": "unix", "data": {"path": str(daemon.nbd_path)}}
        await client.command("nbd-server-start", addr=address)
        await client.command("nbd-server-add", device="vda", writable=True)
        guest = await daemon.guest("vda")
        assert await guest.read(0, SIZE) == chain.content
        await guest.disconnect()
        await client.command("nbd-server-remove", name="vda", mode="hard")


async def test_server_on_a_tcp_port(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await client.command("nbd-server-stop")
        wrong = {"type": "inet", "data": {"host": "127.0.0.1", "port": "nbd"}}
        assert "is not a number" in (await refusal(client, "nbd-server-start", addr=wrong))[1]
        wrong["data"] = {"host": "127.0.0.1", "port": "65536"}
        assert "the last port is 65535" in (await refusal(client, "nbd-server-start", addr=wrong))[1]
        wrong["data"] = {"host": "127.0.0.1", "port": "1" * 5000}
        assert "is not a number" in (await refusal(client, "nbd-server-start", addr=wrong))[1]
        right = {"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}}
        await client.command("nbd-server-start", addr=right)
        assert daemon.services.exports.server is not None
        assert daemon.services.exports.server.addresses[0].startswith("nbd://127.0.0.1:")


async def test_device_on_a_node_shares_the_disk_of_its_exports(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    blockdev = f"driver=qcow2,node-name=top,file.driver=file,file.filename={chain.active}"
    options = ("--blockdev", blockdev, "--export", "type=nbd,id=e,node-name=top,writable=on")
    async with running(tmp_path, *options, "--device", "id=vda,node-name=top") as daemon:
        client, guest = await daemon.qmp(), await daemon.guest("top")
        await client.command("block_stream", device="vda")
        await client.event("BLOCK_STREAM_COMPLETED")
        copy = qemu_img.create(tmp_path / "copy.qcow2", SIZE, backing=chain.active)
        await client.command("block_switch", device="vda", filename=str(copy))
        await guest.write(0, b"in the copy")
        await guest.flush()
        assert qemu_img.content(copy)[:11] == b"in the copy"
        await client.command("block-export-del", id="e", mode="hard")
        assert [device["device"] for device in await client.command("query-block")] == ["vda"]


async def test_query_block_and_nodes(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path, "--device", f"vda={chain.active}") as daemon:
        client = await daemon.qmp()
        [device] = await client.command("query-block")
        assert (device["device"], device["io-status"]) == ("vda", "ok")
        info = device["inserted"]
        assert (info["drv"], info["file"], info["ro"]) == ("qcow2", str(chain.active), False)
        assert (info["backing_file"], info["backing_file_depth"]) == (str(chain.paths[0]), 1)
        image = info["image"]
        assert image["backing-filename"] == image["full-backing-filename"] == str(chain.paths[0])
        assert image["virtual-size"] == SIZE
        assert image["backing-image"]["filename"] == str(chain.paths[0])
        assert image["format-specific"]["data"]["compat"] == "1.1"
        for node in await client.command("query-named-block-nodes", flat=True):
            assert "backing-image" not in node["image"]
            assert node["image"]["actual-size"] == Path(node["file"]).stat().st_blocks * 512


@pytest.mark.parametrize("size", [SIZE * 2, SIZE + 512, SIZE - 512, SIZE // 2])
async def test_resize(tmp_path: Path, size: int) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path, "--device", f"vda={chain.active}") as daemon:
        client = await daemon.qmp()
        assert (await refusal(client, "block_resize", device="vda", size=1000))[1] == (
            "The new size must be a multiple of 512"
        )
        found = await refusal(client, "block_resize", device="vda", size=-512)
        assert found[1] == "Parameter 'size' expects a >0 size"
        found = await refusal(client, "block_resize", node_name="nope", size=512)
        assert found[1] == "Cannot find device='' nor node-name='nope'"
        # Guests cannot be told of another size.
        found = await refusal(client, "block_resize", device="vda", size=size)
        assert found[1].startswith("Permission conflict on node")
        await client.command("block-export-del", id="vda")
        await client.command("block_resize", device="vda", size=size)
        await client.command("nbd-server-add", device="vda")
        assert (await daemon.guest("vda")).size == size
    assert qemu_img.content(chain.active) == chain.content[:size].ljust(size, b"\0")


async def test_nodes_in_a_job_are_not_removed_or_resized(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add_node(client, chain.active, "top")
        await client.command("block-stream", {"device": "top", "job-id": "j", "speed": 1})
        busy = ("GenericError", "Node 'top' is busy: block device is in use by block job: stream")
        assert await refusal(client, "blockdev-del", node_name="top") == busy
        assert await refusal(client, "block_resize", node_name="top", size=SIZE * 2) == busy
        await client.command("job-cancel", id="j")
        await client.event("JOB_STATUS_CHANGE", status="null")
        await client.command("blockdev-del", {"node-name": "top"})
