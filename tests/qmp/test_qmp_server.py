"""Many clients at once, and clients that behave badly."""

import asyncio
import gc
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blockd.qmp import connection
from blockd.qmp import server as server_module
from blockd.qmp.server import CLIENT_MAX, QmpServer
from tests.inline_threads import steps
from tests.qmp.toys import TOYS, Rang, ToyContext
from tests.qmp_client import QmpClient

Server = QmpServer[ToyContext]
OPEN_DESCRIPTORS = Path("/proc/self/fd")


async def until(is_so: Callable[[], bool]) -> None:
    """Let the loop run until something is so."""
    async with asyncio.timeout(100):
        while not is_so():  # noqa: ASYNC110 (the condition is another's state)
            await asyncio.sleep(0.001)


def connection_objects() -> int:
    gc.collect()
    return sum(isinstance(thing, connection.Connection) for thing in gc.get_objects())


# -- many -------------------------------------------------------------------------------------


async def test_clients_do_not_share_anything_but_events(qmp_path: str, toy: ToyContext) -> None:
    first = await QmpClient.connect(qmp_path)
    second = await QmpClient.connect(qmp_path)
    silent = await QmpClient.connect(qmp_path, negotiate=False)
    await first.send(b'{"execute": "wait", "id": "first"}')
    await toy.waiting.wait()
    await second.command("ring", {"note": "b"})
    assert await first.event("RANG") == {"note": "b"}
    assert await second.event("RANG") == {"note": "b"}
    toy.gate.set()
    assert await first.receive() == {"return": {}, "id": "first"}
    # Not negotiated: the next thing it hears is its own reply.
    await silent.command("qmp_capabilities")
    assert silent.events == []
    for client in (first, second, silent):
        await client.close()


async def test_for_a_client_that_has_not_negotiated_no_event_is_made(
    qmp_path: str, server: Server, toy: ToyContext
) -> None:
    """It would load what events are, while guests wait."""
    client = await QmpClient.connect(qmp_path, negotiate=False)
    await until(lambda: server.client_count == 1)
    await server.commands.reader()  # the connection waits for that first
    await steps(5)
    assert not toy.bus.has_listeners
    await client.command("qmp_capabilities")
    assert toy.bus.has_listeners
    await client.close()
    await until(lambda: not server.client_count)
    assert not toy.bus.has_listeners


async def test_one_client_too_many(qmp_path: str, server: Server) -> None:
    clients = [await QmpClient.connect(qmp_path) for _ in range(CLIENT_MAX)]
    refused = await QmpClient.connect(qmp_path, negotiate=False)
    assert refused.greeting["error"]["desc"].startswith("64 clients are connected to this socket")
    with pytest.raises(EOFError):
        await refused.receive()
    await clients.pop().close()
    await until(lambda: server.client_count < CLIENT_MAX)
    clients.append(await QmpClient.connect(qmp_path))
    for client in (*clients, refused):
        await client.close()


async def test_loss_of_clients_is_not_reported_as_a_defect(qmp_path: str, server: Server) -> None:
    """A future with an error that nobody has asked for may be reported when it goes: by luck, not always."""
    gc.disable()  # or such futures would be gone
    try:
        for _ in range(20):
            _, writer = await asyncio.open_unix_connection(qmp_path)
            writer.write(b'{"execute": "qmp_capabilities"}' * 100)
            await asyncio.sleep(0)
            writer.transport.abort()
        await until(lambda: server.client_count == 0)
        futures = [thing for thing in gc.get_objects() if isinstance(thing, asyncio.Future)]
        assert not [future for future in futures if getattr(future, "_log_traceback", False)]
    finally:
        gc.enable()


async def test_memory_and_descriptors_come_back(qmp_path: str, server: Server) -> None:
    async def visit(number: int) -> None:
        reader, writer = await asyncio.open_unix_connection(qmp_path)
        writer.write([b"", b"{", b'{"execute": "qmp_capabilities"}{"exec', b"\xff[[["][number % 4])
        if number % 3:
            await reader.readline()
        writer.transport.abort()

    await asyncio.gather(*(visit(number) for number in range(40)))
    await until(lambda: server.client_count == 0)
    descriptor_count = len(list(OPEN_DESCRIPTORS.iterdir()))
    for _ in range(5):
        await asyncio.gather(*(visit(number) for number in range(40)))
    await until(lambda: server.client_count == 0)
    await until(lambda: len(list(OPEN_DESCRIPTORS.iterdir())) <= descriptor_count)
    await until(lambda: connection_objects() == 0)


# -- leaving ----------------------------------------------------------------------------------


async def test_half_closed_client_gets_its_answers(qmp_path: str, toy: ToyContext) -> None:
    reader, writer = await asyncio.open_unix_connection(qmp_path)
    await reader.readline()
    writer.write(b'{"execute": "qmp_capabilities"}{"execute": "wait"}' + b'{"execute": "note"}' * 20)
    writer.write_eof()
    await toy.waiting.wait()
    toy.gate.set()
    replies = (await reader.read()).splitlines()
    assert replies == [b'{"return": {}}'] * 22
    writer.close()


async def test_leaving_drops_what_is_queued_but_not_what_runs(
    qmp_path: str, server: Server, toy: ToyContext
) -> None:
    client = await QmpClient.connect(qmp_path)
    queued = b'{"execute": "note", "arguments": {"entry": "queued"}}' * 20
    await client.send(b'{"execute": "wait"}' + queued)
    await toy.waiting.wait()
    await client.close()
    # Others go on; the command of the one that left does too.
    async with await QmpClient.connect(qmp_path) as other:
        await other.command("note", {"entry": "other"})
        toy.gate.set()
        await until(lambda: server.client_count == 1)
    assert toy.journal == ["other", "waited"]


async def test_garbage_is_answered_and_survived(qmp_path: str) -> None:
    client = await QmpClient.connect(qmp_path)
    await client.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n\xff{]")
    for _ in range(20):
        message = await client.receive()
        assert message["error"]["desc"].startswith("JSON parse error")
        if message["error"]["desc"].endswith("expecting value"):
            break
    assert await client.command("look")
    await client.close()


# -- not reading ------------------------------------------------------------------------------


def ring_loudly(toy: ToyContext, count: int) -> None:
    for _ in range(count):
        toy.bus.emit(Rang(note="x" * 10_000))


async def unread(path: str) -> socket.socket:
    """Connect a client that negotiates and then never reads."""
    client = socket.socket(socket.AF_UNIX)
    client.connect(path)
    client.sendall(b'{"execute": "qmp_capabilities"}')
    return client


async def test_client_that_does_not_read_is_dropped_and_disturbs_nobody(
    qmp_path: str,
    server: Server,
    toy: ToyContext,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection, "SLOW_READER_GRACE_S", 0.01)
    reading = await QmpClient.connect(qmp_path)
    lazy = await unread(qmp_path)
    await until(lambda: server.client_count == 2)
    await reading.command("note")
    for _ in range(10):
        ring_loudly(toy, 100)
        for _ in range(100):
            await reading.event("RANG")
    await until(lambda: server.client_count == 1)
    assert caplog.text.count("dropping its events") == 1
    assert caplog.text.count("disconnecting it") == 1
    assert await reading.command("look")
    received = bytearray()
    while data := lazy.recv(1 << 20):
        received += data
    assert len(received) < connection.SEND_QUEUE_MAX + (1 << 20)
    lazy.close()
    await reading.close()


async def test_client_that_catches_up_stays(
    qmp_path: str, toy: ToyContext, caplog: pytest.LogCaptureFixture
) -> None:
    client = await QmpClient.connect(qmp_path)
    ring_loudly(toy, 600)
    kept = 0
    await client.send(b'{"execute": "note", "id": "mark"}')
    while (await client.receive()).get("id") != "mark":
        kept += 1
    assert 0 < kept < 600
    ring_loudly(toy, 1)
    await client.event("RANG")
    assert "dropping its events" in caplog.text
    await client.close()


async def test_replies_wait_for_their_reader(qmp_path: str, toy: ToyContext) -> None:
    """A client that asks and does not read is not read from: no reply is lost, none piles up."""
    client = await QmpClient.connect(qmp_path)
    long_id = "x" * 200_000
    line = json.dumps({"execute": "note", "arguments": {"entry": "n"}, "id": long_id}).encode()
    async with asyncio.TaskGroup() as group:
        group.create_task(client.send(line * 40))
        await until(lambda: len(toy.journal) > 0)
        for _ in range(50):
            await asyncio.sleep(0)
        assert len(toy.journal) < 20
        for _ in range(40):
            assert (await client.receive())["id"] == long_id
    assert len(toy.journal) == 40
    await client.close()


# -- the end ----------------------------------------------------------------------------------


async def test_close_finishes_what_runs_and_takes_no_more(
    qmp_path: str, server: Server, toy: ToyContext
) -> None:
    client = await QmpClient.connect(qmp_path)
    idle = await QmpClient.connect(qmp_path)
    await client.send(b'{"execute": "wait", "id": 1}{"execute": "note", "arguments": {"entry": "late"}}')
    await toy.waiting.wait()
    async with asyncio.TaskGroup() as group:
        group.create_task(server.close())
        await until(lambda: not Path(qmp_path).exists())
        toy.bus.emit(Rang(note="last"))
        toy.gate.set()
    assert await client.event("RANG") == {"note": "last"}
    assert await client.receive() == {"return": {}, "id": 1}
    with pytest.raises(EOFError):
        await client.receive()
    with pytest.raises(EOFError):
        while "event" in await idle.receive():
            pass
    await client.close()
    await idle.close()
    assert toy.journal == ["waited"]


async def test_stop_from_within_a_command(qmp_path: str, server: Server, toy: ToyContext) -> None:
    """What `quit` does: its reply goes out, what was sent after it is not run."""
    client = await QmpClient.connect(qmp_path)
    await client.send(b'{"execute": "wait", "id": 1}{"execute": "note"}')
    await toy.waiting.wait()
    server.stop()
    toy.gate.set()
    assert await client.receive() == {"return": {}, "id": 1}
    with pytest.raises(EOFError):
        await client.receive()
    assert toy.journal == ["waited"]
    await client.close()


async def test_close_is_bounded_in_time(
    qmp_path: str, server: Server, toy: ToyContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "CLOSE_TIMEOUT_S", 0.05)
    monkeypatch.setattr(connection, "FLUSH_TIMEOUT_S", 0.05)
    hanging = await QmpClient.connect(qmp_path)
    await hanging.send(b'{"execute": "wait"}')
    lazy = await unread(qmp_path)
    await toy.waiting.wait()
    await until(lambda: server.client_count == 2)
    ring_loudly(toy, 200)
    await server.close()
    await until(lambda: server.client_count == 0)
    assert toy.journal == []
    lazy.close()
    await hanging.close()


async def test_an_exception_in_the_context_drops_everyone(tmp_path: Path, toy: ToyContext) -> None:
    path = str(tmp_path / "s")
    client: Any = None
    with pytest.raises(KeyError, match="elsewhere"):
        async with QmpServer(lambda: TOYS, toy.bus, toy) as server:
            await server.listen_unix(path)
            client = await QmpClient.connect(path)
            raise KeyError("elsewhere")
    assert not Path(path).exists()
    with pytest.raises(EOFError):
        await client.receive()
    await client.close()
