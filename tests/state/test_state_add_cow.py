"""A raw disk that is copied to a raw file under its guest: kills at random moments leave one right image."""

import asyncio
import contextlib
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from blockd.cli.image.create import NewImage, create_image
from blockd.errors import StorageError
from blockd.formats.add_cow.image import AddCowImage
from blockd.units import KIB, MIB
from tests.guest import Guest
from tests.layers import opened
from tests.model import ModelDisk, drawn
from tests.nbd_disk import NbdDisk
from tests.qmp_client import QmpClient, QmpError
from tests.state.restarts import Restarts

pytestmark = pytest.mark.slow

CLUSTER = 64 * KIB
CONTENT = drawn(["ABCDEFGH" * 8], CLUSTER)
LIFE_COUNT = 4
CONCLUDES: dict[str, Any] = {"job-id": "copy", "auto-dismiss": False}


class RawCopy:
    """`a.raw`, which guests use, and `b.raw`, to which it is copied; one state directory, many lives."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.source, self.target = folder / "a.raw", folder / "b.raw"
        self.add_cow = folder / "b.add-cow"
        self.rng = random.Random(seed)
        self.daemon = Restarts(folder, "--device", f"vda={self.source}")
        self.model = ModelDisk(CONTENT)

    async def make(self) -> None:
        self.source.write_bytes(CONTENT)
        await create_image(str(self.add_cow), NewImage("add-cow", len(CONTENT), self.source.name, "raw"))

    async def one_life(self, seed: int) -> None:
        """Run for a while, be killed, and look at the files, and at the disk after a restart."""
        client = await self.daemon.run()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._use(seed))
            tasks.create_task(self._copy(client))
            await asyncio.sleep(self.rng.random() * 0.3)  # the moment of the kill
            await self.daemon.kill()
        after = self.model.after_crash()
        content = await self._content_of_files()
        assert list(after.problems(content))[:5] == []
        await self.daemon.start()
        assert await self.daemon.content() == content
        await self.daemon.kill()
        self.model = ModelDisk(content)

    async def _use(self, seed: int) -> None:
        """Be a guest until the connection is lost."""
        with contextlib.suppress(StorageError, OSError):
            guest = Guest(
                NbdDisk(await self.daemon.guest()), self.model, random.Random(seed), cluster_size=CLUSTER
            )
            while True:
                await guest.step()

    async def _copy(self, client: QmpClient) -> None:
        """Switch and stream, unless an earlier life has."""
        with contextlib.suppress(EOFError, OSError):
            await self._ask(client, "block_switch", filename=str(self.add_cow), format="add-cow")
            await self._ask(client, "block_stream", speed=self.rng.choice([0, 4 * MIB, 16 * MIB]))

    async def _ask(self, client: QmpClient, command: str, **arguments: Any) -> None:
        with contextlib.suppress(QmpError):
            await client.command(command, device="vda", **arguments)

    async def _content_of_files(self) -> bytes:
        """What the add-cow image holds, and the plain image too if that is said to be complete."""
        async with opened(self.add_cow, "add-cow", read_only=True) as disk:
            assert isinstance(disk.node, AddCowImage)
            content = bytes(await disk.node.read(0, disk.node.size))
            if disk.node.is_complete:
                assert self.target.read_bytes() == content
        return content

    async def finish(self) -> None:
        """Let the copy come to its end."""
        client = await self.daemon.run()
        await self._ask(client, "block_switch", filename=str(self.add_cow), format="add-cow")
        await self._ask(client, "block_stream")
        await self._ask(client, "block_stream_set_speed", value=0)
        await self._ask(client, "block-job-set-speed", speed=0)
        async with asyncio.timeout(100):
            while await client.command("query-jobs"):
                await client.receive()
        [block] = await client.command("query-block")
        assert (block["inserted"]["drv"], block["inserted"]["file"]) == ("raw", str(self.target))
        content = await self.daemon.content()
        assert list(self.model.after_crash().problems(content)) == []
        assert await self.daemon.stop() == 0
        assert self.target.read_bytes() == content


@pytest.mark.timeout(1800)
async def test_kills_while_a_raw_disk_is_copied_leave_one_right_image(tmp_path: Path) -> None:
    copy = RawCopy(tmp_path, seed=1)
    await copy.make()
    for life in range(LIFE_COUNT):
        await copy.one_life(seed=life)
    await copy.finish()
    copy.source.unlink()
    copy.add_cow.unlink()
    client = await copy.daemon.run()
    [block] = await client.command("query-block")
    assert block["inserted"]["file"] == str(copy.target)
    assert await copy.daemon.stop() == 0


async def test_kill_after_the_end(tmp_path: Path) -> None:
    copy = RawCopy(tmp_path, seed=0)
    await copy.make()
    client = await copy.daemon.run()
    await client.command("block_switch", device="vda", filename=str(copy.add_cow), format="add-cow")
    await client.command("block-stream", device="vda", **CONCLUDES)
    await client.event("JOB_STATUS_CHANGE", status="concluded")
    await copy.daemon.kill()
    client = await copy.daemon.run()
    [job] = await client.command("query-jobs")
    assert (job["id"], job["status"]) == ("copy", "concluded")
    await client.command("job-dismiss", id="copy")
    [block] = await client.command("query-block")
    assert (block["inserted"]["drv"], block["inserted"]["file"]) == ("raw", str(copy.target))
    assert await copy.daemon.content() == CONTENT
    assert await copy.daemon.stop() == 0


# -- steps of the journal at the end ------------------------------------------------------------

CRASHING_DAEMON = Path(__file__).with_name("crashing_daemon.py")
# Those before belong to the start of the daemon; the end takes fewer than there are. Every third one will do.
STEPS = range(12, 60, 3)


@pytest.mark.timeout(1800)
async def test_kill_at_steps_of_the_journal_while_the_copy_ends(tmp_path: Path) -> None:
    """The disk is on the add-cow image or on the plain one, as the add-cow file says; the job ends once."""
    folder, saved = tmp_path / "disk", tmp_path / "saved"
    folder.mkdir()
    copy = RawCopy(folder, seed=0)
    copy.daemon.program = [str(CRASHING_DAEMON)]
    await copy.make()
    client = await copy.daemon.run()
    await client.command("block_switch", device="vda", filename=str(copy.add_cow), format="add-cow")
    await client.command("block-stream", device="vda", speed=1, **CONCLUDES)
    assert await copy.daemon.stop() == 0
    shutil.copytree(folder, saved)
    outcomes = []
    for step in STEPS:
        shutil.rmtree(folder)
        shutil.copytree(saved, folder)
        (folder / "crash-at").write_text(str(step))
        outcomes.append(await _end_killed_at(copy))
        if outcomes[-1] is None:
            break
    assert outcomes[-1] is None
    assert True in outcomes, "no kill came between the end in the image and that in the journal"


async def _end_killed_at(copy: RawCopy) -> bool | None:
    """Let the copy end; whether the plain image was complete when the kill came, None: it did not."""
    with contextlib.suppress(EOFError, OSError, AssertionError):
        client = await copy.daemon.run()
        await client.command("block-job-set-speed", device="copy", speed=0)
        await client.event("JOB_STATUS_CHANGE", status="concluded")
        await copy.daemon.stop()
    was_killed = await copy.daemon.process.wait() == -signal.SIGKILL
    async with opened(copy.add_cow, "add-cow", read_only=True) as disk:
        assert isinstance(disk.node, AddCowImage)
        was_complete = disk.node.is_complete
    (copy.daemon.folder / "crash-at").unlink()
    client = await copy.daemon.run()
    with contextlib.suppress(QmpError):  # it has ended, or is about to
        await client.command("block-job-set-speed", device="copy", speed=0)
    async with asyncio.timeout(100):
        while (job := (await client.command("query-jobs"))[0])["status"] != "concluded":
            await client.receive()
    assert (job["id"], "error" in job) == ("copy", False)
    [block] = await client.command("query-block")
    assert (block["inserted"]["drv"], block["inserted"]["file"]) == ("raw", str(copy.target))
    assert await copy.daemon.content() == CONTENT
    assert await copy.daemon.stop() == 0
    assert copy.target.read_bytes() == CONTENT
    return was_complete if was_killed else None
