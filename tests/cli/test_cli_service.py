"""blockd under a service manager: inherited sockets, READY=1 and STOPPING=1; libnbd's socket activation."""

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from blockd.cli.service_manager import inherited_sockets, notifier
from blockd.config import Given, Monitor, NbdServer
from blockd.errors import RequestError
from blockd.protocols.nbd_client import NbdClient
from tests import qemu_img
from tests.qmp_client import QmpClient

BLOCKD = [sys.executable, "-m", "blockd"]
# LISTEN_PID is the pid of the program, which `exec` keeps.
AS_SERVICE = ["sh", "-c", 'LISTEN_PID=$$ exec "$@"', "sh", *BLOCKD]
TIMEOUT_S = 100
SIZE = 1 << 20


def listening(folder: Path, name: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / name))
    listener.listen()
    return listener


class ServiceManager:
    """The socket that services tell their states."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.socket.setblocking(False)

    async def state(self) -> bytes:
        async with asyncio.timeout(TIMEOUT_S):
            return await asyncio.get_running_loop().sock_recv(self.socket, 100)


@asynccontextmanager
async def service(
    folder: Path, sockets: list[socket.socket], *arguments: str, **environment: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run blockd with `sockets` as its descriptors from 3 on."""

    def place() -> None:
        moved = [os.dup2(listener.fileno(), 100 + number) for number, listener in enumerate(sockets)]
        for number, fd in enumerate(moved):
            os.dup2(fd, 3 + number)

    process = await asyncio.create_subprocess_exec(
        *AS_SERVICE,
        *arguments,
        cwd=folder,
        env={**os.environ, "LISTEN_FDS": str(len(sockets)), **environment},
        pass_fds=range(3, 3 + len(sockets)),
        preexec_fn=place,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        async with asyncio.timeout(TIMEOUT_S):
            assert await process.wait() == 0


@pytest.mark.parametrize("abstract", [False, True])
async def test_service_with_both_sockets(tmp_path: Path, abstract: bool) -> None:
    image = qemu_img.create(tmp_path / "disk.qcow2", SIZE)
    address = f"@blockd-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    manager = ServiceManager(address)
    sockets = [listening(tmp_path, "a"), listening(tmp_path, "b")]
    async with service(
        *(tmp_path, sockets, "--device", f"vda={image}"),
        LISTEN_FDNAMES="nbd:qmp",
        NOTIFY_SOCKET=address,
    ) as process:
        assert await manager.state() == b"READY=1"
        async with await NbdClient.connect_unix(str(tmp_path / "a"), "vda") as guest:
            assert guest.size == SIZE
        async with await QmpClient.connect(tmp_path / "b") as client:
            assert [device["device"] for device in await client.command("query-block")] == ["vda"]
            await client.command("quit")
        assert await manager.state() == b"STOPPING=1"
        async with asyncio.timeout(TIMEOUT_S):  # by itself: a signal might find it anywhere on its way
            await process.wait()
    # The service manager's sockets stay, and blockd made none of its own.
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_socket()) == sorted(
        ["a", "b"] + ([] if abstract else ["notify"])
    )
    manager.socket.close()
    for listener in sockets:
        listener.close()


async def test_libnbd_starts_blockd(tmp_path: Path) -> None:
    image = qemu_img.create(tmp_path / "disk.qcow2", SIZE)
    process = await asyncio.create_subprocess_exec(
        *("nbdinfo", "--size", "--", "[", *BLOCKD, "--device", f"vda={image}", "]"),
        cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(TIMEOUT_S):
        printed, _ = await process.communicate()
    assert (process.returncode, int(printed)) == (0, SIZE)
    assert [path.name for path in tmp_path.iterdir()] == ["disk.qcow2"]


def given(names: str, sockets: list[socket.socket], **changes: str) -> list[Given]:
    """Look at an environment as if the sockets had been inherited."""
    environment = {
        "LISTEN_PID": str(os.getpid()),
        "LISTEN_FDS": str(len(sockets)),
        "LISTEN_FDNAMES": names,
        **changes,
    }
    options = inherited_sockets(environment)
    assert environment == {}
    return options


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"LISTEN_FDS": "x"}, "LISTEN_FDS=x: not a number from 0 to 64"),
        ({"LISTEN_FDS": "65"}, "LISTEN_FDS=65: not a number from 0 to 64"),
        ({"LISTEN_FDS": "2", "LISTEN_FDNAMES": "nbd:web"}, "LISTEN_FDNAMES=nbd:web: each of several"),
        ({"LISTEN_FDS": "2", "LISTEN_FDNAMES": ""}, "LISTEN_FDNAMES=: each of several"),
        ({"LISTEN_FDS": "3", "LISTEN_FDNAMES": "nbd:qmp"}, "LISTEN_FDNAMES=nbd:qmp: each of several"),
    ],
)
def test_variables_that_make_no_sense(changes: dict[str, str], text: str) -> None:
    with pytest.raises(RequestError, match=text):
        given("", [], **changes)


def test_descriptors_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockd.cli.service_manager._FIRST_FD", 9999)
    with pytest.raises(RequestError, match="socket 9999 of LISTEN_FDS: Bad file descriptor"):
        given("nbd", [], LISTEN_FDS="1")


def test_what_each_socket_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.setattr("blockd.cli.service_manager._FIRST_FD", listener.fileno())
        listener.set_inheritable(True)
        for names, kinds in [("qmp", Monitor), ("nbd", NbdServer), ("unknown", NbdServer), ("", NbdServer)]:
            assert isinstance(given(names, [listener])[-1].option, kinds)
        assert not listener.get_inheritable()


def test_sockets_of_another_process_are_left_alone() -> None:
    assert given("nbd", [], LISTEN_FDS="1", LISTEN_PID="1") == []
    assert inherited_sockets({}) == []


def test_without_a_service_manager_there_is_nothing_to_tell(caplog: pytest.LogCaptureFixture) -> None:
    notifier({})("READY=1")
    assert caplog.text == ""
    notifier({"NOTIFY_SOCKET": "/none"})("READY=1")
    assert "cannot tell the service manager READY=1: NOTIFY_SOCKET=/none: No such file" in caplog.text
