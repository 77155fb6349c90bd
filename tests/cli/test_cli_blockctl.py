"""blockctl against a daemon that is made up: what it asks, what it shows, how it ends."""

import asyncio
import json
import os
import pty
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.cli.fake_daemon import FakeDaemon, Json, Program, blockctl, fake_daemon

LENGTH = 100 << 20


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[FakeDaemon]:
    async with fake_daemon(tmp_path / "blockd.qmp") as daemon:
        daemon.answers["block_stream_status"] = lambda _request: [{"return": [STATUS]}]
        yield daemon


STATUS = {
    "device": "vda",
    "type": "stream",
    "len": LENGTH,
    "offset": LENGTH // 4,
    "speed": 0,
    "status": "running",
    "io-status": "ok",
    "copied": 1 << 20,
    "rate": 10 << 20,
    "seconds-left": 75.0,
}
CREATED = {"event": "JOB_STATUS_CHANGE", "data": {"status": "created", "id": "vda"}}


def ended(name: str, **data: Json) -> dict[str, Json]:
    return {
        "event": name,
        "data": {"device": "vda", "len": LENGTH, "offset": LENGTH, "speed": 0, "type": "stream", **data},
    }


def error(name: str, text: str) -> dict[str, Json]:
    return {"error": {"class": name, "desc": text}}


# -- exit statuses ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "status", "text"),
    [
        (ended("BLOCK_JOB_COMPLETED"), 0, "vda: stream completed, 100 MiB"),
        (
            ended("BLOCK_JOB_COMPLETED", offset=LENGTH // 2, error="No space left on device"),
            1,
            "blockctl: vda: stream failed at 50.0 MiB of 100 MiB: No space left on device",
        ),
        (ended("BLOCK_JOB_CANCELLED", offset=0), 3, "vda: stream cancelled at 0 B of 100 MiB"),
    ],
)
async def test_wait_tells_how_the_stream_ended(
    daemon: FakeDaemon, tmp_path: Path, event: dict[str, Json], status: int, text: str
) -> None:
    program = await Program.start(tmp_path, "stream", "vda", "--wait")
    await daemon.arrival("block_stream_status")
    await daemon.emit(event)
    result = await program.result()
    assert result.status == status
    assert (result.stderr if status == 1 else result.stdout).startswith(text)


async def test_wait_sees_a_stream_that_ends_before_the_reply(daemon: FakeDaemon, tmp_path: Path) -> None:
    daemon.answers["block_stream"] = lambda _request: [
        CREATED,
        ended("BLOCK_JOB_COMPLETED"),
        {"return": {}},
    ]
    daemon.answers["block_stream_status"] = lambda _request: [{"return": []}]
    assert (await blockctl(tmp_path, "stream", "vda", "--wait")).status == 0


async def test_wait_does_not_take_an_earlier_stream_for_its_own(daemon: FakeDaemon, tmp_path: Path) -> None:
    daemon.answers["block_stream"] = lambda _request: [
        ended("BLOCK_JOB_COMPLETED"),
        CREATED,
        {"return": {}},
    ]
    program = await Program.start(tmp_path, "stream", "vda", "--wait")
    await daemon.arrival("block_stream_status")
    await daemon.emit({**ended("BLOCK_JOB_CANCELLED"), "data": {**ended("")["data"], "device": "other"}})
    await daemon.emit(ended("BLOCK_JOB_CANCELLED"))
    assert (await program.result()).status == 3


async def test_wait_sees_an_end_that_is_told_after_the_stream_is_gone(
    daemon: FakeDaemon, tmp_path: Path
) -> None:
    daemon.answers["block_stream_status"] = lambda _request: [{"return": []}]
    program = await Program.start(tmp_path, "stream", "vda", "--wait")
    await daemon.arrival("block_stream_status")
    await daemon.emit(ended("BLOCK_JOB_CANCELLED"))
    assert (await program.result()).status == 3


@pytest.mark.slow
async def test_wait_does_not_hang_when_the_end_was_not_told(daemon: FakeDaemon, tmp_path: Path) -> None:
    replies = [[STATUS], []]
    daemon.answers["block_stream_status"] = lambda _request: [{"return": replies.pop(0)}]
    result = await blockctl(tmp_path, "stream", "vda", "--wait")
    assert result.status == 1
    assert "how was not told" in result.stderr


async def test_refusal_is_a_failure(daemon: FakeDaemon, tmp_path: Path) -> None:
    daemon.answers["block_stream"] = lambda _request: [error("DeviceNotFound", "Device 'no' not found")]
    result = await blockctl(tmp_path, "stream", "no")
    assert (result.status, result.stderr) == (1, "blockctl: Device 'no' not found\n")
    result = await blockctl(tmp_path, "stream", "no", "--json")
    assert json.loads(result.stdout) == error("DeviceNotFound", "Device 'no' not found")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["bogus"],
        ["stream"],
        ["stream", "vda", "--speed", "fast"],
        ["stream", "vda", "--on-error", "cry"],
        ["status", "--watch"],
        ["raw", "{"],
        ["raw", "[1]"],
    ],
)
async def test_wrong_usage(tmp_path: Path, arguments: list[str]) -> None:
    result = await blockctl(tmp_path, *arguments)
    assert result.status == 2
    assert result.stderr.startswith("usage: blockctl")


async def test_no_connection(tmp_path: Path) -> None:
    result = await blockctl(tmp_path, "list")
    assert result.status == 4
    assert result.stderr == (
        "blockctl: Could not connect to 'blockd.qmp': No such file or directory; is blockd running there?\n"
    )
    assert (await blockctl(tmp_path, "list", "--socket", "x" * 200)).status == 4


async def test_lost_connection(daemon: FakeDaemon, tmp_path: Path) -> None:
    program = await Program.start(tmp_path, "stream", "vda", "--wait")
    await daemon.arrival("block_stream_status")
    await daemon.drop_clients()
    result = await program.result()
    assert result.status == 4
    assert "was closed" in result.stderr


async def test_something_else_behind_the_socket(tmp_path: Path) -> None:
    async def talk(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example.com ESMTP\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_unix_server(talk, tmp_path / "blockd.qmp"):
        result = await blockctl(tmp_path, "list")
    assert (result.status, result.stderr) == (4, "blockctl: 'blockd.qmp' does not speak QMP\n")


async def test_ctrl_c_detaches_and_says_so(daemon: FakeDaemon, tmp_path: Path) -> None:
    for command in (["stream", "vda", "--wait"], ["status", "vda", "--watch"]):
        daemon.requests.clear()
        program = await Program.start(tmp_path, *command)
        await daemon.arrival("block_stream_status", 2)
        program.interrupt()
        result = await program.result()
        assert result.status == 130
        assert "the stream on vda goes on; come back with: blockctl status vda --watch" in result.stderr
        assert "Traceback" not in result.stderr
        assert "block_stream_cancel" not in daemon.names()


# -- what is asked -----------------------------------------------------------------------------


async def test_arguments_of_commands(daemon: FakeDaemon, tmp_path: Path) -> None:
    cases: list[tuple[list[str], str, dict[str, Json]]] = [
        (["stream", "vda"], "block_stream", {"device": "vda", "speed": 0}),
        (
            ["stream", "vda", "--base", "b.raw", "--speed", "10M", "--on-error", "stop"],
            "block_stream",
            {"device": "vda", "speed": 10 << 20, "base": "b.raw", "on-error": "stop"},
        ),
        (["cancel", "vda"], "block_stream_cancel", {"device": "vda"}),
        (
            ["switch", "vda", "copy.img", "--format", "qcow2"],
            "block_switch",
            {"device": "vda", "filename": str(tmp_path / "copy.img"), "format": "qcow2"},
        ),
        (["raw", '{"execute":"x","arguments":{"y":1}}'], "x", {"y": 1}),
    ]
    for arguments, command, expected in cases:
        daemon.requests.clear()
        assert (await blockctl(tmp_path, *arguments)).status == 0
        assert daemon.names() == ["qmp_capabilities", command]
        assert daemon.requests[-1]["arguments"] == expected


# -- what is shown -----------------------------------------------------------------------------


async def test_status(daemon: FakeDaemon, tmp_path: Path) -> None:
    result = await blockctl(tmp_path, "status")
    assert result.stdout == "vda: running, 25%, 25.0 MiB of 100 MiB, 10.0 MiB/s, 1:15 left\n"
    result = await blockctl(tmp_path, "--json", "status", "vda")
    assert json.loads(result.stdout) == [STATUS]
    paused = {**STATUS, "status": "paused", "io-status": "nospace", "rate": 0}
    daemon.answers["block_stream_status"] = lambda _request: [{"return": [paused]}]
    assert "paused: no space left" in (await blockctl(tmp_path, "status")).stdout
    daemon.answers["block_stream_status"] = lambda _request: [{"return": []}]
    assert (await blockctl(tmp_path, "status")).stdout == "no stream is running\n"
    result = await blockctl(tmp_path, "status", "vda", "--watch")
    assert (result.status, result.stderr) == (1, "blockctl: No active stream on device 'vda'\n")


async def test_json_is_one_value_a_line(daemon: FakeDaemon, tmp_path: Path) -> None:
    program = await Program.start(tmp_path, "stream", "vda", "--wait", "--json")
    await daemon.arrival("block_stream_status", 2)
    await daemon.emit(ended("BLOCK_JOB_COMPLETED"))
    result = await program.result()
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert lines[0] == STATUS
    assert lines[-1] == {"device": "vda", "result": "completed", "offset": LENGTH, "len": LENGTH}
    assert result.stderr == ""


async def test_list(daemon: FakeDaemon, tmp_path: Path) -> None:
    base = {"filename": "base\x1b[2J.raw", "format": "raw", "virtual-size": LENGTH}
    image = {"filename": "d.qcow2", "format": "qcow2", "virtual-size": LENGTH, "backing-image": base}
    device = {"device": "vda", "inserted": {"file": "d.qcow2", "ro": False, "image": image}}
    export = {"id": "e", "type": "nbd", "node-name": "#block001"}
    daemon.answers["query-block"] = lambda _request: [{"return": [device]}]
    daemon.answers["query-block-exports"] = lambda _request: [{"return": [export]}]
    result = await blockctl(tmp_path, "list")
    assert result.stdout.splitlines() == [
        r"vda  100 MiB  writable  d.qcow2 (qcow2) <- base\x1b[2J.raw (raw)",
        "    stream running, 25%, 25.0 MiB of 100 MiB, 10.0 MiB/s, 1:15 left",
        "export e  (nbd, node #block001)",
    ]
    result = await blockctl(tmp_path, "list", "--json")
    assert json.loads(result.stdout) == {"devices": [device], "exports": [export], "streams": [STATUS]}


async def test_bar_on_a_terminal_only(daemon: FakeDaemon, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    program = await Program.start(tmp_path, "stream", "vda", "--wait", stderr=theirs)
    os.close(theirs)
    await daemon.arrival("block_stream_status", 3)
    await daemon.emit(ended("BLOCK_JOB_COMPLETED"))
    result = await program.result()
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "━" in shown and "25%, 25.0 MiB of 100 MiB, 10.0 MiB/s, 1:15 left" in shown
    assert result.stdout == "vda: stream completed, 100 MiB\n"

    daemon.requests.clear()
    program = await Program.start(tmp_path, "stream", "vda", "--wait")
    await daemon.arrival("block_stream_status", 2)
    await daemon.emit(ended("BLOCK_JOB_COMPLETED"))
    assert (await program.result()).stderr == ""


# -- create ------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_create(tmp_path: Path) -> None:
    assert (await blockctl(tmp_path, "create", "base.raw", "1M", "-f", "raw")).status == 0
    assert (tmp_path / "base.raw").stat().st_size == 1 << 20
    result = await blockctl(tmp_path, "create", "top.qcow2", "-b", "base.raw", "-F", "raw", "--json")
    assert json.loads(result.stdout) == {"filename": "top.qcow2", "size": 1 << 20}
    for arguments, text in [
        (
            ["top.qcow2", "1M"],
            "blockctl: Could not create 'top.qcow2': the file exists and is not overwritten\n",
        ),
        (["new.qcow2"], "blockctl: Give the size, such as 10G, or a backing file to take it from\n"),
        (
            ["new.qcow2", "-b", "none.raw", "-F", "raw"],
            "blockctl: Could not open 'none.raw': No such file or directory\n",
        ),
        (
            ["new.qcow2", "-b", "base.raw"],
            "blockctl: A backing file and its format are given together: -b FILE -F FORMAT\n",
        ),
    ]:
        result = await blockctl(tmp_path, "create", *arguments)
        assert (result.status, result.stderr) == (1, text)
    assert not (tmp_path / "new.qcow2").exists()
