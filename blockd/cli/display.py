"""What blockctl shows: a line for each thing, a progress bar on a terminal, JSON for machines."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from blockd.cli.following import Ending, Outcome, StreamStatus
from blockd.cli.qmp_client import Message
from blockd.errors import printable
from blockd.units import format_size
from blockd.wire.qmp import Value


def print_json(value: object) -> None:
    """Print a value on one line, at once even into a pipe."""
    print(json.dumps(value), flush=True)


def print_text(line: str) -> None:
    """Print a line for people; names in it cannot garble the terminal."""
    print(printable(line), flush=True)


def print_error(line: str) -> None:
    print(f"blockctl: {printable(line)}", file=sys.stderr, flush=True)


def stream_line(status: StreamStatus) -> str:
    """Say how far a stream is."""
    percent = 100 * status["offset"] // (status["len"] or 1)
    parts = [
        f"{status['device']}: {status['status']}, {percent}%, "
        f"{format_size(status['offset'])} of {format_size(status['len'])}"
    ]
    if status.get("rate"):
        parts.append(f"{format_size(status['rate'])}/s")
    if "seconds-left" in status:
        parts.append(f"{_duration(status['seconds-left'])} left")
    if (io_status := status.get("io-status", "ok")) != "ok":
        parts.append(_PAUSES.get(io_status, io_status))
    return ", ".join(parts)


_PAUSES = {"nospace": "paused: no space left", "failed": "paused: an I/O error"}


def ending_line(device: str, ending: Ending) -> str:
    """Say how a stream ended."""
    if ending.outcome is Outcome.COMPLETED:
        return f"{device}: stream completed, {format_size(ending.length)}"
    where = f"at {format_size(ending.offset)} of {format_size(ending.length)}"
    if ending.outcome is Outcome.CANCELLED:
        return f"{device}: stream cancelled {where}; the image is as it was, with what was copied"
    return f"{device}: stream failed {where}: {ending.error}"


def ending_object(device: str, ending: Ending) -> Message:
    """Say the same to a machine."""
    found: Message = {
        "device": device,
        "result": ending.outcome.value,
        "offset": ending.offset,
        "len": ending.length,
    }
    return found if ending.error is None else {**found, "error": ending.error}


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def progress_bar(device: str) -> Iterator[Callable[[StreamStatus], None]]:
    """Show a bar on the terminal; what is yielded moves it."""
    from rich.console import Console  # noqa: PLC0415  (slow to load, and only needed here)
    from rich.progress import BarColumn, Progress, TextColumn  # noqa: PLC0415

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(device, total=None, figures="")

        def show(status: StreamStatus) -> None:
            figures = stream_line(status).partition(": ")[2]
            progress.update(task, completed=status["offset"], total=status["len"], figures=figures)

        yield show


def device_lines(devices: Value, exports: Value, running: list[StreamStatus]) -> Iterator[str]:
    """Describe what the daemon has: a line a device with its chain, its stream, and the exports."""
    statuses = {status["device"]: status for status in running}
    for device in _objects(devices):
        inserted = device.get("inserted")
        assert isinstance(inserted, dict)
        image = inserted.get("image")
        files = " <- ".join(_chain(image))
        size = image.get("virtual-size") if isinstance(image, dict) else 0
        assert isinstance(size, int)
        mode = "read-only" if inserted.get("ro") else "writable"
        yield f"{device['device']}  {format_size(size)}  {mode}  {files}"
        if (status := statuses.get(str(device["device"]))) is not None:
            yield f"    stream {stream_line(status).partition(': ')[2]}"
    for export in _objects(exports):
        yield f"export {export['id']}  ({export['type']}, node {export['node-name']})"


def _chain(image: Value) -> Iterator[str]:
    while isinstance(image, dict):
        yield f"{image.get('filename')} ({image.get('format')})"
        image = image.get("backing-image")


def _objects(value: Value) -> Iterator[Message]:
    assert isinstance(value, list)
    for entry in value:
        assert isinstance(entry, dict)
        yield entry
