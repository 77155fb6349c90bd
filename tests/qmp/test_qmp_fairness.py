"""However large or odd a message is, the others have their turn while it is read, run and answered."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable

import pytest

from blockd.qmp.envelope import ARGUMENT_VALUES_MAX
from blockd.units import KIB, MIB
from blockd.wire.qmp.reader import NESTING_MAX, NUMBER_LENGTH_MAX, TOKEN_COUNT_MAX

# Of the processor's time, so that what else runs on this machine does not count.
# The aim is 50 ms; a machine that is busy with other work makes even CPU time several times as long.
HOLD_MAX_S = 0.4
NEGOTIATE = b'{"execute": "qmp_capabilities"}'
END = b'\n{"execute": "look", "id": "the end"}'


class Holds:
    """Watches for how long the event loop is held between two turns."""

    longest_s = 0.0

    async def watch(self) -> None:
        while True:
            began = time.thread_time()
            await asyncio.sleep(0)
            self.longest_s = max(self.longest_s, time.thread_time() - began)


def ask(path: str, message: bytes) -> bytes:
    """Send a message in a session of its own and return all that is answered."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(1000)  # for 64 MiB on a busy machine
        client.connect(path)
        sender = threading.Thread(target=client.sendall, args=(NEGOTIATE + message + END,))
        sender.start()
        answers = bytearray()
        while b'"the end"' not in answers[-100:]:
            received = client.recv(MIB)
            assert received, answers[-100:]
            answers += received
        sender.join()
        return bytes(answers)


def with_id(value: bytes) -> bytes:
    return b'{"execute": "look", "id": ' + value + b"}"


def with_arguments(command: bytes, members: bytes) -> bytes:
    return b'{"execute": "' + command + b'", "arguments": {' + members + b"}}"


def string(unit: bytes, length: int) -> bytes:
    return b'"' + unit * (length // len(unit)) + b'"'


def members(length: int, value: bytes = b"1") -> bytes:
    return b",".join(b'"%d":%s' % (number, value) for number in range(min(length // 12, 500_000)))


def elements(unit: bytes, length: int) -> bytes:
    return unit + (b"," + unit) * min(length // (len(unit) + 1), TOKEN_COUNT_MAX // 4)


# Messages of about this length, and what the answer to them says.
MESSAGES: dict[str, Callable[[int], tuple[bytes, bytes]]] = {
    "plain text": lambda length: (with_id(string(b"x", length)), b"xxx"),
    "escapes": lambda length: (with_id(string(rb"\u00e9", length)), rb"\u00E9"),
    "escaped backslashes": lambda length: (with_id(string(rb"\\", length)), rb"\\\\"),
    "surrogate pairs": lambda length: (with_id(string(rb"\ud83d\ude00", length)), rb"\uD83D\uDE00"),
    "wide text": lambda length: (with_id(string("€".encode(), length)), rb"\u20AC"),
    "text that doubles": lambda length: (with_id(string(b"\x7f", length)), rb"\u007F"),
    "text of mixed width": lambda length: (
        with_id(string(b"x" * KIB + "😀é".encode(), length)),
        rb"x\uD83D\uDE00",
    ),
    "wrong text": lambda length: (with_id(string(b"\x80", length)), b"invalid UTF-8"),
    "half a character": lambda length: (with_id(string(b"x", length)[:-1] + b'\xc3"'), b"invalid UTF-8"),
    "a long key": lambda length: (b"{" + string(b"k", length) + b": 1}", b"too long"),
    "a long number": lambda length: (with_id(b"1" * min(length, NUMBER_LENGTH_MAX)), b"inf"),
    "a long keyword": lambda length: (with_id(b"a" * min(length, NUMBER_LENGTH_MAX)), b"keyword 'aaa"),
    "lists": lambda length: (with_id(b"[" + elements(b"[]", length) + b"]"), b"[], []"),
    "objects": lambda length: (with_id(b"[" + elements(b"{}", length) + b"]"), b"{}, {}"),
    "members": lambda length: (with_id(b"{" + members(length) + b"}"), b'"1": 1'),
    "numbers": lambda length: (with_id(b"[" + elements(b"1.5", length) + b"]"), b"1.5, 1.5"),
    "keywords": lambda length: (with_id(b"[" + elements(b"true", length) + b"]"), b"true, true"),
    "nesting": lambda length: (b"[" * NESTING_MAX * 8 + b"]" * NESTING_MAX * 8, b"nesting depth limit"),
    "many messages": lambda length: (b"1 " * (length // 40), b"must be a JSON object"),
    "many strays": lambda length: (b"%\n" * (length // 80), b"stray"),
    "skipped": lambda length: (b"%" + b"a" * length + b"\n", b"stray"),
    "many commands": lambda length: (with_id(b"1") * (length // 200), b"return"),
    "unknown envelope": lambda length: (b"{" + members(length) + b"}", b"member '0' is unexpected"),
    "unknown arguments": lambda length: (
        with_arguments(b"stream", members(length)),
        b"more than 10000 values" if length > 12 * ARGUMENT_VALUES_MAX else b"Parameter '0'",
    ),
    "nested arguments": lambda length: (
        with_arguments(b"open", b'"driver": "x", "a": [' + elements(b"[]", length) + b"]"),
        b"more than 10000 values",
    ),
    "as many arguments as may be": lambda length: (
        with_arguments(b"open", b'"driver": "x", ' + members(12 * (ARGUMENT_VALUES_MAX - 2))),
        b'"9997"',
    ),
    "as many wrong arguments as may be": lambda length: (
        with_arguments(b"stream", b'"device": "x", ' + members(12 * (ARGUMENT_VALUES_MAX - 2))),
        b"Parameter '0' is unexpected",
    ),
    "as many wrong elements as may be": lambda length: (
        with_arguments(b"stream", b'"device": "x", "flags": [' + elements(b"0", 19_900) + b"]"),
        b"flags[0]",
    ),
    "a long argument": lambda length: (
        with_arguments(b"stream", b'"device": ' + string(b"x", length)),
        b"Parameter 'device' is too long",
    ),
    "a long command": lambda length: (b'{"execute": ' + string(b"x", length) + b"}", b"must be a string"),
}


async def answers_and_hold(path: str, message: bytes) -> tuple[bytes, float]:
    """Ask, and tell for how long the loop was held at most."""
    holds = Holds()
    async with asyncio.TaskGroup() as group:
        watcher = group.create_task(holds.watch())
        answers = await asyncio.to_thread(ask, path, message)
        watcher.cancel()
    return answers, holds.longest_s


@pytest.mark.parametrize("name", ["escapes", "wide text"])
async def test_one_mebibyte(qmp_path: str, name: str) -> None:
    message, text = MESSAGES[name](MIB)
    answers, longest_s = await answers_and_hold(qmp_path, message)
    assert text in answers
    assert longest_s < HOLD_MAX_S


@pytest.mark.slow
@pytest.mark.parametrize("name", MESSAGES)
async def test_four_mebibytes(qmp_path: str, name: str) -> None:
    message, text = MESSAGES[name](4 * MIB)
    answers, longest_s = await answers_and_hold(qmp_path, message)
    assert text in answers
    assert longest_s < HOLD_MAX_S


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("unit", [b"x", "😀".encode(), rb"\u00e9"])
async def test_as_large_as_may_be(qmp_path: str, unit: bytes) -> None:
    message = with_id(string(unit, 64 * MIB - 100))
    answers, longest_s = await answers_and_hold(qmp_path, message)
    assert len(answers) > 64 * MIB - 100
    assert longest_s < HOLD_MAX_S
