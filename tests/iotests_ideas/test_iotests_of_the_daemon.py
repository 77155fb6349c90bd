"""Nodes, jobs and the end of the daemon: QEMU's iotests 141, 185, 258, qsd-jobs, stream-error-on-reset and
stream-under-throttle."""

import asyncio
from pathlib import Path

import pytest

from tests import qemu_img
from tests.chains import make
from tests.control.running import refusal, running
from tests.iotests_ideas.nodes import add, add_chain, export, file, finished, qcow2, stream, throttle

LAYERS = ["AB0-A-AB", "-C-C--0-", "D------D"]
CLUSTER = 65536


async def test_node_of_a_job_cannot_be_removed(tmp_path: Path) -> None:
    """Mirrors 141, "Testing block-stream": not while the job runs, but when it is cancelled."""
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add(client, qcow2("drv0", chain.active))
        await stream(client, "job0", "drv0", speed=1)
        found = await refusal(client, "blockdev-del", node_name="drv0")
        assert found == (
            "GenericError",
            "Node 'drv0' is busy: block device is in use by block job: stream",
        )
        await client.command("block-job-cancel", device="job0")
        await finished(client, "job0")
        await client.command("blockdev-del", {"node-name": "drv0"})
        assert await client.command("query-named-block-nodes") == []


async def test_quit_during_a_stream(tmp_path: Path) -> None:
    """Mirrors 185, "Start streaming job and exit qemu": one step, then the end, and a sound image."""
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add(client, qcow2("disk", chain.active))
        await stream(client, "j", "disk", speed=CLUSTER)
        await client.command("quit")
        # The events of the job's end came before the reply.
        cancelled = await client.event("BLOCK_JOB_CANCELLED")
        expected = {"device": "j", "len": 8 * CLUSTER, "speed": CLUSTER, "type": "stream"}
        assert expected.items() <= cancelled.items()
        assert cancelled["offset"] <= 4 * CLUSTER
        with pytest.raises(EOFError):
            while True:
                await client.receive()
    qemu_img.assert_sound(chain.active)
    assert qemu_img.content(chain.active) == chain.content


async def test_quit_does_not_wait_for_a_throttled_guest(tmp_path: Path) -> None:
    """Mirrors 185, "throttled QSD": what waits for its limits is not waited for."""
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await client.command("object-add", {"qom-type": "throttle-group", "id": "g", "x-bps-total": 1})
        await add(client, throttle("th", qcow2("disk", chain.active), "g"))
        await export(client, "th")
        guest = await daemon.guest("th")
        await guest.write(0, b"x" * CLUSTER)
        waiting = [guest.write(0, b"y" * CLUSTER), guest.read(0, CLUSTER)]
        writing = asyncio.gather(*waiting, return_exceptions=True)
        await asyncio.sleep(0)
        async with asyncio.timeout(100):
            await client.command("quit")
            results = await writing
        assert all(isinstance(result, Exception) for result in results)
    assert qemu_img.content(chain.active)[:CLUSTER] == b"x" * CLUSTER


@pytest.mark.parametrize("first", ["upper", "lower"])
async def test_neighbouring_jobs_finish_concurrently(tmp_path: Path, first: str) -> None:
    """Mirrors 258: the base of one is the active image of the other, and both end in the same moment."""
    chain = await make(tmp_path, [*LAYERS, "--E-----"])
    async with running(tmp_path) as daemon:
        client, other = await daemon.qmp(), await daemon.qmp()
        await add_chain(client, chain)
        await export(client, "n3")
        guest = await daemon.guest("n3")
        await stream(client, "upper", "n3", base_node="n1", auto_finalize=False)
        await stream(client, "lower", "n1", auto_finalize=False)
        for job_id in ("upper", "lower"):
            await client.event("BLOCK_JOB_PENDING", id=job_id)
        second = "lower" if first == "upper" else "upper"
        await asyncio.gather(
            client.command("job-finalize", id=first), other.command("job-finalize", id=second)
        )
        nodes = daemon.services.graph.nodes
        assert (nodes["n3"].backing, nodes["n1"].backing) == (nodes["n1"], None)
        assert await guest.read(0, len(chain.content)) == chain.content
    assert qemu_img.content(chain.active) == chain.content


async def test_job_at_the_end_of_the_daemon(tmp_path: Path) -> None:
    """Mirrors qsd-jobs, "Job still present at shutdown"; a concluded one that was not dismissed, too."""
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add_chain(client, chain)
        await stream(client, "done", "n1", base_node="n0", auto_dismiss=False)
        await client.event("JOB_STATUS_CHANGE", id="done", status="concluded")
        await stream(client, "pending", "n2", auto_finalize=False)
        await client.event("BLOCK_JOB_PENDING", id="pending")
        await client.command("quit")
        await client.event("BLOCK_JOB_CANCELLED", device="pending")
    assert qemu_img.content(chain.active) == chain.content


async def test_stream_from_a_base_that_a_guest_writes(tmp_path: Path) -> None:
    """Mirrors qsd-jobs, "Streaming can't get permission on base node": here it gets no overlay either."""
    chain = await make(tmp_path, LAYERS[:2])
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add(client, qcow2("base", chain.paths[0]))
        await export(client, "base")
        overlay = qcow2("overlay", chain.active, backing="base")
        found = await refusal(client, "blockdev-add", **overlay)
        assert found == (
            "GenericError",
            "Permission conflict on node 'base': permissions 'write' are both required by an unnamed block "
            "device (uses node 'base' as 'root' child) and unshared by node 'overlay' (uses node 'base' as "
            "'backing' child).",
        )
        await client.command("block-export-del", id="export-base")
        await add(client, overlay)
        await stream(client, "j", "overlay")
        assert "error" not in await finished(client, "j")


async def test_stream_that_fails_while_its_disk_is_drained(tmp_path: Path) -> None:
    """Mirrors stream-error-on-reset: the first write of the job fails, in a drain."""
    chain = await make(tmp_path, LAYERS[:2])
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        rule = {"event": "none", "iotype": "write", "once": True}
        failing = {"driver": "blkdebug", "image": file(chain.active), "inject-error": [rule]}
        await client.command("object-add", {"qom-type": "throttle-group", "id": "g", "x-bps-total": 1})
        await add(client, throttle("base", qcow2("n0", chain.paths[0]), "g"))
        await add(client, qcow2("top", failing, backing="base"))
        await export(client, "top", writable=False)
        guest = await daemon.guest("top")
        await stream(client, "j", "top")
        reading = asyncio.gather(*(guest.read(n * CLUSTER, CLUSTER) for n in range(8)))
        await asyncio.sleep(0)
        node = daemon.services.graph["top"]
        async with daemon.services.devices.changing, daemon.services.devices.drained(node):
            # The job reads its throttled base again, and then meets its error.
            daemon.services.objects.throttle_group("g").set_limits({"bps-total": 0})
            await client.event("BLOCK_JOB_ERROR")
        completed = await finished(client, "j")
        assert completed["error"] == "Input/output error"
        assert b"".join(await reading) == chain.content


async def test_stream_beneath_two_throttles(tmp_path: Path) -> None:
    """Mirrors stream-under-throttle: one without limits, one with, and the stream below both."""
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        limits = {"x-iops-total": 10000, "x-bps-total": 104857600}
        await client.command("object-add", {"qom-type": "throttle-group", "id": "unlimited"})
        await client.command("object-add", {"qom-type": "throttle-group", "id": "limited", **limits})
        inner = throttle("inner", qcow2("unthrottled", chain.active), "unlimited")
        await add(client, throttle("throttled", inner, "limited"))
        await export(client, "throttled")
        guest = await daemon.guest("throttled")
        await stream(client, "stream", "unthrottled")
        assert await guest.read(0, 8 * CLUSTER) == chain.content
        await guest.write(0, b"guest")
        assert "error" not in await finished(client, "stream")
        assert await guest.read(0, 8 * CLUSTER) == b"guest" + chain.content[5:]
    assert qemu_img.content(chain.active) == b"guest" + chain.content[5:]
