"""What the commands of blockctl do: ask the daemon, show the answer, and tell how it went."""

import argparse
import asyncio
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from enum import IntEnum
from pathlib import Path

from blockd.cli.display import (
    device_lines,
    ending_line,
    ending_object,
    print_error,
    print_json,
    print_text,
    progress_bar,
    stream_line,
)
from blockd.cli.following import Ending, Outcome, StreamStatus, follow, streams
from blockd.cli.qmp_client import CommandFailed, Message, QmpClient

DEFAULT_SOCKET = "blockd.qmp"


class ExitStatus(IntEnum):
    """What the exit status tells."""

    SUCCESS = 0
    FAILURE = 1
    USAGE = 2
    CANCELLED = 3
    NO_CONNECTION = 4
    INTERRUPTED = 130
    READER_GONE = 141  # what a shell says of a program that SIGPIPE ended


_EXIT_STATUS = {
    Outcome.COMPLETED: ExitStatus.SUCCESS,
    Outcome.FAILED: ExitStatus.FAILURE,
    Outcome.CANCELLED: ExitStatus.CANCELLED,
}


async def stream(options: argparse.Namespace) -> ExitStatus:
    """Start a stream, and with --wait stay until it has ended."""
    arguments: Message = {"device": options.device, "speed": options.speed}
    if options.base is not None:
        arguments["base"] = options.base
    if options.on_error is not None:
        arguments["on-error"] = options.on_error
    async with await QmpClient.connect(options.socket) as client:
        await client.execute("block_stream", arguments)
        if options.wait:
            return await _follow(client, options, is_started=True)
    if options.json:
        print_json({"device": options.device, "result": "started"})
    else:
        print_text(f"{options.device}: stream started; blockctl status {options.device} --watch follows it")
    return ExitStatus.SUCCESS


async def cancel(options: argparse.Namespace) -> ExitStatus:
    """Ask a stream to end."""
    async with await QmpClient.connect(options.socket) as client:
        await client.execute("block_stream_cancel", {"device": options.device})
    if options.json:
        print_json({"device": options.device, "result": "cancelling"})
    else:
        print_text(f"{options.device}: the stream is being cancelled")
    return ExitStatus.SUCCESS


async def status(options: argparse.Namespace) -> ExitStatus:
    """Tell how far streams are, or with --watch follow one."""
    async with await QmpClient.connect(options.socket) as client:
        if options.watch:
            return await _follow(client, options, is_started=False)
        running = await streams(client, options.device)
    if options.json:
        print_json(running)
    elif not running:
        print_text("no stream is running")
    else:
        for found in running:
            print_text(stream_line(found))
    return ExitStatus.SUCCESS


async def _follow(client: QmpClient, options: argparse.Namespace, *, is_started: bool) -> ExitStatus:
    """Wait for the end of a stream, and say how it went."""
    device = options.device
    try:
        with _display(options) as show:
            ending = await follow(client, device, show, is_started=is_started)
    except asyncio.CancelledError:
        socket = "" if options.socket == DEFAULT_SOCKET else f" --socket {options.socket}"
        print_error(
            f"the stream on {device} goes on; come back with: blockctl{socket} status {device} --watch"
        )
        raise
    if ending is None:
        raise CommandFailed("DeviceNotActive", f"No active stream on device '{device}'")
    return _tell(device, ending, is_json=options.json)


def _display(options: argparse.Namespace) -> AbstractContextManager[Callable[[StreamStatus], None]]:
    """How to show the progress: as JSON, as a bar on a terminal, or not at all."""
    if options.json:
        return nullcontext(print_json)
    if sys.stderr.isatty():
        return progress_bar(options.device)
    return nullcontext(lambda _status: None)


def _tell(device: str, ending: Ending, *, is_json: bool) -> ExitStatus:
    if is_json:
        print_json(ending_object(device, ending))
    elif ending.outcome is Outcome.FAILED:
        print_error(ending_line(device, ending))
    else:
        print_text(ending_line(device, ending))
    return _EXIT_STATUS[ending.outcome]


async def switch(options: argparse.Namespace) -> ExitStatus:
    """Let a disk go on in an overlay of its active image."""
    # The daemon may run in another folder.
    arguments: Message = {"device": options.device, "filename": str(Path(options.file).absolute())}
    if options.format is not None:
        arguments["format"] = options.format
    async with await QmpClient.connect(options.socket) as client:
        await client.execute("block_switch", arguments)
    if options.json:
        print_json({"device": options.device, "filename": arguments["filename"]})
    else:
        print_text(f"{options.device}: goes on in {options.file}")
    return ExitStatus.SUCCESS


async def list_all(options: argparse.Namespace) -> ExitStatus:
    """List disks, streams and exports."""
    async with await QmpClient.connect(options.socket) as client:
        devices = await client.execute("query-block")
        exports = await client.execute("query-block-exports")
        running = await streams(client)
    if options.json:
        print_json({"devices": devices, "exports": exports, "streams": running})
        return ExitStatus.SUCCESS
    for line in device_lines(devices, exports, running):
        print_text(line)
    return ExitStatus.SUCCESS


async def raw(options: argparse.Namespace) -> ExitStatus:
    """Send any request."""
    async with await QmpClient.connect(options.socket) as client:
        print_json(await client.send(options.request))
    return ExitStatus.SUCCESS
