"""The exit status of a stop: 0 if what guests wrote is in the images or kept, else 1. The log says why."""

import json
import signal
from pathlib import Path

import pytest

from blockd.block.file_events import FileEvent as Event
from blockd.errors import StorageError
from blockd.filters.fault_rules import IoType
from blockd.protocols.nbd_client import NbdClient
from blockd.units import MIB
from tests import qemu_img
from tests.conftest import StartDaemon
from tests.daemon_process import DaemonProcess
from tests.faults.rig import Site, nth
from tests.qmp_client import QmpError

SYNC = Site(Event.FLUSH_TO_DISK, IoType.FLUSH)
# The first write of a new cluster takes one sync, the header's mark; then its flush has three: data and
# refcounts, a new table, the map.
FLUSH_SYNCS = range(2, 5)


async def with_failing_sync(start: StartDaemon, folder: Path, number: int, *more: str) -> DaemonProcess:
    """A daemon with a disk whose sync of this number fails."""
    image = qemu_img.create(folder / "disk.qcow2", MIB)
    faults = {"driver": "blkdebug", "node-name": "d", "image": "f", **nth(SYNC, number)}
    return await start(
        *("--blockdev", f"file,node-name=f,filename={image}"),
        *("--blockdev", json.dumps(faults)),
        *("--blockdev", "qcow2,node-name=q,file=d"),
        *("--export", "nbd,id=e,node-name=q,name=vda,writable=on"),
        *more,
    )


async def write(daemon: DaemonProcess) -> None:
    """A guest that leaves without a flush."""
    async with await NbdClient.connect_unix(str(daemon.nbd_path), "vda") as guest:
        await guest.write(0, b"x" * 512)


@pytest.mark.parametrize("is_state_kept", [False, True])
@pytest.mark.parametrize("number", FLUSH_SYNCS)
async def test_an_image_that_cannot_be_flushed(
    tmp_path: Path, start_daemon: StartDaemon, number: int, is_state_kept: bool
) -> None:
    more = ["--state-dir", str(tmp_path / "state")] if is_state_kept else []
    daemon = await with_failing_sync(start_daemon, tmp_path, number, *more)
    await write(daemon)
    assert await daemon.stop() == 1
    assert "acknowledged writes may be lost" in daemon.stderr


async def test_an_image_whose_sync_has_failed_before_cannot_be_closed(
    tmp_path: Path, start_daemon: StartDaemon
) -> None:
    daemon = await with_failing_sync(start_daemon, tmp_path, FLUSH_SYNCS[0])
    await write(daemon)
    async with await NbdClient.connect_unix(str(daemon.nbd_path), "vda") as guest:
        with pytest.raises(StorageError):
            await guest.flush()
    assert await daemon.stop() == 1
    assert "closing node q" in daemon.stderr


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, "quit"])
async def test_a_clean_stop(tmp_path: Path, start_daemon: StartDaemon, how: signal.Signals | str) -> None:
    daemon = await with_failing_sync(start_daemon, tmp_path, 100)
    await write(daemon)
    if isinstance(how, signal.Signals):
        assert await daemon.stop(how) == 0
    else:
        await (await daemon.qmp()).command(how)
        assert await daemon.wait() == 0
    assert qemu_img.content(tmp_path / "disk.qcow2")[:512] == b"x" * 512


async def test_a_journal_that_cannot_be_written(tmp_path: Path, start_daemon: StartDaemon) -> None:
    state = tmp_path / "state"
    daemon = await with_failing_sync(start_daemon, tmp_path, 100, "--state-dir", str(state))
    async with await daemon.qmp() as client:
        (state / "journal.json").unlink()
        (state / "journal.json").mkdir()
        with pytest.raises(QmpError, match="journal"):
            await client.command("object-add", {"qom-type": "throttle-group", "id": "g"})
    assert await daemon.stop() == 1
    assert "the journal may be out of date" in daemon.stderr
