"""The ways to a session: unix, TCP, inherited descriptors, connecting out, standard input and output."""

import asyncio
import contextlib
import http.client
import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from blockd.aio import keeping_socket_files
from blockd.errors import RequestError
from blockd.qmp import server as server_module
from blockd.qmp.server import QmpServer
from blockd.units import MIB
from tests.qmp.toys import TOYS, ToyContext
from tests.qmp_client import QmpClient

Server = QmpServer[ToyContext]


async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """See that a session is at the other end."""
    assert "QMP" in json.loads(await reader.readline())
    writer.write(b'{"execute": "qmp_capabilities", "id": 1}')
    assert json.loads(await reader.readline()) == {"return": {}, "id": 1}
    writer.close()


# -- unix -------------------------------------------------------------------------------------


async def test_socket_file_is_private_and_removed(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "s"
    await server.listen_unix(str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    await converse(*await asyncio.open_unix_connection(path))
    await server.close()
    assert not path.exists()


async def test_several_sockets_share_events_and_commands(server: Server, tmp_path: Path) -> None:
    for name in "ab":
        await server.listen_unix(str(tmp_path / name))
    first, second = [await QmpClient.connect(tmp_path / name) for name in "ab"]
    await first.command("ring")
    assert await second.event("RANG") == {"note": "a"}
    await first.close()
    await second.close()


async def test_dead_socket_is_replaced(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "s"
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()
    await server.listen_unix(str(path))
    await converse(*await asyncio.open_unix_connection(path))


async def test_live_socket_is_not_replaced(server: Server, tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as live:
        live.bind(path)
        live.listen(0)
        with pytest.raises(RequestError, match=f"Failed to bind socket to {path}: another process listens"):
            await server.listen_unix(path)
        # Also when nobody can connect any more because the backlog is full.
        waiting = [socket.socket(socket.AF_UNIX) for _ in range(3)]
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(path)
        with pytest.raises(RequestError, match="another process listens"):
            await server.listen_unix(path)
        for client in waiting:
            client.close()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a-file", "the file exists and is not a socket"),
        ("no/such/folder", "No such file or directory"),
        ("x" * 200, "AF_UNIX path too long"),
    ],
)
async def test_names_that_are_no_good(server: Server, tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "a-file").write_text("kept")
    path = str(tmp_path / name)
    with pytest.raises(RequestError) as caught:
        await server.listen_unix(path)
    assert caught.value.message == f"Failed to bind socket to {path}: {reason}"
    assert (tmp_path / "a-file").read_text() == "kept"


async def test_socket_of_a_successor_is_left_alone(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "s"
    await server.listen_unix(str(path))
    path.unlink()
    with socket.socket(socket.AF_UNIX) as successor:
        successor.bind(str(path))
        await server.close()
        assert path.exists()


async def test_pretty(server: Server, tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    await server.listen_unix(path, pretty=True)
    reader, writer = await asyncio.open_unix_connection(path)
    greeting = await reader.readuntil(b"\n}\r\n")
    assert greeting.startswith(b'{\r\n    "QMP": {\r\n        "version": {\r\n            "qemu": {\r\n')
    assert json.loads(greeting)["QMP"]["capabilities"] == ["oob"]
    writer.close()


# -- TCP --------------------------------------------------------------------------------------


async def test_tcp(server: Server) -> None:
    port = await server.listen_tcp("127.0.0.1", 0)
    await converse(*await asyncio.open_connection("127.0.0.1", port))


async def test_tcp_only_on_loopback(server: Server) -> None:
    with pytest.raises(RequestError, match=r"loopback addresses only, not on 0\.0\.0\.0:4444"):
        await server.listen_tcp("0.0.0.0", 4444)


async def test_tcp_port_in_use(server: Server) -> None:
    port = await server.listen_tcp("127.0.0.1", 0)
    with pytest.raises(RequestError, match=f"Failed to listen on 127.0.0.1:{port}: "):
        await server.listen_tcp("127.0.0.1", port)


async def test_tcp_client_must_negotiate_in_time(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "TCP_NEGOTIATION_TIMEOUT_S", 0.2)
    port = await server.listen_tcp("127.0.0.1", 0)
    quick_reader, quick_writer = await asyncio.open_connection("127.0.0.1", port)
    quick_writer.write(b'{"execute": "qmp_capabilities"}')
    await quick_reader.readline()
    assert await quick_reader.readline() == b'{"return": {}}\r\n'
    slow_reader, slow_writer = await asyncio.open_connection("127.0.0.1", port)
    assert (await slow_reader.read()).count(b"\n") == 1
    quick_writer.write(b'{"execute": "look"}')
    assert b"return" in await quick_reader.readline()
    for writer in (quick_writer, slow_writer):
        writer.close()


COMMANDS = b'{"execute": "qmp_capabilities"}\r\n{"execute": "note", "arguments": {"entry": "obeyed"}}\r\n'


@pytest.mark.parametrize("method", ["POST", "PUT", "{POST"])
async def test_what_a_web_page_sends_is_not_obeyed(server: Server, toy: ToyContext, method: str) -> None:
    port = await server.listen_tcp("127.0.0.1", 0)

    def send_as_a_browser_does() -> None:
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=100)
        try:
            client.request(method, "/", COMMANDS, {"Content-Type": "text/plain"})
            client.getresponse()
        finally:
            client.close()

    with pytest.raises((http.client.HTTPException, ConnectionError)):
        await asyncio.to_thread(send_as_a_browser_does)
    await server.close()
    assert toy.journal == []


@pytest.mark.parametrize(
    ("before", "garbage"),
    [
        (b"", b"G"),
        (b" \t\r\n", b'"a string that does not end'),
        (b"", b"[1]"),
        (b'{"execute": "look"}\r\n', b"null"),
        (b"{}", b"?"),
    ],
)
async def test_tcp_client_that_sends_garbage_first_is_disconnected(
    server: Server, toy: ToyContext, before: bytes, garbage: bytes
) -> None:
    port = await server.listen_tcp("127.0.0.1", 0)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    await reader.readline()
    writer.write(before)
    if before.strip():
        assert b"error" in await reader.readline()
    writer.write(garbage)
    with contextlib.suppress(ConnectionResetError):
        assert await reader.read() == b""
    writer.close()
    await server.close()
    assert toy.journal == []


async def test_tcp_client_may_send_garbage_once_it_has_negotiated(server: Server) -> None:
    port = await server.listen_tcp("127.0.0.1", 0)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b'\r\n {"execute": "qmp_capabilities"} ? {"execute": "look"}')
    replies = [await reader.readline() for _ in range(4)]
    assert [b"return" in reply for reply in replies] == [False, True, False, True]
    writer.close()


# -- descriptors ------------------------------------------------------------------------------


async def test_inherited_listening_socket(server: Server, tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    await server.listen_fd(listener.detach())
    await converse(*await asyncio.open_unix_connection(tmp_path / "s"))


async def test_inherited_connection(server: Server) -> None:
    ours, theirs = socket.socketpair()
    await server.serve_fd(ours.detach())
    await converse(*await asyncio.open_unix_connection(sock=theirs))


async def test_descriptors_that_are_no_good(server: Server) -> None:
    ours, theirs = socket.socketpair()
    with pytest.raises(RequestError, match="is not a listening socket"):
        await server.listen_fd(os.dup(ours.fileno()))
    read_end, write_end = os.pipe()
    for attempt in (server.listen_fd, server.serve_fd):
        with pytest.raises(RequestError, match=f"File descriptor {read_end} is not a socket"):
            await attempt(read_end)
    os.close(read_end)
    os.close(write_end)
    ours.close()
    theirs.close()


# -- connecting out ---------------------------------------------------------------------------


async def test_connecting_to_a_client_that_listens(server: Server, tmp_path: Path) -> None:
    accepted: asyncio.Queue[Any] = asyncio.Queue()
    path = str(tmp_path / "theirs")
    start = keeping_socket_files(asyncio.start_unix_server)
    listener = await start(lambda *streams: accepted.put_nowait(streams), path)
    await server.connect_unix(path)
    await converse(*await accepted.get())
    listener.close()
    assert Path(path).exists()
    with pytest.raises(RequestError, match=f"Failed to connect to '{path}': Connection refused"):
        await server.connect_unix(path)
    with pytest.raises(RequestError, match="No such file or directory"):
        await server.connect_unix(path + "x")


async def test_connecting_over_tcp(server: Server) -> None:
    accepted: asyncio.Queue[Any] = asyncio.Queue()
    listener = await asyncio.start_server(lambda *streams: accepted.put_nowait(streams), "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    await server.connect_tcp("127.0.0.1", port)
    await converse(*await accepted.get())
    listener.close()
    with pytest.raises(RequestError, match=f"Failed to connect to '127.0.0.1:{port}': "):
        await server.connect_tcp("127.0.0.1", port)


# -- standard input and output ----------------------------------------------------------------


async def serve_stdio() -> None:
    """Run in a process of its own, below."""
    toy = ToyContext()
    async with QmpServer(lambda: TOYS, toy.bus, toy) as server:
        await server.serve_stdio()
        while server.client_count:  # noqa: ASYNC110
            await asyncio.sleep(0.001)


PROGRAM = [sys.executable, "-m", __name__]


def test_stdio() -> None:
    lines = b'{"execute": "qmp_capabilities"}\n{"execute": "ring"}\n{"execute": "look", "id": 1}\n'
    done = subprocess.run(PROGRAM, input=lines, stdout=subprocess.PIPE, timeout=100, check=True)
    messages = [json.loads(line) for line in done.stdout.splitlines()]
    assert [next(iter(message)) for message in messages] == ["QMP", "return", "timestamp", "return", "return"]
    assert messages[-1]["id"] == 1


def test_stdio_may_be_files(tmp_path: Path) -> None:
    """No event loop can wait for them; libuv ends the process if it is to."""
    script, replies = tmp_path / "script", tmp_path / "replies"
    script.write_bytes(
        b'{"execute": "qmp_capabilities"}' * 2 + b'{"execute": "look", "id": "%s"}' % (b"x" * MIB)
    )
    with script.open() as stdin, replies.open("w") as stdout:
        subprocess.run(PROGRAM, stdin=stdin, stdout=stdout, timeout=100, check=True)
    messages = [json.loads(line) for line in replies.read_text().splitlines()]
    assert [next(iter(message)) for message in messages] == ["QMP", "return", "error", "return"]
    assert messages[-1]["id"] == "x" * MIB


@pytest.mark.parametrize("is_stdout", [True, False])
async def test_a_daemon_whose_stdio_is_no_pipe_serves_the_others(tmp_path: Path, *, is_stdout: bool) -> None:
    words = ("--chardev", "stdio,id=m", "--monitor", "m", "--qmp", "qmp.sock", "--pidfile", "pid")
    program = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "blockd.cli.daemon", *words),
        cwd=tmp_path,
        stdin=subprocess.PIPE if is_stdout else subprocess.DEVNULL,
        stdout=subprocess.DEVNULL if is_stdout else subprocess.PIPE,
    )
    async with asyncio.timeout(100):
        while not (tmp_path / "pid").exists():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    client = await QmpClient.connect(str(tmp_path / "qmp.sock"))
    await client.command("quit")
    await program.communicate()
    assert program.returncode == 0


if __name__ == "__main__":
    asyncio.run(serve_stdio())
