"""The event loop makes no call that may wait for a disk or a server, and so no file keeps others waiting."""

import asyncio
import contextlib
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from blockd.units import MIB
from tests import qemu_img
from tests.daemon_process import START_TIMEOUT_S, STOP_TIMEOUT_S
from tests.faults import calls
from tests.qmp_client import QmpClient

pytestmark = pytest.mark.slow

# What reads only what is in the page cache, asks only what this machine knows, or copies into the page cache
# as long as that does not wait (protocols/stalls.py).
NEVER_WAIT = {"preadv-nowait", "fstat-nowait", "pwrite"}


class Daemon:
    """A daemon under `calls.c`."""

    def __init__(self, folder: Path, process: asyncio.subprocess.Process) -> None:
        self.folder = folder
        self.process = process

    async def qmp(self) -> QmpClient:
        return await QmpClient.connect(self.folder / "q")

    async def guest(self, export: str, *commands: str) -> str:
        """Run commands of qemu-io on an export."""
        options = [word for line in commands for word in ("-c", line)]
        uri = f"nbd+unix:///{export}?socket={self.folder}/n"
        process = await asyncio.create_subprocess_exec(
            *("qemu-io", "-f", "raw", *options, uri), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        async with asyncio.timeout(STOP_TIMEOUT_S):
            output, _ = await process.communicate()
        assert not process.returncode, output
        return output.decode()

    async def stop(self) -> str:
        """End it with SIGTERM; returns what it said."""
        self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(STOP_TIMEOUT_S):
            _, stderr = await self.process.communicate()
        return stderr.decode()


@asynccontextmanager
async def running(
    folder: Path, environment: dict[str, str], *arguments: str, program: tuple[str, ...] = ()
) -> AsyncIterator[Daemon]:
    sockets = ["--qmp", f"{folder}/q", "--nbd", f"{folder}/n", "--pidfile", f"{folder}/pid"]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", *(program or ("-m", "blockd.cli.daemon")), *arguments, *sockets),
        env=environment,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            while not (folder / "pid").exists():
                assert process.returncode is None, await process.communicate()
                await asyncio.sleep(0.01)
        yield Daemon(folder, process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


# -- which calls it makes -------------------------------------------------------------------------


def make_disks(folder: Path) -> list[str]:
    """A disk of each format, over images that have something."""
    create = "qemu-img", "create", "-q", "-f"
    base = folder / "base.raw"
    qemu_img.qemu(*create, "raw", base, "64M")
    qemu_img.write(base, "write -P 7 16M 16M", image_format="raw")
    qemu_img.create(folder / "a.qcow2", 64 * MIB, backing=base, backing_format="raw")
    qemu_img.qemu(*create, "qed", "-b", base, "-F", "raw", folder / "b.qed", "64M")
    qemu_img.qemu(*create, "raw", folder / "c.raw", "64M")
    qemu_img.create(folder / "over.qcow2", 64 * MIB, backing=folder / "a.qcow2")
    return ["--device", f"a={folder}/a.qcow2", "--device", f"b={folder}/b.qed,format=qed"]


async def use(daemon: Daemon) -> None:
    """Have it do one of everything."""
    for export in "abc":
        await daemon.guest(
            export,
            *(f"write -P 1 {offset}k 64k" for offset in range(0, 4096, 64)),
            "write -P 2 20M 8M",
            "read 16M 8M",
            "discard 1M 2M",
            "write -z 3M 100k",
            "flush",
            "write -f -P 3 5M 4k",
        )
    folder = daemon.folder
    qmp = await daemon.qmp()
    for command in ("query-block", "query-named-block-nodes", "query-blockstats", "query-block-exports"):
        await qmp.command(command)
    file = {"driver": "file", "filename": f"{folder}/base.raw"}
    await qmp.command("blockdev-add", {"driver": "raw", "node-name": "n", "read-only": True, "file": file})
    await qmp.command("blockdev-del", {"node-name": "n"})
    for device in "ab":
        await qmp.command("block_stream", device=device)
        await qmp.event("BLOCK_STREAM_COMPLETED", device=device)
    await qmp.command("block_switch", device="a", filename=f"{folder}/over.qcow2")
    await daemon.guest("a", "write -P 4 30M 4M", "flush")
    await qmp.command("block_stream", device="a")
    await qmp.event("BLOCK_STREAM_COMPLETED", device="a")
    snapshot = {"snapshot-file": f"{folder}/snapshot.qcow2", "format": "qcow2"}
    await qmp.command("blockdev-snapshot-sync", {"device": "a", **snapshot})
    await daemon.guest("a", "write -P 5 30M 64k", "flush")
    await qmp.command("block-export-del", {"id": "c", "mode": "hard"})  # one keeps its size
    await qmp.command("block_resize", device="c", size=96 * MIB)
    await qmp.command("nbd-server-stop")
    await qmp.close()


async def test_the_event_loop_makes_no_call_that_may_wait(tmp_path: Path) -> None:
    log = tmp_path / "calls.log"
    folder = tmp_path / "disks"
    folder.mkdir()
    arguments = [*make_disks(folder), "--device", f"c={folder}/c.raw", "--state-dir", f"{folder}/state"]
    environment = calls.environment(folder, log=log)
    for more in ([], ["--http", f"{folder}/h"]):  # the second finds a journal
        async with running(folder, environment, *arguments, *more) as daemon:
            if not more:
                await use(daemon)
            assert "goes on in" in await daemon.stop() if more else not await daemon.stop()
            assert daemon.process.returncode == 0
    made = {(call.name, Path(call.target).name) for call in calls.logged(log) if call.thread == "main"}
    assert {name for name, _ in made} & NEVER_WAIT
    assert {(name, target) for name, target in made if name not in NEVER_WAIT and target != "-"} == set()


# -- one that hangs --------------------------------------------------------------------------------

# The daemon itself, with less patience.
IMPATIENT = """
import sys
from blockd.cli import daemon
from blockd.daemon import daemon as steps, ending

ending.Ending.step.__defaults__ = (1.0,)
steps.IMAGES_PATIENCE_S = 2.0
sys.exit(daemon.main())
"""


@pytest.mark.parametrize("end", ["SIGTERM", "quit"])
async def test_a_file_that_hangs_keeps_nobody_else_waiting(tmp_path: Path, end: str) -> None:
    """As on a server that is gone: every call on it waits, to look at it, to read and to write."""
    hung, flag = tmp_path / "hung.qcow2", tmp_path / "hung.qcow2.hang"
    for name in ("hung", "well"):
        qemu_img.create(tmp_path / f"{name}.qcow2", 64 * MIB)
        qemu_img.write(tmp_path / f"{name}.qcow2", "write -P 1 0 8M")
    devices = [word for name in ("hung", "well") for word in ("--device", f"{name}={tmp_path}/{name}.qcow2")]
    environment = calls.environment(tmp_path, hang=hung)
    async with running(tmp_path, environment, *devices, program=("-c", IMPATIENT)) as daemon:
        await daemon.guest("hung", "write -P 2 8M 4M", "flush")
        flag.touch()
        guest = asyncio.create_task(daemon.guest("hung", "write -P 3 40M 4k", "write -P 3 12M 8M", "flush"))
        async with await daemon.qmp() as qmp:
            for command in ("query-block", "query-named-block-nodes", "query-blockstats"):
                assert await qmp.command(command)
            await daemon.guest("well", "write -P 4 8M 8M", "write -P 4 40M 4k", "flush", "read -P 4 8M 4M")
            await daemon.guest("well", "write -P 5 16M 64k")
            if end == "quit":
                await qmp.command("quit")
        if end == "SIGTERM":
            daemon.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(STOP_TIMEOUT_S):
            _, said = await daemon.process.communicate()
        with contextlib.suppress(AssertionError):  # it has lost its disk
            await guest
    assert daemon.process.returncode == 1
    assert said.count(b"\n") == 1
    assert b"ERROR: blockd.daemon.ending: ending without waiting any longer: " in said
    assert said.endswith(f"left: NBD clients, guest writes, images, '{hung}'\n".encode()), said
    assert not list(tmp_path.glob("?"))
    assert not (tmp_path / "pid").exists()
    well = tmp_path / "well.qcow2"
    qemu_img.assert_sound(well)
    qemu_img.qemu("qemu-io", "-f", "qcow2", "-c", "read -P 5 16M 64k", "-c", "read -P 4 40M 4k", well)


async def test_a_look_at_a_file_that_hangs_does_not_keep_the_daemon_from_ending(tmp_path: Path) -> None:
    """All that was needed is done and closed, and one thread still asks what a file takes on its disk."""
    hanging = IMPATIENT.replace(
        "sys.exit",
        "import threading\n"
        "from blockd.protocols import file_status\n"
        "file_status._usage_blocking = lambda _: threading.Event().wait()\n"
        "sys.exit",
    )
    arguments = ("--device", f"vda={qemu_img.create(tmp_path / 'disk.qcow2', MIB)}")
    async with running(tmp_path, {}, *arguments, program=("-c", hanging)) as daemon:
        async with await daemon.qmp() as qmp:
            assert await qmp.command("query-named-block-nodes")
        daemon.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(STOP_TIMEOUT_S):
            _, said = await daemon.process.communicate()
    assert (daemon.process.returncode, said.count(b"\n")) == (1, 1)
    assert said.endswith(b"1 calls have not returned; left: calls that nobody waits for\n"), said


async def test_a_file_that_hangs_at_the_start_does_not_keep_the_daemon_from_ending(tmp_path: Path) -> None:
    hung = qemu_img.create(tmp_path / "hung.qcow2", 64 * MIB)
    (tmp_path / "hung.qcow2.hang").touch()
    log = tmp_path / "calls.log"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", IMPATIENT, "--device", f"vda={hung}", "--nbd", f"{tmp_path}/n"),
        env=calls.environment(tmp_path, hang=hung, log=log),
        stderr=subprocess.PIPE,
    )
    async with asyncio.timeout(START_TIMEOUT_S):
        while not any(call.target == str(hung) for call in calls.logged(log)):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(STOP_TIMEOUT_S):
        _, said = await process.communicate()
    assert (process.returncode, said.count(b"\n")) == (1, 1)
    assert b"left: the start" in said
    assert not (tmp_path / "n").exists()
