"""Following a stream to its end, without missing one that ends at once.

The events of a session start with its negotiation and come in order with its replies, so how a stream
ended is known from them alone; asking for the status is only for showing how far it is.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from enum import Enum
from typing import NamedTuple, TypedDict, cast

from blockd.cli.qmp_client import Message, QmpClient

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


async def streams(client: QmpClient, device: str | None = None) -> list[StreamStatus]:
    """Ask for the streams that run, on one device or all."""
    arguments: Message = {} if device is None else {"device": device}
    return cast(list[StreamStatus], await client.execute("block_stream_status", arguments))


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
        running = await streams(client, device)
        if running:
            is_started = True
            show(running[0])
            await client.wait_for_event(POLL_INTERVAL_S)
        elif is_started:
            return await _last_words(client, device)
        else:
            return find_ending(client.take_events(), device, None)
    return ending


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
    return ending


def _ending(is_cancelled: bool, data: Message) -> Ending:
    offset, length, error = data.get("offset"), data.get("len"), data.get("error")
    assert isinstance(offset, int) and isinstance(length, int)
    if is_cancelled:
        return Ending(Outcome.CANCELLED, offset, length)
    if error is not None:
        return Ending(Outcome.FAILED, offset, length, str(error))
    return Ending(Outcome.COMPLETED, offset, length)
