"""Throttle groups: limits that several disks share.

Every limit is a leaky bucket. A request pours its bytes, or one operation, into it; the bucket leaks at the
limit's rate, and while it holds more than its size, requests wait. The size is what the limit lets through
in a tenth of a second, or, where bursts are allowed, the burst rate for the burst's length; a second,
small bucket then keeps bursts at the burst rate.

Those who wait are let in one by one, reads and writes apart, the members of the group taking turns: the
first in line sleeps until there is room, then hands the lead on.

Source:   QEMU documentation, "throttle"; limits and texts are those of its throttle-group object.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Protocol

from blockd.errors import RequestError

RATES = ("bps-total", "bps-read", "bps-write", "iops-total", "iops-read", "iops-write")
RATE_MAX = 10**15
BURST_LENGTH_MAX = (1 << 32) - 1
# What passes at once without a burst rate, in seconds of the rate.
SLICE_S = 0.1
# Waiting for less costs more than it is worth; what is missed is made up for by the next request.
_PAUSE_MIN_S = 0.001

# All limits by name: a rate, its "-max" (burst rate) and "-max-length" (seconds), and "iops-size".
Limits = dict[str, int]

NO_LIMITS: Mapping[str, int] = {
    **{
        name: value
        for rate in RATES
        for name, value in ((rate, 0), (f"{rate}-max", 0), (f"{rate}-max-length", 1))
    },
    "iops-size": 0,
}


class Direction(IntEnum):
    """What a request does."""

    READ = 0
    WRITE = 1


class Member(Protocol):
    """A node whose requests are limited."""

    @property
    def is_released(self) -> bool:
        """Whether its requests pass, for it is being drained; they are counted all the same."""


def check_limits(limits: Limits) -> None:
    """Refuse limits that contradict each other.

    Raises:   RequestError: the first contradiction, in QEMU's words.
    """
    for rate in RATES:
        if not 0 <= limits[f"{rate}-max-length"] <= BURST_LENGTH_MAX:
            raise RequestError(f"{rate}-max-length value must be in the range [0, {BURST_LENGTH_MAX}]")
    for unit in ("bps", "iops"):
        for end in ("", "-max"):
            if limits[f"{unit}-total{end}"] and (limits[f"{unit}-read{end}"] or limits[f"{unit}-write{end}"]):
                raise RequestError(
                    "bps/iops/max total values and read/write values cannot be used at the same time"
                )
    if limits["iops-size"] and not any(limits[f"iops-{kind}"] for kind in ("total", "read", "write")):
        raise RequestError("iops size requires an iops value to be set")
    for rate in RATES:
        _check_rate(limits[rate], limits[f"{rate}-max"], limits[f"{rate}-max-length"])


def _check_rate(rate: int, burst_rate: int, burst_length: int) -> None:
    if not (0 <= rate <= RATE_MAX and 0 <= burst_rate <= RATE_MAX):
        raise RequestError(f"bps/iops/max values must be within [0, {RATE_MAX}]")
    if not burst_length:
        raise RequestError("the burst length cannot be 0")
    if burst_length > 1 and not burst_rate:
        raise RequestError("burst length set without burst rate")
    if burst_rate * burst_length > RATE_MAX:
        raise RequestError("burst length too high for this burst rate")
    if burst_rate and not rate:
        raise RequestError("bps_max/iops_max require corresponding bps/iops values")
    if burst_rate and burst_rate < rate:
        raise RequestError("bps_max/iops_max cannot be lower than bps/iops")


class _Bucket:
    """How much of one limit is used up."""

    __slots__ = ("_burst_level", "_burst_rate", "_burst_size", "_level", "_rate", "_size", "_updated")

    def __init__(self, rate: int, burst_rate: int, burst_length: int, now: float) -> None:
        self._rate = rate
        self._size = burst_rate * burst_length if burst_rate else rate * SLICE_S
        self._level = 0.0
        # 0: a burst of a single second needs no second bucket.
        self._burst_rate = burst_rate if burst_length > 1 else 0
        self._burst_size = burst_rate * SLICE_S
        self._burst_level = 0.0
        self._updated = now

    def wait_s(self, now: float) -> float:
        """How long until there is room; at most 0 when there is."""
        elapsed = now - self._updated
        self._updated = now
        self._level = max(0.0, self._level - self._rate * elapsed)
        wait = (self._level - self._size) / self._rate
        if self._burst_rate:
            self._burst_level = max(0.0, self._burst_level - self._burst_rate * elapsed)
            wait = max(wait, (self._burst_level - self._burst_size) / self._burst_rate)
        return wait

    def pour(self, amount: float) -> None:
        self._level += amount
        self._burst_level += amount


class _Line:
    """Who waits in one direction; `is_led` while somebody sleeps until there is room."""

    def __init__(self) -> None:
        self.is_led = False
        self._waiting: dict[Member, deque[asyncio.Future[bool]]] = {}

    async def lead(self, member: Member) -> bool:
        """Return True at one's turn to lead, False when released.

        Cancel:   safe; the lead is handed on if it came at the same moment.
        """
        if not self.is_led:
            self.is_led = True
            return True
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(member, deque()).append(turn)
        try:
            return await turn
        except asyncio.CancelledError:
            if not turn.cancelled() and turn.result():
                self.hand_on()
            raise

    def hand_on(self) -> None:
        """Let the next member lead with the first of its requests."""
        while self._waiting:
            member, turns = next(iter(self._waiting.items()))
            del self._waiting[member]
            turn = turns.popleft()
            if turns:
                self._waiting[member] = turns  # behind the other members
            if not turn.done():
                turn.set_result(True)
                return
        self.is_led = False

    def release(self, member: Member) -> None:
        for turn in self._waiting.pop(member, ()):
            if not turn.done():
                turn.set_result(False)


class ThrottleGroup:
    """One set of limits, and the members that share it."""

    def __init__(
        self, name: str, limits: Mapping[str, int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = name
        self.members: list[Member] = []
        self._clock = clock
        self._lines = [_Line() for _ in Direction]
        self._changed = asyncio.Event()
        self.limits: Limits = dict(NO_LIMITS)
        # By direction: the buckets a request pours into, and whether its bytes rather than one operation.
        self._buckets: list[list[tuple[_Bucket, bool]]]
        self.set_limits(limits)

    def set_limits(self, limits: Mapping[str, int]) -> None:
        """Change the limits that are given, from now on; all buckets are empty then.

        Raises:   RequestError: they contradict each other; nothing was changed.
        """
        changed = {**self.limits, **limits}
        check_limits(changed)
        self.limits = changed
        now = self._clock()
        buckets = {
            rate: _Bucket(changed[rate], changed[f"{rate}-max"], changed[f"{rate}-max-length"], now)
            for rate in RATES
            if changed[rate]
        }
        self._buckets = [
            [
                (bucket, rate.startswith("bps"))
                for rate, bucket in buckets.items()
                if rate.endswith(("total", direction.name.lower()))
            ]
            for direction in Direction
        ]
        self.wake()

    # -- requests -----------------------------------------------------------------------------

    def has_room(self, direction: Direction) -> bool:
        """Whether a request may pass now, nobody being before it."""
        return not self._lines[direction].is_led and self._wait_s(direction) <= 0

    def take(self, direction: Direction, length: int) -> None:
        """Count a request that passes."""
        size = self.limits["iops-size"]
        operations = max(1.0, length / size) if size else 1.0
        for bucket, counts_bytes in self._buckets[direction]:
            bucket.pour(length if counts_bytes else operations)

    async def admit(self, member: Member, direction: Direction, length: int) -> None:
        """Return when a request may pass; it is counted then.

        Cancel:   safe; it is not counted.
        """
        if not member.is_released and not self.has_room(direction):
            await self._wait(member, direction)
        self.take(direction, length)

    async def _wait(self, member: Member, direction: Direction) -> None:
        line = self._lines[direction]
        if not await line.lead(member):
            return
        try:
            while not member.is_released and (wait_s := self._wait_s(direction)) > 0:
                await self._pause(max(wait_s, _PAUSE_MIN_S))
        finally:
            line.hand_on()

    def _wait_s(self, direction: Direction) -> float:
        buckets = self._buckets[direction]
        if not buckets:
            return 0.0
        now = self._clock()
        return max(bucket.wait_s(now) for bucket, _ in buckets)

    async def _pause(self, wait_s: float) -> None:
        try:
            async with asyncio.timeout(wait_s):
                await self._changed.wait()
        except TimeoutError:
            pass

    # -- members ------------------------------------------------------------------------------

    def release(self, member: Member) -> None:
        """Let all requests of a member pass that wait now."""
        for line in self._lines:
            line.release(member)
        self.wake()

    def wake(self) -> None:
        """Let the first in line look again."""
        self._changed.set()
        self._changed = asyncio.Event()
