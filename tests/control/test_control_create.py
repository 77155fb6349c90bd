"""blockdev-create: files and images as jobs that are not block jobs."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from blockd.commands import creation
from blockd.devices.changes import Change, make_changes
from blockd.devices.reopening import Reopen
from blockd.errors import RequestError
from tests import qemu_img
from tests.chains import make, read_all
from tests.control.running import refusal, running, until
from tests.qmp_client import Json, QmpClient

MIB = 1 << 20
SUCCESS = ["created", "running", "waiting", "pending", "concluded", "null"]
FAILURE = ["created", "running", "aborting", "concluded", "null"]


async def created(client: QmpClient, **options: object) -> Json:
    """Create, wait for the end and dismiss; returns what query-jobs told in between."""
    first = len(client.events)
    dashed = {name.replace("_", "-"): value for name, value in options.items()}
    await client.command("blockdev-create", {"job-id": "c", "options": dashed})
    await client.event("JOB_STATUS_CHANGE", id="c", status="concluded")
    (told,) = await client.command("query-jobs")
    assert await client.command("query-block-jobs") == []
    found = await refusal(client, "block-job-dismiss", id="c")
    assert found == ("DeviceNotActive", "Block job 'c' not found")
    await client.command("job-dismiss", id="c")
    await client.event("JOB_STATUS_CHANGE", id="c", status="null")
    # Only these: no block job was there.
    statuses = [event["data"]["status"] for event in client.events[first:]]
    assert statuses == (FAILURE if "error" in told else SUCCESS)
    assert (told["type"], told["current-progress"], told["total-progress"]) == ("create", 1, 1)
    return told


async def test_file_then_image_then_overlay(tmp_path: Path) -> None:
    """What management tools do before a snapshot: a file, a node on it, the image in it, the node on that."""
    chain = await make(tmp_path, ["AB0-A-AB"])
    path, size = tmp_path / "new.qcow2", len(chain.content)
    async with running(tmp_path, "--device", f"vda={chain.active}") as daemon:
        client, guest = await daemon.qmp(), await daemon.guest("vda")
        assert "error" not in await created(client, driver="file", filename=str(path), size=0)
        await client.command("blockdev-add", {"driver": "file", "node-name": "f", "filename": str(path)})
        backing = {"backing_file": str(chain.active), "backing_fmt": "qcow2"}
        assert "error" not in await created(client, driver="qcow2", file="f", size=size, **backing)
        await client.command(
            "blockdev-add", {"driver": "qcow2", "node-name": "new", "file": "f", "backing": None}
        )
        await client.command("blockdev-snapshot", node="vda", overlay="new")
        await guest.write(0, b"new")
        assert await guest.read(0, size) == b"new" + chain.content[3:]
    assert qemu_img.content(path) == b"new" + chain.content[3:]
    qemu_img.assert_sound(path)


async def test_image_in_a_file_that_is_opened_for_it(tmp_path: Path) -> None:
    path = tmp_path / "new.img"
    path.write_bytes(b"whatever it was" * 100_000)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        file = {"driver": "file", "filename": str(path)}
        assert "error" not in await created(client, driver="qcow2", file=file, size=MIB, cluster_size=4096)
        assert await client.command("query-named-block-nodes") == []
    assert qemu_img.content(path) == bytes(MIB)
    assert "cluster_size: 4096" in qemu_img.qemu("qemu-img", "info", path)


async def test_add_cow_file_and_the_image_beside_it(tmp_path: Path) -> None:
    """A raw disk, and a new raw file that it can be copied to."""
    disk, path = tmp_path / "disk.raw", tmp_path / "copy.add-cow"
    disk.write_bytes(b"A" * MIB)
    async with running(tmp_path, "--device", f"vda={disk}") as daemon:
        client = await daemon.qmp()
        assert "error" not in await created(client, driver="file", filename=str(path), size=0)
        told = {"file": {"driver": "file", "filename": str(path)}, "size": MIB, "cluster_size": 4096}
        backing = {"backing_file": str(disk), "backing_fmt": "raw"}
        failed = await created(client, driver="add-cow", image_file="disk.raw", **told, **backing)
        assert failed["error"].startswith("Could not open '" + str(disk))
        assert "error" not in await created(client, driver="add-cow", image_file="x.img", **told, **backing)
        await client.command("block_switch", device="vda", filename=str(path), format="add-cow")
        await client.command("block_stream", device="vda")
        await client.event("BLOCK_STREAM_COMPLETED", device="vda", image=str(tmp_path / "x.img"))
    assert (tmp_path / "x.img").read_bytes() == b"A" * MIB


async def test_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_bytes(b"data")
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        told = await created(client, driver="file", filename=str(path), size=MIB)
        assert told["error"] == f"Could not create '{path}': the file exists and is not overwritten"
        told = await created(client, driver="file", filename=f"{tmp_path}/nope/x", size=MIB)
        assert told["error"] == f"Could not create '{tmp_path}/nope/x': No such file or directory"
    assert path.read_bytes() == b"data"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"size": 1000}, "Image size must be a multiple of 512 bytes"),
        ({"cluster_size": 1000}, "Cluster size must be a power of two between 512 and 2048k"),
        ({"cluster_size": 4 * MIB}, "Cluster size must be a power of two between 512 and 2048k"),
        ({"backing_fmt": "qcow2"}, "Backing format cannot be used without backing file"),
        ({"refcount_bits": 7}, "Refcount width must be a power of two and may not exceed 64 bits"),
        ({"version": "v2", "lazy_refcounts": True}, "Lazy refcounts only supported with compatibility level"),
        (
            {"preallocation": "full", "backing_file": "b", "backing_fmt": "raw"},
            "Backing file and preallocation can only be used at the same time if extended_l2 is on",
        ),
        ({"file": "nope"}, "Cannot find device='nope' nor node-name='nope'"),
        ({"file": "ro"}, "Block node is read-only"),
        ({"file": "image"}, "An image is made in a file, and 'image' is of driver 'qcow2'"),
        ({"file": {"driver": "file", "filename": "nope"}}, "Could not open 'nope': No such file"),
        (
            {"file": "used"},
            "Permission conflict on node 'used': permissions 'write, resize' are both required by an "
            "unnamed block device (uses node 'used' as 'root' child) and unshared by node 'image' (uses node "
            "'used' as 'file' child).",
        ),
    ],
)
async def test_image_that_cannot_be(tmp_path: Path, options: dict[str, object], error: str) -> None:
    for name in ("f", "ro", "used"):
        qemu_img.create(tmp_path / name, MIB)
    before = {name: (tmp_path / name).read_bytes() for name in ("f", "ro", "used")}
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        for name in ("f", "ro", "used"):
            node = {"driver": "file", "node-name": name, "filename": str(tmp_path / name)}
            await client.command("blockdev-add", {**node, "read-only": name == "ro"})
        await client.command("blockdev-add", {"driver": "qcow2", "node-name": "image", "file": "used"})
        told = await created(client, **{"driver": "qcow2", "file": "f", "size": MIB, **options})
        assert told["error"].startswith(error)
        # Nobody is left who holds the file.
        assert all(not daemon.services.graph.users(node) for node in daemon.services.graph.nodes.values())
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


async def test_errors_of_the_request_itself(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        cases: list[tuple[dict[str, object], str]] = [
            ({"driver": "zap"}, "Parameter 'driver' does not accept value 'zap'"),
            ({"driver": "copy-on-read"}, "Driver does not support blockdev-create"),
            ({"driver": "file", "size": 1}, "Parameter 'options.filename' is missing"),
            ({"driver": "qcow2", "file": "f", "size": 1, "zap": 1}, "Parameter 'options.zap' is unexpected"),
            (
                {"driver": "qcow2", "file": "f", "size": 1, "version": "v9"},
                "Parameter 'version' does not accept value 'v9'",
            ),
        ]
        for options, text in cases:
            found = await refusal(client, "blockdev-create", job_id="c", options=options)
            assert found == ("GenericError", text)
        options = {"driver": "file", "filename": "x", "size": 1}
        found = await refusal(client, "blockdev-create", job_id="9c", options=options)
        assert found == ("GenericError", "Invalid job ID '9c'")
        assert client.events == []


async def test_image_with_subclusters_says_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "new.qcow2"
    path.touch()
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await client.command("blockdev-add", {"driver": "file", "node-name": "f", "filename": str(path)})
        told = await created(client, driver="qcow2", file="f", size=MIB, extended_l2=True)
        assert "error" not in told
        await client.command("blockdev-add", {"driver": "qcow2", "node-name": "new", "file": "f"})
        nodes = await client.command("query-named-block-nodes")
        (image,) = [node["image"] for node in nodes if node["node-name"] == "new"]
        assert (image["cluster-size"], image["format-specific"]["data"]["extended-l2"]) == (65536, True)
    qemu_img.assert_sound(path)


async def test_file_is_left_alone_while_an_image_is_made_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, goes_on = asyncio.Event(), asyncio.Event()

    async def create_later(*arguments: object) -> None:
        reached.set()
        await goes_on.wait()

    monkeypatch.setattr(creation, "create_image", create_later)
    qemu_img.create(tmp_path / "f", MIB)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        node = {"driver": "file", "node-name": "f", "filename": str(tmp_path / "f")}
        await client.command("blockdev-add", node)
        options = {"driver": "qcow2", "file": "f", "size": MIB}
        await client.command("blockdev-create", {"job-id": "c", "options": options})
        await reached.wait()
        tries: list[tuple[str, dict[str, object]]] = [
            ("block-export-add", {"type": "nbd", "id": "e", "node-name": "f"}),
            ("block_resize", {"node-name": "f", "size": MIB}),
            ("blockdev-add", {"driver": "qcow2", "node-name": "q", "file": "f", "read-only": True}),
        ]
        for command, arguments in tries:
            found = await refusal(client, command, **arguments)
            assert "by blockdev-create (uses node" in found[1]
        goes_on.set()
        await client.event("JOB_STATUS_CHANGE", id="c", status="concluded")
        for command, arguments in tries:
            await client.command(command, arguments)
            if command == "block-export-add":
                await client.command("block-export-del", id="e")


class Fails(Change):
    """Lets something else happen when it is its turn, and then cannot be performed."""

    def __init__(self, meanwhile: Callable[[], Awaitable[None]]) -> None:
        self._meanwhile = meanwhile

    async def prepare(self) -> None:
        """Nothing is needed."""

    async def perform(self) -> None:
        await self._meanwhile()
        raise RequestError("no")

    async def undo(self) -> None:
        """It was not performed."""

    async def clean(self) -> None:
        """Nothing was opened."""


async def test_job_that_ends_amid_another_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image loses its backing → a job ends, whose file nobody needs → the change fails → as before."""
    chain, may_end = await make(tmp_path, ["AB0-A-AB", "-C-C--0-"]), asyncio.Event()

    async def held(*_: object) -> None:
        await may_end.wait()

    async def let_job_end() -> None:
        may_end.set()
        for _ in range(100):
            await asyncio.sleep(0)

    monkeypatch.setattr(creation, "create_image", held)
    async with running(tmp_path) as daemon:
        client, services = await daemon.qmp(), daemon.services
        file = {"driver": "file", "filename": str(chain.active)}
        top = {"driver": "qcow2", "node-name": "top", "file": file}
        await client.command("blockdev-add", top)
        image = services.graph["top"]
        (tmp_path / "new").touch()
        making = {"driver": "qcow2", "file": {**file, "filename": str(tmp_path / "new")}, "size": MIB}
        await client.command("blockdev-create", {"job-id": "c", "options": making})
        await until(lambda: len(services.graph.nodes) == len(chain.paths) * 2 + 1)
        reopen = Reopen(services.devices, services.streams, {**top, "backing": None})
        with pytest.raises(RequestError, match="no"):
            await make_changes(services.devices, [reopen, Fails(let_job_end)])
        assert await read_all(image) == chain.content
        await client.event("JOB_STATUS_CHANGE", id="c", status="concluded")
        assert len(services.graph.nodes) == len(chain.paths) * 2
