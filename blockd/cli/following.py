"""Following a stream to its end, without missing one that ends at once.

The events of a session start with its negotiation and come in order with its replies, so how a stream
ended is known from them alone; asking for the status is only for showing how far it is.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from enum import Enum
from typing import NamedTuple, TypedDict, cast

from blockd.cli.qmp_client import CommandFailed, Message, NoConnection, QmpClient

POLL_INTERVAL_S = 0.25
LAST_WORDS_TIMEOUT_S = 5.0

# Members of block_stream_status.
StreamStatus = TypedDict(
    "StreamStatus",
    {
        "device": str,
        "len": int,
        "offset": int,
        "speed": int,
        "status": str,
        "io-status": str,
        "copied": int,
        "rate": int,
        "seconds-left": float,
        "staged": int,
        "staged-error": str,
    },
    total=False,
)


class Outcome(Enum):
    """How a stream ended."""

    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Ending(NamedTuple):
    """How a stream ended, and how far it had come."""

    outcome: Outcome
    offset: int
    length: int
    error: str | None = None
    copied: int | None = None


class Active(NamedTuple):
    """The active image of a disk, and the backing file that it needs."""

    filename: str
    backing: str | None


async def streams(client: QmpClient, device: str | None = None) -> list[StreamStatus]:
    """Ask for the streams that run, on one device or all."""
    arguments: Message = {} if device is None else {"device": device}
    return cast(list[StreamStatus], await client.execute("block_stream_status", arguments))


def is_over(status: StreamStatus) -> bool:
    """Whether a stream is listed only for what guests wrote and what it has left to be merged."""
    return status["status"] == "concluded" and status.get("staged", 0) > 0


async def follow(
    client: QmpClient, device: str, show: Callable[[StreamStatus], None], *, is_started: bool = True
) -> Ending | None:
    """Wait until the stream of a device ends, showing how far it is.

    Returns None when none is running and we have not started one (`is_started`).

    Raises:   CommandFailed: no such device. NoConnection: the daemon is gone.
    Cancel:   the stream goes on.
    """
    ending = None
    while (ending := find_ending(client.take_events(), device, ending)) is None:
        running = [status for status in await streams(client, device) if not is_over(status)]
        if running:
            is_started = True
            show(running[0])
            await client.wait_for_event(POLL_INTERVAL_S)
        elif is_started:
            return await _last_words(client, device)
        else:
            return find_ending(client.take_events(), device, None)
    return ending


async def completed(client: QmpClient, device: str, ending: Ending) -> tuple[Ending, Active | None]:
    """Add how much a completed stream copied, and tell what the disk is on; None: not known.

    The event that tells how much follows the one that tells the end, and comes before this reply.
    """
    try:
        active = await active_image(client, device)
    except (CommandFailed, NoConnection):  # how the stream ended is known all the same
        active = None
    return find_ending(client.take_events(), device, ending) or ending, active


async def active_image(client: QmpClient, device: str) -> Active | None:
    """Ask what a disk is on; None: there is no such disk."""
    disks = await client.execute("query-block")
    for disk in disks if isinstance(disks, list) else ():
        assert isinstance(disk, dict)
        inserted = disk.get("inserted")
        image = inserted.get("image") if isinstance(inserted, dict) else None
        if disk.get("device") == device and isinstance(image, dict):
            return _active(image)
    return None


def _active(image: Message) -> Active:
    """The active image of a chain, below filters: what they say of a file is what it says itself."""
    filename, backing = image.get("filename"), image.get("backing-image")
    while isinstance(backing, dict):
        if backing.get("filename") != filename:
            return Active(str(filename), str(backing.get("filename")))
        backing = backing.get("backing-image")
    return Active(str(filename), None)


async def _last_words(client: QmpClient, device: str) -> Ending:
    """Wait for how a stream ended that is listed no more: its events may come a moment later."""
    ending = None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LAST_WORDS_TIMEOUT_S):
            while (ending := find_ending(client.take_events(), device, ending)) is None:
                await client.wait_for_event(LAST_WORDS_TIMEOUT_S)
    return ending or Ending(Outcome.FAILED, 0, 0, "it ended, and how was not told")


def find_ending(events: Iterable[Message], device: str, ending: Ending | None) -> Ending | None:
    """Find how the last stream of a device ended, if it did; `ending` is what was known before."""
    for event in events:
        data = event.get("data")
        if not isinstance(data, dict):
            continue
        name, job_id = event.get("event"), data.get("device", data.get("id"))
        if job_id != device:
            continue
        if name == "JOB_STATUS_CHANGE" and data.get("status") == "created":
            ending = None  # what came before was an earlier one
        elif name in ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED"):
            ending = _ending(name == "BLOCK_JOB_CANCELLED", data)
        elif name == "BLOCK_STREAM_COMPLETED" and ending is not None:
            copied = data.get("copied")
            ending = ending._replace(copied=copied if isinstance(copied, int) else None)
    return ending


def _ending(is_cancelled: bool, data: Message) -> Ending:
    offset, length, error = data.get("offset"), data.get("len"), data.get("x-detail", data.get("error"))
    assert isinstance(offset, int) and isinstance(length, int)
    if is_cancelled:
        return Ending(Outcome.CANCELLED, offset, length)
    if error is not None:
        return Ending(Outcome.FAILED, offset, length, str(error))
    return Ending(Outcome.COMPLETED, offset, length)
