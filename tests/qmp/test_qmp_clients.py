"""Other people's clients, unchanged: qemu.qmp with its shell, and socat."""

import asyncio
import json
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import ExecuteError, QMPClient

from blockd.qmp.server import QmpServer
from tests.qmp.toys import ToyContext

TIMEOUT_S = 100


async def talk(program: list[str], lines: bytes) -> bytes:
    """Run a client with `lines` as its input, which then ends, and return what it printed."""
    client: Process = await asyncio.create_subprocess_exec(*program, stdin=PIPE, stdout=PIPE)
    async with asyncio.timeout(TIMEOUT_S):
        printed, _ = await client.communicate(lines)
    assert client.returncode == 0
    return printed


async def test_qemu_qmp(qmp_path: str) -> None:
    client = QMPClient("test")
    await client.connect(qmp_path)
    assert await client.execute("look") == [{"device": "d", "on-error": "report"}]
    with client.listener("RANG") as rings:
        await client.execute("ring", {"note": "e", "times": 2})
        async with asyncio.timeout(TIMEOUT_S):
            events: list[Any] = [await rings.get() for _ in range(2)]
        assert [event["data"]["note"] for event in events] == ["e", "e"]
    with pytest.raises(ExecuteError, match="Device 'none' not found") as caught:
        await client.execute("stream", {"device": "none"})
    assert caught.value.error_class == "DeviceNotFound"
    assert await client.execute("look", oob=True) == [{"device": "d", "on-error": "report"}]
    replies = await asyncio.gather(*(client.execute("query-version") for _ in range(20)))
    assert len(replies) == 20
    await client.disconnect()


async def test_qemu_qmp_that_listens(server: QmpServer[ToyContext], tmp_path: Path) -> None:
    """QEMU's test class: it listens, the daemon connects out."""
    client, path = QMPClient("test"), str(tmp_path / "theirs")
    await client.start_server(path)
    async with asyncio.TaskGroup() as group:
        group.create_task(client.accept())
        await server.connect_unix(path)
    assert await client.execute("look")
    await client.disconnect()


async def test_qmp_shell(qmp_path: str) -> None:
    printed = await talk([sys.executable, "-m", "qemu.qmp.qmp_shell", qmp_path], b"query-version\nlook\n")
    assert b"Connected to QEMU 7.2.0" in printed
    assert b'{"return": [{"device": "d", "on-error": "report"}]' in printed


async def test_socat_with_several_lines_at_once(qmp_path: str) -> None:
    lines = (
        b'{"execute": "qmp_capabilities"}\n'
        b'{"execute": "ring"}\n'
        b'{"execute": "look", "id": 1} {"execute": "nope"}\n'
        b'{"execute":\n"query-version"}\n'
    )
    printed = await talk(["socat", "-t10", "-", f"UNIX-CONNECT:{qmp_path}"], lines)
    messages = [json.loads(line) for line in printed.splitlines()]
    assert [next(iter(message)) for message in messages] == [
        "QMP",
        "return",
        "timestamp",
        "return",
        "return",
        "error",
        "return",
    ]
