"""blockdev-snapshot, blockdev-snapshot-sync, change-backing-file: overlays under guests that write."""

import asyncio
from pathlib import Path

import pytest

from blockd.errors import RequestError
from blockd.protocols.nbd_client import NbdClient
from tests import qemu_img
from tests.chains import Chain, make
from tests.control.running import Running, refusal, running
from tests.layers import opened
from tests.qmp_client import QmpClient

LAYERS = ["AB0-A-AB", "-C-C--0-"]
SIZE = len(LAYERS[0]) * 65536


async def add(client: QmpClient, name: str, path: Path, **more: object) -> None:
    file = {"driver": "file", "filename": str(path)}
    options = {"driver": "qcow2", "node-name": name, "file": file, **more}
    await client.command("blockdev-add", options)


async def with_guest(daemon: Running, chain: Chain) -> tuple[QmpClient, NbdClient]:
    """The active image as node `top`, exported writable."""
    client = await daemon.qmp()
    await add(client, "top", chain.active)
    export = {"type": "nbd", "id": "e", "node-name": "top", "name": "disk", "writable": True}
    await client.command("block-export-add", export)
    return client, await daemon.guest("disk")


def backing_of(path: Path) -> tuple[str, str]:
    text = qemu_img.qemu("qemu-img", "info", "-U", path)
    lines = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    return lines["backing file"], lines["backing file format"]


async def test_snapshot_on_a_node(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    overlay = qemu_img.create(tmp_path / "overlay.qcow2", SIZE, backing=chain.active)
    async with running(tmp_path) as daemon:
        client, guest = await with_guest(daemon, chain)
        await add(client, "overlay", overlay, backing=None)
        await guest.write(0, b"before")
        await client.command("blockdev-snapshot", node="top", overlay="overlay")
        await guest.write(6, b"after")
        assert await guest.read(0, 11) == b"beforeafter"
        (export,) = await client.command("query-block-exports")
        assert export["node-name"] == "overlay"
        nodes = {node["node-name"]: node for node in await client.command("query-named-block-nodes")}
        assert (nodes["top"]["ro"], nodes["overlay"]["ro"]) == (True, False)
        assert nodes["overlay"]["backing_file"] == str(chain.active)
        found = await refusal(client, "blockdev-del", node_name="top")
        assert found[1] == "Node 'top' is busy: node is used as backing hd of 'overlay'"
    assert qemu_img.content(chain.active)[:11] == b"before" + chain.content[6:11]
    assert qemu_img.content(overlay)[:11] == b"beforeafter"


async def test_snapshot_on_a_node_is_refused(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    plain = qemu_img.create(tmp_path / "plain.qcow2", SIZE)
    small = qemu_img.create(tmp_path / "small.qcow2", 65536)
    (tmp_path / "disk.raw").write_bytes(bytes(SIZE))
    async with running(tmp_path) as daemon:
        client, _ = await with_guest(daemon, chain)
        await add(client, "plain", plain)
        await add(client, "small", small)
        raw = {"driver": "raw", "node-name": "raw"}
        await client.command(
            "blockdev-add", {**raw, "file": {"driver": "file", "filename": f"{tmp_path}/disk.raw"}}
        )
        await client.command("object-add", {"qom-type": "throttle-group", "id": "g"})
        await client.command(
            "blockdev-add", {"driver": "throttle", "node-name": "th", "file": "raw", "throttle-group": "g"}
        )
        await add(client, "used", qemu_img.create(tmp_path / "used.qcow2", SIZE))
        await client.command("block-export-add", {"type": "nbd", "id": "u", "node-name": "used"})
        await add(client, "ro", qemu_img.create(tmp_path / "ro.qcow2", SIZE), **{"read-only": True})
        cases = [
            ("nope", "plain", "Cannot find device='nope' nor node-name='nope'"),
            ("top", "nope", "Cannot find device='nope' nor node-name='nope'"),
            ("plain", "top", "The overlay is already in use"),
            ("top", "used", "The overlay is already in use"),
            ("top", "th", "Filters cannot be used as overlays"),
            ("plain", "raw", "The overlay does not support backing images"),
            ("top", "ro", "Block node is read-only"),
            ("top", "small", "The overlay 'small' has 65536 bytes, fewer than the 524288 of 'top'"),
        ]
        for node, overlay, text in cases:
            found = await refusal(client, "blockdev-snapshot", node=node, overlay=overlay)
            assert found == ("GenericError", text)
        await client.command("blockdev-del", {"node-name": "th"})
        found = await refusal(client, "blockdev-snapshot", node="top", overlay="raw")
        assert found == ("GenericError", "The overlay does not support backing images")
        await client.command("block-export-del", id="e", mode="hard")
        for node, overlay in (("plain", "top"), ("top", "top")):
            found = await refusal(client, "blockdev-snapshot", node=node, overlay=overlay)
            assert found == ("GenericError", "The overlay already has a backing image")
        nodes = daemon.services.graph.nodes
        assert [name for name, node in nodes.items() if node.read_only] == [
            *[name for name in nodes if nodes[name].filename == str(chain.paths[0])],
            *[name for name in nodes if nodes[name].filename == str(tmp_path / "ro.qcow2")],
        ]
        assert [daemon.services.graph.users(nodes[name]) for name in ("plain", "small", "ro")] == [[], [], []]


async def test_snapshot_in_a_new_file(tmp_path: Path) -> None:
    """The file is made; its name for the backing leads there from any folder."""
    chain = await make(tmp_path, LAYERS)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    path = elsewhere / "new.qcow2"
    async with running(tmp_path) as daemon:
        client, guest = await with_guest(daemon, chain)
        names = {"node-name": "top", "snapshot-file": str(path), "snapshot-node-name": "new"}
        await client.command("blockdev-snapshot-sync", names)
        await guest.write(0, b"new")
        # And once more, on the overlay, in yet another folder.
        newer = f"{tmp_path}/newer.qcow2"
        names = {"node-name": "new", "snapshot-file": newer, "snapshot-node-name": "newer"}
        await client.command("blockdev-snapshot-sync", names)
        await guest.write(3, b"er")
    assert backing_of(path) == (str(chain.active), "qcow2")
    assert qemu_img.content(path) == b"new" + chain.content[3:]
    assert qemu_img.content(chain.active) == chain.content
    assert qemu_img.content(tmp_path / "newer.qcow2") == b"newer" + chain.content[5:]


async def test_snapshot_of_a_device(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS[:1], base_format="raw")
    path = tmp_path / "new.qcow2"
    async with running(tmp_path, "--device", f"vda={chain.active}") as daemon:
        client, guest = await daemon.qmp(), await daemon.guest("vda")
        await client.command("blockdev-snapshot-sync", {"device": "vda", "snapshot-file": str(path)})
        await guest.write(0, b"new")
        device = daemon.services.devices.get("vda")
        assert (device.active.filename, device.root.top) == (str(path), device.node)
    assert backing_of(path) == (str(chain.active), "raw")
    assert chain.active.read_bytes() == chain.content


async def test_snapshot_in_a_file_that_is_there(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    overlay = qemu_img.create(tmp_path / "overlay.qcow2", SIZE, backing=Path(chain.active.name))
    foreign = qemu_img.create(tmp_path / "foreign.qcow2", SIZE, backing=chain.paths[0])
    async with running(tmp_path, "--device", f"vda={chain.active}") as daemon:
        client, guest = await daemon.qmp(), await daemon.guest("vda")
        existing = {"device": "vda", "mode": "existing"}
        found = await refusal(client, "blockdev-snapshot-sync", **existing, snapshot_file=str(foreign))
        assert "not the active image" in found[1]
        found = await refusal(client, "blockdev-snapshot-sync", **existing, snapshot_file="nope.qcow2")
        assert found == ("GenericError", "Could not open 'nope.qcow2': No such file or directory")
        await client.command("blockdev-snapshot-sync", {**existing, "snapshot-file": str(overlay)})
        await guest.write(0, b"new")
    assert qemu_img.content(overlay)[:3] == b"new"


async def test_snapshot_in_a_file_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path) as daemon:
        client, guest = await with_guest(daemon, chain)
        path = str(tmp_path / "new.qcow2")
        cases: list[tuple[dict[str, object], str]] = [
            ({}, "Cannot find device='' nor node-name=''"),
            ({"device": "x"}, "Cannot find device='x' nor node-name=''"),
            ({"node_name": "x"}, "Cannot find device='' nor node-name='x'"),
            ({"node_name": "top"}, "New overlay node-name missing"),
            ({"node_name": "top", "snapshot_node_name": "top"}, "New overlay node-name already in use"),
            ({"node_name": "top", "snapshot_node_name": "9"}, "Invalid node-name: '9'"),
            ({"node_name": "top", "snapshot_node_name": "s", "format": "x"}, "Unknown file format 'x'"),
            (
                {"node_name": "top", "snapshot_node_name": "s", "format": "raw"},
                "Backing file not supported for file format 'raw'",
            ),
            (
                {"node_name": "top", "snapshot_node_name": "s", "mode": "x"},
                "Parameter 'mode' does not accept value 'x'",
            ),
            (
                {"node_name": "top", "snapshot_node_name": "s", "snapshot_file": str(chain.active)},
                f"Could not create '{chain.active}': the file exists and is not overwritten",
            ),
        ]
        for arguments, text in cases:
            found = await refusal(client, "blockdev-snapshot-sync", **{"snapshot_file": path, **arguments})
            assert found == ("GenericError", text)
        assert not Path(path).exists()
        await guest.write(0, b"as before")
    assert qemu_img.content(chain.active)[:9] == b"as before"


async def test_busy_nodes_get_no_overlay(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path) as daemon:
        client, _ = await with_guest(daemon, chain)
        await client.command("block-stream", {"job-id": "j", "device": "top", "speed": 1})
        path = str(tmp_path / "new.qcow2")
        names = {"node-name": "top", "snapshot-file": path, "snapshot-node-name": "new"}
        busy = ("GenericError", "Node 'top' is busy: block device is in use by block job: stream")
        assert await refusal(client, "blockdev-snapshot-sync", **names) == busy
        await add(client, "plain", qemu_img.create(tmp_path / "plain.qcow2", SIZE))
        assert await refusal(client, "blockdev-snapshot", node="top", overlay="plain") == busy
        found = await refusal(
            client, "change-backing-file", device="top", image_node_name="top", backing_file="x"
        )
        assert found[0] == "GenericError"
        assert await refusal(client, "block_resize", node_name="top", size=2 * SIZE) == busy


async def test_overlay_of_a_throttled_disk(tmp_path: Path) -> None:
    """On the throttle, as QEMU has it: what comes from below is limited, what is new is not."""
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add(client, "top", chain.active)
        await client.command("object-add", {"qom-type": "throttle-group", "id": "g"})
        throttle = {"driver": "throttle", "node-name": "th", "file": "top", "throttle-group": "g"}
        await client.command("blockdev-add", throttle)
        export = {"type": "nbd", "id": "e", "node-name": "th", "name": "disk", "writable": True}
        await client.command("block-export-add", export)
        guest = await daemon.guest("disk")
        names = {"node-name": "th", "snapshot-file": str(tmp_path / "new.qcow2"), "snapshot-node-name": "new"}
        await client.command("blockdev-snapshot-sync", names)
        nodes = daemon.services.graph.nodes
        assert nodes["new"].backing is nodes["th"]
        assert (nodes["th"].read_only, nodes["top"].read_only) == (True, True)
        await guest.write(0, b"new")
        assert await guest.read(0, SIZE) == b"new" + chain.content[3:]
    assert backing_of(tmp_path / "new.qcow2") == (str(chain.active), "qcow2")


async def test_many_snapshots_under_a_writing_guest(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path) as daemon:
        client, guest = await with_guest(daemon, chain)
        expected = bytearray(chain.content)
        is_over = False

        async def write() -> None:
            turn = 0
            while not is_over:
                turn += 1
                offset = turn * 4096 * 5 % SIZE
                await guest.write(offset, turn.to_bytes(8, "big") * 512)
                expected[offset : offset + 4096] = turn.to_bytes(8, "big") * 512

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(write())
            name = "top"
            for number in range(8):
                path = tmp_path / f"s{number}.qcow2"
                names = {"node-name": name, "snapshot-file": str(path), "snapshot-node-name": f"s{number}"}
                await client.command("blockdev-snapshot-sync", names)
                name = f"s{number}"
            is_over = True
        assert await guest.read(0, SIZE) == expected
    assert qemu_img.content(path) == bytes(expected)


# -- change-backing-file ----------------------------------------------------------------------


async def test_another_name_for_the_backing_file(tmp_path: Path) -> None:
    chain = await make(tmp_path, [*LAYERS, "--D-----"])
    (tmp_path / "other.qcow2").symlink_to(chain.paths[0])
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add(client, "base", chain.paths[0])
        file = {"driver": "file", "filename": str(chain.paths[1])}
        middle = {"driver": "qcow2", "node-name": "middle", "file": file, "backing": "base"}
        await add(client, "top", chain.paths[2], backing=middle)
        await client.command(
            "change-backing-file",
            {"device": "top", "image-node-name": "middle", "backing-file": "other.qcow2"},
        )
        assert daemon.services.graph["middle"].read_only
        text = "x" * 1024
        found = await refusal(
            client, "change-backing-file", device="top", image_node_name="top", backing_file=text
        )
        assert found[1].startswith(f"Could not change backing file to '{text}': ")
        cases = [
            ("nope", "top", "Cannot find device='nope' nor node-name='nope'"),
            ("top", "nope", "Cannot find device='' nor node-name='nope'"),
            (
                "top",
                "base",
                "not allowing backing file change on an image without a backing file",
            ),
            ("middle", "middle", "Need a root block node"),
        ]
        for device, image, text in cases:
            arguments = {"device": device, "image_node_name": image, "backing_file": "x"}
            assert await refusal(client, "change-backing-file", **arguments) == ("GenericError", text)
        await add(client, "plain", qemu_img.create(tmp_path / "plain.qcow2", SIZE))
        arguments = {"device": "plain", "image_node_name": "top", "backing_file": "x"}
        found = await refusal(client, "change-backing-file", **arguments)
        assert found[1] == "'plain' and image file are not in the same chain"
    assert backing_of(chain.paths[1]) == (f"other.qcow2 (actual path: {tmp_path}/other.qcow2)", "qcow2")
    assert qemu_img.content(chain.active) == chain.content


@pytest.mark.parametrize("image_format", ["qcow2", "add-cow"])
async def test_overlay_that_cannot_be_put_in_place_leaves_all_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image_format: str
) -> None:
    chain = await make(tmp_path, LAYERS)
    path = tmp_path / f"new.{image_format}"
    async with running(tmp_path) as daemon:
        client, guest = await with_guest(daemon, chain)

        async def fail() -> None:
            raise RequestError("the state cannot be recorded")

        nodes = dict(daemon.services.graph.nodes)
        names = {"node-name": "top", "snapshot-file": str(path), "snapshot-node-name": "new"}
        names["format"] = image_format
        with monkeypatch.context() as patch:
            patch.setattr(daemon.services.devices, "record", fail)
            assert (await refusal(client, "blockdev-snapshot-sync", **names))[1].startswith("the state")
        assert dict(daemon.services.graph.nodes) == nodes
        assert not list(tmp_path.glob("new.*"))
        assert not nodes["top"].read_only
        await guest.write(0, b"as before")
        await client.command("blockdev-snapshot-sync", names)
        assert await guest.read(0, SIZE) == b"as before" + chain.content[9:]
    async with opened(path, image_format, read_only=True) as disk:
        assert await disk.node.read(0, SIZE) == b"as before" + chain.content[9:]
