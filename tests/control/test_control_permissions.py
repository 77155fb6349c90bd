"""Who may do what to a node: promises that are kept, files that belong to images, filters that go away."""

from pathlib import Path

import pytest

from blockd.drivers import FORMATS
from blockd.protocols.nbd_client import NbdClient
from blockd.protocols.new_file import new_file
from tests import qemu_img
from tests.chains import Chain, make
from tests.control.running import Running, refusal, running
from tests.qmp_client import QmpClient

LAYERS = ["AB0-A-AB", "-C-C--0-", "D------D"]
CLUSTER = 65536
SIZE = len(LAYERS[0]) * CLUSTER


def qcow2(name: str, path: Path, **more: object) -> dict[str, object]:
    return {"driver": "qcow2", "node-name": name, "file": {"driver": "file", "filename": str(path)}, **more}


async def made(path: Path, driver: str) -> Path:
    async with new_file(str(path)) as file:
        await FORMATS[driver].create(file, SIZE)
    return path


async def export(client: QmpClient, node_name: str, **more: object) -> None:
    arguments = {"type": "nbd", "id": node_name, "node-name": node_name, "writable": True, **more}
    await client.command("block-export-add", arguments)


# -- read-only is a promise ------------------------------------------------------------------------

READ_ONLY = ("GenericError", "Block node is read-only")


async def add_promised(client: QmpClient, chain: Chain) -> None:
    """top → mid → base, mid told to be read-only in each way there is: here, and in the options of top."""
    base = qcow2("base", chain.paths[0])
    mid = qcow2("mid", chain.paths[1], backing=base, **{"read-only": True})
    await client.command("blockdev-add", qcow2("top", chain.paths[2], backing=mid))
    await client.command(
        "blockdev-add", qcow2("alone", chain.active.with_name("alone.qcow2"), **{"read-only": True})
    )


@pytest.mark.parametrize("is_restarted", [False, True])
async def test_nothing_writes_to_what_was_added_read_only(tmp_path: Path, is_restarted: bool) -> None:
    chain = await make(tmp_path, LAYERS)
    alone = qemu_img.create(tmp_path / "alone.qcow2", SIZE)
    promised = [chain.paths[1], alone]
    before = []
    for path in promised:
        path.chmod(0o444)
        before.append((path.read_bytes(), path.stat().st_mtime_ns))
    state = ["--state-dir", str(tmp_path / "state")]
    if is_restarted:
        async with running(tmp_path, *state) as daemon:
            await add_promised(await daemon.qmp(), chain)
    async with running(tmp_path, *state) as daemon:
        client = await daemon.qmp()
        if not is_restarted:
            await add_promised(client, chain)
        for name in ("mid", "alone"):
            assert await refusal(client, "block-stream", job_id="j", device=name) == READ_ONLY
            found = await refusal(client, "block_resize", node_name=name, size=2 * SIZE)
            assert found[1] in (
                "Image is read-only",
                f"Node '{name}' is busy: node is used as backing hd of 'top'",
            )
            found = await refusal(
                client, "block-export-add", type="nbd", id="e", node_name=name, writable=True
            )
            assert found[1] == "Cannot export read-only node as writable"
        names = {"image_node_name": "mid", "backing_file": "other"}
        assert await refusal(client, "change-backing-file", device="top", **names) == READ_ONLY
        cor = {"driver": "copy-on-read", "node-name": "c", "file": "mid"}
        assert await refusal(client, "blockdev-add", **cor) == READ_ONLY
        find = {"driver": "qcow2", "file": {"driver": "file", "filename": str(alone)}, "size": SIZE}
        await client.command("blockdev-create", {"job-id": "c", "options": find})
        await client.event("JOB_STATUS_CHANGE", id="c", status="concluded")
        (job,) = await client.command("query-jobs")
        assert "error" in job
        # Only the image above is written when it is streamed into from there.
        await client.command("block-stream", {"job-id": "j", "device": "top"})
        await client.event("BLOCK_JOB_COMPLETED")
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in promised] == before
    assert qemu_img.content(chain.paths[2]) == chain.content


async def test_a_promise_can_be_taken_back_by_who_made_it(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await client.command("blockdev-add", qcow2("n", chain.active, **{"read-only": True}))
        assert await refusal(client, "block-stream", job_id="j", device="n") == READ_ONLY
        graph = daemon.services.graph
        backing = graph["n"].backing
        assert backing is not None
        await client.command("blockdev-reopen", options=[qcow2("n", chain.active, backing=backing.node_name)])
        # That a backing is read-only was nobody's wish, and may be lifted for its stream.
        assert backing.read_only
        await client.command("block-stream", {"job-id": "b", "device": backing.node_name})
        await client.event("BLOCK_JOB_COMPLETED", device="b")
        await client.command("block-stream", {"job-id": "j", "device": "n"})
        await client.event("BLOCK_JOB_COMPLETED", device="j")
        again = qcow2("n", chain.active, backing=None, **{"read-only": True})
        await client.command("blockdev-reopen", options=[again])
        assert await refusal(client, "block-stream", job_id="j", device="n") == READ_ONLY
    assert qemu_img.content(chain.active) == chain.content


async def test_file_that_is_told_read_only_keeps_its_image_so(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS[:2])
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        file = {"driver": "file", "filename": str(chain.paths[1]), "read-only": True}
        top = qemu_img.create(tmp_path / "top.qcow2", SIZE, backing=chain.paths[1])
        below = {"driver": "qcow2", "node-name": "below", "file": file}
        await client.command("blockdev-add", qcow2("top", top, backing=below))
        assert await refusal(client, "block-stream", job_id="j", device="below") == READ_ONLY


# -- the file under an image is the image's -----------------------------------------------------------


def conflict(node: str, what: str, needing: tuple[str, str], other: tuple[str, str]) -> tuple[str, str]:
    """Of two users, each with its role."""
    users = [f"{name} (uses node '{node}' as '{role}' child)" for name, role in (needing, other)]
    return (
        "GenericError",
        f"Permission conflict on node '{node}': permissions '{what}' are both required by {users[0]} and "
        f"unshared by {users[1]}.",
    )


ANYBODY = ("an unnamed block device", "root")


@pytest.mark.parametrize("driver", ["qcow2", "qed", "add-cow"])
async def test_file_of_an_image_is_left_alone(tmp_path: Path, driver: str) -> None:
    path = await made(tmp_path / "image", driver)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        file = {"driver": "file", "node-name": "f", "filename": str(path)}
        await client.command("blockdev-add", file)
        await client.command("blockdev-add", {"driver": driver, "node-name": "n", "file": "f"})
        before = path.read_bytes()
        found = await refusal(client, "block_resize", node_name="f", size=CLUSTER)
        assert found == conflict("f", "resize", ANYBODY, ("node 'n'", "file"))
        add = {"type": "nbd", "id": "e", "node_name": "f"}
        found = await refusal(client, "block-export-add", **add, writable=True)
        assert found == conflict("f", "write", ANYBODY, ("node 'n'", "file"))
        found = await refusal(client, "block-export-add", **add)
        assert found == conflict("f", "resize", ("node 'n'", "file"), ANYBODY)
        found = await refusal(client, "block-stream", job_id="j", device="f")
        assert found == conflict("f", "resize", ("node 'n'", "file"), ANYBODY)
        found = await refusal(client, "blockdev-add", driver=driver, node_name="m", file="f")
        assert found == conflict("f", "write, resize", ("node 'n'", "file"), ("node 'm'", "file"))
        # A raw node needs of the file what its own users need.
        await client.command("blockdev-add", {"driver": "raw", "node-name": "r", "file": "f"})
        found = await refusal(client, "block-export-add", **{**add, "node_name": "r"}, writable=True)
        assert found == conflict("f", "write", ("node 'r'", "file"), ("node 'n'", "file"))
        assert path.read_bytes() == before
        await export(client, "n")
        guest = await daemon.guest("n")
        await guest.write(5, b"still works")
        assert await guest.read(5, 11) == b"still works"


async def test_image_beside_an_add_cow_file_is_left_alone(tmp_path: Path) -> None:
    path = await made(tmp_path / "x.add-cow", "add-cow")
    data = {"driver": "file", "filename": str(tmp_path / "x.raw")}
    image = {"driver": "raw", "node-name": "r", "file": data}
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        file = {"driver": "file", "filename": str(path)}
        await client.command("blockdev-add", image)
        await client.command(
            "blockdev-add", {"driver": "add-cow", "node-name": "n", "file": file, "image": "r"}
        )
        found = await refusal(client, "block-export-add", type="nbd", id="e", node_name="r", writable=True)
        assert found == conflict("r", "write", ANYBODY, ("node 'n'", "image"))
        found = await refusal(client, "block_resize", node_name="r", size=CLUSTER)
        assert found == conflict("r", "resize", ANYBODY, ("node 'n'", "image"))


async def test_disk_of_guests_becomes_no_backing(tmp_path: Path) -> None:
    """What is accepted is accepted at a restart. (QEMU would let the overlay change below.)"""
    chain = await make(tmp_path, LAYERS[:1])
    over = qemu_img.create(tmp_path / "over.qcow2", SIZE, backing=chain.active)
    state = ["--state-dir", str(tmp_path / "state")]
    async with running(tmp_path, *state) as daemon:
        client = await daemon.qmp()
        await client.command("blockdev-add", qcow2("disk", chain.active))
        await export(client, "disk")
        found = await refusal(client, "blockdev-add", **qcow2("over", over, backing="disk"))
        assert found == conflict("disk", "write", ANYBODY, ("node 'over'", "backing"))
        await client.command("blockdev-add", qcow2("over", over, backing=None))
        again = qcow2("over", over, backing="disk")
        found = await refusal(client, "blockdev-reopen", options=[again])
        assert found == conflict("disk", "write", ANYBODY, ("node 'over'", "backing"))
        await client.command("block-export-del", id="disk")
        await client.command("blockdev-reopen", options=[again])
        await export(client, "over")
        await export(client, "disk", writable=False)
    async with running(tmp_path, *state) as daemon:
        assert await (await daemon.guest("over")).read(0, SIZE) == chain.content
        assert await (await daemon.guest("disk")).read(0, SIZE) == chain.content


# -- filters of jobs ---------------------------------------------------------------------------------


async def with_stream(daemon: Running, chain: Chain) -> tuple[QmpClient, NbdClient]:
    """A stream that waits for its rate, its filter `f` exported beside the disk."""
    client = await daemon.qmp()
    await client.command("blockdev-add", qcow2("top", chain.active))
    await export(client, "top")
    stream = {"job-id": "j", "device": "top", "filter-node-name": "f", "speed": 1}
    await client.command("block-stream", stream)
    await export(client, "f")
    return client, await daemon.guest("f")


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_user_of_a_filter_goes_on_below_it(tmp_path: Path, is_cancelled: bool) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path, "--state-dir", tmp_path / "state") as daemon:
        client, guest = await with_stream(daemon, chain)
        exports = await client.command("query-block-exports")
        # Each as it was named, whatever stands in front for the time of a job.
        assert [(one["id"], one["node-name"]) for one in exports] == [("f", "f"), ("top", "top")]
        await guest.write(0, b"by way of the filter")
        if is_cancelled:
            await client.command("block-job-cancel", device="j")
        else:
            await client.command("block-job-set-speed", device="j", speed=0)
        await client.event("JOB_STATUS_CHANGE", id="j", status="null")
        exports = await client.command("query-block-exports")
        assert [(one["id"], one["node-name"]) for one in exports] == [("f", "top"), ("top", "top")]
        other = await daemon.guest("top")
        await other.write(3, b"the other way")
        assert await guest.read(0, 20) == b"by the other way" + b"lter"
    async with running(tmp_path, "--state-dir", tmp_path / "state") as daemon:
        client = await daemon.qmp()
        for name in ("f", "top"):
            found = await (await daemon.guest(name)).read(0, SIZE)
            assert found == b"by the other waylter" + chain.content[20:]
        await client.command("block-export-del", id="f", mode="hard")
        await client.command("block-export-del", id="top", mode="hard")
        await client.command("blockdev-del", {"node-name": "top"})
        assert await client.command("query-named-block-nodes") == []


async def test_daemon_ends_with_an_exported_filter(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path, "--state-dir", tmp_path / "state") as daemon:
        _, guest = await with_stream(daemon, chain)
        await guest.write(0, b"seen by both")
    async with running(tmp_path, "--state-dir", tmp_path / "state") as daemon:
        for name in ("f", "top"):
            assert await (await daemon.guest(name)).read(0, 12) == b"seen by both"


async def test_nodes_in_front_of_a_filter_go_on_below_it(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    over = qemu_img.create(tmp_path / "over.qcow2", SIZE)
    async with running(tmp_path) as daemon:
        client, guest = await with_stream(daemon, chain)
        await guest.disconnect()
        for export_id in ("f", "top"):
            await client.command("block-export-del", id=export_id, mode="hard")
        await client.command("blockdev-add", qcow2("over", over, backing="f"))
        await client.command("object-add", {"qom-type": "throttle-group", "id": "g"})
        throttle = {"driver": "throttle", "node-name": "th", "throttle-group": "g", "file": "f"}
        await client.command("blockdev-add", throttle)
        await client.command("block-job-set-speed", device="j", speed=0)
        await client.event("JOB_STATUS_CHANGE", id="j", status="null")
        graph = daemon.services.graph
        assert graph["over"].backing is graph["th"].children()["file"] is graph["top"]


# -- no node stands below itself -----------------------------------------------------------------------


async def test_no_node_stands_below_itself(tmp_path: Path) -> None:
    def below(node: str, child: str, role: str = "backing") -> str:
        return f"Making '{child}' a {role} child of '{node}' would create a cycle"

    def snapshot(node: str, overlay: str) -> dict[str, object]:
        return {"type": "blockdev-snapshot", "data": {"node": node, "overlay": overlay}}

    images = {name: qemu_img.create(tmp_path / f"{name}.qcow2", SIZE) for name in "abcx"}
    add = {name: qcow2(name, path) for name, path in images.items()}
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await client.command("blockdev-add", add["a"])
        await client.command("blockdev-add", add["b"])
        await client.command("blockdev-add", {**add["c"], "backing": "b"})
        group = {"qom-type": "throttle-group", "id": "g"}
        await client.command("object-add", group)
        throttle = {"driver": "throttle", "node-name": "t", "throttle-group": "g", "file": "a"}
        await client.command("blockdev-add", throttle)
        shape = shape_of(daemon)
        cases: list[tuple[str, dict[str, object], str]] = [
            ("blockdev-snapshot", {"node": "b", "overlay": "b"}, "used as backing hd of 'c'"),
            ("blockdev-snapshot", {"node": "c", "overlay": "c"}, "The overlay already has a backing image"),
            ("blockdev-snapshot", {"node": "c", "overlay": "b"}, below("b", "c")),
            ("blockdev-add", {**add["x"], "backing": "x"}, below("x", "x")),
            ("blockdev-add", {**add["x"], "file": "x"}, "Cannot find device='x' nor node-name='x'"),
            ("blockdev-add", {**throttle, "node-name": "x", "file": "x"}, "nor node-name='x'"),
            ("blockdev-reopen", {"options": [{**add["b"], "backing": "c"}]}, below("b", "c")),
            ("blockdev-reopen", {"options": [{**add["b"], "backing": "b"}]}, below("b", "b")),
            ("blockdev-reopen", {"options": [{**add["a"], "backing": "t"}]}, below("a", "t")),
            ("blockdev-reopen", {"options": [{**throttle, "file": "t"}]}, below("t", "t", "file")),
            (
                "blockdev-reopen",
                {"options": [{**add["a"], "backing": "c"}, {**add["b"], "backing": "a"}]},
                below("b", "a"),
            ),
            ("blockdev-reopen", {"options": [{**add["c"], "backing": ""}]}, "Cannot find device='' nor"),
        ]
        for command, arguments, text in cases:
            found = await refusal(client, command, **arguments)
            assert text in found[1], (command, arguments)
            assert shape_of(daemon) == shape
        await client.command("blockdev-del", {"node-name": "t"})
        await client.command("blockdev-del", {"node-name": "c"})
        shape = shape_of(daemon)
        found = await refusal(client, "blockdev-snapshot", node="a", overlay="a")
        assert found[1] == below("a", "a")
        for actions in ([("a", "b"), ("b", "a")], [("a", "b"), ("a", "b")], [("a", "a")]):
            transaction = {"actions": [snapshot(*names) for names in actions]}
            await refusal(client, "transaction", **transaction)
            assert shape_of(daemon) == shape
        assert len(await client.command("query-named-block-nodes")) == 4


def shape_of(daemon: Running) -> list[tuple[str, dict[str, str], bool]]:
    return [
        (name, {role: child.node_name for role, child in node.children().items()}, node.read_only)
        for name, node in daemon.services.graph.nodes.items()
    ]
