"""What one client sees: greeting, negotiation, ids, order, errors, out-of-band commands."""

import json
from typing import Any

import pytest

from tests.qmp.toys import ToyContext
from tests.qmp_client import QmpClient, QmpError

ENABLE_OOB = b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}'


async def answers(client: QmpClient, data: bytes, count: int) -> list[dict[str, Any]]:
    await client.send(data)
    return [await client.receive() for _ in range(count)]


def error(name: str, text: str) -> dict[str, Any]:
    return {"error": {"class": name, "desc": text}}


async def test_greeting(qmp_path: str) -> None:
    client = await QmpClient.connect(qmp_path, negotiate=False)
    assert list(client.greeting) == ["QMP"]
    assert client.greeting["QMP"]["capabilities"] == ["oob"]
    version = client.greeting["QMP"]["version"]
    assert (version["qemu"]["major"], version["qemu"]["minor"]) == (7, 2)
    assert version["package"].startswith("blockd ")
    await client.close()


async def test_nothing_works_before_negotiation(qmp_path: str, toy: ToyContext) -> None:
    async with await QmpClient.connect(qmp_path, negotiate=False) as client:
        expecting = error("CommandNotFound", "Expecting capabilities negotiation with 'qmp_capabilities'")
        assert await answers(client, b'{"execute": "note"} {"execute": "no-such"}', 2) == [expecting] * 2
        assert toy.journal == []


async def test_failed_negotiation_changes_nothing(qmp_path: str) -> None:
    async with await QmpClient.connect(qmp_path, negotiate=False) as client:
        for enable, text in [
            ('["zap"]', "Parameter 'enable[0]' does not accept value 'zap'"),
            ('["oob", "zap"]', "Parameter 'enable[1]' does not accept value 'zap'"),
            ('"oob"', "Invalid parameter type for 'enable', expected: array"),
        ]:
            line = f'{{"execute": "qmp_capabilities", "arguments": {{"enable": {enable}}}}}'
            assert await answers(client, line.encode(), 1) == [error("GenericError", text)]
        refused, oob = await answers(client, b'{"execute": "look"} {"exec-oob": "look"}', 2)
        assert refused["error"]["desc"].startswith("Expecting capabilities")
        assert oob == error("GenericError", "QMP input member 'exec-oob' is unexpected")
        assert await answers(client, b'{"execute": "qmp_capabilities"}', 1) == [{"return": {}}]


async def test_negotiating_twice(qmp_path: str) -> None:
    async with await QmpClient.connect(qmp_path) as client:
        with pytest.raises(QmpError, match="Capabilities negotiation is already complete, command ignored"):
            await client.command("qmp_capabilities")


ENVELOPES: list[tuple[str, str]] = [
    ("1 ", "QMP input must be a JSON object"),
    ("[]", "QMP input must be a JSON object"),
    ("{}", "QMP input lacks member 'execute'"),
    ('{"arguments": {}}', "QMP input lacks member 'execute'"),
    ('{"execute": 1}', "QMP input member 'execute' must be a string"),
    ('{"execute": "look", "arguments": []}', "QMP input member 'arguments' must be an object"),
    ('{"execute": "look", "extra": 1}', "QMP input member 'extra' is unexpected"),
    ('{"exec-oob": "look"}', "QMP input member 'exec-oob' is unexpected"),
]


@pytest.mark.parametrize(("line", "text"), ENVELOPES)
async def test_envelope_errors(qmp_path: str, line: str, text: str) -> None:
    async with await QmpClient.connect(qmp_path) as client:
        assert await answers(client, line.encode(), 1) == [error("GenericError", text)]
        if line.startswith("{"):
            with_id = line[:-1] + (", " if len(line) > 2 else "") + '"id": [7]}'
            assert await answers(client, with_id.encode(), 1) == [{"id": [7]} | error("GenericError", text)]


async def test_any_value_is_an_id(qmp_path: str) -> None:
    async with await QmpClient.connect(qmp_path) as client:
        values: tuple[object, ...] = ("x", 1, -0.5, None, False, [], {"a": [1]}, "é😀")
        for value in values:
            line = json.dumps({"execute": "note", "id": value}).encode()
            assert await answers(client, line, 1) == [{"return": {}, "id": value}]
        deep = b"[" * 1000 + b"]" * 1000
        await client.send(b'{"execute": "note", "id": ' + deep + b"}")
        assert await client._reader.readline() == b'{"return": {}, "id": ' + deep + b"}\r\n"


async def test_errors_carry_the_id(qmp_path: str) -> None:
    async with await QmpClient.connect(qmp_path) as client:
        line = b'{"execute": "stream", "arguments": {"device": "none"}, "id": 1}{"execute": "nope", "id": 2}'
        assert await answers(client, line, 2) == [
            {"id": 1} | error("DeviceNotFound", "Device 'none' not found"),
            {"id": 2} | error("CommandNotFound", "The command nope has not been found"),
        ]


async def test_a_mistake_of_ours_is_logged_and_answered(
    qmp_path: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with await QmpClient.connect(qmp_path) as client:
        broken, _ = await answers(client, b'{"execute": "break", "id": 1}{"execute": "note"}', 2)
        assert broken["error"] == {
            "class": "GenericError",
            "desc": "Internal error in break: see the log of blockd, which goes on",
        }
    assert "ZeroDivisionError: a mistake of ours" in caplog.text


async def test_commands_and_version(qmp_path: str) -> None:
    async with await QmpClient.connect(qmp_path) as client:
        names = [command["name"] for command in await client.command("query-commands")]
        assert {"qmp_capabilities", "query-commands", "query-version", "stream", "look"} <= set(names)
        assert len(names) == len(set(names))
        assert await client.command("query-version") == client.greeting["QMP"]["version"]


async def test_many_commands_at_once_are_answered_in_order(qmp_path: str, toy: ToyContext) -> None:
    async with await QmpClient.connect(qmp_path) as client:
        lines = [f'{{"execute":"note","arguments":{{"entry":"{n}"}},"id":{n}}}' for n in range(500)]
        replies = await answers(client, " ".join(lines).encode(), 500)
        assert [reply["id"] for reply in replies] == list(range(500))
        assert toy.journal == [str(n) for n in range(500)]


async def test_events_stand_before_the_reply_of_their_command(qmp_path: str) -> None:
    async with await QmpClient.connect(qmp_path) as client:
        first, second, reply = await answers(client, b'{"execute": "ring", "arguments": {"times": 2}}', 3)
        stamp = {"seconds": 1_300_000_000, "microseconds": 250_000}
        assert first == second == {"timestamp": stamp, "event": "RANG", "data": {"note": "a"}}
        assert reply == {"return": {}}


async def test_out_of_band_overtakes_a_full_queue(qmp_path: str, toy: ToyContext) -> None:
    async with await QmpClient.connect(qmp_path, negotiate=False) as client:
        assert await answers(client, ENABLE_OOB, 1) == [{"return": {}}]
        await client.send(b'{"execute": "wait", "id": 0}')
        await toy.waiting.wait()
        queued = b"".join(b'{"execute": "note", "id": %d}' % n for n in range(1, 8))
        out_of_band = b'{"exec-oob": "look", "id": "oob"}{"exec-oob": "note", "id": "no"}{"exec-oob": 1}'
        looked, refused, malformed = await answers(client, queued + out_of_band, 3)
        assert looked == {"return": [{"device": "d", "on-error": "report"}], "id": "oob"}
        assert refused == {"id": "no"} | error("GenericError", "The command note does not support OOB")
        assert malformed == error("GenericError", "QMP input member 'exec-oob' must be a string")
        toy.gate.set()
        assert [(await client.receive())["id"] for _ in range(8)] == list(range(8))


async def test_execute_and_exec_oob_clash(qmp_path: str) -> None:
    async with await QmpClient.connect(qmp_path, negotiate=False) as client:
        line = b'{"execute": "look", "exec-oob": "look", "id": 1}'
        _, clash = await answers(client, ENABLE_OOB + line, 2)
        text = "QMP input member 'execute' clashes with 'exec-oob'"
        assert clash == {"id": 1} | error("GenericError", text)


async def test_out_of_band_in_the_same_packet_as_its_negotiation(qmp_path: str) -> None:
    async with await QmpClient.connect(qmp_path, negotiate=False) as client:
        replies = await answers(client, ENABLE_OOB + b'{"exec-oob": "look", "id": 1}', 2)
        assert [set(reply) for reply in replies] == [{"return"}, {"return", "id"}]


async def test_reading_stops_while_the_queue_is_full(qmp_path: str, toy: ToyContext) -> None:
    """Nothing is lost, and what a client piles up stays in the kernel and in its own memory."""
    async with await QmpClient.connect(qmp_path) as client:
        await client.send(b'{"execute": "wait"}')
        await toy.waiting.wait()
        padding = b" " * 100_000
        sent = 0
        while client._writer.transport.get_write_buffer_size() == 0 and sent < 100:
            client._writer.write(b'{"execute": "note", "id": %d}' % sent + padding)
            sent += 1
        assert sent < 100
        toy.gate.set()
        await client.receive()
        assert [(await client.receive())["id"] for _ in range(sent)] == list(range(sent))
