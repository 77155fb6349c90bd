"""See it work: a guest writes and verifies while its disk is streamed, switched to a copy, and that streamed.

    python examples/demo.py [FOLDER]

Everything is real: the images are made with blockd's own code, the daemon is a process of its own, and the
guest reads and writes over NBD. A model in memory knows what every byte must be.
"""

import asyncio
import contextlib
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from blockd.cli.following import Outcome, StreamStatus, follow
from blockd.cli.qmp_client import QmpClient
from blockd.formats.qcow2.create import create as create_qcow2
from blockd.formats.qcow2.image import Qcow2Image
from blockd.protocols.file import FileNode
from blockd.protocols.nbd_client import NbdClient
from blockd.protocols.new_file import new_file
from blockd.units import KIB, MIB, SECTOR_SIZE, format_size

DEVICE = "vda"
# In a folder that the demonstration has made.
MARK = ".blockd-demo"
DISK_SIZE = 256 * MIB
# The base has data in its first part and a hole behind it, as images have.
BASE_DATA_SIZE = 192 * MIB
# The first stream is slow enough to watch; the second goes as fast as it can.
WATCHED_SPEED = 48 * MIB
GUEST_LENGTH_MAX = 64 * KIB
COMPARE_LENGTH = 4 * MIB
START_TIMEOUT_S = 30.0

console = Console(highlight=False)


def say(text: str) -> None:
    console.print(f"[green]•[/] {text}", soft_wrap=True)


# -- images ---------------------------------------------------------------------------------------


def write_base(path: Path) -> bytearray:
    """Make a raw image whose sectors say who they are; returns what a guest reads from it."""
    sectors = (f"base sector {number:08}".encode() for number in range(BASE_DATA_SIZE // SECTOR_SIZE))
    content = bytearray(b"".join(sector.ljust(SECTOR_SIZE, b".") for sector in sectors))
    with path.open("wb") as file:
        file.write(content)
        file.truncate(DISK_SIZE)
    content.extend(bytes(DISK_SIZE - BASE_DATA_SIZE))
    return content


async def make_overlay(path: Path, backing: Path, backing_format: str) -> None:
    """Make an empty qcow2 image over `backing`, which is in the same folder."""
    async with new_file(str(path)) as file:
        await create_qcow2(file, DISK_SIZE, backing_filename=backing.name, backing_format=backing_format)


# -- the guest ------------------------------------------------------------------------------------


class Guest:
    """Writes and reads at random places, and knows what it must find there."""

    def __init__(self, disk: NbdClient, content: bytearray) -> None:
        self._disk = disk
        self._content = content
        self._random = random.Random(2011)
        self._has_time = True
        self.write_count = 0
        self.read_count = 0
        self.slowest_s = 0.0

    async def work(self) -> None:
        """Go on until told to stop."""
        while self._has_time:
            started = time.perf_counter()
            await self._one_request()
            self.slowest_s = max(self.slowest_s, time.perf_counter() - started)
        await self._disk.flush()

    def stop(self) -> None:
        """Finish the request in flight, flush, and end."""
        self._has_time = False

    async def _one_request(self) -> None:
        length = SECTOR_SIZE * self._random.randint(1, GUEST_LENGTH_MAX // SECTOR_SIZE)
        offset = SECTOR_SIZE * self._random.randrange((DISK_SIZE - length) // SECTOR_SIZE)
        if self._random.random() < 0.5:
            data = self._random.randbytes(SECTOR_SIZE) * (length // SECTOR_SIZE)
            await self._disk.write(offset, data)
            self._content[offset : offset + length] = data
            self.write_count += 1
        else:
            expect_same(await self._disk.read(offset, length), self._content, offset)
            self.read_count += 1

    async def compare_all(self) -> None:
        """Read the whole disk and compare every byte."""
        for offset in range(0, DISK_SIZE, COMPARE_LENGTH):
            expect_same(await self._disk.read(offset, COMPARE_LENGTH), self._content, offset)


def expect_same(found: bytes | bytearray | memoryview, content: bytearray, offset: int) -> None:
    if found != memoryview(content)[offset : offset + len(found)]:
        sys.exit(f"WRONG DATA in {len(found)} bytes at {offset}: this must never happen, please report it")


# -- the daemon -----------------------------------------------------------------------------------


@asynccontextmanager
async def daemon(folder: Path, image: Path) -> AsyncIterator[QmpClient]:
    """Run blockd on an image, with its sockets in `folder`, and hold a QMP session with it."""
    command = [*(sys.executable, "-m", "blockd.cli.daemon"), *("--device", f"{DEVICE}={image.name}")]
    pidfile = folder / "blockd.pid"
    log = (folder / "blockd.log").open("wb")
    process = await asyncio.create_subprocess_exec(
        *command, "--pidfile", pidfile.name, cwd=folder, stdout=log, stderr=log
    )
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            while not pidfile.exists():  # written when all sockets are ready
                if process.returncode is not None:
                    sys.exit(f"the daemon did not start:\n{(folder / 'blockd.log').read_text()}")
                await asyncio.sleep(0.01)
        async with await QmpClient.connect(str(folder / "blockd.qmp")) as qmp:
            yield qmp
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            await process.wait()
        log.close()


async def stream(qmp: QmpClient, speed: int) -> float:
    """Stream the device with a progress bar; returns how long it took."""
    started = time.perf_counter()
    await qmp.execute("block_stream", {"device": DEVICE, "speed": speed})
    columns = (
        TextColumn("  {task.percentage:>3.0f}%"),
        BarColumn(),
        TransferSpeedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, speed_estimate_period=2.0) as progress:
        bar = progress.add_task("stream", total=DISK_SIZE)

        def show(status: StreamStatus) -> None:
            progress.update(bar, completed=status["offset"])

        ending = await follow(qmp, DEVICE, show)
        if ending is None or ending.outcome is not Outcome.COMPLETED:
            sys.exit(f"the stream did not complete: {ending}")
        progress.update(bar, completed=DISK_SIZE)
    return time.perf_counter() - started


# -- the story ------------------------------------------------------------------------------------


async def stream_and_copy(folder: Path, content: bytearray) -> None:
    """Stream the disk, then copy it to another file, while a guest works on it."""
    async with daemon(folder, folder / "disk.qcow2") as qmp:
        say("the daemon runs: QMP on blockd.qmp, NBD on blockd.nbd")
        async with await NbdClient.connect_unix(str(folder / "blockd.nbd"), DEVICE) as disk:
            guest = Guest(disk, content)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(guest.work())
                say("a guest is connected; from now on it writes and verifies without a break")

                say(
                    f"block_stream, held to {format_size(WATCHED_SPEED)}/s so that there is something to see:"
                )
                duration_s = await stream(qmp, WATCHED_SPEED)
                say(f"disk.qcow2 stands alone after {duration_s:.1f} s: it needs base.raw no more")

                await make_overlay(folder / "copy.qcow2", folder / "disk.qcow2", "qcow2")
                started = time.perf_counter()
                await qmp.execute("block_switch", {"device": DEVICE, "filename": str(folder / "copy.qcow2")})
                switch_ms = (time.perf_counter() - started) * 1e3
                say(f"block_switch to copy.qcow2, an empty overlay of the disk: {switch_ms:.0f} ms")

                say("block_stream again, this time as fast as it can: this is live block copy")
                duration_s = await stream(qmp, speed=0)
                say(f"copy.qcow2 is complete after {duration_s:.1f} s")
                guest.stop()
            say(
                f"the guest made {guest.write_count:,} writes and {guest.read_count:,} verified reads "
                f"meanwhile; the slowest took {guest.slowest_s * 1e3:.0f} ms"
            )
            await guest.compare_all()
            say(f"the guest has read all {format_size(DISK_SIZE)} once more: every byte is right")


async def compare_alone(folder: Path, content: bytearray) -> None:
    """Open the finished copy with everything it was made from out of reach."""
    retired = folder / "retired"
    retired.mkdir()
    for name in ("base.raw", "disk.qcow2"):
        (folder / name).rename(retired / name)
    file = await FileNode.open(str(folder / "copy.qcow2"), node_name="file", read_only=True)
    image = await Qcow2Image.open(file, node_name="copy", read_only=True)
    for offset in range(0, DISK_SIZE, COMPARE_LENGTH):
        expect_same(await image.read(offset, COMPARE_LENGTH), content, offset)
    await image.close()
    await file.close()
    say("the daemon has stopped, base.raw and disk.qcow2 are put away: copy.qcow2 alone has every byte")


def say_how_to_go_on(folder: Path) -> None:
    programs = Path(sys.executable).parent
    console.print(
        f"""
[bold]Go on from here[/], in {folder}:

  cd {folder}
  export PATH={programs}:$PATH
  blockd --device {DEVICE}=copy.qcow2 --daemonize        # the daemon, on the finished copy
  blockctl list                                     # what it serves
  nbdinfo 'nbd+unix:///{DEVICE}?socket=blockd.nbd'       # any NBD client can be the guest
  echo '{{"execute": "qmp_capabilities"}} {{"execute": "query-block"}}' | socat -t 1 - UNIX-CONNECT:blockd.qmp
  blockctl raw '{{"execute": "quit"}}'
""",
        soft_wrap=True,
    )


def make_empty(folder: Path) -> None:
    """Make the folder, in place of one that an earlier demonstration has made, and no other."""
    mark = folder / MARK
    if folder.exists():
        if not mark.exists():
            sys.exit(
                f"{folder} was not made by this demonstration, which would empty it: name another folder"
            )
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.connect(os.path.relpath(folder / "blockd.qmp"))
            sys.exit(f"a daemon runs in {folder}: end it, or name another folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    mark.touch()


async def main(folder: Path) -> None:
    started = time.perf_counter()
    make_empty(folder)
    content = write_base(folder / "base.raw")
    await make_overlay(folder / "disk.qcow2", folder / "base.raw", "raw")
    say(f"made base.raw, {format_size(DISK_SIZE)} with recognisable data, and disk.qcow2, an empty overlay")
    await stream_and_copy(folder, content)
    await compare_alone(folder, content)
    console.print(f"[bold green]All as promised[/], in {time.perf_counter() - started:.0f} seconds.")
    say_how_to_go_on(folder)


if __name__ == "__main__":
    if any(word.startswith("-") for word in sys.argv[1:]):
        sys.exit(__doc__)
    asyncio.run(main(Path(sys.argv[1] if sys.argv[1:] else "demo-run").resolve()))
