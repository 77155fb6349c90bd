"""--http: what is shown, to whom, and what is cut off; over real sockets."""

import asyncio
import json
import os
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import pytest
from prometheus_client.parser import text_string_to_metric_families

from blockd.errors import RequestError
from blockd.web import server as web_server
from blockd.web.server import WebServer
from blockd.web.status import Status
from tests import qemu_img
from tests.conftest import StartDaemon
from tests.missing import require_listening
from tests.programs import run

TIMEOUT_S = 30
SIZE = 1 << 20
EMPTY = Status(version="1", uptime_seconds=2.5, devices=[], jobs=[])


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


async def talk(where: Path | int, request: bytes) -> bytes:
    """Send bytes and return what comes until the connection ends."""
    if isinstance(where, Path):
        reader, writer = await asyncio.open_unix_connection(where)
    else:
        reader, writer = await asyncio.open_connection("127.0.0.1", where)
    try:
        writer.write(request)
        async with asyncio.timeout(TIMEOUT_S):
            return await reader.read()
    except (ConnectionResetError, BrokenPipeError):
        return b""
    finally:
        writer.close()


async def ask(
    where: Path | int, path: str, *, method: str = "GET", headers: str = "Host: localhost\r\n"
) -> Reply:
    said = await talk(where, f"{method} {path} HTTP/1.1\r\n{headers}\r\n".encode())
    head, _, body = said.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    fields = dict(line.lower().split(": ", 1) for line in lines)
    return Reply(int(first.split()[1]), fields, body)


async def empty() -> Status:
    return EMPTY


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Path]:
    """A socket where an idle daemon shows its status."""
    async with WebServer(empty) as server:
        await server.listen_unix(str(tmp_path / "http"))
        yield tmp_path / "http"


# -- what is shown ----------------------------------------------------------------------------


async def test_every_path_answers_and_protects_the_browser(place: Path) -> None:
    for path, content_type in {
        "/": "text/html; charset=utf-8",
        "/page.js": "text/javascript; charset=utf-8",
        "/page.css": "text/css; charset=utf-8",
        "/healthz": "text/plain; charset=utf-8",
        "/api/status": "application/json",
        "/metrics": "text/plain; version=0.0.4; charset=utf-8",
        "/api/status?x=1": "application/json",
    }.items():
        reply = await ask(place, path)
        assert (reply.status, reply.headers["content-type"]) == (200, content_type)
        assert reply.body
        assert reply.headers["content-security-policy"].startswith("default-src 'self';")
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["cache-control"] == "no-store"
        assert reply.headers["server"] == "blockd"
        assert not [name for name in reply.headers if name.startswith("access-control")]


async def test_the_page_keeps_to_its_own_policy(place: Path) -> None:
    """Scripts and styles come from files of their own, and nothing from anywhere else."""
    page = (await ask(place, "/")).body.decode()
    assert "<style" not in page
    assert " style=" not in page
    assert "http:" not in page + (await ask(place, "/page.js")).body.decode()
    assert page.count("<script") == page.count('<script src="/page.js"') == 1


async def test_head_has_no_body(place: Path) -> None:
    reply = await ask(place, "/api/status", method="HEAD")
    assert (reply.status, reply.body) == (200, b"")


async def test_a_stream_is_seen_in_all_faces(start_daemon: StartDaemon, tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(os.urandom(SIZE))
    disk = qemu_img.create(tmp_path / "disk.qcow2", SIZE, backing=base, backing_format="raw")
    place = tmp_path / "http"
    daemon = await start_daemon("--device", f"vda={disk}", "--http", place)
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    await run("qemu-io", "-f", "raw", "-c", "write -P 7 64k 128k", daemon.nbd_uri("vda"))
    async with await daemon.qmp() as client:
        # A limit that lets one piece through and then none for an hour.
        await client.command("block_stream", {"device": "vda", "speed": 100})
        status = json.loads((await ask(place, "/api/status")).body)
        metrics = (await ask(place, "/metrics")).body.decode()
        await client.command("block_stream_cancel", {"device": "vda"})
    (device,) = status["devices"]
    assert [(layer["filename"], layer["format"]) for layer in device["chain"]] == [
        (str(disk), "qcow2"),
        (str(base), "raw"),
    ]
    assert (device["name"], device["exports"]) == ("vda", ["vda"])
    assert device["guest"]["write"]["byte-count"] == 128 << 10
    assert device["stream"]["length"] == SIZE
    assert [job["id"] for job in status["jobs"]] == ["vda"]
    assert status["nbd"]["addresses"] == [f"nbd+unix:///?socket={daemon.nbd_path}"]
    values = {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
    }
    assert values["blockd_guest_bytes_total", "vda", "write"] == 128 << 10
    assert values["blockd_stream_length_bytes", "vda"] == SIZE
    assert values["blockd_jobs", "running", "stream"] == 1
    assert await daemon.stop() == 0
    assert not place.exists()


async def test_no_secret_is_shown(start_daemon: StartDaemon, tmp_path: Path) -> None:
    place = tmp_path / "http"
    daemon = await start_daemon("--object", "secret,id=s,data=hush-hush", "--http", place)
    for path in ("/api/status", "/metrics", "/"):
        assert b"hush-hush" not in (await ask(place, path)).body
    await daemon.stop()


# -- who may ask, and for what ----------------------------------------------------------------


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:8080", "[::1]:80", "[::1]"])
async def test_names_of_this_machine(place: Path, host: str) -> None:
    assert (await ask(place, "/healthz", headers=f"Host: {host}\r\n")).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "localhost.evil.example", "", "10.0.0.1", ":80"]
)
async def test_other_names_are_refused(place: Path, host: str) -> None:
    reply = await ask(place, "/api/status", headers=f"Host: {host}\r\n")
    assert reply.status == 403
    assert b"version" not in reply.body
    assert reply.body.startswith(b"unknown Host: ask for one of 127.0.0.1, ")


async def test_no_name_and_two_names_are_refused(place: Path) -> None:
    for headers in ("", "Host: localhost\r\nHost: localhost\r\n"):
        assert (await ask(place, "/api/status", headers=headers)).status in (400, 403)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
async def test_nothing_can_be_changed(place: Path, method: str) -> None:
    reply = await ask(place, "/api/status", method=method)
    assert (reply.status, reply.headers["allow"]) == (405, "get, head")


async def test_a_body_is_not_taken(place: Path) -> None:
    for headers in ("Content-Length: 5\r\n", "Transfer-Encoding: chunked\r\n"):
        assert (await ask(place, "/", headers=f"Host: localhost\r\n{headers}")).status == 413


@pytest.mark.parametrize(
    "path", ["/static/page.html", "/../server.py", "/%2e%2e/server.py", "/page.html", "//"]
)
async def test_there_is_nothing_else(place: Path, path: str) -> None:
    assert (await ask(place, path)).status == 404


# -- limits -----------------------------------------------------------------------------------


async def test_slow_heads_and_slow_readers_are_cut(tmp_path: Path) -> None:
    async with WebServer(empty, deadline_s=0.05) as server:
        await server.listen_unix(str(tmp_path / "http"))
        assert await talk(tmp_path / "http", b"GET / HTTP/1.1\r\nHost: local") == b""
        assert await talk(tmp_path / "http", b"") == b""
        assert server._connections == {}


async def test_what_is_too_long_is_refused(place: Path) -> None:
    long_line = await talk(place, b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert b" 400 " in long_line.partition(b"\r\n")[0]
    many = b"".join(b"X-%d: %s\r\n" % (number, b"y" * 7000) for number in range(100))
    assert b" 200 " not in await talk(place, b"GET / HTTP/1.1\r\nHost: localhost\r\n" + many + b"\r\n")
    assert (await ask(place, "/healthz")).status == 200


async def test_a_bug_becomes_an_error_page(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def look() -> Status:
        raise IndexError

    async with WebServer(look) as server:
        await server.listen_unix(str(tmp_path / "http"))
        reply = await ask(tmp_path / "http", "/api/status")
    assert (reply.status, reply.body) == (500, b"internal error, see the log of blockd\n")
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert "IndexError" in caplog.text


async def test_nonsense_gets_an_error_without_a_traceback(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for nonsense in (
        b"\x00\xff\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b'{"execute": "quit"}\r\n\r\n',
    ):
        said = await talk(place, nonsense)
        assert b" 200 " not in said.partition(b"\r\n")[0]
        assert b"Traceback" not in said
        assert b".py" not in said
    assert caplog.text == ""


async def test_at_the_limit_of_connections_the_next_is_cut(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web_server, "CONNECTION_COUNT_MAX", 2)
    held = [await asyncio.open_unix_connection(place) for _ in range(2)]
    assert await talk(place, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n") == b""
    for _, writer in held:
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    for reader, writer in held:
        async with asyncio.timeout(TIMEOUT_S):
            assert (await reader.read()).endswith(b"ok\n")
        writer.close()
    assert (await ask(place, "/healthz")).status == 200


# -- where ------------------------------------------------------------------------------------


async def test_loopback_only(tmp_path: Path) -> None:
    async with WebServer(empty) as server:
        await server.listen_tcp("127.0.0.1", 0)
        (port,) = server.ports
        assert (await ask(port, "/healthz")).body == b"ok\n"
        for host in ("0.0.0.0", "192.0.2.1", "::"):
            with pytest.raises(RequestError, match="HTTP is for this machine only"):
                await server.listen_tcp(host, 0)
        with pytest.raises(RequestError, match=f"port {port}: "):
            await server.listen_tcp("127.0.0.1", port)
    with pytest.raises(ConnectionRefusedError):
        await ask(port, "/healthz")


async def test_a_client_on_tcp_of_a_whole_daemon(start_daemon: StartDaemon) -> None:
    require_listening("localhost")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    daemon = await start_daemon("--http", f"localhost:{port}")
    assert json.loads((await ask(port, "/api/status")).body)["devices"] == []
    await daemon.stop()
    assert f"HTTP http://localhost:{port}/" in daemon.stdout
