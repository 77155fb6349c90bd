"""A stream whose base is changed while it runs ends there, also in another run of the daemon."""

import asyncio
from pathlib import Path

import pytest

from blockd.errors import RequestError
from blockd.formats.qcow2.image import Qcow2Image
from blockd.jobs.stream import StreamJob
from blockd.units import KIB
from tests import qemu_img
from tests.chains import make
from tests.control.running import refusal, running, until
from tests.iotests_ideas.nodes import add, qcow2, reopen, stream
from tests.state.restarts import Restarts

CLUSTER = 64 * KIB
LAYERS = ["ABCDEFGH", "-X--0---", "--Y-----"]
SIZE = len(LAYERS[0]) * CLUSTER


@pytest.mark.parametrize("has_base", [True, False])
async def test_the_base_of_now_is_there_after_a_kill(tmp_path: Path, *, has_base: bool) -> None:
    chain = await make(tmp_path, LAYERS)
    low, mid, top = chain.paths
    copy = tmp_path / "copy.qcow2"
    copy.write_bytes(low.read_bytes())
    daemon = Restarts(tmp_path)
    client = await daemon.run()
    await add(client, qcow2("low", low, read_only=True), qcow2("copy", copy, read_only=True))
    await add(client, qcow2("mid", mid, backing="low"), qcow2("top", top, backing="mid"))
    await stream(client, "j", "top", base_node="low", auto_finalize=False)
    await client.event("BLOCK_JOB_PENDING")
    await reopen(client, qcow2("mid", mid, backing="copy" if has_base else None))
    await daemon.kill()
    client = await daemon.run()
    async with asyncio.timeout(100):
        while (await client.command("query-jobs"))[0]["status"] != "pending":  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await client.command("job-finalize", id="j")
    assert "error" not in await client.event("BLOCK_JOB_COMPLETED")
    assert await daemon.stop() == 0
    assert ("copy.qcow2" in qemu_img.qemu("qemu-img", "info", top)) is has_base
    low.rename(tmp_path / "away")
    if has_base:
        assert qemu_img.content(top) == chain.content


async def test_the_image_records_no_base_before_the_state_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that would end while its base is changed waits, and ends as before if that comes to nothing."""
    chain = await make(tmp_path, LAYERS)
    low, mid, top = chain.paths
    async with running(tmp_path) as daemon, asyncio.TaskGroup() as tasks:
        client, other = await daemon.qmp(), await daemon.qmp()
        await add(client, qcow2("low", low, read_only=True), qcow2("mid", mid, backing="low"))
        await add(client, qcow2("top", top, backing="mid"))
        await stream(client, "j", "top", base_node="low", auto_finalize=False)
        await client.event("BLOCK_JOB_PENDING")
        image = daemon.services.graph["top"]
        [job] = daemon.services.jobs
        assert isinstance(image, Qcow2Image)
        assert isinstance(job, StreamJob)

        async def record() -> None:
            monkeypatch.undo()
            tasks.create_task(other.command("job-finalize", id="j"))
            await until(lambda: image.backing_filename != str(mid) or bool(job._recording._waiters))
            assert image.backing_filename == str(mid)
            raise RequestError("the state cannot be recorded")

        monkeypatch.setattr(daemon.services.devices, "record", record)
        found = await refusal(client, "blockdev-reopen", options=[qcow2("mid", mid, backing=None)])
        assert found[1] == "the state cannot be recorded"
        assert "error" not in await client.event("BLOCK_JOB_COMPLETED")
        assert image.backing_filename == str(low)
    assert qemu_img.content(top) == chain.content


async def test_the_base_may_be_changed_twice_by_one_command(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    low, mid, top = chain.paths
    async with running(tmp_path) as daemon, asyncio.timeout(100):
        client = await daemon.qmp()
        await add(client, qcow2("low", low, read_only=True), qcow2("mid", mid, backing="low"))
        await add(client, qcow2("top", top, backing="mid"))
        await stream(client, "j", "top", base_node="low", auto_finalize=False)
        await client.event("BLOCK_JOB_PENDING")
        await reopen(client, *(qcow2("mid", mid, backing=name) for name in (None, "low", None, "low")))
        await client.command("job-finalize", id="j")
        assert "error" not in await client.event("BLOCK_JOB_COMPLETED")
    assert qemu_img.content(top) == chain.content
