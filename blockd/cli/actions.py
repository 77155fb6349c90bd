"""What the commands of blockctl do: ask the daemon, show the answer, and tell how it went."""

import argparse
import asyncio
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from enum import IntEnum

from blockd.cli.display import (
    device_lines,
    ending_line,
    ending_object,
    image_line,
    print_error,
    print_json,
    print_text,
    progress_bar,
    stream_line,
    trouble_lines,
)
from blockd.cli.following import (
    Active,
    Ending,
    Outcome,
    StreamStatus,
    active_image,
    completed,
    follow,
    is_over,
    streams,
)
from blockd.cli.qmp_client import CommandFailed, Message, NoConnection, QmpClient
from blockd.filenames import absolute, given_path

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
    """Ask a stream to end, or with --force give up what an ended one has left staged."""
    arguments: Message = {"device": options.device}
    if options.force:
        arguments["force"] = True
    async with await QmpClient.connect(options.socket) as client:
        await client.execute("block_stream_cancel", arguments)
    if options.json:
        print_json({"device": options.device, "result": "cancelling"})
    else:
        print_text(f"{options.device}: the stream is being cancelled")
    return ExitStatus.SUCCESS


async def pause(options: argparse.Namespace) -> ExitStatus:
    """Pause a stream."""
    return await _tell_job(options, "job-pause", {"id": options.device}, "paused")


async def resume(options: argparse.Namespace) -> ExitStatus:
    """Let a stream go on that a client or an error has paused."""
    return await _tell_job(options, "job-resume", {"id": options.device}, "resumed")


async def speed(options: argparse.Namespace) -> ExitStatus:
    """Set how fast a stream may be."""
    arguments: Message = {"device": options.device, "speed": options.rate}
    return await _tell_job(options, "block-job-set-speed", arguments, "speed set")


async def _tell_job(options: argparse.Namespace, command: str, arguments: Message, result: str) -> ExitStatus:
    """Tell the stream of a device something: its job has the device's name."""
    async with await QmpClient.connect(options.socket) as client:
        running = await streams(client, options.device)
        if not running or is_over(running[0]):
            raise CommandFailed("DeviceNotActive", f"No active stream on device '{options.device}'")
        await client.execute(command, arguments)
    if options.json:
        print_json({"device": options.device, "result": result})
    else:
        print_text(f"{options.device}: stream {result}")
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
    except NoConnection as error:
        raise NoConnection(
            f"{error.message}; a stream on {device} goes on at the next start of blockd with --state-dir, "
            "and otherwise has to be started again"
        ) from error
    if ending is None:
        return await _tell_none(client, options)
    active = None
    if ending.outcome is Outcome.COMPLETED:
        ending, active = await completed(client, device, ending)
    return _tell(device, ending, active, is_json=options.json)


async def _tell_none(client: QmpClient, options: argparse.Namespace) -> ExitStatus:
    """Say that no stream runs, and whether one is still needed: it may have ended before we asked."""
    device = options.device
    active = await active_image(client, device)
    left = await streams(client, device)
    if active is None or active.backing is not None or left:
        why = f"; {image_line(active)}" if active is not None else ""
        why = f"; {stream_line(left[0])}" if left else why
        raise CommandFailed("DeviceNotActive", f"No active stream on device '{device}'{why}")
    if options.json:
        print_json({"device": device, "result": "not-running", "image": active.filename})
    else:
        print_text(f"{device}: no stream is running; {image_line(active)}")
    return ExitStatus.SUCCESS


def _display(options: argparse.Namespace) -> AbstractContextManager[Callable[[StreamStatus], None]]:
    """How to show the progress: as JSON, as a bar on a terminal, or not at all."""
    if options.json:
        return nullcontext(print_json)
    if sys.stderr.isatty():
        return progress_bar(options.device)
    return nullcontext(lambda _status: None)


def _tell(device: str, ending: Ending, active: Active | None, *, is_json: bool) -> ExitStatus:
    if is_json:
        print_json(ending_object(device, ending))
    elif ending.outcome is Outcome.FAILED:
        print_error(ending_line(device, ending, active))
    else:
        print_text(ending_line(device, ending, active))
    return _EXIT_STATUS[ending.outcome]


async def switch(options: argparse.Namespace) -> ExitStatus:
    """Let a disk go on in an overlay of its active image."""
    # The daemon may run in another folder.
    arguments: Message = {"device": options.device, "filename": absolute(given_path(options.file))}
    if options.format is not None:
        arguments["format"] = options.format
    async with await QmpClient.connect(options.socket) as client:
        try:
            await client.execute("block_switch", arguments)
        except CommandFailed as error:
            if options.format is None and error.message.endswith("is not a qcow2 image"):
                hint = "give the format of another one, such as --format add-cow"
                raise CommandFailed(error.error_class, f"{error.message}; {hint}") from error
            raise
    if options.json:
        print_json({"device": options.device, "filename": arguments["filename"]})
    else:
        print_text(
            f"{options.device}: goes on in {options.file}; without --state-dir the next start has to name it"
        )
    return ExitStatus.SUCCESS


async def list_all(options: argparse.Namespace) -> ExitStatus:
    """List disks, streams and exports, and what is missing or lost."""
    async with await QmpClient.connect(options.socket) as client:
        devices = await client.execute("query-block")
        exports = await client.execute("query-block-exports")
        running = await streams(client)
        left_out = await client.execute("query-left-out")
        lost = await client.execute("query-lost-writes")
    if options.json:
        print_json(
            {
                "devices": devices,
                "exports": exports,
                "streams": running,
                "left-out": left_out,
                "lost-writes": lost,
            }
        )
        return ExitStatus.SUCCESS
    for line in device_lines(devices, exports, running):
        print_text(line)
    for line in trouble_lines(left_out, lost):
        print_text(line)
    return ExitStatus.SUCCESS


async def acknowledge(options: argparse.Namespace) -> ExitStatus:
    """Let flushes of a disk succeed again that has lost acknowledged writes."""
    async with await QmpClient.connect(options.socket) as client:
        names: Message = {"device": options.disk, "node-name": options.disk}
        await client.execute("acknowledge-lost-writes", names)
    if options.json:
        print_json({"disk": options.disk})
    else:
        print_text(f"{options.disk}: no flush fails any more because of writes that are lost")
    return ExitStatus.SUCCESS


async def raw(options: argparse.Namespace) -> ExitStatus:
    """Send any request."""
    async with await QmpClient.connect(options.socket) as client:
        print_json(await client.send(options.request))
    return ExitStatus.SUCCESS
