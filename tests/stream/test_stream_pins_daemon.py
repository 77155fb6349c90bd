"""Two streams in one chain of a daemon, and a base whose disk does not answer for a long time."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests import qemu_img
from tests.conftest import StartDaemon
from tests.daemon_process import DaemonProcess
from tests.faults import calls
from tests.qmp_client import QmpClient
from tests.stream.deep_chain import NAMES, make_chain

pytestmark = pytest.mark.slow

# Commands that a daemon answers in the time in which it would close what it needs no more.
COMMAND_COUNT = 50


@asynccontextmanager
async def hanging(file: Path) -> AsyncIterator[None]:
    """Inside, no call on a file returns."""
    flag = file.with_name(f"{file.name}.hang")
    flag.touch()
    try:
        yield
    finally:
        flag.unlink()


async def node_names(qmp: QmpClient) -> dict[str, str]:
    """The names of all images that are open, by those of their files."""
    nodes = await qmp.command("query-named-block-nodes", flat=True)
    return {Path(node["file"]).name: node["node-name"] for node in nodes if node["drv"] != "file"}


async def until_read(log: Path, file: Path) -> None:
    while calls.Call("other", "preadv", str(file)) not in calls.logged(log):  # noqa: ASYNC110 (a log)
        await asyncio.sleep(0.01)


async def until_recorded(image: Path, backing: str) -> None:
    """Wait until an image that is in use records another backing file."""
    while backing not in qemu_img.qemu("qemu-img", "info", "-U", image):  # noqa: ASYNC110 (a file)
        await asyncio.sleep(0.01)


async def test_the_end_of_a_stream_leaves_open_what_a_slow_one_reads(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    content = make_chain(tmp_path)
    base, middle, active = (tmp_path / NAMES[number] for number in (0, 2, -1))
    log = tmp_path / "calls.log"
    daemon: DaemonProcess = await start_daemon(
        "--device",
        f"vda={active}",
        environment=calls.environment(tmp_path, log=log, hang=base),
    )
    async with await daemon.qmp() as qmp:
        names = await node_names(qmp)
        log.write_bytes(b"")
        async with hanging(base):
            upper = {"job-id": "upper", "device": "vda", "base-node": names["m.qcow2"]}
            await qmp.command("block-stream", upper)
            await until_read(log, base)
            lower = {"job-id": "lower", "device": names["m.qcow2"], "base-node": names["b0.raw"]}
            await qmp.command("block-stream", {**lower, "backing-file": base.name})
            await until_recorded(middle, f"backing file: {base.name}")
            while "b1.qcow2" in await node_names(qmp):
                pass
            for _ in range(COMMAND_COUNT):
                await qmp.command("query-jobs")
        ends = {(await qmp.event("BLOCK_JOB_COMPLETED"))["device"] for _ in range(2)}
        assert ends == {"lower", "upper"}
        assert not [event for event in qmp.events if event.get("data", {}).get("error")]
        assert qemu_img.qemu("qemu-img", "info", "-U", active).count("m.qcow2") == 1
        reads = qemu_img.qemu(
            "qemu-img", "convert", "-O", "raw", daemon.nbd_uri("vda"), tmp_path / "read.raw"
        )
        assert not reads
    assert (tmp_path / "read.raw").read_bytes() == content
    assert await daemon.stop() == 0
    assert "Bad file descriptor" not in daemon.stderr
    assert qemu_img.content(active) == content
