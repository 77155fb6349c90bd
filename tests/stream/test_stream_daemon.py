"""Random lives of a disk in a real daemon: guests over NBD, the operator over QMP, QEMU as the judge."""

import asyncio
import contextlib
import random
from pathlib import Path

import pytest

from blockd.protocols.nbd_client import NbdClient
from blockd.units import KIB, MIB
from tests import chains, qemu_img
from tests.chains import Chain
from tests.conftest import StartDaemon
from tests.daemon_process import DaemonProcess
from tests.guest import Guest
from tests.model import ModelDisk
from tests.nbd_disk import NbdDisk
from tests.qmp_client import QmpClient, QmpError

LAYERS = ["ABCDEFGH" * 4, "-M-0-M-N" * 4, "-" * 32]


class Operator:
    """Starts, steers and switches as a person in a hurry would: what is refused is refused."""

    def __init__(self, qmp: QmpClient, rng: random.Random, chain: Chain) -> None:
        self.qmp = qmp
        self.rng = rng
        self.active = chain.active
        self.size = len(chain.content)
        self.bases = [str(path) for path in chain.paths[:-1]]
        self.running_count = 0  # streams started whose end was not looked at

    async def step(self) -> None:
        action = self.rng.choice(
            [self.stream, self.stream, self.cancel, self.throttle, self.pause, self.switch]
        )
        with contextlib.suppress(QmpError):
            await action()
        await asyncio.sleep(self.rng.random() * 0.01)  # leaves the guests a random turn

    async def stream(self) -> None:
        base = self.rng.choice([None, None, *self.bases])
        given = {"base": base} if base else {}
        await self.qmp.command("block_stream", {"device": "vda", "speed": self.rng.choice([0, MIB]), **given})
        self.running_count += 1

    async def cancel(self) -> None:
        await self.qmp.command("block_stream_cancel", device="vda")

    async def throttle(self) -> None:
        speed = self.rng.choice([0, 512 * KIB, 8 * MIB])
        await self.qmp.command("block-job-set-speed", device="vda", speed=speed)

    async def pause(self) -> None:
        await self.qmp.command("block-job-pause", device="vda")
        await asyncio.sleep(self.rng.random() * 0.01)
        await self.qmp.command("block-job-resume", device="vda")

    async def switch(self) -> None:
        overlay = self.active.with_name(f"over-{self.active.name}")
        if overlay.exists():
            return  # the last one was refused; it is still in nobody's way
        link = ("-u", "-b", self.active, "-F", "qcow2")  # unseen: the daemon has it open
        qemu_img.qemu("qemu-img", "create", "-q", "-f", "qcow2", *link, overlay, str(self.size))
        try:
            await self.qmp.command("block_switch", device="vda", filename=str(overlay))
        except QmpError:
            overlay.unlink()
            raise
        self.bases.append(str(self.active))
        self.active = overlay

    async def finish(self) -> None:
        """Stream until nothing is left below."""
        with contextlib.suppress(QmpError):
            await self.cancel()
        await self._all_ended()
        await self.qmp.command("block_stream", device="vda")
        self.running_count += 1
        await self._all_ended()
        [*_, last] = [event["data"] for event in self.qmp.events if event["event"] == "BLOCK_JOB_COMPLETED"]
        assert "error" not in last, last

    async def _all_ended(self) -> None:
        while self.running_count:
            await self.qmp.event("JOB_STATUS_CHANGE", id="vda", status="null")
            self.running_count -= 1


async def live(start_daemon: StartDaemon, folder: Path, seed: int, *, step_count: int) -> None:
    rng = random.Random(seed)
    cluster_size = rng.choice([4 * KIB, 64 * KIB])
    chain = chains.make_with_qemu(folder, LAYERS, cluster_size, rng.choice(["raw", "qcow2"]))
    model = ModelDisk(chain.content)
    daemon = await start_daemon("--device", f"vda={chain.active}")
    operator = Operator(await daemon.qmp(), rng, chain)
    async with asyncio.TaskGroup() as tasks:
        for number in range(3):
            tasks.create_task(be_guest(daemon, model, seed + number, cluster_size, step_count))
        for _ in range(step_count // 6):
            await operator.step()
    await operator.finish()
    await be_guest(daemon, model, seed, cluster_size, 0)
    await operator.qmp.close()
    assert await daemon.stop() == 0
    for path in operator.bases:
        Path(path).rename(f"{path}.away")
    verdict = qemu_img.check(operator.active)
    assert verdict is not None
    assert (verdict.corruptions, verdict.leaks) == (0, 0)
    assert qemu_img.content(operator.active) == model.content


async def be_guest(
    daemon: DaemonProcess, model: ModelDisk, seed: int, cluster_size: int, step_count: int
) -> None:
    """Random steps over a connection of its own; without any, one look at the whole disk."""
    async with await NbdClient.connect_unix(str(daemon.nbd_path), "vda") as client:
        guest = Guest(NbdDisk(client), model, random.Random(seed), cluster_size=cluster_size)
        for _ in range(step_count):
            await guest.step()
        if not step_count:
            await guest.read_all()


async def test_one_random_life_in_a_daemon(start_daemon: StartDaemon, tmp_path: Path) -> None:
    await live(start_daemon, tmp_path, 1, step_count=100)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 112))
async def test_random_lives_in_a_daemon(start_daemon: StartDaemon, tmp_path: Path, seed: int) -> None:
    await live(start_daemon, tmp_path, seed, step_count=500)
