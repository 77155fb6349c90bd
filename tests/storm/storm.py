"""A storm: clients and guests do random things to a daemon, which is killed, or told to end, and comes back.

After each life everything that was acknowledged has to be there: what guests wrote and flushed, the chains of
the disks, nodes, exports, jobs. Nothing may be left out, nothing may be an internal error.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from tests.qmp_client import QmpClient
from tests.state.restarts import Restarts
from tests.storm.clients import Gardener, direct, meddle
from tests.storm.disk import GUEST_COUNT, Disk
from tests.storm.life import Life

END_TIMEOUT_S = 60.0
FORMATS = {"vda": "qcow2", "vdb": "qed", "vdc": "qcow2"}
SILENT = ("Traceback", "nternal error", "Assertion", "not restored")


class Storm:
    """One folder, one state directory, many lives."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.disks = [Disk(name, folder, image_format) for name, image_format in FORMATS.items()]
        self.gardener = Gardener(folder)
        devices = [word for disk in self.disks for word in ("--device", f"{disk.name}={disk.active}")]
        formats = [f"{word},format=qed" if word.endswith(".qed") else word for word in devices]
        self.daemon = Restarts(folder, *formats)
        self.counts: Counter[str] = Counter()
        # By command: how many were done, and refused.
        self.done: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self._stderr_length = 0

    async def make(self) -> None:
        for disk in self.disks:
            await disk.make()
        self.gardener.make()
        client = await self.daemon.run()
        await client.close()
        await self.daemon.kill()

    async def one_life(self) -> None:
        """Begin, compare with the life before, live, and end in some way."""
        way = self.rng.choices(["kill", "kill early", "stop"], weights=[7, 1, 2])[0]
        self.counts[way] += 1
        if way == "kill early":
            await self.daemon.launch()
            await asyncio.sleep(self.rng.random())  # the moment of the kill
            await self.daemon.kill()
            return
        listener = await self.daemon.run()
        life = Life(self.daemon, self.rng)
        async with asyncio.timeout(END_TIMEOUT_S), asyncio.TaskGroup() as tasks:
            tasks.create_task(self._listen(listener))
            await self._check_what_came_back()
            for work in self._all_work(life):
                tasks.create_task(until_the_end(life, work))
            await life.last()
            await self._end(life, way)
        self.done += life.done
        self.refused += life.refused
        for disk in self.disks:
            await asyncio.to_thread(disk.check_image)
        self._check_log()

    def _all_work(self, life: Life) -> list[Coroutine[Any, Any, None]]:
        work = [self.gardener.live(life)]
        for disk in self.disks:
            others = [other for other in self.disks if other is not disk]
            work += [direct(life, disk, others), meddle(life, disk)]
            work += [disk.use(life, self.rng.getrandbits(32)) for _ in range(GUEST_COUNT)]
        return work

    async def _end(self, life: Life, way: str) -> None:
        life.is_over = True
        self.is_clean = way == "stop"
        if self.is_clean:
            assert await self.daemon.stop() == 0, self.daemon.stderr
        else:
            await self.daemon.kill()

    # -- what is there again ------------------------------------------------------------------

    is_clean = False

    async def _check_what_came_back(self) -> None:
        client = await self.daemon.qmp()
        left_out = await client.command("query-left-out")
        assert left_out == [], left_out
        blocks = {block["device"]: block for block in await client.command("query-block")}
        jobs = await client.command("query-block-jobs")
        for disk in self.disks:
            disk.check_content(await self.daemon.content(disk.name), is_clean=self.is_clean)
            disk.check_chain(blocks[disk.name])
            disk.check_job(jobs)
        await self.gardener.check(client)
        await client.close()
        self.is_clean = False

    async def _listen(self, listener: QmpClient) -> None:
        """Count the ends of jobs; each is told once."""
        try:
            while True:
                message = await listener.receive()
                if message.get("event") in ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED"):
                    [disk] = (disk for disk in self.disks if disk.name == message["data"]["device"])
                    disk.told_count += 1
                    assert disk.told_count <= disk.asked_count, f"{disk.name}: an end was told twice"
                    assert "error" not in message["data"], message
        except (*Life.gone, ValueError):
            pass

    def _check_log(self) -> None:
        said = self.daemon.stderr[self._stderr_length :]
        self._stderr_length += len(said)
        for word in SILENT:
            assert word not in said, said

    async def finish(self) -> None:
        """A last life in which all jobs come to their ends."""
        listener = await self.daemon.run()
        async with asyncio.timeout(END_TIMEOUT_S), asyncio.TaskGroup() as tasks:
            tasks.create_task(self._listen(listener))
            await self._check_what_came_back()
            client, life = await self.daemon.qmp(), Life(self.daemon, self.rng)
            while jobs := await client.command("query-block-jobs"):
                for job in jobs:
                    for command in ("job-resume", "job-finalize", "job-dismiss"):
                        await life.ask(client, command, {"id": job["device"]})
                    await life.ask(client, "block-job-set-speed", {"device": job["device"], "speed": 0})
            await self._end(life, "stop")
        self._check_log()
        for disk in self.disks:
            disk.check_image()
            # The moment between writing down that an end was told and telling it may be that of a kill.
            assert disk.begun_count - disk.told_count <= self.counts["kill"], disk.name


async def until_the_end(life: Life, work: Coroutine[Any, Any, None]) -> None:
    """Work until the daemon is gone, which it may not be before its end."""
    try:
        await work
    except (*Life.gone, ValueError):  # the last line may be half a one
        if not life.is_over:
            raise


async def storm(folder: Path, *, seed: int, step_count: int, is_told: bool = False) -> Counter[str]:
    """Have `step_count` lives; returns how they ended."""
    began, found = time.monotonic(), Storm(folder, seed)
    await found.make()
    for step in range(step_count):
        await found.one_life()
        if is_told and step % 50 == 49:
            print(f"{step + 1} lives, {(time.monotonic() - began) / (step + 1):.2f} s each", flush=True)
    await found.finish()
    if is_told:
        for command in sorted({*found.done, *found.refused}):
            print(f"{found.done[command]:8} done {found.refused[command]:8} refused  {command}")
    return found.counts
