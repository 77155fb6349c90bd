"""What is durable before what: the new image, the journal, what guests write, what clients are told."""

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from blockd.commands.telling import EventTeller
from blockd.daemon.state_dir import StateDir
from blockd.devices import overlays
from blockd.jobs.job import Job
from blockd.protocols.file import FileNode
from blockd.units import KIB
from tests import qemu_img
from tests.chains import make
from tests.control.running import running, until

LAYERS = ["ABCDEFGH", "-X--0---"]
SIZE = 8 * 64 * KIB


class Log:
    """Notes calls of methods, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lines: list[str] = []
        self._monkeypatch = monkeypatch

    def note(self, owner: object, name: str, line: Callable[..., str]) -> None:
        real = getattr(owner, name)

        def noting(*arguments: object) -> object:
            self.lines.append(line(*arguments))
            return real(*arguments)

        self._monkeypatch.setattr(owner, name, noting)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    found = Log(monkeypatch)
    found.note(StateDir, "publish", lambda *_: "journal")
    found.note(FileNode, "sync_blocking", lambda file: f"sync {os.path.basename(file.filename)}")  # noqa: PTH119
    found.note(overlays, "sync_folder", lambda _: "sync folder")

    def ended(_events: EventTeller, job: Job) -> str:
        return f"{job.id} ended"

    found.note(EventTeller, "ended", ended)
    return found


async def test_new_image_is_durable_before_the_journal_names_it(tmp_path: Path, log: Log) -> None:
    chain = await make(tmp_path, LAYERS)
    copy = qemu_img.create(tmp_path / "copy.qcow2", SIZE, backing=chain.active)
    async with running(tmp_path, "--state-dir", tmp_path / "s", "--device", f"vda={chain.active}") as daemon:
        client = await daemon.qmp()
        log.lines.clear()
        await client.command("block_switch", device="vda", filename=str(copy))
        assert log.lines.count("journal") == 1
        before = log.lines[: log.lines.index("journal")]
        assert {"sync copy.qcow2", "sync folder", f"sync {chain.active.name}"} <= set(before)


async def test_job_is_recorded_before_its_end_is_told_and_its_image_before_both(
    tmp_path: Path, log: Log
) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path, "--state-dir", tmp_path / "s", "--device", f"vda={chain.active}") as daemon:
        client = await daemon.qmp()
        await client.command("block_stream", device="vda")
        await client.event("JOB_STATUS_CHANGE", status="null")
        told = log.lines.index("vda ended")
        assert log.lines[told - 1] == "journal"
        assert log.lines[told - 2] == f"sync {chain.active.name}"


async def test_guests_wait_until_the_switch_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_writing, may_write = threading.Event(), threading.Event()
    publish: Callable[[StateDir], None] = StateDir.publish

    def wait_and_publish(directory: StateDir) -> None:
        is_writing.set()
        assert may_write.wait(10)
        publish(directory)

    chain = await make(tmp_path, LAYERS)
    copy = qemu_img.create(tmp_path / "copy.qcow2", SIZE, backing=chain.active)
    async with running(tmp_path, "--state-dir", tmp_path / "s", "--device", f"vda={chain.active}") as daemon:
        client, guest = await daemon.qmp(), await daemon.guest("vda")
        monkeypatch.setattr(StateDir, "publish", wait_and_publish)
        switch = client.command("block_switch", device="vda", filename=str(copy))
        async with asyncio.TaskGroup() as tasks:
            switching = tasks.create_task(switch)
            await until(is_writing.is_set)
            writing = tasks.create_task(guest.write(0, b"in the copy"))
            assert await (await daemon.qmp()).command("query-jobs") == []
            assert not (writing.done() or switching.done())
            may_write.set()
    assert qemu_img.content(copy)[:11] == b"in the copy"
    assert qemu_img.content(chain.active) == chain.content
