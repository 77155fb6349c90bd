"""When the journal cannot be written, and the end of a daemon with much to end."""

import asyncio
import contextlib
import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockd.daemon.state_dir import StateDir
from blockd.errors import StorageError
from blockd.protocols.nbd_client import NbdClient
from blockd.units import KIB
from tests import qemu_img
from tests.chains import make
from tests.conftest import StartDaemon
from tests.control.running import refusal, running, until
from tests.qmp_client import QmpClient

CLUSTER = 64 * KIB
LAYERS = ["ABCDEFGH", "-X--0---"]
SIZE = 8 * CLUSTER


class FullDisk:
    """Makes the writing of journals fail while it is full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    @contextlib.contextmanager
    def full(self, step: str) -> Iterator[None]:
        def fail(*_arguments: object) -> None:
            raise StorageError.from_os(OSError(errno.ENOSPC, ""), "write", "journal.json")

        with self._monkeypatch.context() as patch:
            patch.setattr(StateDir, step, fail)
            yield


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> FullDisk:
    return FullDisk(monkeypatch)


@pytest.mark.parametrize("step", ["write_new", "publish", "sync"])
async def test_switch_that_cannot_be_recorded_does_not_happen(
    tmp_path: Path, disk: FullDisk, step: str
) -> None:
    chain = await make(tmp_path, LAYERS)
    copy = qemu_img.create(tmp_path / "copy.qcow2", SIZE, backing=chain.active)
    async with running(tmp_path, "--state-dir", tmp_path / "s", "--device", f"vda={chain.active}") as daemon:
        client, guest = await daemon.qmp(), await daemon.guest("vda")
        with disk.full(step):
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


async def test_command_that_cannot_be_recorded_says_so_and_the_next_one_records_it(
    tmp_path: Path, disk: FullDisk
) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path, "--state-dir", tmp_path / "s", "--device", f"vda={chain.active}") as daemon:
        client = await daemon.qmp()
        with disk.full("write_new"):
            error = await refusal(client, "block_stream", device="vda", speed=1)
            assert error == ("GenericError", "Could not write 'journal.json': No space left on device")
            assert len(await client.command("query-jobs")) == 1
        await client.command("job-pause", id="vda")
    async with running(tmp_path, "--state-dir", tmp_path / "s", "--device", f"vda={chain.active}") as daemon:
        [job] = await (await daemon.qmp()).command("query-block-jobs")
        assert job["paused"]


@pytest.mark.parametrize("step", ["write_new", "publish", "sync"])
async def test_end_that_cannot_be_recorded_is_told_all_the_same(
    tmp_path: Path, disk: FullDisk, step: str, caplog: pytest.LogCaptureFixture
) -> None:
    chain = await make(tmp_path, LAYERS)
    async with running(tmp_path, "--state-dir", tmp_path / "s", "--device", f"vda={chain.active}") as daemon:
        client = await daemon.qmp()
        await client.command("block_stream", device="vda", speed=1)
        await client.command("job-pause", id="vda")
        await client.command("block-job-set-speed", device="vda", speed=0)
        with disk.full(step):
            await refusal(client, "job-resume", id="vda")
            await client.event("BLOCK_STREAM_COMPLETED")
            await client.event("JOB_STATUS_CHANGE", status="null")
            assert await client.command("query-jobs") == []
        assert client.event_names().count("BLOCK_JOB_COMPLETED") == 1
        await until(lambda: "job vda: its end may be told again after a restart" in caplog.text)
    assert qemu_img.content(chain.active) == chain.content


async def test_journal_is_written_when_something_changes_and_not_while_nothing_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[object] = []
    write_new: Callable[[StateDir, object], None] = StateDir.write_new

    def count(directory: StateDir, state: object) -> None:
        written.append(state)
        write_new(directory, state)

    monkeypatch.setattr(StateDir, "write_new", count)
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
    assert len(written) == 3


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
        async with asyncio.timeout(10):
            assert await daemon.stop() == 0
    ends = [await ends_heard(client) for client in clients]
    assert ends == [0 if has_state_dir else 4] * 16
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


async def ends_heard(client: QmpClient) -> int:
    with contextlib.suppress(EOFError, OSError):
        while True:
            await client.receive()
    return client.event_names().count("BLOCK_JOB_CANCELLED")
