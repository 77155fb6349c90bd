"""Commands: arguments checked before anything happens, results and errors in QMP's form."""

from typing import Any

import pytest

from blockd.errors import BlockdError, ErrorKind, RequestError, StorageError
from blockd.qmp.errors import error_object
from blockd.qmp.table import CommandTable
from tests.qmp.toys import TOYS, Quiet, Rang, ToyContext

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "Parameter 'device' is missing"),
    ({"speed": "x"}, "Parameter 'device' is missing"),
    ({"device": None}, "Invalid parameter type for 'device', expected: string"),
    ({"device": 1}, "Invalid parameter type for 'device', expected: string"),
    ({"base": None}, "Invalid parameter type for 'base', expected: string"),
    ({"all": "on"}, "Invalid parameter type for 'all', expected: boolean"),
    ({"all": 1}, "Invalid parameter type for 'all', expected: boolean"),
    ({"speed": "1"}, "Invalid parameter type for 'speed', expected: integer"),
    ({"speed": True}, "Invalid parameter type for 'speed', expected: integer"),
    ({"speed": [1]}, "Invalid parameter type for 'speed', expected: integer"),
    ({"speed": {}}, "Invalid parameter type for 'speed', expected: integer"),
    ({"speed": 1.0}, "Invalid parameter type for 'speed', expected: integer"),
    ({"speed": 1 << 63}, "Invalid parameter type for 'speed', expected: integer"),
    ({"speed": -1}, "Parameter 'speed' expects a non-negative value"),
    ({"nice": "x"}, "Invalid parameter type for 'nice', expected: number"),
    ({"on-error": "zap"}, "Parameter 'on-error' does not accept value 'zap'"),
    ({"on-error": 1}, "Invalid parameter type for 'on-error', expected: string"),
    ({"on_error": "stop"}, "Parameter 'on_error' is unexpected"),
    ({"bogus": 1}, "Parameter 'bogus' is unexpected"),
    ({"flags": "a"}, "Invalid parameter type for 'flags', expected: array"),
    ({"flags": ["a", "z"]}, "Parameter 'flags[1]' does not accept value 'z'"),
    ({"flags": ["a", 1]}, "Invalid parameter type for 'flags[1]', expected: string"),
    ({"addr": "x"}, "Invalid parameter type for 'addr', expected: object"),
    ({"addr": {}}, "Parameter 'addr.type' is missing"),
    ({"addr": {"type": "zap"}}, "Parameter 'type' does not accept value 'zap'"),
    ({"addr": {"type": "unix"}}, "Parameter 'addr.path' is missing"),
    ({"addr": {"type": "unix", "path": None}}, "Invalid parameter type for 'addr.path', expected: string"),
    ({"addr": {"type": "unix", "path": "p", "host": "h"}}, "Parameter 'addr.host' is unexpected"),
    (
        {"addr": {"type": "inet", "host": "h", "port": "1"}},
        "Invalid parameter type for 'addr.port', expected: integer",
    ),
]


async def run(name: str, arguments: dict[str, Any], context: ToyContext | None = None) -> Any:
    command = TOYS.get(name)
    assert command is not None
    return await command.run(context or ToyContext(), arguments)


@pytest.mark.parametrize(("arguments", "text"), REFUSED, ids=[str(arguments) for arguments, _ in REFUSED])
async def test_wrong_arguments_change_nothing(arguments: dict[str, Any], text: str) -> None:
    context = ToyContext()
    given = arguments if text == "Parameter 'device' is missing" else {"device": "d"} | arguments
    with pytest.raises(RequestError) as caught:
        await run("stream", given, context)
    assert caught.value.message == text
    assert context.journal == []


async def test_good_arguments_and_optional_results() -> None:
    assert await run("stream", {"device": "d", "on-error": "stop"}) == {"device": "d", "on-error": "stop"}
    assert await run("stream", {"device": "d", "base": "b", "nice": 1, "speed": 0}) == {
        "device": "d",
        "on-error": "report",
        "base": "b",
    }
    assert await run("look", {}) == [{"device": "d", "on-error": "report"}]
    assert await run("note", {}) == {}


async def test_members_a_command_does_not_name() -> None:
    assert await run("open", {"driver": "x", "a-b": 1, "backing": None}) == {"names": ["a-b", "backing"]}
    with pytest.raises(RequestError, match="Parameter 'driver' is missing"):
        await run("open", {"a": 1})


async def test_arguments_for_a_command_that_takes_none() -> None:
    with pytest.raises(RequestError, match="Parameter 'x' is unexpected"):
        await run("look", {"x": 1})


def test_tables_of_topics_become_one() -> None:
    table: CommandTable[ToyContext] = CommandTable()
    table.merge(TOYS)
    assert [command.name for command in table] == [command.name for command in TOYS]
    with pytest.raises(AssertionError):
        table.merge(TOYS)
    with pytest.raises(AssertionError):
        table.command("stream")(run)


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (RequestError("x"), "GenericError"),
        (RequestError("x", kind=ErrorKind.COMMAND_NOT_FOUND), "CommandNotFound"),
        (RequestError("x", kind=ErrorKind.DEVICE_NOT_FOUND), "DeviceNotFound"),
        (RequestError("x", kind=ErrorKind.DEVICE_IN_USE), "DeviceInUse"),
        (RequestError("x", kind=ErrorKind.DEVICE_NOT_ACTIVE), "DeviceNotActive"),
        (RequestError("x", kind=ErrorKind.NOT_SUPPORTED), "NotSupported"),
        (StorageError("x"), "GenericError"),
    ],
)
def test_error_classes(error: BlockdError, name: str) -> None:
    assert error_object(error) == {"class": name, "desc": "x"}


def test_events_are_stamped_and_complete() -> None:
    context = ToyContext()
    heard: list[object] = []
    with context.bus.listening(heard.append):
        context.bus.emit(Rang(note="c"))
        context.bus.emit(Rang(note="d", louder_than=3))
        context.bus.emit(Quiet())
    context.bus.emit(Quiet())
    stamp = {"seconds": 1_300_000_000, "microseconds": 250_000}
    assert heard == [
        {"timestamp": stamp, "event": "RANG", "data": {"note": "c"}},
        {"timestamp": stamp, "event": "RANG", "data": {"note": "d", "louder-than": 3}},
        {"timestamp": stamp, "event": "QUIET"},
    ]
