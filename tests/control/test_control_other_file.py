"""Images that go on in another file while guests use them."""

import asyncio
import itertools
from pathlib import Path

import pytest

from blockd.devices.reopening import Reopen
from blockd.drivers import check_blockdev
from blockd.errors import StorageError
from blockd.formats.qcow2.image import Qcow2Image
from blockd.protocols.nbd_client import NbdClient
from tests import qemu_img
from tests.control.running import Running, refusal, running
from tests.iotests_ideas.nodes import (
    Options,
    add,
    export,
    file,
    finished,
    nodes_of,
    qcow2,
    reopen,
    stream,
    throttle,
)
from tests.qmp_client import QmpClient

CLUSTER = 65536
SIZE = 16 * CLUSTER


def image(folder: Path, name: str, *commands: str, size: int = SIZE, cluster_size: int = CLUSTER) -> Path:
    path = qemu_img.create(folder / f"{name}.qcow2", size, f"cluster_size={cluster_size}")
    if commands:
        qemu_img.write(path, *commands)
    return path


async def add_group(client: QmpClient) -> None:
    await client.command("object-add", {"qom-type": "throttle-group", "id": "g"})


async def refused(client: QmpClient, *nodes: Options) -> str:
    error_class, text = await refusal(client, "blockdev-reopen", options=list(nodes))
    assert error_class == "GenericError"
    return text


class Guest:
    """Writes cluster after cluster, and reads each again, until it is told to stop."""

    def __init__(self, client: NbdClient) -> None:
        self._client = client
        self.content = bytearray(client.size)
        self.is_stopped = False
        self.written = 0

    async def run(self) -> None:
        for number in itertools.count():
            if self.is_stopped:
                return
            # Across a border of clusters, so that new ones and those of before are written.
            offset = number * 3 * CLUSTER // 2 % (self._client.size - CLUSTER)
            data = (number % 255 + 1).to_bytes(1, "big") * CLUSTER
            await self._client.write(offset, data)
            self.content[offset : offset + CLUSTER] = data
            assert await self._client.read(offset, CLUSTER) == data
            self.written += 1

    async def more(self) -> None:
        """Wait until it has written something more."""
        wanted = self.written + 2
        while self.written < wanted:  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_a_throttle_comes_and_goes_below_an_image_and_its_guest_sees_nothing(tmp_path: Path) -> None:
    """The file gets longer while the throttle is not in between, and has to know it."""
    path = image(tmp_path, "disk", size=4 * SIZE)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add_group(client)
        node = qcow2("n", file(path, node_name="f"))
        await add(client, node, throttle("t", "f", "g"))
        await export(client, "n")
        guest = Guest(await daemon.guest("n"))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(guest.run())
            for below in ["t", "f"] * 5:
                await guest.more()
                await reopen(client, {**node, "file": below})
                found = daemon.services.graph["n"].children()["file"]
                assert found.node_name == below
            await guest.more()
            guest.is_stopped = True
    qemu_img.assert_sound(path)
    assert qemu_img.content(path) == guest.content


async def test_what_an_image_has_in_memory_is_flushed_before_it_leaves_its_file(tmp_path: Path) -> None:
    """No guest has flushed."""
    one, two = image(tmp_path, "one"), image(tmp_path, "two")
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add(client, file(one, node_name="f1"), file(two, node_name="f2"), qcow2("n", "f1"))
        await export(client, "n")
        guest = await daemon.guest("n")
        await guest.write(0, b"1" * CLUSTER)
        await reopen(client, qcow2("n", "f2"))
        assert await guest.read(0, CLUSTER) == bytes(CLUSTER)
        # Nobody has it any more: it is as if it had been closed.
        await client.command("blockdev-del", {"node-name": "f1"})
        qemu_img.assert_sound(one)
        assert qemu_img.content(one)[:CLUSTER] == b"1" * CLUSTER
        await guest.write(CLUSTER, b"2" * CLUSTER)
    qemu_img.assert_sound(two)
    assert qemu_img.content(two)[: 2 * CLUSTER] == bytes(CLUSTER) + b"2" * CLUSTER


async def swapped(daemon: Running, client: QmpClient, paths: list[Path]) -> list[NbdClient]:
    """Two guests, each of whom has written to its own image and reads what is in the other one."""
    nodes = [qcow2(f"n{number}", file(path, node_name=f"f{number}")) for number, path in enumerate(paths)]
    await add(client, *nodes)
    for name in ("n0", "n1"):
        await export(client, name)
    guests = [await daemon.guest(name) for name in ("n0", "n1")]
    await guests[0].write(0, b"0" * CLUSTER)
    await guests[1].write(SIZE - CLUSTER, b"1" * CLUSTER)
    await reopen(client, {**nodes[0], "file": "f1"}, {**nodes[1], "file": "f0"})
    assert await guests[0].read(SIZE - CLUSTER, CLUSTER) == b"1" * CLUSTER
    assert await guests[1].read(0, CLUSTER) == b"0" * CLUSTER
    return guests


async def test_two_images_swap_their_files(tmp_path: Path) -> None:
    paths = [image(tmp_path, "zero", "write -P 7 512k 64k"), image(tmp_path, "one")]
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        guests = await swapped(daemon, client, paths)
        await guests[0].write(CLUSTER, b"x" * CLUSTER)
        text = await refused(client, qcow2("n0", "f0"))
        assert text == (
            "Permission conflict on node 'f0': permissions 'write, resize' are both required by node 'n1' "
            "(uses node 'f0' as 'file' child) and unshared by node 'n0' (uses node 'f0' as 'file' child)."
        )
        await reopen(client, qcow2("n0", "f0"), qcow2("n1", "f1"))
        assert await guests[0].read(0, CLUSTER) == b"0" * CLUSTER
        assert await guests[1].read(CLUSTER, CLUSTER) == b"x" * CLUSTER
        await guests[0].write(3 * CLUSTER, b"y" * CLUSTER)
    for path in paths:
        qemu_img.assert_sound(path)
    assert qemu_img.content(paths[0])[3 * CLUSTER :][:CLUSTER] == b"y" * CLUSTER


async def test_all_is_as_before_if_one_of_several_cannot_be(tmp_path: Path) -> None:
    paths = [image(tmp_path, "zero"), image(tmp_path, "one")]
    (tmp_path / "none").write_bytes(bytes(SIZE))
    other = image(tmp_path, "other")
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        guests = await swapped(daemon, client, paths)
        await add(client, file(tmp_path / "none", node_name="none"), qcow2("n2", other))
        await guests[0].write(CLUSTER, b"x" * CLUSTER)
        back = [qcow2("n0", "f0"), qcow2("n1", "f1")]
        assert await refused(client, *back, qcow2("n2", "none")) == (
            f"'{tmp_path / 'none'}' is not a qcow2 image"
        )
        assert await guests[0].read(CLUSTER, CLUSTER) == b"x" * CLUSTER
        await guests[0].write(2 * CLUSTER, b"y" * CLUSTER)
        await guests[1].write(CLUSTER, b"z" * CLUSTER)
    for path in paths:
        qemu_img.assert_sound(path)
    assert qemu_img.content(paths[1])[CLUSTER : 3 * CLUSTER] == b"x" * CLUSTER + b"y" * CLUSTER
    assert qemu_img.content(paths[0])[: 2 * CLUSTER] == b"0" * CLUSTER + b"z" * CLUSTER


async def test_an_image_stays_in_its_file_if_that_cannot_be_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = image(tmp_path, "one"), image(tmp_path, "two")
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add(client, file(one, node_name="f1"), file(two, node_name="f2"), qcow2("n", "f1"))
        node = daemon.services.graph["n"]

        async def fail(image: Qcow2Image) -> None:
            raise StorageError("Could not sync 'one'", errno=5)

        with monkeypatch.context() as patch:
            patch.setattr(Qcow2Image, "prepare_to_move", fail)
            assert await refused(client, qcow2("n", "f2")) == "Could not sync 'one'"
        assert node.children()["file"].node_name == "f1"
        await reopen(client, qcow2("n", "f2"))


async def test_what_an_image_cannot_go_on_in(tmp_path: Path) -> None:
    one, larger = image(tmp_path, "one"), image(tmp_path, "larger", size=2 * SIZE)
    overlay = qemu_img.create(tmp_path / "overlay.qcow2", SIZE, backing=one)
    fine = image(tmp_path, "fine", cluster_size=4096)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        paths = {"one": one, "larger": larger, "overlay": overlay, "fine": fine}
        await add(client, *(file(path, node_name=name) for name, path in paths.items()))
        await add(client, qcow2("n", "one"), qcow2("q", image(tmp_path, "q")))
        await reopen(client, qcow2("n", "larger"))
        assert daemon.services.graph["n"].size == 2 * SIZE
        await reopen(client, qcow2("n", "one"))
        assert await refused(client, qcow2("n", "overlay")) == "backing is missing for 'n'"
        assert await refused(client, qcow2("n", "q")) == "Cannot change the option 'file'"
        await export(client, "n", writable=False)
        text = await refused(client, qcow2("n", "larger"))
        assert text.startswith("Permission conflict on node 'n': permissions 'resize' are both required")
        assert daemon.services.graph["n"].size == SIZE
        await add(client, {"driver": "copy-on-read", "node-name": "front", "file": "n"})
        assert await refused(client, qcow2("n", "fine")) == "Cannot change the option 'file'"
        await client.command("blockdev-del", {"node-name": "front"})
        await reopen(client, qcow2("n", "fine"))
        assert (await nodes_of(client))["n"]["file"] == str(fine)


async def test_an_image_stays_in_its_file_while_a_job_copies_into_it(tmp_path: Path) -> None:
    base = image(tmp_path, "base", "write -P 1 0 1M")
    overlay = qemu_img.create(tmp_path / "overlay.qcow2", SIZE, backing=base)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add_group(client)
        node = qcow2("n", file(overlay, node_name="f"), backing=qcow2("base", file(base, node_name="below")))
        await add(client, node, throttle("t", "f", "g"), throttle("t-below", "below", "g"))
        await stream(client, "j", "n", speed=1)
        busy = "Node '{}' is busy: block device is in use by block job: stream"
        assert await refused(client, qcow2("n", "t", backing="base")) == busy.format("n")
        assert await refused(client, qcow2("base", "t-below", read_only=True)) == busy.format("base")
        await client.command("block-job-set-speed", device="j", speed=0)
        assert "error" not in await finished(client, "j")
        await reopen(client, qcow2("n", "t", backing=None))
    assert qemu_img.content(overlay) == qemu_img.content(base)


async def test_no_image_is_touched_if_a_job_copies_into_one_of_several(tmp_path: Path) -> None:
    """What the job has under way would be cut off."""
    base = image(tmp_path, "base", "write -P 1 0 1M")
    overlay = qemu_img.create(tmp_path / "overlay.qcow2", SIZE, backing=base)
    paths = [image(tmp_path, "one"), image(tmp_path, "two")]
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add(client, *(file(path, node_name=path.stem) for path in paths))
        await add(client, qcow2("n", "one"), qcow2("o", overlay))
        await stream(client, "j", "o", speed=1)
        busy = daemon.services.graph["o"]
        assert isinstance(busy, Qcow2Image)
        await busy.metadata.relieve()
        assert busy.metadata.is_marked
        text = await refused(client, qcow2("n", "two"), qcow2("o", "one", backing=None))
        assert text == "Node 'o' is busy: block device is in use by block job: stream"
        assert busy.metadata.is_marked, "it was not treated as one that nobody uses"


async def test_guests_of_a_backing_image_that_is_told_along_are_held_too(tmp_path: Path) -> None:
    base = image(tmp_path, "base", "write -P 1 0 1M")
    other = image(tmp_path, "other")
    overlay = qemu_img.create(tmp_path / "overlay.qcow2", SIZE, backing=base)
    async with running(tmp_path) as daemon:
        client, services = await daemon.qmp(), daemon.services
        below = {"driver": "qcow2", "node-name": "below", "file": file(base)}
        await add(client, file(other, node_name="f", read_only=True), qcow2("top", overlay, backing=below))
        options = qcow2("top", overlay, backing={**below, "file": "f"})
        change = Reopen(services.devices, services.streams, check_blockdev(options, is_text=False))
        await change.prepare()
        assert {node.node_name for node in change.disks()} == {"top", "below"}
        await change.clean()


async def test_a_throttle_comes_below_a_backing_image(tmp_path: Path) -> None:
    base = image(tmp_path, "base", "write -P 1 0 1M")
    raw = tmp_path / "raw"
    raw.write_bytes(b"r" * SIZE)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add_group(client)
        for name, driver, path in (("q", "qcow2", base), ("r", "raw", raw)):
            overlay = qemu_img.create(tmp_path / f"{name}.over", SIZE, backing=path, backing_format=driver)
            below: Options = {"driver": driver, "node-name": name, "read-only": True}
            await add(client, file(path, node_name=f"{name}-file", read_only=True))
            await add(client, {**below, "file": f"{name}-file"}, qcow2(f"{name}-top", overlay, backing=name))
            await add(client, throttle(f"{name}-t", f"{name}-file", "g"))
            await export(client, f"{name}-top")
            guest = await daemon.guest(f"{name}-top")
            before = await guest.read(0, SIZE)
            await reopen(client, {**below, "file": f"{name}-t"})
            assert await guest.read(0, SIZE) == before


async def test_an_image_becomes_read_only_in_a_file_that_is(tmp_path: Path) -> None:
    one, two = image(tmp_path, "one"), image(tmp_path, "two", "write -P 2 0 1M")
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add(client, file(one, node_name="rw"), file(two, node_name="ro", read_only=True))
        await add(client, qcow2("n", "rw"))
        assert await refused(client, qcow2("n", "ro")) == "Block node is read-only"
        await reopen(client, qcow2("n", "ro", read_only=True))
        node = daemon.services.graph["n"]
        assert (await node.read(0, 1), node.read_only) == (b"\2", True)
        await reopen(client, qcow2("n", "rw"))
        assert (await node.read(0, 1), node.read_only) == (b"\0", False)
        await node.write(0, b"w" * 512)
    qemu_img.assert_sound(one)
    assert qemu_img.content(one)[:1] == b"w"


async def test_a_throttle_knows_what_a_file_has_become_since_it_was_put_there(tmp_path: Path) -> None:
    """As soon as an image is opened on it; otherwise what is behind the former end would be lost."""
    path = image(tmp_path, "disk")
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add_group(client)
        await add(client, file(path, node_name="f"), throttle("t", "f", "g"), qcow2("n", "f"))
        await daemon.services.graph["n"].write(0, b"w" * SIZE)
        await client.command("blockdev-del", {"node-name": "n"})
        await add(client, qcow2("n", "t"))
        assert await daemon.services.graph["n"].read(0, SIZE) == b"w" * SIZE
    qemu_img.assert_sound(path)


async def test_a_raw_image_with_guests_keeps_its_size(tmp_path: Path) -> None:
    for name, size in (("one", SIZE), ("two", SIZE), ("small", CLUSTER)):
        (tmp_path / name).write_bytes(name.encode()[:1] * size)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        names = ("one", "two", "small")
        await add(client, *(file(tmp_path / name, node_name=name) for name in names))
        raw: Options = {"driver": "raw", "node-name": "r", "file": "one"}
        await add(client, raw)
        await export(client, "r")
        guest = await daemon.guest("r")
        text = await refused(client, {**raw, "file": "small"})
        assert text.startswith("Permission conflict on node 'r': permissions 'resize' are both required")
        assert await guest.read(SIZE - 1, 1) == b"o"
        await reopen(client, {**raw, "file": "two"})
        assert await guest.read(SIZE - 1, 1) == b"t"
        await client.command("block-export-del", id="export-r", mode="hard")
        await reopen(client, {**raw, "file": "small"})
