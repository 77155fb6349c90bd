"""When the journal cannot be written, and the end of a daemon with much to end."""

import asyncio
import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockd.daemon import tracking
from blockd.daemon.state_dir import StateDir
from blockd.errors import StorageError
from blockd.protocols import new_file
from blockd.protocols.nbd_client import NbdClient
from blockd.units import KIB
from tests import qemu_img, slow_source
from tests.chains import make
from tests.conftest import StartDaemon
from tests.control.running import refusal, running, until
from tests.filesystems import TMPFS, mounted, read_only
from tests.iotests_ideas.nodes import add, export, file, qcow2
from tests.qmp_client import QmpClient
from tests.state.full_disk import FullDisk

CLUSTER = 64 * KIB
LAYERS = ["ABCDEFGH", "-X--0---"]
SIZE = 8 * CLUSTER


class FailingJournal:
    """Makes a step of writing journals fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    @contextlib.contextmanager
    def fails(self, step: str) -> Iterator[None]:
        def fail(*_arguments: object, **_named: object) -> None:
            raise StorageError.from_os(OSError(errno.ENOSPC, ""), "write", "journal.json")

        with self._monkeypatch.context() as patch:
            patch.setattr(StateDir, step, fail)
            yield


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> FailingJournal:
    return FailingJournal(monkeypatch)


@pytest.mark.parametrize("step", ["prepare", "publish", "sync"])
async def test_switch_that_cannot_be_recorded_does_not_happen(
    tmp_path: Path, failing: FailingJournal, step: str
) -> None:
    chain = await make(tmp_path, LAYERS)
    copy = qemu_img.create(tmp_path / "copy.qcow2", SIZE, backing=chain.active)
    async with running(tmp_path, "--state-dir", tmp_path / "s", "--device", f"vda={chain.active}") as daemon:
        client, guest = await daemon.qmp(), await daemon.guest("vda")
        with failing.fails(step):
            error = await refusal(client, "block_switch", device="vda", filename=str(copy))
        assert error == ("GenericError", "Could not write 'journal.json': No space left on device")
        assert "BLOCK_SWITCHED" not in client.event_names()
        await guest.write(0, b"still there")
        await guest.flush()
        assert daemon.services.devices.get("vda").active.filename == str(chain.active)
        await client.command("block_switch", device="vda", filename=str(copy))
        await guest.write(0, b"in the copy")
        await guest.flush()
    expected = b"in the copy" + chain.content[11:]
    async with running(tmp_path, "--state-dir", tmp_path / "s", "--device", f"vda={chain.active}") as daemon:
        guest = await daemon.guest("vda")
        assert await guest.read(0, SIZE) == expected
    assert qemu_img.content(chain.active)[:11] == b"still there"


async def test_files_are_not_swapped_if_that_cannot_be_recorded(
    tmp_path: Path, failing: FailingJournal
) -> None:
    paths = [qemu_img.create(tmp_path / f"{number}.qcow2", SIZE) for number in range(2)]
    nodes = [qcow2(f"n{number}", file(path, node_name=f"f{number}")) for number, path in enumerate(paths)]
    async with running(tmp_path, "--state-dir", tmp_path / "s") as daemon:
        client = await daemon.qmp()
        await add(client, *nodes)
        for name in ("n0", "n1"):
            await export(client, name)
        guests = [await daemon.guest(name) for name in ("n0", "n1")]
        for number, guest in enumerate(guests):
            await guest.write(0, bytes([number + 1]) * CLUSTER)
        swapped = [{**nodes[0], "file": "f1"}, {**nodes[1], "file": "f0"}]
        with failing.fails("prepare"):
            error = await refusal(client, "blockdev-reopen", options=swapped)
        assert error == ("GenericError", "Could not write 'journal.json': No space left on device")
        for number, guest in enumerate(guests):
            assert await guest.read(0, CLUSTER) == bytes([number + 1]) * CLUSTER
            await guest.write(CLUSTER, bytes([number + 8]) * CLUSTER)
    for number, path in enumerate(paths):
        qemu_img.assert_sound(path)
        written = bytes([number + 1]) * CLUSTER + bytes([number + 8]) * CLUSTER
        assert qemu_img.content(path)[: 2 * CLUSTER] == written


@pytest.mark.parametrize("command", ["block_switch", "transaction"])
async def test_switch_that_is_recorded_is_done_even_if_something_else_cannot_be(
    tmp_path: Path, failing: FailingJournal, caplog: pytest.LogCaptureFixture, command: str
) -> None:
    """After the journal with the switch another disk's job is paused, before the one at the command's end."""
    (tmp_path / "other").mkdir()
    chain, other = await make(tmp_path, LAYERS), await make(tmp_path / "other", LAYERS)
    copy = qemu_img.create(tmp_path / "copy.qcow2", SIZE, backing=chain.active)
    disks = ["--device", f"vda={chain.active}", "--device", f"vdb={other.active}"]
    switch = {"device": "vda", "filename": str(copy)}
    actions = [
        {"type": "x-block-switch", "data": switch},
        {"type": "x-block-stream", "data": {"device": "vda", "speed": 1}},
    ]
    async with running(tmp_path, "--state-dir", tmp_path / "s", *disks) as daemon:
        client, devices = await daemon.qmp(), daemon.services.devices
        await client.command("block_stream", device="vdb", speed=1)
        job, save = daemon.services.jobs.get("vdb"), devices.record
        assert job is not None
        with contextlib.ExitStack() as failures:

            async def record() -> None:
                await save()
                failures.enter_context(failing.fails("prepare"))
                job.pause()

            devices.record = record
            await client.command(command, switch if command == "block_switch" else {"actions": actions})
            devices.record = save
            assert "the journal may be out of date: Could not write" in caplog.text
            _, text = await refusal(client, "block-export-del", id="vdb", mode="hard")
            assert "nothing was changed" in text
    async with running(tmp_path, "--state-dir", tmp_path / "s", *disks) as daemon:
        assert daemon.services.devices.get("vda").active.filename == str(copy)
        assert (daemon.services.jobs.get("vda") is not None) == (command == "transaction")


async def test_snapshot_whose_file_cannot_be_removed_again_tells_why_there_is_none(
    tmp_path: Path, failing: FailingJournal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(new_file, "_remove", fail)
    chain, name = await make(tmp_path, LAYERS), str(tmp_path / "new.qcow2")
    async with running(tmp_path, "--state-dir", tmp_path / "s", "--device", f"vda={chain.active}") as daemon:
        client = await daemon.qmp()
        with failing.fails("prepare"):
            error = await refusal(client, "blockdev-snapshot-sync", device="vda", snapshot_file=name)
        assert error == ("GenericError", "Could not write 'journal.json': No space left on device")
    assert f"could not remove '{name}': Input/output error" in caplog.text


async def test_command_that_cannot_be_recorded_says_so_and_the_next_one_records_it(
    tmp_path: Path, failing: FailingJournal
) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path, "--state-dir", tmp_path / "s", "--device", f"vda={chain.active}") as daemon:
        client = await daemon.qmp()
        with failing.fails("prepare"):
            error = await refusal(client, "block_stream", device="vda", speed=1)
            done = "block_stream was carried out, but a restart would not know of it"
            assert error == (
                "GenericError",
                f"Could not write 'journal.json': No space left on device; {done}",
            )
            assert len(await client.command("query-jobs")) == 1
        await client.command("job-pause", id="vda")
    async with running(tmp_path, "--state-dir", tmp_path / "s", "--device", f"vda={chain.active}") as daemon:
        [job] = await (await daemon.qmp()).command("query-block-jobs")
        assert job["paused"]


async def test_while_the_journal_is_behind_commands_change_nothing_more_but_can_stop_what_goes_on(
    tmp_path: Path, failing: FailingJournal, caplog: pytest.LogCaptureFixture
) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path, "--state-dir", tmp_path / "s", "--device", f"vda={chain.active}") as daemon:
        client = await daemon.qmp()
        text = "Could not write 'journal.json': No space left on device"
        with failing.fails("prepare"):
            await refusal(client, "block_stream", device="vda", speed=1)
            for _ in range(2):
                error = await refusal(client, "block-export-add", id="e", type="nbd", node_name="vda")
                nothing = "nothing was changed, as a restart would not know of it"
                assert error == ("GenericError", f"{text}; {nothing}")
            assert len(await client.command("query-block-exports")) == 1
            error = await refusal(client, "job-cancel", id="vda")
            done = "job-cancel was carried out, but a restart would not know of it"
            assert error == ("GenericError", f"{text}; {done}")
            await client.event("BLOCK_JOB_CANCELLED")
            assert caplog.text.count("the journal may be out of date: Could not write") == 1
        await client.command("block_stream", device="vda", speed=1)
        with failing.fails("prepare"):
            await refusal(client, "job-pause", id="vda")
            assert caplog.text.count("the journal may be out of date: Could not write") == 2
        await client.command("job-resume", id="vda")


async def test_start_on_a_full_disk_serves_what_the_journal_says(
    tmp_path: Path, full_disk: FullDisk, caplog: pytest.LogCaptureFixture
) -> None:
    chain = await make(tmp_path, LAYERS)
    options: list[str | Path] = ["--state-dir", tmp_path / "s", "--device", f"vda={chain.active}"]
    async with running(tmp_path, *options):
        pass
    full_disk.room = 0
    extra = qemu_img.create(tmp_path / "extra.qcow2", SIZE)
    async with running(tmp_path, *options, "--device", f"vdb={extra}") as daemon:
        client, guest = await daemon.qmp(), await daemon.guest("vda")
        assert await guest.read(0, SIZE) == chain.content
        await guest.write(0, b"durable")
        await guest.flush()
        assert caplog.text.count("disks are served as it says, and commands that change something are") == 1
        _, text = await refusal(client, "block_stream", device="vda")
        assert text.endswith(
            "No space left on device; nothing was changed, as a restart would not know of it"
        )
        assert await client.command("query-jobs") == []
        full_disk.room = None
        await client.command("block_stream", device="vda", speed=1)
    async with running(tmp_path, "--state-dir", tmp_path / "s") as daemon:
        client = await daemon.qmp()
        assert [job["device"] for job in await client.command("query-block-jobs")] == ["vda"]
        assert {block["device"] for block in await client.command("query-block")} == {"vda", "vdb"}


async def test_start_on_a_read_only_file_system_serves_what_the_journal_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chain = await make(tmp_path, LAYERS)
    with mounted(TMPFS, tmp_path) as place:
        options: list[str | Path] = ["--state-dir", place.path / "s", "--device", f"vda={chain.active}"]
        async with running(tmp_path, *options):
            pass
        extra = qemu_img.create(tmp_path / "extra.qcow2", SIZE)
        with read_only(place.path):
            async with running(tmp_path, *options, "--device", f"vdb={extra}") as daemon:
                client, guest = await daemon.qmp(), await daemon.guest("vda")
                await guest.write(0, b"durable")
                await guest.flush()
                assert caplog.text.count("disks are served as it says, and commands that change") == 1
                _, text = await refusal(client, "block_stream", device="vda")
                nothing = "nothing was changed, as a restart would not know of it"
                assert text.endswith(f"Read-only file system; {nothing}")
                assert await client.command("query-jobs") == []
        async with running(tmp_path, *options, "--device", f"vdb={extra}") as daemon:
            client, guest = await daemon.qmp(), await daemon.guest("vda")
            assert await guest.read(0, 7) == b"durable"
            await client.command("block_stream", device="vda", speed=1)


async def test_changes_are_kept_as_long_as_they_fit(tmp_path: Path, full_disk: FullDisk) -> None:
    chain = await make(tmp_path, LAYERS)
    options: list[str | Path] = ["--state-dir", tmp_path / "s", "--device", f"vda={chain.active}"]
    async with running(tmp_path, *options):
        pass
    full_disk.room = (tmp_path / "s" / "journal.json").stat().st_size - 1
    async with running(tmp_path, *options) as daemon:
        client = await daemon.qmp()
        await client.command("block_stream", device="vda", speed=1)
        await client.command("job-pause", id="vda")
    async with running(tmp_path, *options) as daemon:
        [job] = await (await daemon.qmp()).command("query-block-jobs")
        assert job["paused"]


async def test_state_that_cannot_be_described_once_is_recorded_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake of ours in the middle of it forgets nothing that was touched."""
    chain = await make(tmp_path, LAYERS)

    def fail(*_arguments: object) -> None:
        raise ZeroDivisionError

    async with running(tmp_path, "--state-dir", tmp_path / "s", "--device", f"vda={chain.active}") as daemon:
        client = await daemon.qmp()
        for name in ("job_records", "small_parts", "export_record"):
            with monkeypatch.context() as patch:
                patch.setattr(tracking, name, fail)
                extra = qemu_img.create(tmp_path / name, SIZE)
                await refusal(client, "blockdev-add", driver="file", filename=str(extra), node_name=name)
                await refusal(client, "block-export-add", id=name, type="nbd", node_name=name, name=name)
        await client.command("block_stream", device="vda", speed=1)
    async with running(tmp_path, "--state-dir", tmp_path / "s") as daemon:
        client = await daemon.qmp()
        names = {node["node-name"] for node in await client.command("query-named-block-nodes")}
        assert {"job_records", "small_parts", "export_record"} <= names
        exports = {export["id"] for export in await client.command("query-block-exports")}
        assert {"job_records", "small_parts", "export_record"} <= exports


async def test_a_stop_with_nothing_lost_does_not_say_that_guests_lose_anything(
    tmp_path: Path, failing: FailingJournal, caplog: pytest.LogCaptureFixture
) -> None:
    chain = await make(tmp_path, LAYERS)
    with contextlib.ExitStack() as until_the_end:
        async with running(
            tmp_path, "--state-dir", tmp_path / "s", "--device", f"vda={chain.active}"
        ) as daemon:
            client = await daemon.qmp()
            until_the_end.enter_context(failing.fails("prepare"))
            await refusal(client, "block_stream", device="vda", speed=1)
    assert "the journal may be out of date" in caplog.text
    assert "lost" not in caplog.text


@pytest.mark.parametrize("step", ["prepare", "publish", "sync"])
async def test_end_that_cannot_be_recorded_is_told_all_the_same(
    tmp_path: Path, failing: FailingJournal, step: str, caplog: pytest.LogCaptureFixture
) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path, "--state-dir", tmp_path / "s", "--device", f"vda={chain.active}") as daemon:
        client = await daemon.qmp()
        await client.command("block_stream", device="vda", speed=1)
        await client.command("job-pause", id="vda")
        await client.command("block-job-set-speed", device="vda", speed=0)
        with failing.fails(step):
            await refusal(client, "job-resume", id="vda")
            await client.event("BLOCK_STREAM_COMPLETED")
            await client.event("JOB_STATUS_CHANGE", status="null")
            assert await client.command("query-jobs") == []
        assert client.event_names().count("BLOCK_JOB_COMPLETED") == 1
        await until(lambda: "job vda: its end may be told again after a restart" in caplog.text)
    assert qemu_img.content(chain.active) == chain.content


@pytest.mark.parametrize("step", ["prepare", "publish", "sync"])
async def test_filter_that_leaves_after_its_stream_need_not_be_recorded(
    tmp_path: Path, failing: FailingJournal, step: str, caplog: pytest.LogCaptureFixture
) -> None:
    chain = await make(tmp_path, slow_source.LAYERS, base_format="raw")
    async with running(tmp_path, "--state-dir", tmp_path / "s", *slow_source.options(chain)) as daemon:
        client, guest = await daemon.qmp(), await daemon.guest("vda")
        await guest.read(0, CLUSTER)  # what the limit allows at once
        await client.command("block_stream", device="vda")
        await slow_source.write_parts(guest)
        await client.command("block_stream_cancel", device="vda")
        await client.event("BLOCK_JOB_CANCELLED")
        with failing.fails(step):
            await refusal(client, "qom-set", path="slow", property="limits", value={"bps-read": 0})
            await until(lambda: not list(daemon.services.streams))
            await until(lambda: "the journal may be out of date: Could not write" in caplog.text)
            await slow_source.read_parts(guest)
            await guest.flush()
        await client.command("block_stream", device="vda")
        await client.event("BLOCK_STREAM_COMPLETED")
    assert qemu_img.content(chain.active) == slow_source.with_parts(chain)


async def test_journal_is_written_when_something_changes_and_not_while_nothing_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[object] = []
    publish: Callable[[StateDir], None] = StateDir.publish

    def count(directory: StateDir) -> None:
        written.append(directory)
        publish(directory)

    monkeypatch.setattr(StateDir, "publish", count)
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path, "--state-dir", tmp_path / "s", "--device", f"vda={chain.active}") as daemon:
        client, guest = await daemon.qmp(), await daemon.guest("vda")
        assert len(written) == 1
        for number in range(20):
            await guest.write(number % 8 * CLUSTER, bytes(100))
            await guest.flush()
            await client.command("query-block")
            await client.command("block_stream_status")
        assert len(written) == 1
        await client.command("block_stream", device="vda")
        await client.event("JOB_STATUS_CHANGE", status="null")
        assert len(written) == 3
    assert len(written) == 4  # at the end it is written as a whole


# -- the end of a daemon -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("has_state_dir", [False, True])
async def test_end_with_jobs_and_many_clients_is_clean_and_quick(
    tmp_path: Path, start_daemon: StartDaemon, has_state_dir: bool
) -> None:
    """Four disks being streamed, 16 guests that write and 16 QMP clients: status 0 within 10 seconds."""
    options: list[str | Path] = ["--state-dir", tmp_path / "s"] if has_state_dir else []
    actives = []
    for name in ("vda", "vdb", "vdc", "vdd"):
        (tmp_path / name).mkdir()
        chain = await make(tmp_path / name, ["ABCDEFGH" * 16, "-X--0---" * 16])
        actives.append(chain.active)
        options += ["--device", f"{name}={chain.active}"]
    daemon = await start_daemon(*options)
    clients = [await daemon.qmp() for _ in range(16)]
    async with asyncio.TaskGroup() as tasks:
        for number in range(16):
            guest = await NbdClient.connect_unix(str(daemon.nbd_path), f"vd{'abcd'[number % 4]}")
            tasks.create_task(write_until_the_end(guest, number // 4))
        for name in ("vda", "vdb", "vdc", "vdd"):
            await clients[0].command("block_stream", device=name, speed=4 * CLUSTER)
        async with asyncio.timeout(60):
            assert await daemon.stop() == 0
    ends = [await ends_heard(client) for client in clients]
    completed, _ = ends[0]  # guests may have written all of a disk meanwhile
    assert ends == [(completed, 0 if has_state_dir else 4 - completed)] * 16
    assert not daemon.qmp_path.exists()
    assert not daemon.nbd_path.exists()
    assert daemon.stderr == ""
    for active in actives:
        qemu_img.assert_sound(active)


async def write_until_the_end(guest: NbdClient, part: int) -> None:
    with contextlib.suppress(StorageError):
        number = 0
        while True:
            number += 1
            await guest.write((part * 32 + number % 32) * CLUSTER + 512 * (number % 100), bytes(512))
            if number % 50 == 0:
                await guest.flush()


async def ends_heard(client: QmpClient) -> tuple[int, int]:
    """How many jobs were completed, and how many cancelled."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            await client.receive()
    names = client.event_names()
    return names.count("BLOCK_JOB_COMPLETED"), names.count("BLOCK_JOB_CANCELLED")
