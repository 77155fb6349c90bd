"""What blockctl shows: a line for each thing, a progress bar on a terminal, JSON for machines."""

import asyncio
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

from blockd.cli.following import Active, Ending, Outcome, StreamStatus, is_over
from blockd.cli.qmp_client import Message
from blockd.cli.standard_streams import write_out
from blockd.errors import printable
from blockd.units import format_size
from blockd.wire.qmp import Value

# What takes longer shows that it goes on.
PATIENCE_S = 1.0


def print_json(value: object) -> None:
    """Print a value on one line, at once even into a pipe."""
    write_out(json.dumps(value) + "\n")


def print_text(line: str) -> None:
    """Print a line for people; names in it cannot garble the terminal."""
    write_out(printable(line) + "\n")


def print_lines(lines: Iterable[str]) -> None:
    """Print many lines at once, each as `print_text` does."""
    write_out("".join(f"{printable(line)}\n" for line in lines))


def print_error(line: str) -> None:
    print(f"blockctl: {printable(line)}", file=sys.stderr, flush=True)


def stream_line(status: StreamStatus) -> str:
    """Say how far a stream is, or what it has left staged."""
    staged = format_size(status.get("staged", 0)) + " of guest writes are staged"
    error = status.get("staged-error")
    if is_over(status):
        return (
            f"{status['device']}: ended; {staged} until they can be merged: {error or 'the source is slow'}"
        )
    percent = 100 * status["offset"] // (status["len"] or 1)
    is_paused = status["status"] == "paused"
    io_status = status.get("io-status", "ok")
    why = f" ({_PAUSES.get(io_status, io_status)})" if io_status != "ok" else ""
    parts = [
        f"{status['device']}: {status['status']}{why}, {percent}%, "
        f"{format_size(status['offset'])} of {format_size(status['len'])}"
    ]
    if status.get("rate") and not is_paused:
        parts.append(f"{format_size(status['rate'])}/s")
    if "seconds-left" in status and not is_paused:
        parts.append(f"{_duration(status['seconds-left'])} left")
    if is_paused:
        parts.append(f"goes on with: blockctl resume {status['device']}")
    if error is not None:
        parts.append(f"{staged}: {error}")
    return ", ".join(parts)


_PAUSES = {"nospace": "no space left", "failed": "an I/O error"}


def image_line(active: Active) -> str:
    """Say what the active image of a disk needs."""
    if active.backing is None:
        return f"{active.filename} needs no backing file"
    return f"{active.filename} has the backing file {active.backing}"


def ending_line(device: str, ending: Ending, active: Active | None = None) -> str:
    """Say how a stream ended; `active`: what the disk is on by now, where that is known."""
    if ending.outcome is Outcome.COMPLETED:
        copied = "" if ending.copied is None else f", {format_size(ending.copied)} copied"
        return f"{device}: stream completed{copied}" + (f"; {image_line(active)}" if active else "")
    where = f"at {format_size(ending.offset)} of {format_size(ending.length)}"
    if ending.outcome is Outcome.CANCELLED:
        return f"{device}: stream cancelled {where}; the image keeps its backing file and what was copied"
    return f"{device}: stream failed {where}: {ending.error}"


def ending_object(device: str, ending: Ending) -> Message:
    """Say the same to a machine."""
    found: Message = {
        "device": device,
        "result": ending.outcome.value,
        "offset": ending.offset,
        "len": ending.length,
    }
    if ending.copied is not None:
        found["copied"] = ending.copied
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


@contextmanager
def late_bar(name: str, *, is_shown: bool) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on the terminal once something has taken `PATIENCE_S`.

    What is yielded takes how much is done, and of how much; until it is called the bar moves to and fro.
    """
    done, moves = (0, 0), list[Callable[[int, int], None]]()

    def show() -> None:
        moves.append(stack.enter_context(_plain_bar(name)))
        move(*done)

    def move(count: int, total: int) -> None:
        nonlocal done
        done = (count, total)
        for move_bar in moves:
            move_bar(count, total)

    with ExitStack() as stack:
        if is_shown and sys.stderr.isatty():
            stack.callback(asyncio.get_running_loop().call_later(PATIENCE_S, show).cancel)
        yield move


@contextmanager
def _plain_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console  # noqa: PLC0415  (slow to load, and only needed here)
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False)
    with bar as progress:
        task = progress.add_task(name, total=None)
        yield lambda count, total: progress.update(task, completed=count, total=total or None)


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


def trouble_lines(left_out: Value, lost: Value) -> Iterator[str]:
    """Describe what a restart could not bring back, and which disks have lost what guests wrote."""
    for things in _by_root(list(_objects(left_out))):
        by_use = sorted(things, key=lambda thing: thing["type"] == "node")  # names of nodes say little
        names = ", ".join(f"{thing['type']} '{thing['name']}'" for thing in by_use)
        yield f"left out: {names}: {things[0]['reason']}"
    for loss in _objects(lost):
        name = loss["device"] or loss["node-name"]
        kind = "device" if loss["device"] else "node"
        yield (
            f"lost writes: {kind} '{name}': {loss['error']}; the first flush of each connection fails until "
            f"'blockctl acknowledge {name}'"
        )


def _by_root(things: list[Message]) -> list[list[Message]]:
    """What is left out, grouped by what went wrong; that comes first in its group."""
    nodes = {thing["name"]: index for index, thing in enumerate(things) if thing["type"] == "node"}
    groups: dict[int, list[Message]] = {}
    for index, thing in enumerate(things):
        root = index
        while (cause := things[root].get("cause")) in nodes:
            root = nodes[cause]
        groups.setdefault(root, []).append(thing)
    return list(groups.values())


def _chain(image: Value) -> Iterator[str]:
    while isinstance(image, dict):
        yield f"{image.get('filename')} ({image.get('format')})"
        image = image.get("backing-image")


def _objects(value: Value) -> Iterator[Message]:
    assert isinstance(value, list)
    for entry in value:
        assert isinstance(entry, dict)
        yield entry
