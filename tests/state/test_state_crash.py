"""Kills at every step of the journal, and at random moments of a disk's life."""

import asyncio
import contextlib
import random
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from blockd.errors import StorageError
from blockd.units import KIB
from tests import qemu_img
from tests.chains import Chain, make
from tests.guest import Guest
from tests.model import ModelDisk
from tests.nbd_disk import NbdDisk
from tests.qmp_client import QmpClient, QmpError
from tests.state.restarts import Restarts, events_to_the_end

pytestmark = pytest.mark.slow

CLUSTER = 64 * KIB
LAYERS = ["ABCDEFGH", "-X--0---"]
SIZE = 8 * CLUSTER
CRASHING_DAEMON = Path(__file__).with_name("crashing_daemon.py")
# Several streams and switches take fewer.
STEP_COUNT_MAX = 100


# -- every step --------------------------------------------------------------------------------


class Life(NamedTuple):
    """What came of one run."""

    is_killed: bool
    completed_count: int


async def live(daemon: Restarts, copy: Path, acknowledged: asyncio.Event) -> None:
    """Stream, switch, write and stream again; ends early when the daemon does."""
    client = await daemon.qmp()
    await client.command("block_stream", device="vda")
    await client.event("BLOCK_STREAM_COMPLETED")
    await client.command("block_switch", device="vda", filename=str(copy))
    async with await daemon.guest() as guest:
        await guest.write(0, b"in the copy")
        await guest.flush()
        acknowledged.set()
    await client.command("block_stream", device="vda")
    await client.event("BLOCK_STREAM_COMPLETED")


@pytest.mark.timeout(1800)
async def test_kill_at_every_step_of_the_journal(tmp_path: Path) -> None:
    """The later the kill, the more streams had begun, and each of them is told to have completed, once."""
    completed_counts = []
    for step in range(1, STEP_COUNT_MAX):
        folder = tmp_path / str(step)
        folder.mkdir()
        life = await killed_at(folder, step)
        completed_counts.append(life.completed_count)
        if not life.is_killed:
            break
    assert completed_counts == sorted(completed_counts)
    assert set(completed_counts) == {0, 1, 2}


async def killed_at(folder: Path, step: int) -> Life:
    """Live until the kill, and look at what is there then."""
    chain = await make(folder, LAYERS)
    copy = qemu_img.create(folder / "copy.qcow2", SIZE, backing=chain.active)
    daemon = Restarts(folder, "--device", f"vda={chain.active}", program=[str(CRASHING_DAEMON)])
    (folder / "crash-at").write_text(str(step))
    acknowledged = asyncio.Event()
    heard = await heard_in_one_life(daemon, copy, acknowledged)
    is_killed = daemon.process.returncode == -9
    if not is_killed:
        await daemon.stop()
    (folder / "crash-at").unlink()
    client = await daemon.run()
    content = await daemon.content()
    written = b"in the copy" + chain.content[11:]
    assert content == written or (content == chain.content and not acknowledged.is_set()), step
    told = Counter(heard + await all_ended(client))
    assert told["BLOCK_STREAM_COMPLETED"] == told["BLOCK_JOB_COMPLETED"], (step, told)
    assert await daemon.content() == content
    assert await daemon.stop() == 0
    for image in (chain.active, copy):
        qemu_img.assert_sound(image)
    return Life(is_killed, told["BLOCK_JOB_COMPLETED"])


async def heard_in_one_life(daemon: Restarts, copy: Path, acknowledged: asyncio.Event) -> list[str]:
    """The names of the events that a client hears while `live` goes on."""
    try:
        await daemon.start()
    except AssertionError:
        return []
    listener = await daemon.qmp()
    async with asyncio.TaskGroup() as tasks:
        listening = tasks.create_task(events_to_the_end(listener))
        with contextlib.suppress(EOFError, OSError, StorageError):
            await live(daemon, copy, acknowledged)
            await daemon.stop()
        names = await listening
    await daemon.process.wait()
    return names


async def all_ended(client: QmpClient) -> list[str]:
    """Wait until no job is left; the names of the events of the session."""
    async with asyncio.timeout(100):
        while await client.command("query-jobs"):
            await client.receive()
    return client.event_names()


# -- random moments ----------------------------------------------------------------------------


class Disk:
    """One disk, one state directory, and a model of what the guest must find; over many lives."""

    def __init__(self, folder: Path, chain: Chain, seed: int) -> None:
        self.folder = folder
        self.rng = random.Random(seed)
        self.daemon = Restarts(folder, "--device", f"vda={chain.active}")
        self.model = ModelDisk(chain.content)
        self.actives = [chain.active]
        # Streams that were asked for, those of them that were answered, and ends that were told.
        self.asked_count = 0
        self.begun_count = 0
        self.told: Counter[str] = Counter()

    async def listen(self, listener: QmpClient) -> None:
        """Count what is told until the daemon is gone."""
        self.told.update(await events_to_the_end(listener))

    async def use(self, seed: int) -> None:
        """Be a guest until the connection is lost."""
        with contextlib.suppress(StorageError, OSError):
            guest = Guest(
                NbdDisk(await self.daemon.guest()), self.model, random.Random(seed), cluster_size=CLUSTER
            )
            while True:
                await guest.step()

    async def administer(self) -> None:
        """Start streams and switch, until the daemon is gone."""
        with contextlib.suppress(EOFError, OSError):
            client = await self.daemon.qmp()
            while True:
                await self._stream(client)
                while await client.command("query-jobs"):
                    await client.event("JOB_STATUS_CHANGE", status="null")
                if self.rng.random() < 0.7:
                    await self._switch(client)

    async def _stream(self, client: QmpClient) -> None:
        with contextlib.suppress(QmpError):  # it runs already, from an earlier life
            speed = self.rng.choice([0, 8 * CLUSTER, 40 * CLUSTER])
            self.asked_count += 1
            try:
                await client.command("block_stream", device="vda", speed=speed)
            except QmpError:
                self.asked_count -= 1
                raise
            self.begun_count += 1

    async def _switch(self, client: QmpClient) -> None:
        block = await client.command("query-block")
        backing = Path(block[0]["inserted"]["file"])
        name = self.folder / f"active{len(self.actives)}.qcow2"
        self.actives.append(qemu_img.create(name, SIZE, backing=backing))
        await client.command("block_switch", device="vda", filename=str(name))

    async def one_life(self, seed: int) -> None:
        """Run for a while, be killed, and look at the disk."""
        listener = await self.daemon.run()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.listen(listener))
            tasks.create_task(self.use(seed))
            tasks.create_task(self.administer())
            await asyncio.sleep(self.rng.random() * 0.4)  # the moment of the kill
            await self.daemon.kill()
        after = self.model.after_crash()
        await self.daemon.start()
        content = await self.daemon.content()
        await self.daemon.kill()
        problems = list(after.problems(content))
        assert problems == [], problems[:5]
        self.model = ModelDisk(content)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(5))
async def test_kills_at_random_moments(tmp_path: Path, seed: int) -> None:
    """60 kills in all, two a life: under load, and right after the restart.

    The kill may come in the moment between writing down that an end was told and the last of the events
    that tell it, so one may be missing; none may be told twice.
    """
    chain = await make(tmp_path, LAYERS)
    disk = Disk(tmp_path, chain, seed)
    for life in range(6):
        await disk.one_life(seed=100 * seed + life)
    client = await disk.daemon.run()
    disk.told.update(await all_ended(client))
    assert await disk.daemon.stop() == 0
    assert disk.told["BLOCK_JOB_CANCELLED"] == 0
    assert disk.told["BLOCK_JOB_COMPLETED"] - disk.told["BLOCK_STREAM_COMPLETED"] in (0, 1)
    assert disk.begun_count - 1 <= disk.told["BLOCK_JOB_COMPLETED"] <= disk.asked_count
    for image in disk.actives:
        qemu_img.assert_sound(image)
