"""Guests and QMP clients at random on one daemon: whatever they do, the guests read what they wrote."""

import asyncio
import random
from pathlib import Path

import pytest

from blockd.protocols.nbd_client import NbdClient
from tests import qemu_img
from tests.chains import Chain, make
from tests.control.running import running
from tests.guest import Guest
from tests.model import ModelDisk
from tests.qmp_client import QmpClient, QmpError

LAYERS = ["AB0-A-ABAB0-A-AB", "-C-C--0--C-C--0-", "D------DD------D"]
CLUSTER_SIZE = 65536
COMMAND_COUNT = 60
GUEST_COUNT = 3


class NbdDisk:
    """A disk behind an NBD connection."""

    def __init__(self, client: NbdClient) -> None:
        self._client = client
        self.flush = client.flush

    async def read(self, offset: int, length: int) -> bytes:
        return bytes(await self._client.read(offset, length))

    async def write(self, offset: int, data: bytes) -> None:
        await self._client.write(offset, data)

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        await self._client.write_zeroes(offset, length, no_hole=not unmap)

    async def discard(self, offset: int, length: int) -> None:
        await self._client.trim(offset, length)


class Operator:
    """Sends random commands, most of which are refused: what was done is seen in the images."""

    def __init__(self, client: QmpClient, chain: Chain, rng: random.Random) -> None:
        self._client = client
        self._rng = rng
        self._folder = chain.active.parent
        self.active = chain.active
        self._files = list(map(str, chain.paths))
        self._switch_count = 0

    async def step(self) -> None:
        choices = [self.stream, self.stream, self.switch, self.cancel, self.pause, self.resume, self.speed]
        try:
            await self._rng.choice(choices)()
        except QmpError as error:
            assert error.error_class != "CommandNotFound"
            assert "nternal error" not in error.description
        await asyncio.sleep(self._rng.choice([0, 0, 0.001, 0.01]))

    async def stream(self) -> None:
        base = self._rng.choice([None, None, *self._files])
        speed = self._rng.choice([0, 0, 10 * CLUSTER_SIZE])
        await self._client.command(
            "block_stream", {"device": "vda", "speed": speed} | ({"base": base} if base else {})
        )

    async def switch(self) -> None:
        self._switch_count += 1
        path = self._folder / f"switch{self._switch_count}.qcow2"
        size = len(LAYERS[0]) * CLUSTER_SIZE
        await asyncio.to_thread(qemu_img.create, path, size, backing=self.active)
        await self._client.command("block_switch", device="vda", filename=str(path))
        self.active = path
        self._files.append(str(path))

    async def cancel(self) -> None:
        await self._client.command("block_stream_cancel", device="vda")

    async def pause(self) -> None:
        await self._client.command("job-pause", id="vda")

    async def resume(self) -> None:
        await self._client.command("job-resume", id="vda")

    async def speed(self) -> None:
        await self._client.command("block-job-set-speed", device="vda", speed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
async def test_random_commands_and_guests(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    chain = await make(tmp_path, LAYERS)
    model = ModelDisk(chain.content)
    async with running(tmp_path, "--device", f"vda={chain.active}") as daemon:
        operator = Operator(await daemon.qmp(), chain, rng)
        is_over = False

        async def use(number: int) -> None:
            disk = NbdDisk(await daemon.guest("vda"))
            guest = Guest(disk, model, random.Random(seed * 100 + number), cluster_size=CLUSTER_SIZE)
            while not is_over:
                await guest.step()

        async with asyncio.TaskGroup() as tasks:
            for number in range(GUEST_COUNT):
                tasks.create_task(use(number))
            for _ in range(COMMAND_COUNT):
                await operator.step()
            is_over = True
        model.check_read(0, await NbdDisk(await daemon.guest("vda")).read(0, model.size))
    model.check_read(0, qemu_img.content(operator.active))
    qemu_img.assert_sound(operator.active)
