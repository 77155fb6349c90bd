"""Start and end of a real daemon process: signals, pidfile, sockets, failing options."""

import asyncio
import fcntl
import os
import signal
import stat
import sys
from pathlib import Path

import pytest

from blockd.cli.options import parse_command_line
from blockd.daemon import Daemon
from blockd.daemon.pidfile import Pidfile
from blockd.errors import RequestError
from tests import qemu_img
from tests.chains import make
from tests.conftest import StartDaemon
from tests.daemon_process import DaemonProcess

pytestmark = pytest.mark.slow

LAYERS = ["AB0-AAAA", "-C------"]


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
async def test_clean_end_by_signal(tmp_path: Path, start_daemon: StartDaemon, number: signal.Signals) -> None:
    chain = await make(tmp_path, LAYERS)
    daemon = await start_daemon("--device", f"vda={chain.active}")
    client = await daemon.qmp()
    await client.command("block_stream", device="vda", speed=1)
    async with asyncio.timeout(60):
        assert await daemon.stop(number) == 0
        await client.event("JOB_STATUS_CHANGE", status="null")
        assert "BLOCK_JOB_CANCELLED" in client.event_names()
        with pytest.raises(EOFError):
            await client.receive()
    for path in (daemon.qmp_path, daemon.nbd_path, daemon.pidfile):
        assert not path.exists()
    assert daemon.stderr == ""
    assert qemu_img.content(chain.active) == chain.content
    qemu_img.assert_sound(chain.active)


async def test_quit_cancels_jobs_replies_and_hangs_up(tmp_path: Path, start_daemon: StartDaemon) -> None:
    chain = await make(tmp_path, LAYERS)
    daemon = await start_daemon("--device", f"vda={chain.active}")
    client, other = await daemon.qmp(), await daemon.qmp()
    await client.command("block_stream", device="vda", speed=1)
    await client.send(b'{"execute":"quit","id":"bye"}')
    seen = []
    with pytest.raises(EOFError):
        while True:
            message = await client.receive()
            seen.append(message.get("event", message.get("id")))
    assert seen == [
        *("BLOCK_EXPORT_DELETED", "JOB_STATUS_CHANGE", "BLOCK_JOB_CANCELLED"),
        *("JOB_STATUS_CHANGE", "JOB_STATUS_CHANGE", "bye"),
    ]
    await other.event("BLOCK_JOB_CANCELLED")
    assert await daemon.wait() == 0


async def test_pidfile_says_who_is_ready_and_is_locked(tmp_path: Path, start_daemon: StartDaemon) -> None:
    daemon = await start_daemon()
    assert daemon.pidfile.read_text() == f"{daemon.pid}\n"
    assert stat.S_IMODE(daemon.pidfile.stat().st_mode) == 0o600
    with daemon.pidfile.open("r+") as file, pytest.raises(BlockingIOError):
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    command = (
        sys.executable,
        "-m",
        "blockd.cli.daemon",
        "--qmp",
        tmp_path / "q",
        "--pidfile",
        daemon.pidfile,
    )
    second = await asyncio.create_subprocess_exec(*map(str, command), stderr=asyncio.subprocess.PIPE)
    _, error = await second.communicate()
    assert (second.returncode, b"another process has locked the file" in error) == (1, True)
    assert not (tmp_path / "q").exists()
    assert daemon.pidfile.read_text() == f"{daemon.pid}\n"


async def test_pidfile_of_a_dead_daemon_is_taken_over(tmp_path: Path, start_daemon: StartDaemon) -> None:
    pidfile = tmp_path / "pid"
    pidfile.write_text("9999999999\n\0\0")
    daemon = DaemonProcess(tmp_path, own_sockets=False)
    daemon.arguments = ["--qmp", str(tmp_path / "q"), "--pidfile", str(pidfile)]
    await daemon.launch()
    async with asyncio.timeout(100):
        while pidfile.read_text() != f"{daemon.pid}\n":  # noqa: ASYNC110  (another process writes it)
            await asyncio.sleep(0.01)
    assert await daemon.stop() == 0
    assert not pidfile.exists()


OTHERS = ["QFI\xfb and the rest", "12 is how it begins", "12\nbegins it", "12\n13\n", "9" * 20, "\0" * 512]


@pytest.mark.parametrize("content", [*OTHERS, None])
def test_a_pidfile_is_not_put_over_something_else(tmp_path: Path, content: str | None) -> None:
    other = tmp_path / "other"
    if content is None:  # a device that takes writes, such as /dev/null
        os.mkfifo(other, 0o644)
    else:
        other.write_text(content)
    with pytest.raises(RequestError, match="other: the file exists and is not a pidfile"):
        Pidfile.create_blocking(str(other))
    assert other.is_fifo() if content is None else other.read_text() == content
    assert content is not None or stat.S_IMODE(other.stat().st_mode) == 0o644


def test_what_cannot_be_a_pidfile_is_not_even_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are devices that act when they are opened: a watchdog, a tape, a terminal."""
    device, opened, open_really = tmp_path / "device", [], os.open
    os.mkfifo(device)

    def noted(path: Path, *arguments: int) -> int:
        opened.append(path)
        return open_really(path, *arguments)

    monkeypatch.setattr(os, "open", noted)
    with pytest.raises(RequestError, match="device: the file exists and is not a pidfile"):
        Pidfile.create_blocking(str(device))
    assert opened == []
    Pidfile.create_blocking(str(tmp_path / "pid")).remove_blocking()
    assert opened == [tmp_path / "pid"]


async def test_option_that_fails_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    chain = await make(tmp_path, LAYERS)
    options = [
        "--device",
        f"vda={chain.active}",
        "--blockdev",
        f"driver=file,node-name=x,filename={tmp_path}/nope",
    ]
    daemon = DaemonProcess(tmp_path, *options)
    await daemon.launch()
    assert await daemon.wait() == 1
    assert daemon.stderr == (
        f"blockd: --blockdev driver=file,node-name=x,filename={tmp_path}/nope: "
        f"Could not open '{tmp_path}/nope': No such file or directory\n"
    )
    for path in (daemon.qmp_path, daemon.nbd_path, daemon.pidfile):
        assert not path.exists()
    assert qemu_img.content(chain.active) == chain.content


FAILING = [
    ("--monitor chardev=nope", 'chardev "nope" not found'),
    ("--chardev socket,id=c,path=s,server=on,wait=off --chardev stdio,id=c", "Duplicate ID 'c' for chardev"),
    ("--export nbd,id=e,node-name=nope", "Cannot find device='' nor node-name='nope'"),
    ("--device id=vda,node-name=nope", "Cannot find device='' nor node-name='nope'"),
    ("--device vda=disk.raw,format=raw --device vda=other.raw,format=raw", "Device 'vda' already exists"),
    ("--nbd-server addr.type=unix,addr.path=n --nbd-server addr.type=unix,addr.path=m", "already running"),
]


@pytest.mark.parametrize(("options", "text"), FAILING)
async def test_options_that_cannot_be_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("disk.raw", "other.raw"):
        (tmp_path / name).write_bytes(bytes(65536))
    config = parse_command_line([*options.split(), "--pidfile", "pid"]).config
    with pytest.raises(RequestError) as caught:
        await Daemon().run(config, lambda _: pytest.fail("was ready"))
    assert text in caught.value.message
    assert caught.value.message.startswith("--")
    assert {path.name for path in tmp_path.iterdir()} == {"disk.raw", "other.raw"}


async def test_monitor_that_connects_out(tmp_path: Path, start_daemon: StartDaemon) -> None:
    """QEMU's test classes listen, and the daemon comes to them."""
    greeted = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert b'"QMP"' in await reader.readline()
        greeted.set()
        writer.write(b'{"execute":"qmp_capabilities"}{"execute":"quit"}')
        assert await reader.readline() == b'{"return": {}}\r\n'
        assert await reader.readline() == b'{"return": {}}\r\n'
        assert await reader.readline() == b""
        writer.close()

    server = await asyncio.start_unix_server(serve, tmp_path / "s")
    async with server:
        chardev = f"socket,id=c,path={tmp_path}/s"
        daemon = DaemonProcess(tmp_path, "--chardev", chardev, "--monitor", "c", own_sockets=False)
        await daemon.launch()
        assert await daemon.wait() == 0
    assert greeted.is_set()
