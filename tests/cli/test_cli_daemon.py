"""`blockd` as a process: how it starts, what it says, how it ends, and what blockctl does with it."""

import asyncio
import json
import os
import signal
import stat
import sys
from pathlib import Path

import pytest

from tests import qemu_img
from tests.cli.fake_daemon import PROGRAM_TIMEOUT_S, Result, blockctl
from tests.conftest import StartDaemon
from tests.daemon_process import DaemonProcess
from tests.qmp_client import QmpClient

SIZE = 4 << 20


async def start(folder: Path, *arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "blockd", *arguments),
        cwd=folder,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def run(folder: Path, *arguments: str) -> Result:
    """Run blockd to its end."""
    process = await start(folder, *arguments)
    async with asyncio.timeout(PROGRAM_TIMEOUT_S):
        stdout, stderr = await process.communicate()
    assert process.returncode is not None
    return Result(process.returncode, stdout.decode(), stderr.decode())


def make_disk(folder: Path) -> Path:
    """A disk over a base with data in it."""
    base = folder / "base.raw"
    base.write_bytes(os.urandom(SIZE))
    return qemu_img.create(folder / "disk.qcow2", SIZE, backing=base, backing_format="raw")


async def test_help_and_version(tmp_path: Path) -> None:
    for option in ("--help", "-h"):
        result = await run(tmp_path, option)
        assert result.status == 0
        assert "blockd --device vda=disk.qcow2" in result.stdout
    result = await run(tmp_path, "--version")
    assert (result.status, result.stdout.split()[0]) == (0, "blockd")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to serve: give a disk, --device NAME=FILE, or see --help"),
        (["--bogus"], "unrecognized option '--bogus'; see --help"),
        (
            ["--blockdev", "driver=file,node-name=x,filename=none"],
            "--blockdev driver=file,node-name=x,filename=none: Could not open 'none': "
            "No such file or directory",
        ),
        (
            ["--device", "vda=no\x1bne.qcow2"],
            r"--device vda=no\x1bne.qcow2: The file name 'no\x1bne.qcow2' has control characters in it",
        ),
        (
            ["--device", "vda=d.qcow2,format=vmdk"],
            "--device vda=d.qcow2,format=vmdk: Could not open 'd.qcow2': Unknown driver 'vmdk'; the formats "
            "are qcow2, qed, raw, add-cow",
        ),
        (
            ["--device", "vda=d.qcow2,backing-format=vmdk"],
            "--device vda=d.qcow2,backing-format=vmdk: Could not open 'd.qcow2': Unknown driver 'vmdk'; the "
            "formats are qcow2, qed, raw, add-cow",
        ),
        (["--monitor", "none"], '--monitor none: chardev "none" not found'),
        (
            ["--export", "nbd,id=e,node-name=none"],
            "--export nbd,id=e,node-name=none: Cannot find device='' nor node-name='none'",
        ),
    ],
)
async def test_what_cannot_be_ends_with_status_1(tmp_path: Path, arguments: list[str], message: str) -> None:
    assert await run(tmp_path, *arguments) == Result(1, "", f"blockd: {message}\n")
    assert list(tmp_path.iterdir()) == []


async def test_device_alone(tmp_path: Path) -> None:
    make_disk(tmp_path)
    process = await start(tmp_path, "--device", "vda=disk.qcow2")
    assert process.stdout is not None
    said = [(await process.stdout.readline()).decode() for _ in range(5)]
    assert "blockd is ready" in said[0]
    assert f"UNIX-CONNECT:{tmp_path}/blockd.qmp" in said[2]
    uri = f"nbd+unix:///vda?socket={tmp_path}/blockd.nbd"
    assert uri in said[3]
    assert stat.S_IMODE((tmp_path / "blockd.qmp").stat().st_mode) == 0o600
    info = await asyncio.to_thread(qemu_img.qemu, "qemu-img", "info", "--output=json", uri)
    assert json.loads(info)["virtual-size"] == SIZE
    async with await QmpClient.connect(tmp_path / "blockd.qmp") as client:
        await client.command("block_stream", device="vda", speed=1)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = await process.communicate()
    assert (process.returncode, stderr) == (0, b"")
    last = stdout.decode().splitlines()[-1]
    assert last.startswith("stream 'vda' stopped at ")
    assert last.endswith(
        " of 4.0 MiB; what was copied stays: stream again after the next start to copy the rest"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"disk.qcow2", "base.raw"}


async def test_command_line_of_qemu_storage_daemon(tmp_path: Path, start_daemon: StartDaemon) -> None:
    disk = make_disk(tmp_path)
    monitor, nbd = tmp_path / "monitor", tmp_path / "nbd"
    blockdev = {
        "driver": "qcow2",
        "node-name": "disk",
        "file": {"driver": "file", "filename": str(disk), "cache": {"direct": False}},
    }
    await start_daemon(
        *("--object", "iothread,id=t"),
        *("--object", "throttle-group,id=g,limits.iops-total=1000"),
        *("--blockdev", json.dumps(blockdev)),
        *("--blockdev", "throttle,node-name=slow,file=disk,throttle-group=g"),
        *("--blockdev", f"driver=file,node-name=b,filename={tmp_path}/base.raw,read-only=on"),
        *("--nbd-server", f"addr.type=unix,addr.path={nbd}"),
        *("--export", "type=nbd,id=e,node-name=disk,name=x,writable=on,iothread=t"),
        *("--chardev", f"socket,id=c,path={monitor},server=on,wait=off"),
        *("--monitor", "chardev=c"),
        own_sockets=False,
    )
    async with await QmpClient.connect(monitor) as qmp:
        names = {node["node-name"] for node in await qmp.command("query-named-block-nodes")}
        assert {"disk", "b", "slow"} <= names
        (export,) = await qmp.command("query-block-exports")
        assert (export["id"], export["node-name"]) == ("e", "disk")
    info = await asyncio.to_thread(qemu_img.qemu, "nbdinfo", "--json", f"nbd+unix:///x?socket={nbd}")
    assert json.loads(info)["exports"][0]["export-size"] == SIZE


async def test_monitor_on_stdio(tmp_path: Path) -> None:
    process = await start(tmp_path, "--chardev", "stdio,id=c", "--monitor", "c")
    async with asyncio.timeout(PROGRAM_TIMEOUT_S):
        stdout, _ = await process.communicate(b'{"execute":"qmp_capabilities"}{"execute":"quit"}')
    lines = [json.loads(line) for line in stdout.splitlines()]
    assert "QMP" in lines[0]
    assert lines[1:3] == [{"return": {}}, {"return": {}}]
    assert process.returncode == 0


async def test_connecting_out(tmp_path: Path) -> None:
    """QEMU's own test class listens, and the daemon connects to it."""
    greeted = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        greeted.set_result(await reader.readline())
        writer.write(b'{"execute":"qmp_capabilities"}{"execute":"quit"}')
        await reader.read()
        writer.close()

    async with await asyncio.start_unix_server(serve, tmp_path / "out"):
        result = await run(tmp_path, "--chardev", "socket,id=c,path=out", "--monitor", "c")
    assert b'"QMP"' in await greeted
    assert (result.status, result.stderr) == (0, "")


async def test_background(tmp_path: Path) -> None:
    make_disk(tmp_path)
    arguments = ["--device", "vda=disk.qcow2", "--pidfile", "pid", "--daemonize"]
    result = await run(tmp_path, *arguments)
    assert (result.status, result.stderr) == (0, "")
    pid = int((tmp_path / "pid").read_text())
    assert os.getsid(pid) == pid
    async with await QmpClient.connect(tmp_path / "blockd.qmp") as client:  # however long that may take
        await client.command("quit")
    async with asyncio.timeout(PROGRAM_TIMEOUT_S):
        while any((tmp_path / name).exists() for name in ("pid", "blockd.qmp")):  # noqa: ASYNC110
            await asyncio.sleep(0.01)  # the daemon is nobody's child any more


async def test_background_that_cannot_start_says_so(tmp_path: Path) -> None:
    result = await run(tmp_path, "--device", "vda=none.qcow2", "--daemonize")
    assert result.status == 1
    assert "Could not open 'none.qcow2': No such file or directory" in result.stderr


# -- blockctl with the real daemon -------------------------------------------------------------


@pytest.mark.slow
async def test_stream_switch_and_stream_again(tmp_path: Path, start_daemon: StartDaemon) -> None:
    disk = make_disk(tmp_path)
    daemon = await start_daemon("--device", f"vda={disk}")

    async def control(*arguments: str) -> Result:
        return await blockctl(tmp_path, "--socket", str(daemon.qmp_path), *arguments)

    text = f"vda: stream completed, 4.0 MiB copied; {disk} needs no backing file\n"
    assert await control("stream", "vda", "--wait") == Result(0, text, "")
    assert (await control("create", "copy.qcow2", "-b", "disk.qcow2", "-F", "qcow2")).status == 0
    switched = await control("switch", "vda", "copy.qcow2")
    assert switched.stdout.startswith("vda: goes on in copy.qcow2; without --state-dir the next start has ")
    assert (await control("stream", "vda", "--wait", "--json")).status == 0
    listed = await control("list")
    assert listed.stdout.startswith(f"vda  4.0 MiB  writable  {tmp_path}/copy.qcow2 (qcow2)\n")
    await daemon.stop()
    assert f"vda is on {tmp_path}/copy.qcow2 now: start with that file next time" in daemon.stdout
    qemu_img.assert_same(tmp_path / "copy.qcow2", "qcow2", tmp_path / "base.raw", "raw")


@pytest.mark.slow
async def test_cancel_ends_a_wait_with_status_3(tmp_path: Path, start_daemon: StartDaemon) -> None:
    disk = make_disk(tmp_path)
    daemon = await start_daemon("--device", f"vda={disk}")
    socket = ("--socket", str(daemon.qmp_path))
    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(blockctl(tmp_path, *socket, "stream", "vda", "--wait", "--speed", "64k"))
        while "no stream" in (await blockctl(tmp_path, *socket, "status")).stdout:
            assert not waiting.done()
        assert (await blockctl(tmp_path, *socket, "cancel", "vda")).status == 0
    assert waiting.result().status == 3
    result = await blockctl(tmp_path, *socket, "cancel", "vda")
    assert (result.status, result.stderr) == (1, "blockctl: No active stream on device 'vda'\n")


@pytest.mark.slow
async def test_daemon_that_dies_is_a_lost_connection(tmp_path: Path) -> None:
    disk = make_disk(tmp_path)
    async with DaemonProcess(tmp_path, "--device", f"vda={disk}") as daemon:
        socket = ("--socket", str(daemon.qmp_path))
        async with asyncio.TaskGroup() as tasks:
            waiting = tasks.create_task(
                blockctl(tmp_path, *socket, "stream", "vda", "--wait", "--speed", "64k")
            )
            while "no stream" in (await blockctl(tmp_path, *socket, "status")).stdout:
                assert not waiting.done()
            await daemon.kill()
        assert waiting.result().status == 4
