"""A daemon that nobody asks for anything sleeps: it has no timer set, so nothing but a client wakes it up."""

import asyncio
from pathlib import Path

from blockd.units import MIB
from tests import qemu_img
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
