"""Graphs of all kinds come back as they were, names included."""

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from blockd.block.node import BlockNode
from blockd.devices.streams import Stream
from blockd.units import KIB
from tests import qemu_img
from tests.chains import make
from tests.control.running import Running, running, until
from tests.iotests_ideas.nodes import add, export, file, qcow2, reopen, throttle

CLUSTER = 64 * KIB
LAYERS = ["ABCDEFGH", "-X--0---", "--Y-----", "---Z----"]
SIZE = 8 * CLUSTER


@asynccontextmanager
async def run(folder: Path, *arguments: str | Path) -> AsyncIterator[Running]:
    async with running(folder, "--state-dir", folder / "state", *arguments) as daemon:
        yield daemon


Shape = dict[str, tuple[object, ...]]


def shape(daemon: Running) -> Shape:
    """Every node: what it is, what is below it, whether it is read-only and stays without users."""
    graph = daemon.services.graph

    def described(node: BlockNode) -> tuple[object, ...]:
        below = {role: child.node_name for role, child in node.children().items()}
        return node.driver, node.filename, node.read_only, below, graph.is_added(node), graph.users(node)

    return {name: described(node) for name, node in graph.nodes.items()}


async def same_after_restart(folder: Path, daemon_before: Shape, *arguments: str | Path) -> None:
    async with run(folder, *arguments) as daemon:
        assert shape(daemon) == daemon_before


async def test_chain_of_a_device_with_generated_names(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    arguments = ["--device", f"vda={chain.active}"]
    async with run(tmp_path, *arguments) as daemon:
        before = shape(daemon)
    async with run(tmp_path, *arguments) as daemon:
        assert shape(daemon) == before
        client = await daemon.qmp()
        # New names do not collide with those that came back.
        node = {"driver": "raw", "file": {"driver": "file", "filename": str(chain.paths[0])}}
        for number in range(3):
            await client.command("blockdev-add", {**node, "node-name": f"r{number}", "read-only": True})
        assert len(daemon.services.graph.nodes) == len(before) + 6
        after = shape(daemon)
    await same_after_restart(tmp_path, after, *arguments)


async def test_nodes_by_options_with_a_backing_that_the_image_does_not_record(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS[:1])
    top = qemu_img.create(tmp_path / "top.qcow2", SIZE)
    arguments = [
        *("--blockdev", f"qcow2,node-name=base,file.driver=file,file.filename={chain.active}"),
        *("--blockdev", f"qcow2,node-name=top,file.driver=file,file.filename={top},backing=null"),
        *("--device", "id=vda,node-name=base"),
        *("--export", "nbd,id=vda,node-name=base,name=vda,writable=on"),
    ]
    arguments[3] = (
        f'{{"driver": "qcow2", "node-name": "top", "backing": null, '
        f'"file": {{"driver": "file", "filename": "{top}"}}}}'
    )
    async with run(tmp_path, *arguments) as daemon:
        client, guest = await daemon.qmp(), await daemon.guest("vda")
        await client.command("blockdev-snapshot", node="base", overlay="top")
        await guest.write(0, b"in top")
        before = shape(daemon)
    async with run(tmp_path, *arguments) as daemon:
        assert shape(daemon) == before
        guest = await daemon.guest("vda")
        assert await guest.read(0, SIZE) == b"in top" + chain.content[6:]
    assert qemu_img.content(chain.active) == chain.content


async def test_filters_and_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = await make(tmp_path, LAYERS)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules").write_text('[inject-error]\nevent = "pwritev"\n')
    arguments: list[str] = [
        *("--object", "throttle-group,id=t,limits.iops-total=1000"),
        *("--blockdev", f"file,node-name=f,filename={chain.active}"),
        *(
            "--blockdev",
            "faults,node-name=broken,image=f,config=rules,inject-error.0.event=vmstate_save",
        ),
        *("--blockdev", "qcow2,node-name=q,file=broken"),
        *("--blockdev", "copy-on-read,node-name=cor,file=q"),
        *("--blockdev", "throttle,node-name=slow,file=cor,throttle-group=t"),
        *("--device", "id=vda,node-name=slow"),
    ]
    async with run(tmp_path, *arguments) as daemon:
        before = shape(daemon)
        assert before["broken"][3] == {"image": "f"}
    monkeypatch.chdir("/")
    await same_after_restart(tmp_path, before, *arguments)
    await same_after_restart(tmp_path, before, *arguments)


async def test_streams_of_parts_of_a_chain_go_on(tmp_path: Path) -> None:
    """Two at once, one of them into an image that is writable only for that; both are stopped half way."""
    chain = await make(tmp_path, [layer * 4 for layer in LAYERS])
    arguments = ["--device", f"vda={chain.active}"]
    async with run(tmp_path, *arguments) as daemon:
        client = await daemon.qmp()
        names = [node.node_name for node in layers(daemon)]
        before = shape(daemon)
        top = {"job-id": "top", "device": "vda", "base-node": names[2], "speed": 1}
        await client.command("block-stream", {**top, "filter-node-name": "front"})
        await client.command("block-stream", {"job-id": "low", "device": names[2], "speed": 1})
        during = shape(daemon)
        assert (before[names[2]][2], during[names[2]][2]) == (True, False)
    async with run(tmp_path, *arguments) as daemon:
        client = await daemon.qmp()
        # The filter of "low" has a name that is made anew, if need be.
        assert {name for name in shape(daemon) if not name.startswith("#")} == {"front"}
        streams = sorted(daemon.services.streams.running, key=lambda stream: stream.job.id)
        assert [described(stream) for stream in streams] == [("low", names[2:]), ("top", names[:2])]
        for job in ("low", "top"):
            await client.command("block-job-set-speed", device=job, speed=0)
            await client.event("BLOCK_JOB_COMPLETED", device=job)
        await until(lambda: len(layers(daemon)) == 2)
        assert [node.node_name for node in layers(daemon)] == [names[0], names[2]]
        after = shape(daemon)
        assert after[names[2]][2] is True
        guest = await daemon.guest("vda")
        assert await guest.read(0, 4 * SIZE) == chain.content
    for path in (chain.paths[0], chain.paths[2]):
        path.rename(path.with_suffix(".away"))
    await same_after_restart(tmp_path, after, *arguments)
    assert qemu_img.content(chain.active) == chain.content


def layers(daemon: Running) -> list[BlockNode]:
    """The images of the disk, the active one first."""
    node: BlockNode | None = daemon.services.devices.get("vda").active
    fronts = {stream.front: stream.front.active for stream in daemon.services.streams}
    found = []
    while node is not None:
        found.append(node)
        node = fronts.get(node.backing, node.backing) if node.backing is not None else None  # type: ignore[call-overload]
    return found


def described(stream: Stream) -> tuple[str, list[str]]:
    return stream.job.id, [node.node_name for node in stream.layers]


async def test_transaction_of_switch_and_stream(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS[:2])
    copy = qemu_img.create(tmp_path / "copy.qcow2", SIZE, backing=chain.active)
    arguments = ["--device", f"vda={chain.active}"]
    async with run(tmp_path, *arguments) as daemon:
        client = await daemon.qmp()
        switch = {"type": "x-block-switch", "data": {"device": "vda", "filename": str(copy)}}
        stream = {"type": "x-block-stream", "data": {"job-id": "j", "device": "vda", "speed": 1}}
        await client.command("transaction", {"actions": [switch, stream]})
    async with run(tmp_path, *arguments) as daemon:
        client = await daemon.qmp()
        await client.command("block-job-set-speed", device="j", speed=0)
        await client.event("BLOCK_JOB_COMPLETED", device="j")
    assert qemu_img.content(copy) == chain.content
    assert "backing file" not in qemu_img.qemu("qemu-img", "info", copy)


async def test_images_that_have_swapped_their_files(tmp_path: Path) -> None:
    """One of them on a throttle by then; what was opened along with an image stays, for the other has it."""
    paths = [qemu_img.create(tmp_path / f"{number}.qcow2", SIZE) for number in range(2)]
    nodes = [qcow2(f"n{number}", file(path, node_name=f"f{number}")) for number, path in enumerate(paths)]
    async with run(tmp_path) as daemon:
        client = await daemon.qmp()
        await client.command("object-add", {"qom-type": "throttle-group", "id": "g"})
        await add(client, *nodes, throttle("t", "f0", "g"))
        for number, name in enumerate(("n0", "n1")):
            await export(client, name)
            await (await daemon.guest(name)).write(0, bytes([number + 1]) * CLUSTER)
        await reopen(client, {**nodes[0], "file": "f1"}, {**nodes[1], "file": "t"})
        before = shape(daemon)
        assert [before[name][3] for name in ("n0", "n1")] == [{"file": "f1"}, {"file": "t"}]
        await (await daemon.guest("n1")).write(CLUSTER, b"x" * CLUSTER)
    async with run(tmp_path) as daemon:
        assert shape(daemon) == before
        guest = await daemon.guest("n1")
        assert await guest.read(0, 2 * CLUSTER) == b"\1" * CLUSTER + b"x" * CLUSTER
        assert await (await daemon.guest("n0")).read(0, CLUSTER) == b"\2" * CLUSTER
        client = await daemon.qmp()
        await reopen(client, {**nodes[0], "file": "f0"}, {**nodes[1], "file": "f1"})
        assert await guest.read(0, CLUSTER) == b"\2" * CLUSTER
    for path in paths:
        qemu_img.assert_sound(path)


async def test_many_restarts_change_nothing(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    journals = []
    for _ in itertools.repeat(None, 5):
        async with run(tmp_path, "--device", f"vda={chain.active}"):
            journals.append((tmp_path / "state" / "journal.json").read_bytes())
    assert len(set(journals[1:])) == 1
