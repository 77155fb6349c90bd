"""SIGKILL at the worst moments: nothing that was promised is lost.

The page cache survives a killed process, so these tests show the order of events and writes; that the
order holds on the disk too is shown by tests/crash.
"""

import asyncio
import contextlib
import json
import os
import random
import signal
from pathlib import Path

import pytest

from blockd.errors import StorageError
from blockd.protocols.nbd_client import NbdClient
from blockd.units import KIB, MIB
from tests import qemu_img
from tests.chains import Chain
from tests.daemon_process import DaemonProcess
from tests.guest import Guest
from tests.model import AfterCrash, ModelDisk, drawn
from tests.nbd_disk import NbdDisk
from tests.qmp_client import QmpClient

pytestmark = pytest.mark.slow

CLUSTER = 64 * KIB
COUNT = 64
RUN_COUNT = 13


def make_chain(folder: Path, base_format: str) -> Chain:
    """A base full of data, an overlay with nothing; both new."""
    content = drawn(["ABCDEFGH" * (COUNT // 8)], CLUSTER)
    raw, base, active = folder / "base.raw", folder / f"base.{base_format}", folder / "active.qcow2"
    raw.write_bytes(content)
    if base_format == "qcow2":
        qemu_img.qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, base)
    active.unlink(missing_ok=True)
    qemu_img.create(active, len(content), backing=base, backing_format=base_format)
    return Chain([base, active], [base_format, "qcow2"], CLUSTER, content)


class Session:
    """A daemon with one disk, a QMP client, and a guest that uses the disk until it is gone."""

    def __init__(self, daemon: DaemonProcess, qmp: QmpClient, guest: Guest) -> None:
        self.daemon = daemon
        self.qmp = qmp
        self.guest = guest

    @classmethod
    async def start(cls, folder: Path, chain: Chain, model: ModelDisk, seed: int) -> "Session":
        folder.mkdir(exist_ok=True)
        daemon = await DaemonProcess(folder, "--device", f"vda={chain.active}").start()
        client = await NbdClient.connect_unix(str(daemon.nbd_path), "vda")
        guest = Guest(NbdDisk(client), model, random.Random(seed), cluster_size=CLUSTER)
        return cls(daemon, await daemon.qmp(), guest)

    async def use_disk(self) -> None:
        """Be a guest until the connection is lost."""
        with contextlib.suppress(StorageError):
            while True:
                await self.guest.step()

    async def kill(self) -> AfterCrash:
        """SIGKILL; returns what the disk may hold then."""
        await self.daemon.kill()
        await self.qmp.close()
        return self.guest.model.after_crash()


def problems_without_base(chain: Chain, after: AfterCrash) -> list[str]:
    """What is wrong with the active image when its base is gone."""
    away = chain.paths[0].rename(chain.paths[0].with_suffix(".away"))
    try:
        qemu_img.assert_sound(chain.active)
        return list(after.problems(qemu_img.content(chain.active)))
    finally:
        away.rename(chain.paths[0])


@pytest.mark.parametrize("base_format", ["raw", "qcow2"])
@pytest.mark.parametrize("event", ["BLOCK_JOB_COMPLETED", "BLOCK_STREAM_COMPLETED"])
async def test_killed_right_after_completion_the_image_is_whole(
    tmp_path: Path, event: str, base_format: str
) -> None:
    """Promise 1; four times thirteen runs, while the guest goes on writing."""
    rng = random.Random(f"{event} {base_format}")
    for run in range(RUN_COUNT):
        chain = make_chain(tmp_path, base_format)
        model = ModelDisk(chain.content)
        session = await Session.start(tmp_path / f"run{run}", chain, model, seed=run)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(session.use_disk())
            await session.qmp.command("block_stream", device="vda")
            await session.qmp.event(event)
            await asyncio.sleep(rng.choice([0, rng.random() * 0.03]))  # the moment of the kill
            after = await session.kill()
        problems = problems_without_base(chain, after)
        assert problems == [], f"run {run}: {problems[:5]}"


@pytest.mark.parametrize("base_format", ["raw", "qcow2"])
async def test_killed_at_any_moment_the_disk_is_right_and_the_stream_can_go_on(
    tmp_path: Path, base_format: str
) -> None:
    """Promises 2 to 5, with several kills in the life of one disk."""
    rng = random.Random(base_format)
    for run in range(5):
        chain = make_chain(tmp_path, base_format)
        model = ModelDisk(chain.content)
        for life in range(4):
            session = await Session.start(tmp_path / f"run{run}-{life}", chain, model, seed=10 * run + life)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(session.use_disk())
                await session.qmp.command("block_stream", device="vda", speed=rng.choice([0, 4 * MIB]))
                await asyncio.sleep(rng.random() * 0.2)  # the moment of the kill
                after = await session.kill()
            qemu_img.assert_sound(chain.active)
            content = qemu_img.content(chain.active)
            problems = list(after.problems(content))
            assert problems == [], f"run {run}, life {life}: {problems[:5]}"
            model = ModelDisk(content)
            if recorded_backing(chain.active) is None:
                break


async def test_killed_while_another_process_copies(tmp_path: Path) -> None:
    """That ends, too, whatever it is about; then the image is free, and right."""
    rng = random.Random(5)
    content = rng.randbytes(64 * MIB)
    base, active = tmp_path / "base.raw", tmp_path / "active.qcow2"
    base.write_bytes(content)
    for run in range(6):
        active.unlink(missing_ok=True)
        qemu_img.create(active, len(content), backing=base, backing_format="raw")
        chain = Chain([base, active], ["raw", "qcow2"], CLUSTER, content)
        session = await Session.start(tmp_path / f"run{run}", chain, ModelDisk(content), seed=run)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(session.use_disk())
            await session.guest.step()
            await session.qmp.command("block_stream", device="vda", speed=rng.choice([0, 256 * MIB]))
            copiers: list[int] = []
            # Until it ends with the daemon whatever happens: this is set up last.
            while not copiers or os.sched_getscheduler(copiers[0]) != os.SCHED_BATCH:
                await asyncio.sleep(0)
                copiers = session.daemon.copiers()
            await asyncio.sleep(rng.random() * 0.1)  # the moment of the kill
            if run % 2:
                os.kill(copiers[0], signal.SIGSTOP)
            after = await session.kill()
        qemu_img.assert_sound(active)
        problems = list(after.problems(qemu_img.content(active)))
        assert problems == [], f"run {run}: {problems[:5]}"


@pytest.mark.parametrize("base_format", ["raw", "qcow2"])
async def test_stream_after_a_kill_finishes_what_was_begun(tmp_path: Path, base_format: str) -> None:
    chain = make_chain(tmp_path, base_format)
    model = ModelDisk(chain.content)
    session = await Session.start(tmp_path / "first", chain, model, seed=1)
    await session.qmp.command("block_stream", device="vda", speed=2 * MIB)
    for _ in range(30):
        await session.guest.step()
    after = await session.kill()

    model = ModelDisk(qemu_img.content(chain.active))
    assert list(after.problems(bytes(model.content))) == []
    session = await Session.start(tmp_path / "second", chain, model, seed=2)
    await session.qmp.command("block_stream", device="vda")
    await session.qmp.event("BLOCK_STREAM_COMPLETED", device="vda")
    after = await session.kill()
    assert problems_without_base(chain, after) == []


def recorded_backing(path: Path) -> str | None:
    info = json.loads(qemu_img.qemu("qemu-img", "info", "--output=json", path))
    name: str | None = info.get("backing-filename")
    return name
