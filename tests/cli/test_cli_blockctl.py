"""blockctl against a daemon that is made up: what it asks, what it shows, how it ends."""

import asyncio
import json
import os
import pty
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from blockd.cli.blockctl import main
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


def disk(filename: str, backing: str | None = None) -> Json:
    image: Json = {"filename": filename}
    if backing is not None:
        image["backing-image"] = {"filename": backing}
    return [{"device": "vda", "inserted": {"image": image}}]


# -- exit statuses ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "status", "text"),
    [
        (ended("BLOCK_JOB_COMPLETED"), 0, "vda: stream completed\n"),
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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["stream", "vda", "--sped", "1"], "unrecognized option '--sped'; did you mean '--speed'?"),
        (["--sockt", "x", "list"], "unrecognized option '--sockt'; did you mean '--socket'?"),
        (["image", "check", "--repiar=all", "x"], "unrecognized option '--repiar'; did you mean '--repair'?"),
        (["image", "info", "--", "--none"], ""),
    ],
)
def test_mistyped_option_is_named(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if not said:
        assert main(arguments) == 1  # a file of that name
        return
    with pytest.raises(SystemExit) as refused:
        main(arguments)
    assert refused.value.code == 2
    assert capsys.readouterr().err.endswith(f"blockctl: error: {said}\n")


async def test_help_of_each_command_tells_the_exit_statuses(tmp_path: Path) -> None:
    for arguments in (["--help"], ["stream", "--help"]):
        result = await blockctl(tmp_path, *arguments)
        assert result.status == 0
        assert "\n  3    the stream was cancelled\n" in result.stdout


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
    assert "was closed; a stream on vda goes on at the next start of blockd with --state-dir" in result.stderr


async def test_switch_to_another_format_tells_the_option(daemon: FakeDaemon, tmp_path: Path) -> None:
    refusal = error("GenericError", "'/c.add-cow' is not a qcow2 image")
    daemon.answers["block_switch"] = lambda _request: [refusal]
    result = await blockctl(tmp_path, "switch", "vda", "/c.add-cow")
    hint = "; give the format of another one, such as --format add-cow\n"
    assert (result.status, result.stderr) == (1, f"blockctl: '/c.add-cow' is not a qcow2 image{hint}")
    result = await blockctl(tmp_path, "switch", "vda", "/c.add-cow", "--format", "qcow2")
    assert result.stderr == "blockctl: '/c.add-cow' is not a qcow2 image\n"


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
        (["cancel", "vda", "--force"], "block_stream_cancel", {"device": "vda", "force": True}),
        (
            ["switch", "vda", "copy.img", "--format", "qcow2"],
            "block_switch",
            {"device": "vda", "filename": str(tmp_path / "copy.img"), "format": "qcow2"},
        ),
        (["pause", "vda"], "job-pause", {"id": "vda"}),
        (["resume", "vda"], "job-resume", {"id": "vda"}),
        (["speed", "vda", "10M"], "block-job-set-speed", {"device": "vda", "speed": 10 << 20}),
        (["acknowledge", "vda"], "acknowledge-lost-writes", {"device": "vda", "node-name": "vda"}),
        (["raw", '{"execute":"x","arguments":{"y":1}}'], "x", {"y": 1}),
    ]
    for arguments, command, expected in cases:
        daemon.requests.clear()
        assert (await blockctl(tmp_path, *arguments)).status == 0
        assert [name for name in daemon.names() if name != "block_stream_status"] == [
            "qmp_capabilities",
            command,
        ]
        assert daemon.requests[-1]["arguments"] == expected


# -- what is shown -----------------------------------------------------------------------------


async def test_status(daemon: FakeDaemon, tmp_path: Path) -> None:
    result = await blockctl(tmp_path, "status")
    assert result.stdout == "vda: running, 25%, 25.0 MiB of 100 MiB, 10.0 MiB/s, 1:15 left\n"
    result = await blockctl(tmp_path, "--json", "status", "vda")
    assert json.loads(result.stdout) == [STATUS]
    paused = {**STATUS, "status": "paused", "io-status": "nospace", "rate": 0}
    daemon.answers["block_stream_status"] = lambda _request: [{"return": [paused]}]
    result = await blockctl(tmp_path, "status")
    assert result.stdout == (
        "vda: paused (no space left), 25%, 25.0 MiB of 100 MiB, goes on with: blockctl resume vda\n"
    )
    daemon.answers["block_stream_status"] = lambda _request: [{"return": []}]
    assert (await blockctl(tmp_path, "status")).stdout == "no stream is running\n"


async def test_watch_of_a_stream_that_has_ended(daemon: FakeDaemon, tmp_path: Path) -> None:
    """Whether one is still needed tells its image: that is no failure where nothing is left to copy."""
    daemon.answers["block_stream_status"] = lambda _request: [{"return": []}]
    daemon.answers["query-block"] = lambda _request: [{"return": disk("d.qcow2")}]
    watch = ("status", "vda", "--watch")
    result = await blockctl(tmp_path, *watch)
    assert (result.status, result.stderr) == (0, "")
    assert result.stdout == "vda: no stream is running; d.qcow2 needs no backing file\n"
    result = await blockctl(tmp_path, *watch, "--json")
    assert json.loads(result.stdout) == {"device": "vda", "result": "not-running", "image": "d.qcow2"}
    daemon.answers["query-block"] = lambda _request: [{"return": disk("d.qcow2", "base.raw")}]
    result = await blockctl(tmp_path, *watch)
    text = "blockctl: No active stream on device 'vda'; d.qcow2 has the backing file base.raw\n"
    assert (result.status, result.stdout, result.stderr) == (1, "", text)


async def test_what_a_completed_stream_has_copied_is_told(daemon: FakeDaemon, tmp_path: Path) -> None:
    """Not how large the disk is. The event that tells it comes with that of the end, or after it."""
    told = ended("BLOCK_STREAM_COMPLETED", copied=3 << 20)
    daemon.answers["block_stream"] = lambda _request: [CREATED, ended("BLOCK_JOB_COMPLETED"), {"return": {}}]
    daemon.answers["query-block"] = lambda _request: [told, {"return": disk("d.qcow2", "base.raw")}]
    result = await blockctl(tmp_path, "stream", "vda", "--wait")
    text = "vda: stream completed, 3.0 MiB copied; d.qcow2 has the backing file base.raw\n"
    assert (result.status, result.stdout) == (0, text)
    result = await blockctl(tmp_path, "stream", "vda", "--wait", "--json")
    assert json.loads(result.stdout)["copied"] == 3 << 20
    events = [CREATED, ended("BLOCK_JOB_COMPLETED"), told]
    daemon.answers["block_stream"] = lambda _request: [*events, {"return": {}}]
    throttled = disk("d.qcow2", "d.qcow2")
    throttled[0]["inserted"]["image"]["backing-image"]["backing-image"] = {"filename": "base.raw"}
    daemon.answers["query-block"] = lambda _request: [{"return": throttled}]
    assert (await blockctl(tmp_path, "stream", "vda", "--wait")).stdout == text


async def test_daemon_that_leaves_after_the_end_takes_nothing_back(
    daemon: FakeDaemon, tmp_path: Path
) -> None:
    daemon.answers["block_stream"] = lambda _request: [CREATED, ended("BLOCK_JOB_COMPLETED"), {"return": {}}]
    program = await Program.start(tmp_path, "stream", "vda", "--wait")

    def leave(_request: Json) -> Json:
        raise ConnectionResetError

    daemon.answers["query-block"] = leave
    result = await program.result()
    assert (result.status, result.stdout) == (0, "vda: stream completed\n")


async def test_what_an_ended_stream_has_left_staged_is_shown(daemon: FakeDaemon, tmp_path: Path) -> None:
    left = {**STATUS, "status": "concluded", "offset": 0, "staged": 4096, "rate": 0}
    del left["seconds-left"]
    replies: list[Json] = []
    daemon.answers["block_stream_status"] = lambda _request: [{"return": replies}]
    replies[:] = [left]
    text = "vda: ended; 4.0 KiB of guest writes are staged until they can be merged: the source is slow\n"
    assert (await blockctl(tmp_path, "status")).stdout == text
    full = "Could not write 'disk.qcow2': No space left on device"
    replies[:] = [{**left, "staged-error": full, "io-status": "nospace"}]
    assert (await blockctl(tmp_path, "status")).stdout == text.replace("the source is slow", full)
    replies[:] = [{**STATUS, "staged": 4096, "staged-error": full}]
    result = await blockctl(tmp_path, "status")
    assert result.stdout.endswith(f"1:15 left, 4.0 KiB of guest writes are staged: {full}\n")
    # Nothing of it would ever be told as the end of a stream.
    replies[:] = [left]
    result = await blockctl(tmp_path, "status", "vda", "--watch")
    assert (result.status, result.stderr) == (1, "blockctl: No active stream on device 'vda'; " + text)
    result = await blockctl(tmp_path, "resume", "vda")
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
    left_out = {
        "type": "device",
        "name": "vdb",
        "reason": "the node 'n' is not restored",
        "cause": "n",
    }
    missing = {"type": "node", "name": "n", "reason": "Could not open 'e.qcow2': No such file or directory"}
    lost = {"device": "vda", "node-name": "disk", "error": "not merged, the daemon has ended"}
    unnamed = {**lost, "device": ""}
    daemon.answers["query-block-exports"] = lambda _request: [{"return": [export]}]
    daemon.answers["query-left-out"] = lambda _request: [{"return": [missing, left_out]}]
    daemon.answers["query-lost-writes"] = lambda _request: [{"return": [lost, unnamed]}]
    result = await blockctl(tmp_path, "list")
    assert result.stdout.splitlines() == [
        r"vda  100 MiB  writable  d.qcow2 (qcow2) <- base\x1b[2J.raw (raw)",
        "    stream running, 25%, 25.0 MiB of 100 MiB, 10.0 MiB/s, 1:15 left",
        "export e  (nbd, node #block001)",
        "left out: device 'vdb', node 'n': Could not open 'e.qcow2': No such file or directory",
        "lost writes: device 'vda': not merged, the daemon has ended; the first flush of each connection "
        "fails until 'blockctl acknowledge vda'",
        "lost writes: node 'disk': not merged, the daemon has ended; the first flush of each connection "
        "fails until 'blockctl acknowledge disk'",
    ]
    result = await blockctl(tmp_path, "list", "--json")
    assert json.loads(result.stdout) == {
        "devices": [device],
        "exports": [export],
        "streams": [STATUS],
        "left-out": [missing, left_out],
        "lost-writes": [lost, unnamed],
    }


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
    assert result.stdout == "vda: stream completed\n"

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
