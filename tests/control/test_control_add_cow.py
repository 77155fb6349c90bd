"""Live block copy from a raw disk to a raw disk: add-cow is there only while it is needed."""

from collections.abc import Callable
from pathlib import Path

from blockd.cli.image.create import NewImage, create_image
from blockd.drivers import FORMATS
from blockd.formats.add_cow.image import AddCowImage
from blockd.formats.raw.image import RawImage
from blockd.protocols.new_file import new_file
from tests import qemu_img
from tests.control.running import refusal, running
from tests.layers import opened
from tests.loop_device import can_loop, loop_device
from tests.model import drawn
from tests.qmp_client import QmpClient

CLUSTER = 65536
DRAWING = "AB0-CD00-0AB----"
SIZE = len(DRAWING) * CLUSTER


def sparse_raw(path: Path, drawing: str = DRAWING) -> bytes:
    """A raw file with holes where nothing is drawn."""
    content = drawn([drawing], CLUSTER)
    with path.open("wb") as file:
        file.truncate(len(content))
        for index, kind in enumerate(drawing):
            if kind not in "-0":
                file.seek(index * CLUSTER)
                file.write(content[index * CLUSTER : (index + 1) * CLUSTER])
    return content


def data_size(path: Path) -> int:
    return path.stat().st_blocks * 512


async def make_target(folder: Path, backing: Path, *, size: int = SIZE, name: str = "b") -> Path:
    """A sparse raw file and its add-cow file over `backing`, a raw one."""
    path = folder / f"{name}.add-cow"
    async with new_file(str(path)) as file:
        await FORMATS["add-cow"].create(file, size, backing_filename=backing.name, backing_format="raw")
    return path


async def switched(client: QmpClient, path: Path) -> None:
    await client.command("block_switch", device="vda", filename=str(path), format="add-cow")


async def test_live_copy_from_raw_to_raw(tmp_path: Path) -> None:
    source, target = tmp_path / "a.raw", tmp_path / "b.raw"
    expected = bytearray(sparse_raw(source))
    add_cow = await make_target(tmp_path, source)
    async with running(tmp_path, "--device", f"vda={source}") as daemon:
        client, guest = await daemon.qmp(), await daemon.guest("vda")
        await guest.write(5, b"before")
        expected[5:11] = b"before"
        await switched(client, add_cow)
        assert (await client.event("BLOCK_SWITCHED"))["filename"] == str(add_cow)
        old = source.read_bytes()
        await guest.write(CLUSTER + 7, b"behind")
        expected[CLUSTER + 7 : CLUSTER + 13] = b"behind"
        assert bytes(await guest.read(0, SIZE)) == expected
        await client.command("block_stream", device="vda")
        completed = await client.event("BLOCK_STREAM_COMPLETED")
        copied = completed.pop("copied")
        assert 0 < copied < SIZE
        assert completed == {"device": "vda", "len": SIZE, "offset": SIZE, "image": str(target)}
        device = daemon.services.devices.get("vda")
        assert isinstance(device.node, RawImage)
        assert {node.filename for node in daemon.services.graph.nodes.values()} == {str(target)}
        await guest.write(3 * CLUSTER, b"afterwards")
        expected[3 * CLUSTER : 3 * CLUSTER + 10] = b"afterwards"
        assert bytes(await guest.read(0, SIZE)) == expected
    assert target.read_bytes() == bytes(expected)
    assert source.read_bytes() == old
    assert data_size(target) <= data_size(source) + CLUSTER


async def test_live_copy_to_what_held_something_else(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """What was on the target is seen at no time, and is gone in the end, also where the source has holes.

    Block devices, which go the same way as files, are tried where they can be made; the report says so.
    """
    with_device = can_loop(tmp_path)
    record_property("with_block_device", with_device)
    used = tmp_path / "used.img"
    used.write_bytes(b"\xee" * SIZE)
    await copy_live_onto(used, tmp_path)
    assert data_size(used) <= data_size(tmp_path / "a.raw") + 2 * CLUSTER, "holes are data in the target"
    if with_device:
        used.write_bytes(b"\xee" * SIZE)
        with loop_device(used) as device:
            await copy_live_onto(device, tmp_path)


async def copy_live_onto(target: Path, folder: Path) -> None:
    source, add_cow = folder / "a.raw", folder / f"{target.name}.add-cow"
    expected = bytearray(sparse_raw(source))
    told = NewImage("add-cow", SIZE, source.name, "raw", {"image_file": str(target)})
    await create_image(str(add_cow), told)
    async with running(folder, "--device", f"vda={source}", "--image-paths", "/dev") as daemon:
        client, guest = await daemon.qmp(), await daemon.guest("vda")
        await switched(client, add_cow)
        assert bytes(await guest.read(0, SIZE)) == expected
        await guest.write(4 * CLUSTER + 100, b"in a hole")
        expected[4 * CLUSTER + 100 : 4 * CLUSTER + 109] = b"in a hole"
        await client.command("block_stream", device="vda")
        completed = await client.event("BLOCK_STREAM_COMPLETED")
        assert completed["image"] == str(target)
        assert bytes(await guest.read(0, SIZE)) == expected
    assert target.read_bytes() == bytes(expected)


async def test_what_add_cow_file_says_when_all_is_in_the_image(tmp_path: Path) -> None:
    source = tmp_path / "a.raw"
    expected = sparse_raw(source)
    add_cow = await make_target(tmp_path, source)
    async with running(tmp_path, "--device", f"vda={source}") as daemon:
        client = await daemon.qmp()
        await switched(client, add_cow)
        await client.command("block_stream", device="vda")
        await client.event("BLOCK_STREAM_COMPLETED")
    source.unlink()
    async with running(tmp_path, "--device", f"vda={add_cow}") as daemon:
        active = daemon.services.devices.get("vda").active
        assert isinstance(active, AddCowImage)
        assert active.is_complete
        guest = await daemon.guest("vda")
        assert bytes(await guest.read(0, SIZE)) == expected
        await guest.write(3 * CLUSTER, b"more")
    assert (tmp_path / "b.raw").read_bytes()[3 * CLUSTER :][:4] == b"more"


async def test_status_while_copying(tmp_path: Path) -> None:
    source, target = tmp_path / "a.raw", tmp_path / "b.raw"
    sparse_raw(source)
    add_cow = await make_target(tmp_path, source)
    async with running(tmp_path, "--device", f"vda={source}") as daemon:
        client = await daemon.qmp()
        await switched(client, add_cow)
        await client.command("block_stream", device="vda", speed=1)
        [status] = await client.command("block_stream_status", device="vda")
        assert (status["image"], status["all-allocated"]) == (str(target), False)
        await client.command("block_stream_cancel", device="vda")
        [node] = [
            node for node in await client.command("query-named-block-nodes") if node["drv"] == "add-cow"
        ]
        specific = node["image"]["format-specific"]
        assert specific["data"] == {"image-file": str(target), "all-allocated": False}
        assert node["image"]["backing-filename"] == "a.raw"


async def test_stream_to_a_base_keeps_add_cow_file_and_base(tmp_path: Path) -> None:
    """Only what is above the base is copied; the plain image alone is not the disk then."""
    base, middle = tmp_path / "a.raw", tmp_path / "middle.qcow2"
    expected = bytearray(sparse_raw(base))
    qemu_img.create(middle, SIZE, backing=base, backing_format="raw")
    add_cow = tmp_path / "b.add-cow"
    await create_image(str(add_cow), NewImage("add-cow", SIZE, middle.name, "qcow2"))
    async with running(tmp_path, "--device", f"vda={middle}") as daemon:
        client, guest = await daemon.qmp(), await daemon.guest("vda")
        await guest.write(CLUSTER, b"middle")
        expected[CLUSTER : CLUSTER + 6] = b"middle"
        await switched(client, add_cow)
        await guest.write(3 * CLUSTER, b"top")
        expected[3 * CLUSTER : 3 * CLUSTER + 3] = b"top"
        await client.command("block_stream", device="vda", base=str(base))
        completed = await client.event("BLOCK_STREAM_COMPLETED")
        assert "image" not in completed
        assert bytes(await guest.read(0, SIZE)) == expected
    middle.unlink()
    async with opened(add_cow, "add-cow", read_only=True) as disk:
        assert disk.node.backing is not None
        assert disk.node.backing.filename == str(base)
        assert bytes(await disk.node.read(0, SIZE)) == expected
    assert data_size(tmp_path / "b.raw") <= 3 * CLUSTER, "more was copied than the base lacks"


async def test_node_that_a_client_has_added_stays(tmp_path: Path) -> None:
    """A client speaks of it by its name; that it is not needed any more is told all the same."""
    expected = sparse_raw(tmp_path / "a.raw")
    add_cow = await make_target(tmp_path, tmp_path / "a.raw")
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        node = {
            "driver": "add-cow",
            "node-name": "copy",
            "file": {"driver": "file", "filename": str(add_cow)},
        }
        await client.command("blockdev-add", node)
        await client.command("block-stream", {"job-id": "j", "device": "copy"})
        completed = await client.event("BLOCK_JOB_COMPLETED")
        assert completed["image"] == str(tmp_path / "b.raw")
        [told] = [n for n in await client.command("query-named-block-nodes") if n["node-name"] == "copy"]
        assert told["image"]["format-specific"]["data"]["all-allocated"] is True
        assert "backing-filename" not in told["image"]
        await client.command("blockdev-del", {"node-name": "copy"})
        assert await client.command("query-named-block-nodes") == []
    assert (tmp_path / "b.raw").read_bytes() == expected


async def test_what_keeps_its_backing_has_to_record_it(tmp_path: Path) -> None:
    """An add-cow image that records no backing file is complete, whatever it lacks."""
    source = tmp_path / "a.raw"
    expected = sparse_raw(source)
    add_cow = await make_target(tmp_path, source)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        file = {"driver": "file", "filename": str(add_cow)}
        await client.command("blockdev-add", {"driver": "add-cow", "node-name": "n", "file": file})
        names = {"device": "n", "image_node_name": "n", "backing_file": ""}
        found = await refusal(client, "change-backing-file", **names)
        assert found[1].endswith(
            "has to record the backing file that it keeps: an add-cow image without one is complete"
        )
        assert await daemon.services.graph["n"].read(0, SIZE) == expected
