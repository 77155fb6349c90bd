"""transaction: all disks at one moment, or none."""

import asyncio
from pathlib import Path

from tests import qemu_img
from tests.chains import Chain, make
from tests.control.running import Running, refusal, running, until
from tests.qmp_client import QmpClient

LAYERS = ["AB0-A-AB", "-C-C--0-"]
SIZE = len(LAYERS[0]) * 65536
NAMES = ("vda", "vdb", "vdc")


async def chains(folder: Path) -> dict[str, Chain]:
    made = {}
    for name in NAMES:
        (folder / name).mkdir()
        made[name] = await make(folder / name, LAYERS)
    return made


def devices(made: dict[str, Chain]) -> list[str]:
    return [word for name, chain in made.items() for word in ("--device", f"{name}={chain.active}")]


def copies(made: dict[str, Chain]) -> dict[str, Path]:
    return {
        name: qemu_img.create(chain.active.with_name("copy.qcow2"), SIZE, backing=chain.active)
        for name, chain in made.items()
    }


def action(type_name: str, **data: object) -> dict[str, object]:
    return {"type": type_name, "data": {name.replace("_", "-"): value for name, value in data.items()}}


def active_files(daemon: Running) -> dict[str, str]:
    return {device.name: device.active.filename for device in daemon.services.devices}


async def null_events(client: QmpClient, *job_ids: str) -> None:
    for job_id in job_ids:
        await client.event("JOB_STATUS_CHANGE", id=job_id, status="null")


async def test_live_copy_of_several_disks_in_one_request(tmp_path: Path) -> None:
    made = await chains(tmp_path)
    copied = copies(made)
    async with running(tmp_path, *devices(made)) as daemon:
        client = await daemon.qmp()
        guest = await daemon.guest("vdb")
        switches = [action("x-block-switch", device=name, filename=str(copied[name])) for name in NAMES]
        streams = [action("x-block-stream", device=name) for name in NAMES]
        grouped = {"completion-mode": "grouped"}
        await client.command("transaction", actions=[*switches, *streams], properties=grouped)
        assert client.event_names()[:2] == ["JOB_STATUS_CHANGE:created", "JOB_STATUS_CHANGE:running"]
        assert sum(event["event"] == "BLOCK_SWITCHED" for event in client.events) == 3
        await guest.write(0, b"new")
        await null_events(client, *NAMES)
        # All have done their work before one completes.
        order = [event["data"]["status"] for event in client.events if event["event"] == "JOB_STATUS_CHANGE"]
        assert order.count("waiting") == 3
        assert max(i for i, status in enumerate(order) if status == "waiting") < order.index("pending")
        assert active_files(daemon) == {name: str(path) for name, path in copied.items()}
    for name, path in copied.items():
        expected = b"new" + made[name].content[3:] if name == "vdb" else made[name].content
        assert qemu_img.content(path) == expected
        assert "backing file:" not in qemu_img.qemu("qemu-img", "info", "-U", path)
        assert qemu_img.content(made[name].active) == made[name].content


async def test_disks_are_cut_at_one_moment(tmp_path: Path) -> None:
    """A guest writes numbers to three disks in turn: every cut has three that follow each other."""
    made = await chains(tmp_path)
    async with running(tmp_path, *devices(made)) as daemon:
        client = await daemon.qmp()
        guests = [await daemon.guest(name) for name in NAMES]
        number = 0
        is_over = False

        async def write() -> None:
            nonlocal number
            while not is_over:
                await guests[number % 3].write(0, number.to_bytes(8, "big"))
                number += 1

        files = [[chain.active for chain in made.values()]]

        def has_gone_on() -> bool:
            return number > 10 * len(files)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(write())
            for turn in range(6):
                await until(has_gone_on)
                files.append([tmp_path / f"{name}{turn}.qcow2" for name in NAMES])
                actions = [
                    action("blockdev-snapshot-sync", device=name, snapshot_file=str(path))
                    for name, path in zip(NAMES, files[-1], strict=True)
                ]
                await client.command("transaction", actions=actions)
            is_over = True
        for cut in files:
            numbers = sorted(int.from_bytes(qemu_img.content(path)[:8], "big") for path in cut)
            assert numbers == list(range(numbers[0], numbers[0] + 3))


async def test_one_that_fails_undoes_the_others(tmp_path: Path) -> None:
    made = await chains(tmp_path)
    copied = copies(made)
    before = {name: path.read_bytes() for name, path in copied.items()}
    async with running(tmp_path, *devices(made)) as daemon:
        client = await daemon.qmp()
        guest = await daemon.guest("vda")
        nodes = dict(daemon.services.graph.nodes)
        files = active_files(daemon)
        switches = [action("x-block-switch", device=name, filename=str(copied[name])) for name in NAMES]
        snapshot = action("blockdev-snapshot-sync", device="vda", snapshot_file=f"{tmp_path}/s.qcow2")
        stream = [action("x-block-stream", device=name) for name in NAMES]
        failing = [
            ([*switches, action("abort")], "Transaction aborted using Abort action"),
            ([snapshot, action("abort")], "Transaction aborted using Abort action"),
            ([*switches, *stream, action("abort")], "Transaction aborted using Abort action"),
            ([*switches, action("x-block-stream", device="z")], "Cannot find device='z' nor node-name='z'"),
            ([*stream, stream[0]], None),
            ([switches[0], switches[0]], None),
            ([*stream, action("x-block-stream", device="vda", base="nope")], None),
        ]
        for actions, text in failing:
            found = await refusal(client, "transaction", actions=actions)
            assert found[0] == "GenericError"
            assert text is None or found[1] == text
            assert dict(daemon.services.graph.nodes) == nodes
            assert active_files(daemon) == files
            assert not list(daemon.services.streams)
            assert not list(daemon.services.jobs)
            assert all(device.root.top is device.node for device in daemon.services.devices)
            await guest.write(0, b"as before")
        assert client.events == []
        assert {name: path.read_bytes() for name, path in copied.items()} == before
        assert not (tmp_path / "s.qcow2").exists()
        # What was undone can be done now.
        await client.command("transaction", actions=[*switches, *stream])
        await null_events(client, *NAMES)
    for name, path in copied.items():
        expected = b"as before" + made[name].content[9:] if name == "vda" else made[name].content
        assert qemu_img.content(path) == expected


async def test_chain_of_snapshots_in_one_request(tmp_path: Path) -> None:
    """An action can go on with the node that one before it has added."""
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path, "--device", f"vda={chain.active}") as daemon:
        client, guest = await daemon.qmp(), await daemon.guest("vda")
        one = {"device": "vda", "snapshot_file": f"{tmp_path}/s1.qcow2", "snapshot_node_name": "s1"}
        two = {"node_name": "s1", "snapshot_file": f"{tmp_path}/s2.qcow2", "snapshot_node_name": "s2"}
        actions = [action("blockdev-snapshot-sync", **one), action("blockdev-snapshot-sync", **two)]
        found = await refusal(client, "transaction", actions=[*actions, action("abort")])
        assert found[1] == "Transaction aborted using Abort action"
        await client.command("transaction", actions=actions)
        await guest.write(0, b"new")
        nodes = daemon.services.graph.nodes
        assert (nodes["s2"].backing, nodes["s1"].read_only) == (nodes["s1"], True)
    assert qemu_img.content(tmp_path / "s2.qcow2") == b"new" + chain.content[3:]
    assert qemu_img.content(tmp_path / "s1.qcow2") == chain.content


async def test_errors_of_the_request_itself(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        snapshot = action("blockdev-snapshot", node="x", overlay="y")
        cases: list[tuple[dict[str, object], str]] = [
            ({}, "Parameter 'actions' is missing"),
            ({"actions": [{}]}, "Parameter 'actions[0].type' is missing"),
            ({"actions": [{"type": "zap"}]}, "Parameter 'type' does not accept value 'zap'"),
            ({"actions": [{"type": "abort"}]}, "Parameter 'actions[0].data' is missing"),
            ({"actions": [action("abort", x=1)]}, "Parameter 'actions[0].data.x' is unexpected"),
            (
                {"actions": [action("blockdev-snapshot", node="x")]},
                "Parameter 'actions[0].data.overlay' is missing",
            ),
            ({"actions": [snapshot]}, "Cannot find device='x' nor node-name='x'"),
            (
                {"actions": [], "properties": {"completion-mode": "zap"}},
                "Parameter 'completion-mode' does not accept value 'zap'",
            ),
            (
                {"actions": [snapshot], "properties": {"completion-mode": "grouped"}},
                "Action 'blockdev-snapshot' does not support Transaction property completion-mode = grouped",
            ),
        ]
        for arguments, text in cases:
            assert await refusal(client, "transaction", **arguments) == ("GenericError", text)
        assert await client.command("transaction", actions=[]) == {}


# -- jobs that complete together ----------------------------------------------------------------


async def start_grouped(client: QmpClient, **more: object) -> None:
    actions = [action("x-block-stream", device=name, **more) for name in NAMES]
    await client.command("transaction", actions=actions, properties={"completion-mode": "grouped"})


async def test_cancelled_job_takes_its_group_with_it(tmp_path: Path) -> None:
    made = await chains(tmp_path)
    async with running(tmp_path, *devices(made)) as daemon:
        client = await daemon.qmp()
        await start_grouped(client, speed=1)
        await client.command("block-job-set-speed", device="vda", speed=0)
        await client.event("JOB_STATUS_CHANGE", id="vda", status="waiting")
        await client.command("block-job-cancel", device="vdb")
        await null_events(client, *NAMES)
        for name in NAMES:
            await client.event("BLOCK_JOB_CANCELLED", device=name)
        assert all(device.active.backing is not None for device in daemon.services.devices)


async def test_finalizing_one_finalizes_its_group(tmp_path: Path) -> None:
    made = await chains(tmp_path)
    async with running(tmp_path, *devices(made)) as daemon:
        client = await daemon.qmp()
        await start_grouped(client, auto_finalize=False)
        for name in NAMES:
            await client.event("BLOCK_JOB_PENDING", id=name)
        await client.command("job-finalize", id="vdc")
        await null_events(client, *NAMES)
        assert all(device.active.backing is None for device in daemon.services.devices)
    for chain in made.values():
        assert qemu_img.content(chain.active) == chain.content


async def test_job_that_fails_cancels_the_others(tmp_path: Path) -> None:
    made = await chains(tmp_path)
    async with running(tmp_path, *devices(made)) as daemon:
        client = await daemon.qmp()
        await start_grouped(client, speed=1)
        # The base of one disk is cut short under it.
        with made["vda"].paths[0].open("r+b") as base:
            base.truncate(4096)
        for name in ("vda", "vdb"):
            await client.command("block-job-set-speed", device=name, speed=0)
        await null_events(client, *NAMES)
        assert (await client.event("BLOCK_JOB_COMPLETED", device="vda"))["error"]
        for name in ("vdb", "vdc"):
            await client.event("BLOCK_JOB_CANCELLED", device=name)
        assert all(device.active.backing is not None for device in daemon.services.devices)
