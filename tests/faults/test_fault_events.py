"""A whole daemon on disks that fail: the events that QMP clients get, io-status, and how it goes on."""

import errno
import itertools
from pathlib import Path

import pytest

from blockd.block.file_events import FileEvent as Event
from blockd.filters.fault_rules import IoType
from tests import qemu_img
from tests.control.running import running
from tests.faults.rig import Site, nth
from tests.model import drawn
from tests.qmp_client import Json, QmpClient

CLUSTER = 65536
WRITES = Site(Event.COR_WRITE, IoType.WRITE)
READS = Site(Event.READ_AIO, IoType.READ, "base")
CASES = list(
    itertools.product([WRITES, READS], [errno.EIO, errno.ENOSPC], ["report", "ignore", "stop", "enospc"])
)


async def add_disk(client: QmpClient, folder: Path, site: Site, code: int) -> bytes:
    """An overlay over a raw base; one of the two fails once. Returns the content."""
    content = drawn(["ABCDEFGH" * 16], CLUSTER)  # more than one copy takes
    base = folder / "base.raw"
    base.write_bytes(content)
    active = qemu_img.create(folder / "active.qcow2", len(content), backing=base, backing_format="raw")
    files = {"active": active, "base": base}
    nodes: dict[str, Json] = {name: {"driver": "file", "filename": str(path)} for name, path in files.items()}
    nodes[site.file] = {"driver": "faults", "image": nodes[site.file], **nth(site, 2, code)}
    backing = {"driver": "raw", "file": nodes["base"]}
    await client.command(
        "blockdev-add",
        {"driver": "qcow2", "node-name": "q", "file": nodes["active"], "backing": backing},
    )
    return content


@pytest.mark.parametrize(
    ("site", "code", "on_error"),
    CASES,
    ids=[f"{site.io_type}-{errno.errorcode[code]}-{on_error}" for site, code, on_error in CASES],
)
async def test_error_of_the_disk_under_a_stream(tmp_path: Path, site: Site, code: int, on_error: str) -> None:
    expected = on_error
    if on_error == "enospc":
        expected = "stop" if code == errno.ENOSPC else "report"
    async with running(tmp_path) as daemon:
        client = await daemon.qmp()
        content = await add_disk(client, tmp_path, site, code)
        await client.command("block-stream", {"device": "q", "job-id": "j", "on-error": on_error})
        told = await client.event("BLOCK_JOB_ERROR")
        assert told == {"device": "j", "operation": site.io_type, "action": expected}
        if expected == "stop":
            await client.event("JOB_STATUS_CHANGE", id="j", status="paused")
            [job] = await client.command("query-block-jobs")
            assert (job["io-status"], job["paused"]) == (
                "nospace" if code == errno.ENOSPC else "failed",
                True,
            )
            await client.command("block-job-resume", {"device": "j"})
        done = await client.event("BLOCK_JOB_COMPLETED")
        assert ("error" in done) == (expected != "stop")
        if expected != "stop":
            assert client.event_names().count("BLOCK_JOB_ERROR") == 1
            await client.event("JOB_STATUS_CHANGE", id="j", status="null")
            await client.command("block-stream", {"device": "q", "job-id": "k"})
            done = await client.event("BLOCK_JOB_COMPLETED", device="k")
            assert "error" not in done
    (tmp_path / "base.raw").unlink()
    qemu_img.assert_sound(tmp_path / "active.qcow2")
    assert qemu_img.content(tmp_path / "active.qcow2") == content
