"""A thousand clients on one QMP socket, half of them rude, while a disk is streamed."""

import asyncio
import contextlib
import os
from pathlib import Path

import pytest

from blockd.units import MIB
from tests import qemu_img
from tests.conftest import StartDaemon
from tests.daemon_process import DaemonProcess
from tests.qmp_client import QmpClient

WAVE_COUNT, WAVE_SIZE = 25, 40
SIZE = 4 * MIB
# More than the daemon takes for a wave, far less than it would take for a thousand clients it forgot.
MEMORY_GROWTH_MAX = 32 * MIB

# What a rude client says before it is gone, without having read an answer.
RUDENESS = [
    b"",
    b"{",
    b'{"execute": "qmp_capabilities"}{"execute": "query-jo',
    b"\x00\xff[[[{}{]]" * 1000,
    b'{"execute": "query-block-jobs", "id": 1}' * 50,
    b'{"execute": "qmp_capabilities"}' + b'{"execute": "query-commands"}' * 50,
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b'{"execute": "' + b"x" * 100_000,
]


async def be_rude(daemon: DaemonProcess, number: int) -> None:
    _, writer = await asyncio.open_unix_connection(daemon.qmp_path)
    writer.write(RUDENESS[number % len(RUDENESS)])
    if number % 2:
        await asyncio.sleep(0)
        writer.transport.abort()
    else:
        writer.close()


async def be_polite(client: QmpClient) -> None:
    """Hear of the pause and of what follows it, and get an answer to each question."""
    await client.event("JOB_STATUS_CHANGE", status="paused")
    await client.event("JOB_STATUS_CHANGE", status="running")
    (job,) = await client.command("query-jobs")
    assert job["id"] == "vda"
    (stream,) = await client.command("query-block-jobs")
    assert stream["device"] == "vda"
    assert client.event_names() == ["JOB_STATUS_CHANGE:paused", "JOB_STATUS_CHANGE:running"]
    await client.close()


async def wave(daemon: DaemonProcess, driver: QmpClient, first: int) -> None:
    """Polite clients join, rude ones come and go, and the driver pauses and resumes the stream."""
    polite = [await daemon.qmp() for _ in range(WAVE_SIZE // 2)]
    async with asyncio.TaskGroup() as tasks:
        for number in range(WAVE_SIZE // 2):
            tasks.create_task(be_rude(daemon, first + number))
        for client in polite:
            tasks.create_task(be_polite(client))
        await driver.command("job-pause", id="vda")
        await driver.event("JOB_STATUS_CHANGE", status="paused")
        await driver.command("job-resume", id="vda")
        await driver.event("JOB_STATUS_CHANGE", status="running")


def socket_count(daemon: DaemonProcess) -> int:
    count = 0
    for link in Path(f"/proc/{daemon.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            count += str(link.readlink()).startswith("socket:")
    return count


async def until_alone(daemon: DaemonProcess, count: int) -> None:
    """Wait until the sockets of clients are given back; the test's time-out ends this if they never are."""
    while socket_count(daemon) > count:  # noqa: ASYNC110  (another process closes them)
        await asyncio.sleep(0.01)


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_a_thousand_clients_half_of_them_rude(start_daemon: StartDaemon, tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(os.urandom(SIZE))
    disk = qemu_img.create(tmp_path / "disk.qcow2", SIZE, backing=base, backing_format="raw")
    daemon = await start_daemon("--device", f"vda={disk}")
    driver = await daemon.qmp()
    # A limit that lets one piece through and then none for hours.
    await driver.command("block_stream", device="vda", speed=1)
    await driver.event("JOB_STATUS_CHANGE", status="running")
    count = socket_count(daemon)
    await wave(daemon, driver, 0)
    await until_alone(daemon, count)
    memory = daemon.resident_bytes
    for number in range(1, WAVE_COUNT):
        await wave(daemon, driver, number * WAVE_SIZE)
        await until_alone(daemon, count)
    assert daemon.resident_bytes < memory + MEMORY_GROWTH_MAX
    await driver.command("block-job-set-speed", device="vda", speed=0)
    completed = await driver.event("BLOCK_STREAM_COMPLETED", device="vda")
    assert "error" not in completed
    assert driver.event_names().count("JOB_STATUS_CHANGE:paused") == WAVE_COUNT
    await driver.close()
    assert await daemon.stop() == 0
    qemu_img.assert_same(disk, "qcow2", base, "raw")
