"""A daemon that nobody asks for anything sleeps: it has no timer set, so nothing but a client wakes it up."""

import asyncio
import hashlib
from pathlib import Path

import pytest

from blockd.protocols.nbd_client import NbdClient
from blockd.units import MIB
from tests import qemu_img
from tests.conftest import StartDaemon
from tests.control.running import running

# A timer that is set again each time is missed for a few rounds of the loop at most.
QUIET_ROUND_COUNT = 100
# The rig's own: it limits how long the test may take.
OWN_TIMER_COUNT = 1


def timer_count() -> int:
    timers: list[asyncio.TimerHandle] = getattr(asyncio.get_running_loop(), "_scheduled")  # noqa: B009
    return sum(not timer.cancelled() for timer in timers)


async def until_no_timers_are_set() -> None:
    quiet_count = 0
    while quiet_count < QUIET_ROUND_COUNT:
        await asyncio.sleep(0)
        quiet_count = quiet_count + 1 if timer_count() <= OWN_TIMER_COUNT else 0


async def test_idle_daemon_sets_no_timer(tmp_path: Path) -> None:
    image = qemu_img.create(tmp_path / "disk.qcow2", MIB)
    overlay = qemu_img.create(tmp_path / "overlay.qcow2", MIB, backing=image)
    (tmp_path / "state").mkdir(mode=0o700)
    words = ("--state-dir", tmp_path / "state", "--device", f"disk={overlay}")
    async with running(tmp_path, *words) as daemon:
        await until_no_timers_are_set()
        client = await daemon.qmp()
        guest = await daemon.guest("disk")
        await guest.write(0, bytes(512))
        await guest.flush()
        await client.command("block-stream", {"device": "disk", "job-id": "j"})
        await client.event("BLOCK_JOB_COMPLETED")
        await client.event("JOB_STATUS_CHANGE", id="j", status="null")
        await until_no_timers_are_set()
        assert timer_count() == OWN_TIMER_COUNT


# -- as the kernel sees it ----------------------------------------------------------------------

# How long the daemon is looked at, as work of this process: about a second, more on a busy machine.
PERIOD_MIB = 256
WAIT_S = 100.0
# What a client caused may still be going on when its reply is there, so the first period may not be the one.
PERIOD_COUNT_MAX = 20


def wake_ups(pid: int) -> dict[str, str]:
    """How often each thread of a process has gone to sleep so far."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    lines = ((thread.name, (thread / "status").read_text().splitlines()) for thread in threads)
    return {
        name: line for name, status in lines for line in status if line.startswith("voluntary_ctxt_switches")
    }


def let_time_pass() -> None:
    digest = hashlib.sha256()
    for _ in range(PERIOD_MIB):
        digest.update(bytes(MIB))


def see_quiet_period(pid: int) -> None:
    """Raise AssertionError unless there is a period in which no thread has woken up."""
    for _ in range(PERIOD_COUNT_MAX):
        before = wake_ups(pid)
        let_time_pass()
        if wake_ups(pid) == before:
            return
    raise AssertionError(f"the daemon woke up in each of {PERIOD_COUNT_MAX} periods")


@pytest.mark.slow
async def test_idle_daemon_with_clients_does_not_wake_up(tmp_path: Path, start_daemon: StartDaemon) -> None:
    image = qemu_img.create(tmp_path / "disk.qcow2", MIB)
    overlay = qemu_img.create(tmp_path / "overlay.qcow2", MIB, backing=image)
    daemon = await start_daemon("--device", f"disk={overlay}")
    client = await daemon.qmp()
    guest = await NbdClient.connect_unix(str(daemon.nbd_path), "disk")
    async with client, guest:
        await guest.write(0, bytes(512))
        await guest.flush()
        await client.command("block-stream", {"device": "disk", "job-id": "j"})
        await client.event("BLOCK_JOB_COMPLETED")
        see_quiet_period(daemon.pid)
        # Whoever asks wakes it up, and that is seen as soon as it sleeps again.
        before = wake_ups(daemon.pid)
        async with asyncio.timeout(WAIT_S):
            while wake_ups(daemon.pid) == before:
                await client.command("query-version")
        see_quiet_period(daemon.pid)
