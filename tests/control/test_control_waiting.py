"""Commands that wait for another change find what is there when it is their turn."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from blockd.aio import ThreadCalls, in_thread, process_calls
from blockd.daemon.journal import parse_journal
from blockd.devices.turns import ChangeLock, NoTurn
from blockd.units import MIB
from tests import qemu_img
from tests.control.running import WAIT_S, Running, refusal, running, until
from tests.qmp_client import QmpClient

COMMANDS: dict[str, dict[str, object]] = {
    "block_resize": {"node_name": "n", "size": 2 * MIB},
    "block-stream": {"device": "n", "job_id": "j"},
    "block-export-add": {"type": "nbd", "id": "e", "node_name": "n", "writable": True},
    "nbd-server-add": {"device": "n", "writable": True},
    "change-backing-file": {"device": "n", "image_node_name": "n", "backing_file": ""},
    "blockdev-snapshot": {"node": "n", "overlay": "o"},
    "blockdev-snapshot-sync": {"node_name": "n", "snapshot_file": "s.qcow2", "snapshot_node_name": "s"},
    "blockdev-del": {"node_name": "n"},
    "blockdev-reopen": {"options": [{"driver": "qcow2", "node-name": "n", "file": "f"}]},
}


def waiting_count(daemon: Running) -> int:
    """How many commands wait for a change, in the order in which they came."""
    return len(daemon.services.devices.changing._waiters or ())


def nodes(folder: Path) -> list[str]:
    """The options for what the commands name."""
    words: list[str] = []
    for node, file in (("n", "f"), ("o", "g")):
        image = qemu_img.create(folder / f"{node}.qcow2", MIB)
        words += ["--blockdev", f"file,node-name={file},filename={image}"]
        words += ["--blockdev", f"qcow2,node-name={node},file={file}"]
    return words


@pytest.mark.parametrize("command", COMMANDS)
async def test_a_node_that_is_removed_meanwhile_is_not_there(tmp_path: Path, command: str) -> None:
    async with running(tmp_path, *nodes(tmp_path)) as daemon:
        first, second = await daemon.qmp(), await daemon.qmp()
        async with daemon.services.devices.changing:
            removing = asyncio.create_task(first.command("blockdev-del", {"node-name": "n"}))
            await until(lambda: waiting_count(daemon) == 1)
            waiting = asyncio.create_task(refusal(second, command, **COMMANDS[command]))
            await until(lambda: waiting_count(daemon) == 2)
        await removing
        _, text = await waiting
        assert "node-name='n'" in text, text


async def test_a_stream_with_nothing_to_do_that_another_client_pauses_is_answered(tmp_path: Path) -> None:
    image = qemu_img.create(tmp_path / "disk.qcow2", MIB)
    async with running(tmp_path, "--device", f"vda={image}") as daemon:
        client, jobs = await daemon.qmp(), daemon.services.jobs
        streaming = asyncio.create_task(client.command("block_stream", device="vda"))
        async with asyncio.timeout(60):
            while (job := jobs.get("vda")) is None:  # noqa: ASYNC110  (at every turn of the loop)
                await asyncio.sleep(0)
            job.pause()
            await streaming
        assert job.status == "paused"
        await client.command("job-resume", id="vda")
        await client.event("BLOCK_JOB_COMPLETED")


OF_EXPORTS: dict[str, dict[str, object]] = {
    "block-export-del": {"id": "x"},
    "nbd-server-remove": {"name": "x"},
    "nbd-server-stop": {},
}
# What changes no disk, so that only the journal waits for its turn.
OF_THE_JOURNAL: dict[str, dict[str, object]] = {"object-add": {"qom_type": "throttle-group", "id": "t"}}
HANGS = "Another change waits for a file that has not answered for"


@asynccontextmanager
async def hanging_change(daemon: Running) -> AsyncIterator[QmpClient]:
    """A client of a daemon in which a change waits for a file as long as this lasts."""
    answer = threading.Event()
    client, devices = await daemon.qmp(), daemon.services.devices
    devices.changing.turn_max_s = 0.05
    async with devices.changing, asyncio.TaskGroup() as tasks:
        tasks.create_task(in_thread(answer.wait))
        try:
            async with asyncio.timeout(WAIT_S / 2):
                yield client
        finally:
            answer.set()
            devices.changing.turn_max_s = WAIT_S


@pytest.mark.parametrize("has_journal", [False, True], ids=["", "journal"])
@pytest.mark.parametrize("command", [*COMMANDS, *OF_EXPORTS])
async def test_behind_a_change_that_waits_for_a_file_it_is_refused(
    tmp_path: Path, command: str, *, has_journal: bool
) -> None:
    """However long the file takes, the client has an answer."""
    words = ["--state-dir", str(tmp_path / "state")] if has_journal else []
    async with running(tmp_path, *nodes(tmp_path), *words) as daemon:
        export = {"type": "nbd", "id": "x", "node-name": "n"}
        await (await daemon.qmp()).command("block-export-add", export)
        async with hanging_change(daemon) as client:
            _, text = await refusal(client, command, **{**COMMANDS, **OF_EXPORTS}[command])
            assert HANGS in text
            assert await client.command("query-named-block-nodes")
            assert await client.command("query-block-exports")


@pytest.mark.parametrize("command", ["job-finalize", "job-cancel"])
async def test_a_job_that_cannot_end_behind_such_a_change_ends_later(tmp_path: Path, command: str) -> None:
    """Who has asked for its end has an answer meanwhile."""
    base = qemu_img.create(tmp_path / "base.qcow2", MIB)
    disk = qemu_img.create(tmp_path / "disk.qcow2", MIB, backing=base)
    async with running(tmp_path, "--device", f"vda={disk}") as daemon:
        listener = await daemon.qmp()
        await listener.command("block-stream", {"device": "vda", "job-id": "j", "auto-finalize": False})
        await listener.event("BLOCK_JOB_PENDING")
        async with hanging_change(daemon) as client:
            _, text = await refusal(client, command, id="j")
            assert HANGS in text
            assert len(await client.command("query-jobs")) == 1
        is_done = command == "job-finalize"
        await listener.event("BLOCK_JOB_COMPLETED" if is_done else "BLOCK_JOB_CANCELLED")
    assert ("backing" in qemu_img.qemu("qemu-img", "info", disk)) != is_done


async def test_a_stream_with_nothing_to_copy_that_cannot_end_behind_such_a_change_ends_later(
    tmp_path: Path,
) -> None:
    """It has begun before the change that hangs, and is to record another name after it."""
    base = qemu_img.create(tmp_path / "base.qcow2", MIB)
    disk = qemu_img.create(tmp_path / "disk.qcow2", MIB, backing=base)
    async with running(tmp_path, "--device", f"vda={disk}") as daemon:
        client = await daemon.qmp()
        arguments = {"device": "vda", "job_id": "j", "base": str(base), "backing_file": "./base.qcow2"}

        async def hang() -> None:
            async with hanging_change(daemon) as other:
                assert HANGS in (await streaming)[1]
                assert [job["id"] for job in await other.command("query-jobs")] == ["j"]

        async with daemon.services.devices.changing:
            streaming = asyncio.create_task(refusal(client, "block-stream", **arguments))
            await until(lambda: waiting_count(daemon) == 1)
            hanging = asyncio.create_task(hang())
            await until(lambda: waiting_count(daemon) == 2)
        await hanging
        await client.event("BLOCK_JOB_COMPLETED")
    assert qemu_img.info(disk)["backing-filename"] == "./base.qcow2"


@pytest.mark.parametrize("command", OF_THE_JOURNAL)
async def test_what_cannot_be_recorded_behind_such_a_change_is_answered(tmp_path: Path, command: str) -> None:
    async with (
        running(tmp_path, "--state-dir", tmp_path / "state") as daemon,
        hanging_change(daemon) as client,
    ):
        _, text = await refusal(client, command, **OF_THE_JOURNAL[command])
        assert f"Could not write the journal: {HANGS}" in text
    journal = (tmp_path / "state" / "journal.json").read_bytes()
    [group] = parse_journal(journal, "journal").state["throttle-groups"]
    assert group["id"] == "t"


@pytest.mark.parametrize(
    ("held_s", "hanging_s"), [(1000.0, 0.0), (0.0, 1000.0)], ids=["nothing hangs", "a guest's read hangs"]
)
async def test_behind_a_change_that_only_takes_long_it_has_its_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_s: float, hanging_s: float
) -> None:
    async with running(tmp_path, *nodes(tmp_path)) as daemon:
        client, devices = await daemon.qmp(), daemon.services.devices
        devices.changing.turn_max_s, has_come, tries = 0.001, devices.changing._has_come, []

        async def noted(wait: Callable[[], Awaitable[object]]) -> bool:
            tries.append(await has_come(wait))
            return tries[-1]

        monkeypatch.setattr(devices.changing, "_has_come", noted)
        monkeypatch.setattr(ThreadCalls, "longest_s", hanging_s)
        monkeypatch.setattr(ChangeLock, "held_s", held_s)
        async with devices.changing:
            removing = asyncio.create_task(client.command("blockdev-del", {"node-name": "n"}))
            await until(lambda: len(tries) > 1)
            assert not removing.done()
        await removing


async def test_a_copy_by_another_process_that_hangs_is_such_a_change_too() -> None:
    lock = ChangeLock()
    lock.turn_max_s = 0.01
    async with lock:
        copying = process_calls.begin()
        try:
            with pytest.raises(NoTurn, match=HANGS):
                await lock.unless_hanging(lock.acquire)
        finally:
            process_calls.finish(copying)
