"""Images that become read-only or writable while they are open."""

import fcntl
import json
import os
from pathlib import Path

import pytest

from blockd.block.node import BlockNode
from blockd.devices.stream_request import StreamRequest
from blockd.drivers import NodeGraph
from blockd.errors import BlockdError, ImageError, RequestError
from blockd.formats.qcow2.header import INCOMPATIBLE_CORRUPT, INCOMPATIBLE_FIELD
from blockd.protocols.file import FileNode
from tests import qemu_img
from tests.chains import Chain, make, read_all
from tests.control.running import refusal, running
from tests.qmp_client import QmpClient

LAYERS = ["AB0-A-AB", "-C-C--0-", "D------D", "--E-----"]
CLUSTER = 65536


def can_write(file: BlockNode) -> bool:
    """Whether the kernel would let the descriptor be written."""
    assert isinstance(file, FileNode)
    return fcntl.fcntl(file._fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY


async def opened(graph: NodeGraph, chain: Chain, *, read_only: bool) -> BlockNode:
    return await graph.open_image(str(chain.active), chain.formats[-1], read_only=read_only)


@pytest.fixture(params=["qcow2", "raw"])
async def single(tmp_path: Path, request: pytest.FixtureRequest) -> Chain:
    return await make(tmp_path, LAYERS[:1], base_format=request.param)


async def test_there_and_back(single: Chain) -> None:
    graph = NodeGraph()
    image = await opened(graph, single, read_only=False)
    file = image.children()["file"]
    expected = bytearray(single.content)
    for number in range(3):
        data = bytes([number + 1]) * 100
        offset = 3 * CLUSTER + number * 1000
        await image.write(offset, data)
        expected[offset : offset + 100] = data
        await graph.set_read_only(image, True)
        assert (image.read_only, file.read_only, can_write(file)) == (True, True, False)
        assert not image.write_nowait(0, b"x" * 512)
        with pytest.raises(RequestError, match="was opened read-only"):
            await image.write(0, b"x" * 512)
        # All of it is in the file, maps included, and is still read from there.
        assert qemu_img.content(single.active, single.formats[0]) == bytes(expected)
        assert await read_all(image) == bytes(expected)
        await graph.set_read_only(image, False)
        assert (image.read_only, file.read_only, can_write(file)) == (False, False, True)
    assert image.write_nowait(0, b"y" * 512)
    await graph.close()
    assert qemu_img.content(single.active, single.formats[0])[:512] == b"y" * 512


async def test_the_same_file_whatever_its_name_is_now(single: Chain) -> None:
    graph = NodeGraph()
    image = await opened(graph, single, read_only=True)
    moved = single.active.rename(single.active.with_name("moved"))
    single.active.write_bytes(b"another file")
    await graph.set_read_only(image, False)
    await image.write(0, b"written")
    await graph.close()
    assert qemu_img.content(moved, single.formats[0])[:7] == b"written"
    assert single.active.read_bytes() == b"another file"


async def test_image_that_must_not_be_written_stays_read_only(tmp_path: Path) -> None:
    path = qemu_img.create(tmp_path / "corrupt.qcow2", CLUSTER)
    with path.open("r+b") as file:
        file.seek(INCOMPATIBLE_FIELD)
        file.write(INCOMPATIBLE_CORRUPT.to_bytes(8, "big"))
    graph = NodeGraph()
    image = await graph.open_image(str(path), "qcow2", read_only=True)
    with pytest.raises(ImageError, match="is marked corrupt"):
        await graph.set_read_only(image, False)
    assert (image.read_only, can_write(image.children()["file"])) == (True, False)
    await graph.close()


async def test_one_writer_only(tmp_path: Path) -> None:
    """Two nodes read a file; neither may start to write while the other has it."""
    chain = await make(tmp_path, LAYERS[:1])
    graph = NodeGraph()
    file = {"driver": "file", "filename": str(chain.active)}
    common = {"driver": "qcow2", "read-only": True}
    one = await graph.open({**common, "node-name": "one", "file": {**file, "node-name": "f"}})
    await graph.open({**common, "node-name": "same", "file": "f"})
    with pytest.raises(RequestError, match=r"are both required by node 'one' .* unshared by node 'same'"):
        await graph.set_read_only(one, False)
    await graph.remove("same")
    await graph.open({**common, "node-name": "other", "file": file})
    with pytest.raises(RequestError, match='Failed to get "write" lock'):
        await graph.set_read_only(one, False)
    await graph.remove("other")
    await graph.set_read_only(one, False)
    await graph.close()


async def test_file_that_was_added_by_itself_stays_as_it_was_added(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS[:1])
    graph = NodeGraph()
    for name, read_only in (("rw", False), ("ro", True)):
        options = {"driver": "file", "node-name": name, "filename": str(chain.active), "read-only": read_only}
        file = await graph.open(options)
        image = await graph.open(
            {"driver": "qcow2", "node-name": "image", "file": name, "read-only": read_only}
        )
        if read_only:
            with pytest.raises(RequestError, match="Block node is read-only"):
                await graph.set_read_only(image, False)
        else:
            await graph.set_read_only(image, True)
        assert (image.read_only, file.read_only) == (True, read_only)
        await graph.remove("image")
        await graph.remove(name)


async def test_failing_flush_leaves_the_image_writable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = await make(tmp_path, LAYERS[:1])
    graph = NodeGraph()
    image = await opened(graph, chain, read_only=False)
    await image.write(3 * CLUSTER, b"x")

    def no_sync(fd: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", no_sync)
        with pytest.raises(BlockdError, match="Could not sync"):
            await graph.set_read_only(image, True)
    assert not image.read_only
    await graph.close()


async def test_old_image_of_a_switch_cannot_be_written(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS[:2])
    copy = qemu_img.create(tmp_path / "copy.qcow2", len(chain.content), backing=chain.active)
    async with running(tmp_path, "--device", f"vda={chain.active}") as daemon:
        client = await daemon.qmp()
        old = daemon.services.devices.get("vda").node
        assert can_write(old.children()["file"])
        await client.command("block_switch", device="vda", filename=str(copy))
        assert not can_write(old.children()["file"])


# -- streams ----------------------------------------------------------------------------------


async def stream(client: QmpClient, **arguments: object) -> None:
    await client.command("block-stream", {"job-id": "j", **arguments})
    await client.event("JOB_STATUS_CHANGE", id="j", status="null")


async def test_read_only_intermediate_is_writable_for_its_stream(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path, "--device", f"vda={chain.active}") as daemon:
        client, guest = await daemon.qmp(), await daemon.guest("vda")
        middle = daemon.services.devices.get("vda").active.backing
        assert middle is not None
        before = qemu_img.content(chain.paths[2])
        name = middle.node_name
        await client.command("block-stream", {"job-id": "j", "device": name, "speed": 1})
        assert not middle.read_only
        assert await guest.read(0, len(chain.content)) == chain.content
        await guest.write(0, b"guest")
        await client.command("block-job-set-speed", device="j", speed=0)
        await client.event("JOB_STATUS_CHANGE", id="j", status="null")
        assert (middle.read_only, can_write(middle.children()["file"])) == (True, False)
        assert middle.backing is None
        assert await guest.read(5, len(chain.content) - 5) == chain.content[5:]
    assert qemu_img.content(chain.paths[2]) == before
    qemu_img.assert_sound(chain.paths[2])
    assert qemu_img.content(chain.active) == b"guest" + chain.content[5:]


@pytest.mark.parametrize("end", ["cancel", "quit"])
async def test_read_only_again_after_a_cancel(tmp_path: Path, end: str) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path, "--device", f"vda={chain.active}") as daemon:
        client = await daemon.qmp()
        middle = daemon.services.devices.get("vda").active.backing
        assert middle is not None
        await client.command("block-stream", {"job-id": "j", "device": middle.node_name, "speed": 1})
        if end == "quit":
            await client.command("quit")
        else:
            await client.command("block-job-cancel", device="j")
            await client.event("JOB_STATUS_CHANGE", id="j", status="null")
            assert middle.read_only
    assert qemu_img.content(chain.active) == chain.content


async def test_stream_of_nothing(tmp_path: Path) -> None:
    """An image that lacks nothing has an empty job, as with QEMU."""
    chain = await make(tmp_path, LAYERS[:1])
    (tmp_path / "disk.raw").write_bytes(bytes(CLUSTER))
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        for number, (driver, path) in enumerate([("qcow2", chain.active), ("raw", tmp_path / "disk.raw")]):
            file = {"driver": "file", "filename": str(path)}
            options = {"driver": driver, "node-name": f"n{number}", "file": file}
            await client.command("blockdev-add", options)
            await stream(client, device=f"n{number}")
            assert await client.event("BLOCK_JOB_COMPLETED") == {
                "type": "stream",
                "device": "j",
                "len": 0,
                "offset": 0,
                "speed": 0,
            }


async def test_only_the_name_of_the_backing_file_is_written(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS[:3])
    async with running(tmp_path, "--device", f"vda={chain.active}") as daemon:
        client = await daemon.qmp()
        middle = daemon.services.devices.get("vda").active.backing
        assert middle is not None
        assert middle.backing is not None
        ends = {"base-node": middle.backing.node_name, "backing-file": "layer0.qcow2"}
        await stream(client, device=middle.node_name, **ends)
        assert middle.read_only
        info = qemu_img.qemu("qemu-img", "info", "-U", chain.paths[1])
        assert "backing file: layer0.qcow2 (actual path" in info


async def test_image_whose_file_may_not_be_written_is_not_streamed_into(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS[:2])
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        file = {"driver": "file", "node-name": "f", "filename": str(chain.active), "read-only": True}
        await client.command("blockdev-add", file)
        await client.command(
            "blockdev-add", {"driver": "qcow2", "node-name": "n", "file": "f", "read-only": True}
        )
        found = await refusal(client, "block-stream", job_id="j", device="n")
        assert found == ("GenericError", "Block node is read-only")
        node = daemon.services.graph["n"]
        with pytest.raises(RequestError, match="Block node is read-only"):
            await daemon.services.streams.start(StreamRequest(node, "j"))
        assert client.events == []


async def test_a_raw_image_goes_on_in_another_file(tmp_path: Path) -> None:
    """What was written before is in the one that it had then."""
    contents = {"one": b"1" * CLUSTER, "two": b"2" * CLUSTER}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        for name in contents:
            file = {"driver": "file", "node-name": name, "filename": str(tmp_path / name)}
            await client.command("blockdev-add", file)
        raw = {"driver": "raw", "node-name": "raw", "file": "one"}
        await client.command("blockdev-add", raw)
        image = daemon.services.graph["raw"]
        await image.write(0, b"w" * 512)
        await client.command("blockdev-reopen", options=[{**raw, "file": "two"}])
        assert (await image.read(0, 512), image.filename) == (b"2" * 512, str(tmp_path / "two"))
        await image.write(512, b"w" * 512)
        # Nobody else may write to it now, and the first file is nobody's.
        await client.command("blockdev-del", {"node-name": "one"})
    assert (tmp_path / "one").read_bytes() == b"w" * 512 + contents["one"][512:]
    assert (tmp_path / "two").read_bytes() == b"2" * 512 + b"w" * 512 + contents["two"][1024:]


async def test_a_stream_below_a_raw_image(tmp_path: Path) -> None:
    """The filter of the job comes between them, and goes again."""
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        image = {
            "driver": "qcow2",
            "node-name": "q",
            "file": {"driver": "file", "filename": str(chain.active)},
        }
        await client.command("blockdev-add", {"driver": "raw", "node-name": "raw", "file": image})
        await client.command("block-stream", {"job-id": "j", "device": "q"})
        await client.event("JOB_STATUS_CHANGE", status="null")
        assert await read_all(daemon.services.graph["raw"]) == chain.content
        assert daemon.services.graph["raw"].children()["file"] is daemon.services.graph["q"]
    assert qemu_img.content(chain.active) == chain.content


# -- copy-on-read down to a bottom ------------------------------------------------------------


def node(name: str, path: Path, backing: str | None = None) -> str:
    options = {"driver": "qcow2", "node-name": name, "file": {"driver": "file", "filename": str(path)}}
    return json.dumps({**options, "backing": backing})


async def test_the_base_of_copy_on_read_may_leave_the_chain(tmp_path: Path) -> None:
    """A stream into the bottom takes away what is below it; links above stay frozen, others do not."""
    chain = await make(tmp_path, LAYERS[:3])
    other = qemu_img.create(tmp_path / "other.qcow2", CLUSTER)
    base, middle, active = chain.paths
    words = [node("base", base), node("middle", middle, "base"), node("active", active, "middle")]
    words += [node("other", other, "base")]
    front = {"driver": "copy-on-read", "node-name": "front", "file": "active", "bottom": "middle"}
    options = [word for blockdev in (*words, json.dumps(front)) for word in ("--blockdev", blockdev)]
    async with running(tmp_path, *options) as daemon:
        client = await daemon.qmp()
        await client.command("block-stream", {"device": "middle", "job-id": "j"})
        await client.event("BLOCK_JOB_COMPLETED")
        await client.command("blockdev-reopen", options=[json.loads(node("other", other))])
        error = await refusal(client, "blockdev-reopen", options=[json.loads(node("active", active))])
        assert error == ("GenericError", "Cannot change frozen 'backing' link from 'active' to 'middle'")


async def test_nothing_is_copied_from_behind_a_filter_below_the_bottom(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS[:3])
    base, middle, active = chain.paths
    group = json.dumps({"qom-type": "throttle-group", "id": "group"})
    below = {"driver": "throttle", "node-name": "below", "throttle-group": "group", "file": "base"}
    front = {"driver": "copy-on-read", "node-name": "front", "file": "active", "bottom": "middle"}
    words = [node("base", base), json.dumps(below), node("middle", middle, "below")]
    words += [node("active", active, "middle"), json.dumps(front)]
    options = [word for blockdev in words for word in ("--blockdev", blockdev)]
    export = ("--export", "nbd,id=e,node-name=front,name=vda,writable=on")
    async with running(tmp_path, "--object", group, *options, *export) as daemon:
        guest = await daemon.guest("vda")
        assert await guest.read(0, len(chain.content)) == chain.content
    own = {
        start // CLUSTER
        for extent in qemu_img.map_of(active, "qcow2")
        if not extent["depth"]
        for start in range(extent["start"], extent["start"] + extent["length"], CLUSTER)
    }
    assert own == {0, 1, 3, 6, 7}, "what the active image and the middle one have"
