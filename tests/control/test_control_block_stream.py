"""block-stream and the job commands on a whole daemon: QEMU's order, texts and shapes."""

import asyncio
import errno
from pathlib import Path

import pytest

from blockd.block.node import Buffer
from blockd.errors import StorageError
from blockd.protocols.file import FileNode
from tests import qemu_img
from tests.chains import Chain, make
from tests.control.running import dashed, refusal, running
from tests.qmp_client import QmpClient

LAYERS = ["AB0-A-AB", "-C-C--0-", "D------D", "--E-----"]

BEFORE_REPLY = ["JOB_STATUS_CHANGE:created", "JOB_STATUS_CHANGE:running"]
COMPLETED = [
    *("JOB_STATUS_CHANGE:waiting", "JOB_STATUS_CHANGE:pending", "BLOCK_JOB_COMPLETED"),
    *("JOB_STATUS_CHANGE:concluded", "JOB_STATUS_CHANGE:null"),
]
CANCELLED = [
    *("JOB_STATUS_CHANGE:aborting", "BLOCK_JOB_CANCELLED"),
    *("JOB_STATUS_CHANGE:concluded", "JOB_STATUS_CHANGE:null"),
]


async def add_chain(client: QmpClient, chain: Chain) -> None:
    """Every layer as a node of its own, writable, named n0 (the base), n1, ..."""
    for number, path in enumerate(chain.paths):
        file = {"driver": "file", "filename": str(path)}
        backing = {"backing": f"n{number - 1}"} if number else {}
        driver = chain.formats[number]
        await client.command(
            "blockdev-add", {"driver": driver, "node-name": f"n{number}", "file": file, **backing}
        )


async def stream(client: QmpClient, **arguments: object) -> None:
    await client.command("block-stream", dashed(arguments))


async def finished(client: QmpClient, job_id: str = "j") -> None:
    await client.event("JOB_STATUS_CHANGE", id=job_id, status="null")


async def test_bare_node_in_order(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add_chain(client, chain)
        await stream(client, job_id="j", device="n3")
        assert client.event_names() == BEFORE_REPLY
        await finished(client)
        assert client.event_names() == BEFORE_REPLY + COMPLETED
        assert await client.command("query-block-jobs") == []
    assert qemu_img.content(chain.active) == chain.content


async def test_image_whose_snapshots_need_the_backing_is_not_streamed_into(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    qemu_img.qemu("qemu-img", "snapshot", "-c", "s", chain.active)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add_chain(client, chain)
        _, text = await refusal(client, "block-stream", job_id="j", device="n3")
        assert "internal snapshots, which need its backing file" in text
        await stream(client, job_id="j", device="n2")
        await finished(client)
    assert qemu_img.content(chain.active) == chain.content


async def test_refusals(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add_chain(client, chain)
        cases: list[tuple[dict[str, object], str]] = [
            ({"device": "x"}, "Cannot find device='x' nor node-name='x'"),
            ({"device": "n3", "base": "x"}, "Can't find 'x' in the backing chain"),
            ({"device": "n3", "base_node": "x"}, "Cannot find device='' nor node-name='x'"),
            ({"device": "n3", "bottom": "x"}, "Cannot find device='' nor node-name='x'"),
            ({"device": "n1", "base_node": "n2"}, "Node 'n2' is not a backing image of 'n1'"),
            ({"device": "n1", "base_node": "n1"}, "Node 'n1' is not a backing image of 'n1'"),
            ({"device": "n1", "bottom": "n2"}, "Node 'n2' is not in a chain starting from 'n1'"),
            ({"device": "n3", "backing_file": "x"}, "backing file specified, but streaming the entire chain"),
            ({"device": "n3", "job_id": "x y"}, "Invalid job ID 'x y'"),
            ({"device": "n3", "speed": -1}, "Parameter 'speed' expects a non-negative value"),
            (
                {"device": "n3", "filter_node_name": "n0"},
                "Could not create node: Duplicate nodes with node-name='n0'",
            ),
            (
                {"device": "n3", "filter_node_name": "9bad"},
                "Could not create node: Invalid node-name: '9bad'",
            ),
        ]
        for ends in (("base", "base_node"), ("base", "bottom"), ("bottom", "base_node")):
            one, other = (end.replace("_", "-") for end in ends)
            text = f"'{one}' and '{other}' cannot be specified at the same time"
            cases.append(({"device": "n3", **dict.fromkeys(ends, "n0")}, text))
        for arguments, text in cases:
            found = await refusal(client, "block-stream", **{"job_id": "j", **arguments})
            assert found == ("GenericError", text)
        assert await refusal(client, "block-stream", device="n3") == ("GenericError", "Invalid job ID ''")
        assert client.events == []
        assert {node["drv"] for node in await client.command("query-named-block-nodes")} == {"qcow2", "file"}


@pytest.mark.parametrize("end", [{"base_node": "n0"}, {"base": "layer0.qcow2"}, {"bottom": "n1"}])
async def test_ways_to_say_where_to_stop(tmp_path: Path, end: dict[str, object]) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add_chain(client, chain)
        await stream(client, job_id="j", device="n3", **end)
        await finished(client)
        nodes = {node["node-name"]: node for node in await client.command("query-named-block-nodes")}
        assert nodes["n3"]["image"]["backing-filename"] == str(chain.paths[0])
        assert nodes["n3"]["image"]["backing-filename-format"] == "qcow2"
        assert nodes["n3"]["backing_file_depth"] == 1
        # Nodes that the client added itself stay.
        assert {"n1", "n2"} <= nodes.keys()
    assert qemu_img.content(chain.active) == chain.content


async def test_backing_file_is_recorded_as_told(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add_chain(client, chain)
        await stream(client, job_id="j", device="n3", base_node="n0", backing_file="layer0.qcow2")
        await finished(client)
    info = qemu_img.qemu("qemu-img", "info", "-U", chain.active)
    assert "backing file: layer0.qcow2 (actual path:" in info


async def test_intermediate_node(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    middle = qemu_img.content(chain.paths[2])
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add_chain(client, chain)
        export = {"type": "nbd", "id": "e", "node-name": "n3", "name": "disk", "writable": True}
        await client.command("block-export-add", export)
        guest = await daemon.guest("disk")
        await stream(client, job_id="j", device="n2", base_node="n0", speed=65536, filter_node_name="front")
        nodes = daemon.services.graph.nodes
        assert nodes["n3"].backing is nodes["front"]
        assert await guest.read(0, len(chain.content)) == chain.content
        await guest.write(0, b"top" * 100)
        await client.command("block-job-set-speed", device="j", speed=0)
        await finished(client)
        assert nodes["n3"].backing is nodes["n2"]
        assert nodes["n2"].backing is nodes["n0"]
        assert await guest.read(300, 4096) == chain.content[300:4396]
    assert qemu_img.content(chain.paths[2]) == middle
    assert qemu_img.content(chain.active) == b"top" * 100 + chain.content[300:]


async def test_streams_of_disjoint_parts_run_side_by_side(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add_chain(client, chain)
        await stream(client, job_id="upper", device="n3", base_node="n2", speed=65536)
        # Nothing is between n3 and n2: that was over at once.
        await finished(client, "upper")
        await stream(client, job_id="lower", device="n1", speed=65536)
        await stream(client, job_id="upper", device="n3", bottom="n2", speed=65536)
        busy = "is busy: block device is in use by block job: stream"
        for device in ("n3", "n2", "n1"):
            found = await refusal(client, "block-stream", job_id="third", device=device)
            assert found[1].endswith(busy)
        assert len(await client.command("query-block-jobs")) == 2
        for job_id in ("upper", "lower"):
            await client.command("block-job-set-speed", device=job_id, speed=0)
            await finished(client, job_id)
        nodes = daemon.services.graph.nodes
        assert (nodes["n3"].backing, nodes["n1"].backing) == (nodes["n1"], None)
    assert qemu_img.content(chain.active) == chain.content
    qemu_img.assert_sound(chain.paths[1])


@pytest.mark.parametrize("first", ["upper", "lower"])
async def test_neighbouring_streams_end_in_any_order(tmp_path: Path, first: str) -> None:
    """The base of one is the active image of the other, whose filter comes or goes meanwhile."""
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add_chain(client, chain)
        await stream(client, job_id="upper", device="n3", base_node="n1", auto_finalize=False)
        await stream(client, job_id="lower", device="n1", auto_finalize=False)
        for job_id in ("upper", "lower"):
            await client.event("BLOCK_JOB_PENDING", id=job_id)
        second = "lower" if first == "upper" else "upper"
        for job_id in (first, second):
            await client.command("job-finalize", id=job_id)
        nodes = daemon.services.graph.nodes
        assert (nodes["n3"].backing, nodes["n1"].backing) == (nodes["n1"], None)
        assert {node.driver for node in nodes.values()} == {"qcow2", "file"}
    assert qemu_img.content(chain.active) == chain.content


async def test_job_commands_in_order(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add_chain(client, chain)
        await stream(client, job_id="j", device="n3", speed=1, auto_finalize=False, auto_dismiss=False)
        size = len(chain.content)
        await client.command("job-pause", id="j")
        await client.event("JOB_STATUS_CHANGE", status="paused")
        [job] = await client.command("query-block-jobs")
        assert job.pop("offset") < size
        settings = {
            "auto-finalize": False,
            "auto-dismiss": False,
            "speed": 1,
            "type": "stream",
            "device": "j",
        }
        state = {"io-status": "ok", "busy": False, "status": "paused", "paused": True, "ready": False}
        assert job == {**settings, **state, "len": size}
        assert (await refusal(client, "job-pause", id="j"))[1] == "Job is already paused"
        text = "The block job for device 'j' is currently paused"
        assert await refusal(client, "block-job-cancel", device="j") == ("GenericError", text)
        for verb in ("complete", "finalize", "dismiss"):
            text = f"Job 'j' in state 'paused' cannot accept command verb '{verb}'"
            assert await refusal(client, f"job-{verb}", id="j") == ("GenericError", text)
        await client.command("block-job-resume", device="j")
        assert (await refusal(client, "job-resume", id="j"))[1] == "Can't resume a job that was not paused"
        found = await refusal(client, "block-job-set-speed", device="j", speed=-1)
        assert found[1] == "Parameter 'speed' expects a non-negative value"
        await client.command("block-job-set-speed", device="j", speed=0)
        await client.event("BLOCK_JOB_PENDING", type="stream", id="j")
        await client.command("block-job-finalize", id="j")
        # A concluded job is in nobody's way.
        for query in ("query-named-block-nodes", "query-block", "query-block-exports", "query-commands"):
            await client.command(query)
        expected = {"current-progress": size, "status": "concluded", "total-progress": size}
        assert await client.command("query-jobs") == [{**expected, "type": "stream", "id": "j"}]
        found = await refusal(client, "block-stream", job_id="j", device="n3")
        assert found == ("GenericError", "Job ID 'j' already in use")
        await client.command("block-job-dismiss", id="j")
        assert client.event_names()[-4:] == [
            *("BLOCK_JOB_PENDING", "BLOCK_JOB_COMPLETED"),
            *("JOB_STATUS_CHANGE:concluded", "JOB_STATUS_CHANGE:null"),
        ]
        found = await refusal(client, "block-job-pause", device="j")
        assert found == ("DeviceNotActive", "Block job 'j' not found")
        assert await refusal(client, "job-pause", id="j") == ("GenericError", "Job not found")


async def test_cancel_of_a_job_at_rest_is_seen_before_the_reply(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add_chain(client, chain)
        await stream(client, job_id="j", device="n3", speed=1)
        await client.command("job-pause", id="j")
        await client.event("JOB_STATUS_CHANGE", status="paused")
        await client.command("block-job-cancel", device="j", force=True)
        expected = [*BEFORE_REPLY, "JOB_STATUS_CHANGE:paused", "JOB_STATUS_CHANGE:running", *CANCELLED]
        assert client.event_names() == expected
        assert daemon.services.devices.graph.nodes["n3"].backing is not None


async def test_out_of_band_commands_overtake(tmp_path: Path) -> None:
    """While a command waits in the queue, job-pause, query-jobs and the like are answered."""
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path, "--device", f"vda={chain.active}") as daemon:
        client = await QmpClient.connect(daemon.qmp_path, negotiate=False)
        await client.command("qmp_capabilities", enable=["oob"])
        await client.command("block_stream", device="vda", speed=1)
        async with daemon.services.devices.changing:
            await client.send(
                b'{"execute":"block_switch","arguments":{"device":"vda","filename":"x"},"id":"slow"}'
                b'{"exec-oob":"block_stream_status","id":"status"}'
                b'{"exec-oob":"query-jobs","id":"jobs"}'
                b'{"exec-oob":"block-job-set-speed","arguments":{"device":"vda","speed":0},"id":"speed"}'
            )
            replies: list[str] = []
            while len(replies) < 3:
                message = await client.receive()
                if "id" in message:
                    replies.append(message["id"])
            assert replies == ["status", "jobs", "speed"]
        while (await client.receive()).get("id") != "slow":
            pass
        await client.close()


async def test_events_reach_every_session(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path, "--device", f"vda={chain.active}") as daemon:
        one, two = await daemon.qmp(), await daemon.qmp()
        await one.command("block-stream", device="vda")
        await asyncio.gather(finished(one, "vda"), finished(two, "vda"))
        assert one.event_names() == two.event_names() == BEFORE_REPLY + COMPLETED
        # A session that comes later starts with no events.
        assert (await daemon.qmp()).events == []


class BrokenDisk:
    """The file `path` cannot be read, until it is mended, and nothing of it is in the page cache."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
        self.is_broken = True
        work, work_nowait = FileNode.readinto_blocking, FileNode.read_nowait

        def read(file: FileNode, offset: int, buffer: memoryview) -> None:
            if self.is_broken and file.filename == str(path):
                raise StorageError.from_os(OSError(errno.EIO, ""), "read", str(path))
            work(file, offset, buffer)

        def read_nowait(file: FileNode, offset: int, length: int) -> Buffer | None:
            if self.is_broken and file.filename == str(path):
                return None
            return work_nowait(file, offset, length)

        monkeypatch.setattr(FileNode, "readinto_blocking", read)
        monkeypatch.setattr(FileNode, "read_nowait", read_nowait)


async def test_error_with_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = await make(tmp_path, LAYERS, base_format="raw")
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add_chain(client, chain)
        BrokenDisk(monkeypatch, chain.paths[0])
        await stream(client, job_id="j", device="n3")
        await finished(client)
        expected = [*BEFORE_REPLY, "BLOCK_JOB_ERROR", "JOB_STATUS_CHANGE:aborting", *COMPLETED[2:]]
        assert client.event_names() == expected
        error = await client.event("BLOCK_JOB_ERROR")
        assert error == {"device": "j", "operation": "read", "action": "report"}
        completed = await client.event("BLOCK_JOB_COMPLETED")
        assert completed["error"] == "Input/output error"
        assert completed["x-detail"] == f"Could not read '{chain.paths[0]}': Input/output error"
        assert completed["offset"] < completed["len"]
        nodes = daemon.services.graph.nodes
        assert nodes["n3"].backing is nodes["n2"]


async def test_error_with_stop_then_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = await make(tmp_path, LAYERS, base_format="raw")
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add_chain(client, chain)
        disk = BrokenDisk(monkeypatch, chain.paths[0])
        await stream(client, job_id="j", device="n3", on_error="stop")
        await client.event("JOB_STATUS_CHANGE", status="paused")
        assert client.event_names() == [*BEFORE_REPLY, "BLOCK_JOB_ERROR", "JOB_STATUS_CHANGE:paused"]
        [job] = await client.command("query-block-jobs")
        assert (job["io-status"], job["paused"], job["status"]) == ("failed", True, "paused")
        disk.is_broken = False
        await client.command("block-job-resume", device="j")
        [job] = await client.command("query-block-jobs") or [{"io-status": "ok"}]
        assert job["io-status"] == "ok"
        await finished(client)
        assert "error" not in await client.event("BLOCK_JOB_COMPLETED")
    assert qemu_img.content(chain.active) == chain.content


async def test_error_with_ignore_keeps_the_backing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = await make(tmp_path, LAYERS, base_format="raw")
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add_chain(client, chain)
        disk = BrokenDisk(monkeypatch, chain.paths[0])
        await stream(client, job_id="j", device="n3", on_error="ignore")
        await finished(client)
        names = client.event_names()
        assert set(names[2:-4]) == {"BLOCK_JOB_ERROR"}
        assert names[-4:] == ["JOB_STATUS_CHANGE:aborting", *COMPLETED[2:]]
        completed = await client.event("BLOCK_JOB_COMPLETED")
        assert completed["error"]
        assert completed["offset"] == completed["len"]
        disk.is_broken = False
    assert qemu_img.content(chain.active) == chain.content


@pytest.mark.parametrize("on_error", ["report", "ignore"])
async def test_a_map_that_cannot_be_read_ends_the_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_error: str
) -> None:
    """There is nothing to ignore: what would be left out nobody knows."""
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add_chain(client, chain)
        disk = BrokenDisk(monkeypatch, chain.paths[0])
        await stream(client, job_id="j", device="n3", on_error=on_error)
        await finished(client)
        error = await client.event("BLOCK_JOB_ERROR")
        assert error == {"device": "j", "operation": "read", "action": on_error}
        completed = await client.event("BLOCK_JOB_COMPLETED")
        assert completed["x-detail"] == f"Could not read '{chain.paths[0]}': Input/output error"
        assert completed["offset"] < completed["len"]
        disk.is_broken = False
    assert qemu_img.content(chain.active) == chain.content


async def test_filter_that_a_stream_was_asked_for_stays(tmp_path: Path) -> None:
    """A restart looks the stream up by that name, which must not be another node's by then."""
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await client.command("object-add", {"qom-type": "throttle-group", "id": "g"})
        image = {"driver": "qcow2", "file": {"driver": "file", "filename": str(chain.active)}}
        throttle = {"driver": "throttle", "node-name": "th", "throttle-group": "g", "file": image}
        await client.command("blockdev-add", throttle)
        await client.command("block-stream", {"job-id": "j", "device": "th", "speed": 1})
        assert (await refusal(client, "blockdev-del", node_name="th"))[1] == (
            "Node 'th' is busy: block device is in use by block job: stream"
        )
        await client.command("block-job-cancel", device="j", force=True)
        await client.event("BLOCK_JOB_CANCELLED")
        await client.command("blockdev-del", {"node-name": "th"})
