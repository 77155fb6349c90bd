"""Streams of all kinds: QEMU's iotest 030."""

import errno
from pathlib import Path

import pytest

from tests import qemu_img
from tests.chains import Chain, make
from tests.control.running import refusal, running
from tests.iotests_ideas.nodes import Options, add, add_chain, export, file, finished, nodes_of, qcow2, stream
from tests.qmp_client import QmpClient

LAYERS = ["AB0-A-AB", "-C-C--0-", "D------D", "--E-----", "F---F---", "-----G--"]
CLUSTER = 65536

BUSY = "is busy: block device is in use by block job: stream"


async def go_on(client: QmpClient, *job_ids: str) -> None:
    """Let jobs that were started slowly come to their end."""
    for job_id in job_ids:
        await client.command("block-job-set-speed", device=job_id, speed=0)
    for job_id in job_ids:
        assert "error" not in await finished(client, job_id)
    assert await client.command("query-block-jobs") == []


# -- one disk ---------------------------------------------------------------------------------


async def test_stream_of_everything(tmp_path: Path) -> None:
    """Mirrors TestSingleDrive.test_stream: afterwards the image has the same map as with its backing."""
    chain = await make(tmp_path, LAYERS[:2], base_format="raw")
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add_chain(client, chain)
        await stream(client, "j", "n1")
        completed = await finished(client, "j")
        assert completed["offset"] == completed["len"] == len(chain.content)
        assert await client.command("query-block-jobs") == []
    assert qemu_img.content(chain.active) == chain.content


async def test_intermediate_stream(tmp_path: Path) -> None:
    """Mirrors test_stream_intermediate: what is streamed is not found above, and the disk is as it was."""
    chain = await make(tmp_path, LAYERS[:3])
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add_chain(client, chain)
        await stream(client, "j", "n1")
        await finished(client, "j")
        nodes = await nodes_of(client)
        assert "backing_file" not in nodes["n1"]
        assert nodes["n2"]["backing_file"] == str(chain.paths[1])
    assert qemu_img.content(chain.active) == chain.content
    one = await make_flat(tmp_path, LAYERS[:2])
    assert qemu_img.content(chain.paths[1]) == one


async def make_flat(folder: Path, layers: list[str]) -> bytes:
    (folder / "flat").mkdir()
    return (await make(folder / "flat", layers)).content


async def test_paused_stream_stands_still(tmp_path: Path) -> None:
    """Mirrors test_stream_pause."""
    chain = await make(tmp_path, LAYERS[:2])
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add_chain(client, chain)
        await stream(client, "j", "n1", speed=CLUSTER)
        await client.command("block-job-pause", device="j")
        await client.event("JOB_STATUS_CHANGE", id="j", status="paused")
        (before,) = await client.command("query-block-jobs")
        await client.command("block-job-set-speed", device="j", speed=0)
        await export(client, "n1")
        guest = await daemon.guest("n1")
        for number in range(20):  # others go on, for as long as the whole stream would take
            assert await guest.read(number % 8 * CLUSTER, CLUSTER)
        (after,) = await client.command("query-block-jobs")
        assert {**after, "speed": before["speed"]} == before
        await client.command("block-job-resume", device="j")
        assert "error" not in await finished(client, "j")
    assert qemu_img.content(chain.active) == chain.content


async def test_stream_of_nothing_copies_nothing(tmp_path: Path) -> None:
    """Mirrors test_stream_no_op."""
    chain = await make(tmp_path, LAYERS[:3])
    before = qemu_img.check(chain.active)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add_chain(client, chain)
        await stream(client, "j", "n2", base=str(chain.paths[1]))
        assert (await finished(client, "j"))["len"] == 0
    assert qemu_img.check(chain.active) == before


async def test_partial_stream(tmp_path: Path) -> None:
    """Mirrors test_stream_partial."""
    chain = await make(tmp_path, LAYERS[:3])
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add_chain(client, chain)
        await stream(client, "j", "n2", base=str(chain.paths[0]))
        assert "error" not in await finished(client, "j")
        assert (await nodes_of(client))["n2"]["backing_file"] == str(chain.paths[0])
    assert qemu_img.content(chain.active) == chain.content


async def test_what_is_not_there(tmp_path: Path) -> None:
    """Mirrors test_device_not_found and test_job_id_missing."""
    chain = await make(tmp_path, LAYERS[:2])
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add_chain(client, chain)
        found = await refusal(client, "block-stream", job_id="j", device="nope")
        assert found == ("GenericError", "Cannot find device='nope' nor node-name='nope'")
        found = await refusal(client, "block-stream", device="n1")
        assert found == ("GenericError", "Invalid job ID ''")


async def test_read_only_image(tmp_path: Path) -> None:
    """Mirrors test_read_only: with its file read-only for good it cannot be streamed into."""
    chain = await make(tmp_path, LAYERS[:2])
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add(client, file(chain.active, node_name="f", read_only=True))
        await add(client, qcow2("n", "f", read_only=True))
        found = await refusal(client, "block-stream", job_id="j", device="n")
        assert found == ("GenericError", "Block node is read-only")


# -- several streams in one chain ---------------------------------------------------------------


async def test_parallel_streams(tmp_path: Path) -> None:
    """Mirrors TestParallelOps.test_stream_parallel: each second image is streamed into, all at once."""
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add_chain(client, chain)
        await export(client, "n5")
        guest = await daemon.guest("n5")
        pairs = [("n5", "n3"), ("n3", "n1"), ("n1", None)]
        for top, base in pairs:
            end = {"base_node": base} if base else {}
            await stream(client, f"into-{top}", top, speed=1, **end)
        assert len(await client.command("query-block-jobs")) == 3
        assert await guest.read(0, len(chain.content)) == chain.content
        await go_on(client, *(f"into-{top}" for top, _ in pairs))
        nodes = daemon.services.graph.nodes
        assert [nodes[top].backing for top, _ in pairs] == [nodes["n3"], nodes["n1"], None]
        assert await guest.read(0, len(chain.content)) == chain.content
    assert qemu_img.content(chain.active) == chain.content
    for path in chain.paths:
        qemu_img.assert_sound(path)


@pytest.mark.parametrize(
    ("first", "others"),
    [
        # test_overlapping_1: what lies between top and base, top included, belongs to the first.
        (("n4", "n1"), [("n5", "n2"), ("n3", "n1"), ("n2", None), ("n4", "n3"), ("n5", None)]),
        # test_overlapping_2 and 3: without a base it is everything below.
        (("n3", None), [("n1", None), ("n2", "n0"), ("n5", "n2"), ("n3", "n2")]),
    ],
)
async def test_overlapping_streams(
    tmp_path: Path, first: tuple[str, str | None], others: list[tuple[str, str | None]]
) -> None:
    """Mirrors test_overlapping_1 to _3."""
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add_chain(client, chain)
        top, base = first
        await stream(client, "first", top, speed=1, **({"base_node": base} if base else {}))
        for other_top, other_base in others:
            end = {"base_node": other_base} if other_base else {}
            found = await refusal(client, "block-stream", job_id="other", device=other_top, **end)
            assert found[0] == "GenericError"
            assert found[1].endswith(BUSY)
        await go_on(client, "first")
    assert qemu_img.content(chain.active) == chain.content


async def test_base_by_node_name(tmp_path: Path) -> None:
    """Mirrors test_stream_base_node_name."""
    chain = await make(tmp_path, LAYERS[:5])
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add_chain(client, chain)
        cases = [
            (
                {"base": str(chain.paths[2]), "base_node": "n2"},
                "'base' and 'base-node' cannot be specified at the same time",
            ),
            ({"base_node": "none"}, "Cannot find device='' nor node-name='none'"),
            ({"base_node": "n4"}, "Node 'n4' is not a backing image of 'n4'"),
            ({"base": str(chain.paths[4])}, f"Can't find '{chain.paths[4]}' in the backing chain"),
        ]
        for end, text in cases:
            found = await refusal(client, "block-stream", job_id="j", device="n4", **end)
            assert found == ("GenericError", text)
        await stream(client, "j", "n4", base_node="n2")
        assert "error" not in await finished(client, "j")
        assert (await nodes_of(client))["n4"]["backing_file"] == str(chain.paths[2])
    assert qemu_img.content(chain.active) == chain.content


async def test_smaller_backing_file(tmp_path: Path) -> None:
    """Mirrors TestSmallerBackingFile: behind the end of the backing there are zeroes."""
    below = await make(tmp_path, ["AB"])
    path = qemu_img.create(tmp_path / "large.qcow2", 8 * CLUSTER, backing=below.active)
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add(client, qcow2("top", path))
        await stream(client, "j", "top")
        assert "error" not in await finished(client, "j")
    assert qemu_img.content(path) == below.content + bytes(6 * CLUSTER)


# -- disks that fail --------------------------------------------------------------------------

FAILING_CLUSTER = 4


async def add_failing(client: QmpClient, chain: Chain, code: int) -> None:
    """The base cannot be read in one place, once."""
    rule = {"event": "none", "iotype": "read", "once": True, "errno": code}
    # Raw, so that a place of the disk is a place of the file.
    sector = FAILING_CLUSTER * CLUSTER // 512
    failing: Options = {
        "driver": "blkdebug",
        "image": file(chain.paths[0]),
        "inject-error": [{**rule, "sector": sector}],
    }
    base = {"driver": "raw", "node-name": "base", "file": failing, "read-only": True}
    await add(client, base, qcow2("top", chain.active, backing="base"))


@pytest.fixture
async def failing_chain(tmp_path: Path) -> Chain:
    return await make(tmp_path, ["ABABABAB", "--------"], base_format="raw")


@pytest.mark.parametrize(("on_error", "code"), [("report", errno.EIO), ("enospc", errno.EIO)])
async def test_report(failing_chain: Chain, on_error: str, code: int) -> None:
    """Mirrors TestEIO.test_report and test_enospc."""
    chain = failing_chain
    async with running(chain.active.parent) as daemon:
        client = await daemon.qmp()
        await add_failing(client, chain, code)
        await stream(client, "j", "top", on_error=on_error, speed=10 * CLUSTER)
        completed = await finished(client, "j")
        assert await client.event("BLOCK_JOB_ERROR") == {
            "device": "j",
            "operation": "read",
            "action": "report",
        }
        assert completed["error"] == "Input/output error"
        assert (completed["offset"], completed["len"]) == (FAILING_CLUSTER * CLUSTER, 8 * CLUSTER)
        assert daemon.services.graph["top"].backing is daemon.services.graph["base"]
        # It failed once only.
        await stream(client, "j", "top")
        assert "error" not in await finished(client, "j")
    assert qemu_img.content(chain.active) == chain.content


async def test_ignore(failing_chain: Chain) -> None:
    """Mirrors TestEIO.test_ignore: to the end, and yet it has failed and keeps its backing."""
    chain = failing_chain
    async with running(chain.active.parent) as daemon:
        client = await daemon.qmp()
        await add_failing(client, chain, errno.EIO)
        await stream(client, "j", "top", on_error="ignore")
        completed = await finished(client, "j")
        assert completed["error"] == "Input/output error"
        assert completed["offset"] == completed["len"]
        assert (await client.event("BLOCK_JOB_ERROR"))["action"] == "ignore"
        assert daemon.services.graph["top"].backing is daemon.services.graph["base"]
    assert qemu_img.content(chain.active) == chain.content


@pytest.mark.parametrize(
    ("on_error", "code", "io_status"),
    [("stop", errno.EIO, "failed"), ("stop", errno.ENOSPC, "nospace"), ("enospc", errno.ENOSPC, "nospace")],
)
async def test_stop_and_resume(failing_chain: Chain, on_error: str, code: int, io_status: str) -> None:
    """Mirrors TestEIO.test_stop and TestENOSPC.test_enospc."""
    chain = failing_chain
    async with running(chain.active.parent) as daemon:
        client = await daemon.qmp()
        await add_failing(client, chain, code)
        await stream(client, "j", "top", on_error=on_error, speed=10 * CLUSTER)
        assert (await client.event("BLOCK_JOB_ERROR"))["action"] == "stop"
        await client.event("JOB_STATUS_CHANGE", id="j", status="paused")
        (job,) = await client.command("query-block-jobs")
        assert (job["status"], job["io-status"], job["paused"]) == ("paused", io_status, True)
        assert job["offset"] == FAILING_CLUSTER * CLUSTER
        await client.command("block-job-resume", device="j")
        (job,) = await client.command("query-block-jobs")
        assert (job["io-status"], job["paused"]) == ("ok", False)
        assert "error" not in await finished(client, "j")
    assert qemu_img.content(chain.active) == chain.content


# -- speed ------------------------------------------------------------------------------------


async def test_set_speed(tmp_path: Path) -> None:
    """Mirrors TestSetSpeed."""
    chain = await make(tmp_path, LAYERS[:2])
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add_chain(client, chain)
        text = ("GenericError", "Parameter 'speed' expects a non-negative value")
        assert await refusal(client, "block-stream", job_id="j", device="n1", speed=-1) == text
        assert await client.command("query-block-jobs") == []
        await stream(client, "j", "n1", speed=1)
        assert await refusal(client, "block-job-set-speed", device="j", speed=-1) == text
        for speed in (8 << 20, 4096):
            await client.command("block-job-set-speed", device="j", speed=speed)
            jobs = await client.command("query-block-jobs")
            assert not jobs or jobs[0]["speed"] == speed
        await client.command("quit")


async def test_stream_of_a_large_disk_can_be_cancelled_at_once(tmp_path: Path) -> None:
    """Mirrors TestStreamStop."""
    base = tmp_path / "base.raw"
    with base.open("wb") as disk:
        disk.write(b"\1" * (4 << 20))
        disk.truncate(8 << 30)
    top = qemu_img.create(tmp_path / "top.qcow2", 8 << 30, backing=base, backing_format="raw")
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        await add(client, qcow2("top", top))
        await stream(client, "j", "top", speed=1)
        await client.command("block-job-cancel", device="j")
        assert "error" not in await finished(client, "j")
        assert client.event_names()[-3:] == [
            *("BLOCK_JOB_CANCELLED", "JOB_STATUS_CHANGE:concluded", "JOB_STATUS_CHANGE:null")
        ]
    qemu_img.assert_sound(top)
